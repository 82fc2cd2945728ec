"""Run a conversion: make every shard of a plan with workers, publish the result, and report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from nemotron_fp8._utils import format_bytes
from nemotron_fp8.conversion.progress import ConversionProgress
from nemotron_fp8.conversion.report import report_of
from nemotron_fp8.conversion.workers.base import Job
from nemotron_fp8.destinations.comparison import DifferentError
from nemotron_fp8.destinations.run_identity import run_identity
from nemotron_fp8.documents.render import with_manifest
from nemotron_fp8.engines.devices import check_engine
from nemotron_fp8.errors import UnsteadyReadError
from nemotron_fp8.events import emit
from nemotron_fp8.planning.receipt import disagreeing
from nemotron_fp8.sources.base import NoPrefetch
from nemotron_fp8.sources.files import side_file_pieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.conversion.report import Report
    from nemotron_fp8.conversion.workers.base import WorkerPool
    from nemotron_fp8.destinations.base import Destination, OpenDestination, RunOptions
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.sources.base import Prefetch, Source


MAX_ATTEMPTS = 3
"""Maximum attempts at shards that disagree about a shared scale."""


def convert(source: Source, destination: Destination, plan: Plan, workers: WorkerPool, options: RunOptions) -> Report:
    """Convert a source into a folder or a repository.

    Args:
        source: the checkpoint to convert.
        destination: the folder or repository of the result.
        plan: plan of the conversion, for the budget of one worker.
        workers: workers that make the shards.
        options: options of the conversion.

    Raises:
        SourceError, DestinationError, HubError, WorkerDiedError, ClusterError: the subclass names the cause.
        RecipeError: no kernel computes the number format of the layout.
        BudgetError: the buffers of a device do not fit the budget.
    """
    destination.check_source(source)
    check_engine(workers.spec, plan.shard_tasks)
    identity = run_identity(plan, source.stamps, destination.mode)
    progress = ConversionProgress(plan.shard_tasks, options.progress)
    sizes = f"{format_bytes(plan.bytes_in)} become {format_bytes(plan.bytes_out)}"
    shards, tensors = len(plan.shard_tasks), len(plan.tensors)
    emit(
        "run.planned",
        f"{source.label}: {shards} shards, {tensors} tensors, {sizes}",
        shards=shards,
        tensors=tensors,
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
    )

    existing = destination.existing(plan, identity)
    if existing is not None:
        with suppress(DifferentError), existing:
            return write_result(existing, source, plan, workers, progress, options)
        progress.restart()
    opened = destination.open(
        plan, identity, source, progress.transfers, workers=workers.count, shares_disk=workers.shares_disk
    )
    with opened:
        return write_result(opened, source, plan, workers, progress, options)


def write_result(
    destination: OpenDestination,
    source: Source,
    plan: Plan,
    workers: WorkerPool,
    progress: ConversionProgress,
    options: RunOptions,
) -> Report:
    """Make the shards that no earlier run has finished, and publish the result."""
    receipts = dict(destination.finished())
    resumed = len(receipts)
    if destination.complete:
        return report_of(plan, destination.label, receipts, 0, len(plan.shard_tasks), options.started)
    largest = max(shard_task.layout.file_size for shard_task in plan.shard_tasks)
    with source.prefetcher.start(
        progress.transfers,
        workers.count,
        largest if destination.staging.uses_cache else 0,
        whole_shards=workers.shares_disk,
    ) as prefetch:
        left = unfinished(plan, receipts)
        missing = {shard_task.name for shard_task in left}
        for shard_task in plan.shard_tasks:
            if shard_task.name not in missing:
                progress.skip(shard_task.name)
        for _ in range(MAX_ATTEMPTS):
            if left:
                make_shards(left, receipts, source, destination, workers, prefetch, progress)
                left = unfinished(plan, receipts)  # includes shards that disagree about a shared scale
        if left:
            raise UnsteadyReadError(left[0].name, disagreeing(receipts)[left[0].name], MAX_ATTEMPTS)
        receipts = {shard_task.name: receipts[shard_task.name] for shard_task in plan.shard_tasks}
        copies = {side.name: side_file_pieces(source.opener, side) for side in plan.inventory.side_files}
        destination.publish(receipts, with_manifest(plan, receipts, copies, destination.digests), copies)
    return report_of(plan, destination.label, receipts, destination.bytes_published, resumed, options.started)


def unfinished(plan: Plan, receipts: Mapping[str, ShardReceipt]) -> list[ShardTask]:
    """Return the tasks without a receipt, and those whose receipts disagree about a shared scale."""
    unsteady = disagreeing(receipts)
    return [task for task in plan.shard_tasks if task.name not in receipts or task.name in unsteady]


def make_shards(
    left: Sequence[ShardTask],
    receipts: dict[str, ShardReceipt],
    source: Source,
    destination: OpenDestination,
    workers: WorkerPool,
    prefetch: Prefetch,
    progress: ConversionProgress,
) -> None:
    """Make shards as their input arrives, and add their receipts to ``receipts``."""
    staging = destination.staging
    fetch = NoPrefetch() if workers.shares_disk else source.prefetcher.for_workers()
    shard_tasks = prefetch.shard_tasks(left)
    jobs: Iterable[Job] = (Job(shard_task, source.opener, staging, fetch) for shard_task in shard_tasks)
    if isinstance(shard_tasks, Sequence):
        jobs = list(jobs)
    with closing(workers.run(jobs, progress)) as receipts_as_done:
        for receipt in receipts_as_done:
            destination.record(receipt)
            receipts[receipt.name] = receipt
            prefetch.done(receipt.name)
            progress.finish(receipt.name, receipt.size)
    destination.wait()
