"""How a plan is carried out: the source opened, shards made by a runner, receipts recorded, all published at once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import SideFile
from nemotron_fp8.conversion.in_place import InPlaceFolder, finished_inventory
from nemotron_fp8.conversion.progress import ConversionProgress
from nemotron_fp8.conversion.report import Outcome, report_of
from nemotron_fp8.conversion.workers.base import Job, Local
from nemotron_fp8.destinations.comparison import ComparingDestination, DifferentError
from nemotron_fp8.destinations.folder import (
    FolderDestination,
    discard_leftover,
    is_occupied,
    published_receipts,
    refuse_overlap,
)
from nemotron_fp8.destinations.run_identity import RunIdentity, plan_digest
from nemotron_fp8.documents.manifest import has_digests
from nemotron_fp8.documents.model_card import render_card
from nemotron_fp8.documents.render import planned_sizes, with_manifest
from nemotron_fp8.engines.cuda.memory_plan import ring_plan
from nemotron_fp8.engines.devices import EngineSpec, open_engine
from nemotron_fp8.errors import DestinationExistsError, RecipeError, UnsteadyReadError
from nemotron_fp8.hub.options import HubOptions
from nemotron_fp8.planning.layouts import quantized_dtypes
from nemotron_fp8.planning.plan import Plan
from nemotron_fp8.planning.receipt import disagreeing
from nemotron_fp8.progress import TransferTracker
from nemotron_fp8.sources.base import NoPrefetch
from nemotron_fp8.sources.open import open_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.conversion.workers.base import Runner
    from nemotron_fp8.destinations.base import Destination
    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.progress import Progress
    from nemotron_fp8.sources.base import Prefetcher, PrefetcherFactory, Source
    from nemotron_fp8.sources.files import Opener


logger = logging.getLogger("nemotron_fp8")
"""What a program that uses this library can listen to; nothing is ever printed."""
logger.addHandler(logging.NullHandler())  # or Python itself would print warnings


MAX_ATTEMPTS = 3
"""How often shards that disagree about a shared scale are made before it is an error."""
Planner = Callable[["Inventory", int, int], Plan]
"""Makes a plan from an inventory, a byte budget and a number of threads."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What every way of converting takes, and the ways.

    Attributes:
        planner: decides what is done to every tensor.
        devices: one for each worker.
        spec: the engine of the first worker; the others differ in the device alone.
        progress: called with how far the conversion is.
        threads: of all workers together.
        digests: whether receipts and manifest carry SHA-256 digests.
        restart: whether to discard what an unfinished run has left.
        elsewhere: makes what carries out the shards on other machines; None to do so here.
        hub: how to read from the Hub and how to write to it.
    """

    planner: Planner
    devices: tuple[str, ...]
    spec: EngineSpec
    progress: Callable[[Progress], None] | None
    threads: int
    digests: bool
    restart: bool
    hub: HubOptions = field(default_factory=HubOptions)
    elsewhere: Callable[[ConversionProgress, PrefetcherFactory | None, TransferTracker], Runner] | None = None
    transfers: TransferTracker = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "transfers", TransferTracker(self.progress))

    def convert(
        self,
        source: str | os.PathLike[str],
        destination: str | os.PathLike[str],
        overwrite: bool,
        shard_size: str | int | None = None,
    ) -> Outcome:
        """Convert a source into a folder or into a repository on the Hub.

        Raises:
            AddressError: the destination is meant as an address and is none, or cannot be written to.
        """
        from nemotron_fp8.hub.address import parse_target

        target = os.fspath(destination)
        address = parse_target(target)
        if address is not None:
            self.hub.require_token(address.repo)
            return self.into_hub(open_source(source, shard_size, self.hub), address, overwrite)
        if self.hub.private or self.hub.pull_request:
            raise RecipeError("a private repository or a pull request is for a destination on the Hub (hf://)")
        return self.into_folder(open_source(source, shard_size, self.hub), Path(os.path.realpath(target)), overwrite)

    def prepare(self, source: Source, mode: str) -> tuple[Plan, ConversionProgress, RunIdentity]:
        """The plan, what counts its progress, and what a later run must agree with."""
        plan = self.planner(source.inventory, self.spec.host_bytes, self.spec.threads)
        if self.devices[0] != "cpu":
            # Refused here, not at the shard that it fails at. What is free on a device only its worker knows.
            ring_plan(plan.shard_tasks, self.spec.host_bytes, self.spec.device_bytes or sys.maxsize, self.spec.threads)
        # A later commit of the source with the same files in it is no other job.
        lasting = replace(plan, inventory=replace(plan.inventory, commit=None))
        terms = RunIdentity(plan_digest(lasting), plan.asked, source.stamps, mode)
        sizes = f"{plan.bytes_in:,} bytes become {plan.bytes_out:,}"
        logger.info(
            "%s: %d shards, %d tensors, %s", plan.inventory.source, len(plan.shard_tasks), len(plan.tensors), sizes
        )
        tally = ConversionProgress(plan, self.transfers.update if self.progress else None)
        self.transfers.begin(tally.state())
        return plan, tally, terms

    def supply(self, source: Source, largest_output: int = 0) -> Prefetcher:
        """What has the source's bytes at hand; ``largest_output``: of the shards that go through its disk."""
        if source.supplier is None:
            return NoPrefetch()
        supply = source.supplier.supply(largest_output, len(self.devices), self.transfers)
        if self.elsewhere is None:
            return supply
        from nemotron_fp8.sources.hub_prefetch import WorkerFetch

        return WorkerFetch(supply)

    def runner(self, tally: ConversionProgress, source: Source) -> Runner:
        """What carries out the shards: this process for one device, a process each for several, or a cluster."""
        if self.elsewhere is not None:
            return self.elsewhere(tally, source.supplier, self.transfers)
        if len(self.devices) == 1:
            return Local(self.spec, tally.add)
        from nemotron_fp8.conversion.workers.processes import Processes

        return Processes([replace(self.spec, device=device) for device in self.devices], tally.add)

    def into_folder(self, opened: Source, target: Path, overwrite: bool) -> Outcome:
        """Convert into another folder."""
        if opened.root is not None:
            refuse_overlap(opened.root, target)
        plan, tally, terms = self.prepare(opened, "folder")
        runner = self.runner(tally, opened)
        if is_occupied(target) and target.is_dir():
            taken = published_receipts(target, terms, self.threads)
            if taken is not None:
                return report_of(plan, target, taken, 0, len(taken))
            there = ComparingDestination(target, has_digests(target), plan.recipe.nonfinite == "keep")
            try:
                receipts = carry_out(plan, opened.opener, there, runner, tally, there.digests, self.supply(opened))
                discard_leftover(target, terms)
                return report_of(plan, target, receipts, 0)
            except DifferentError:
                if not overwrite:
                    raise DestinationExistsError(str(target), "holds files already, and not this result") from None
            tally.restart()
        destination = FolderDestination(
            target,
            opened.root,
            terms,
            planned_sizes(plan),
            overwrite=overwrite,
            restart=self.restart,
            digests=self.digests,
            threads=self.threads,
        )
        with destination as folder:
            resumed = len(folder.finished())
            receipts = carry_out(plan, opened.opener, folder, runner, tally, self.digests, self.supply(opened))
            return report_of(plan, target, receipts, folder.bytes_published, resumed)

    def into_hub(self, opened: Source, target: Address, overwrite: bool) -> Outcome:
        """Convert into a repository on the Hub."""
        from nemotron_fp8.destinations.hub.destination import HubDestination, job_options

        plan, tally, terms = self.prepare(opened, "hub")
        label = opened.label or plan.inventory.source
        options = job_options(target, terms, label, self.hub, overwrite, self.restart)
        outputs = [shard_task.layout.file_size for shard_task in plan.shard_tasks]
        elsewhere = self.elsewhere is not None
        # The supply checks the disk for both where it fetches something, and again for what is left of a job.
        room = first_room = 0
        if opened.supplier is None:
            room = 0 if elsewhere else 2 * max(outputs)
        elif not elsewhere:
            first_room = opened.supplier.room(plan.shard_tasks, max(outputs), len(self.devices))
        card = render_card(plan, {}, plan.bytes_out)
        with HubDestination(
            self.hub.client(),
            options,
            self.hub.folder(),
            self.transfers,
            room,
            elsewhere,
            first_room=first_room,
            card=card,
        ) as there:
            if there.published is not None:
                return report_of(plan, str(there.published), {}, 0, len(plan.shard_tasks))
            resumed = len(there.finished())
            supply = self.supply(opened, max(outputs))
            receipts = carry_out(plan, opened.opener, there, self.runner(tally, opened), tally, self.digests, supply)
            return report_of(plan, str(there.published), receipts, there.bytes_published, resumed)

    def in_place(self, root: Path, recipe: Recipe) -> Outcome:
        """Convert a folder in place."""
        done = finished_inventory(root, recipe)
        if done is not None:
            quantized = sum(view.dtype in quantized_dtypes() for view in done.views)
            unquantized = len(done.views) - 2 * quantized  # every FP8 tensor has a scale beside it
            return Outcome(root, done, {}, quantized, unquantized, (), 0, 0)
        with InPlaceFolder(root, restart=self.restart) as folder:
            opened = folder.open()
            plan, tally, terms = self.prepare(opened, "in-place")
            folder.agree(plan, opened, terms)
            resumed = len(folder.finished())

            shard = ""

            def started(shard_task: ShardTask, finished: bool) -> None:
                nonlocal shard
                shard = shard_task.name
                if finished:
                    tally.skip(shard_task)

            # One device: the originals go one by one, and each must be replaced before the next is touched.
            with open_engine(self.spec, lambda count: tally.add(shard, count)) as engine:
                folder.convert(plan, opened, engine, started, lambda count: tally.add(shard, count))
            receipts = folder.finished()
            sizes = folder.side_sizes(side.name for side in plan.inventory.side_files)
            copies = {name: _pieces(opened.opener, SideFile(name, size)) for name, size in sizes.items()}
            documents = with_manifest(plan, receipts, copies, self.digests)
            written = sum(r.size for r in receipts.values()) + sum(map(len, documents.values()))
            folder.publish(receipts, documents, copies)
            return report_of(plan, folder.root, receipts, written, resumed)


