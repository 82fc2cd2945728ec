"""Interface of a worker pool: jobs in, receipts out."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from nemotron_fp8.errors.store_results import UploadBrokenError
from nemotron_fp8.sources.base import NoPrefetch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from nemotron_fp8.conversion.progress import ConversionProgress
    from nemotron_fp8.destinations.base import Staging
    from nemotron_fp8.engines.devices import EngineSpec
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.sources.base import Prefetcher
    from nemotron_fp8.sources.files import Opener


logger = logging.getLogger("nemotron_fp8")


@dataclass(frozen=True, slots=True)
class Job:
    """One shard to make, with everything that a worker needs, on whichever machine. Picklable.

    Attributes:
        shard_task: task of the shard.
        opener: opens the files of the source.
        staging: place where the shard is staged.
        prefetcher: fetches the files of the source to the worker's machine; `NoPrefetch` for local files.
    """

    shard_task: ShardTask
    opener: Opener
    staging: Staging
    prefetcher: Prefetcher = field(default_factory=NoPrefetch)

    @property
    def nbytes(self) -> int:
        """Input bytes that the job reads at least once."""
        own = {tensor_task.view.name for tensor_task in self.shard_task.tensor_tasks}
        foreign = (m for group in self.shard_task.groups for m in group.members if m.name not in own)
        return sum(tensor_task.view.nbytes for tensor_task in self.shard_task.tensor_tasks) + sum(
            m.nbytes for m in foreign
        )


class WorkerPool(Protocol):
    """Workers that make shards.

    Attributes:
        spec: engine of one worker; all workers have the same budget.
        count: shards that workers of this machine make at the same time.
        shares_disk: True if the workers read and write the disks of this machine.
    """

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def count(self) -> int: ...

    @property
    def shares_disk(self) -> bool: ...

    def run(self, jobs: Iterable[Job], progress: ConversionProgress) -> Generator[ShardReceipt, None, None]:
        """Run jobs and yield their receipts as they finish, in any order.

        The first failure stops all jobs and is raised here. Closing the generator early stops them too. Once the
        generator is closed, no thread and no process of the pool is running.

        Args:
            jobs: jobs, all at once if they are a sequence.
            progress: counts the bytes that are processed.

        Raises:
            NemotronFp8Error: a job failed.
            WorkerDiedError: a worker process ended without a message.
        """


class InProcess:
    """One worker in this process: jobs run one after another, and receipts come in their order.

    Args:
        spec: engine of the worker.
    """

    count = 1
    shares_disk = True

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def run(self, jobs: Iterable[Job], progress: ConversionProgress) -> Generator[ShardReceipt, None, None]:
        yield from run_jobs(self.spec, jobs, progress.add)


def run_jobs(spec: EngineSpec, jobs: Iterable[Job], advance: Callable[[str, int], None]) -> Iterator[ShardReceipt]:
    """Open the engine of ``spec``, run jobs with it in order, and close the engine.

    Args:
        spec: the engine.
        jobs: the jobs.
        advance: called with the name of a shard and the input bytes that were processed, from any thread.

    Raises:
        UploadBrokenError: every attempt to upload a shard while it is made has broken.
    """
    from nemotron_fp8.conversion.shard import make_shard
    from nemotron_fp8.engines.devices import open_engine

    shard = ""

    def count(nbytes: int) -> None:
        advance(shard, nbytes)

    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(spec, count))
        for job in jobs:
            shard = job.shard_task.name
            for wait in (*job.staging.upload_waits, None):
                try:
                    receipt = make_shard(job.shard_task, job.opener, job.staging, engine, count)
                    break
                except UploadBrokenError as error:
                    if wait is None:
                        raise
                    logger.warning("%s; the shard is made again in %.0f s", error, wait)
                # A new engine: the exception has interrupted the other one.
                stack.close()
                time.sleep(wait)
                engine = stack.enter_context(open_engine(spec, count))
            yield receipt