def carry_out(
    plan: Plan,
    opener: Opener,
    destination: Destination,
    runner: Runner,
    tally: ConversionProgress,
    digests: bool,
    supply: Prefetcher | None = None,
) -> dict[str, ShardReceipt]:
    """Carry out every unit that is not finished yet, record the receipts in one place, publish once.

    Shards that share a scale group must have found the same in it; those that did not are made again.

    Raises:
        UnsteadyReadError: they never do.
    """
    found = dict(destination.finished())
    odd = disagreeing(found)
    with supply or NoPrefetch() as at_hand:
        for shard_task in plan.shard_tasks:
            if shard_task.name in found and shard_task.name not in odd:
                tally.skip(shard_task)
        for attempt in range(MAX_ATTEMPTS + 1):
            left = [
                shard_task for shard_task in plan.shard_tasks if shard_task.name not in found or shard_task.name in odd
            ]
            if not left:
                break
            if attempt == MAX_ATTEMPTS:
                raise UnsteadyReadError(*next(iter(odd.items())), attempt)
            make_all(left, found, opener, destination, runner, at_hand, tally)
            if odd := disagreeing(found):
                destination.wait()
        # In the order of the plan, whatever order they were done in.
        receipts = {shard_task.name: found[shard_task.name] for shard_task in plan.shard_tasks}
        copies = {file.name: _pieces(opener, file) for file in plan.inventory.side_files}
        destination.publish(receipts, with_manifest(plan, receipts, copies, digests), copies)
    return receipts


def make_all(
    left: Sequence[ShardTask],
    found: dict[str, ShardReceipt],
    opener: Opener,
    destination: Destination,
    runner: Runner,
    supply: Prefetcher,
    tally: ConversionProgress,
) -> None:
    """Make units as their input comes to hand, and record their receipts in ``found`` too."""
    staging = destination.staging
    shard_tasks = supply.shard_tasks(left)
    jobs: Iterable[Job] = (Job(shard_task, opener, staging) for shard_task in shard_tasks)
    if isinstance(shard_tasks, Sequence):
        jobs = list(jobs)
    with closing(runner.run(jobs)) as receipts_as_done:
        for receipt in receipts_as_done:
            destination.record(receipt)
            found[receipt.name] = receipt
            supply.done(receipt.name)
            tally.finish(receipt.name)
            logger.info("%s: made, %d bytes", receipt.name, receipt.size)


def _pieces(opener: Opener, side: SideFile, step: int = 1 << 20) -> Callable[[], Iterator[bytes]]:
    """A function that gives the bytes of a source file, a piece at a time."""

    def pieces() -> Iterator[bytes]:
        file = opener.open(side.file or side.name)
        for done in range(0, side.size, step):
            buffer = bytearray(min(step, side.size - done))
            file.read_into(side.offset + done, memoryview(buffer))
            yield bytes(buffer)
        file.close()

    return pieces
