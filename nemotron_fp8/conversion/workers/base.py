"""The seam between a plan and whoever carries it out: jobs in, receipts out.

A job is all that a worker needs, wherever it runs: one unit, how to open the source, how to reach the place
where shards are staged. A runner takes jobs and gives receipts; what is published, and when, is not its
business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from nemotron_fp8.destinations.base import Staging
    from nemotron_fp8.engines.devices import EngineSpec
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.sources.files import Opener


@dataclass(frozen=True, slots=True)
class Job:
    """One shard to make. Picklable.

    Attributes:
        unit: what to make.
        opener: opens the source's files.
        staging: where the shard is staged.
    """

    shard_task: ShardTask
    opener: Opener
    staging: Staging

    @property
    def nbytes(self) -> int:
        """Input bytes that the job reads at least once."""
        own = {work.view.name for work in self.shard_task.tensor_tasks}
        foreign = (m for group in self.shard_task.groups for m in group.members if m.name not in own)
        return sum(work.view.nbytes for work in self.shard_task.tensor_tasks) + sum(m.nbytes for m in foreign)


class Runner(Protocol):
    """Carries out jobs."""

    def run(self, jobs: Iterable[Job]) -> Generator[ShardReceipt, None, None]:
        """Carry out jobs and yield their receipts as they are done, in any order.

        The first failure stops all jobs and is raised here. Closing the generator early stops them too; when
        it is closed, no thread and no process is left at work.

        Raises:
            NemotronFp8Error: what a job raised.
            WorkerDiedError: a worker process ended without a word.
        """


class Local:
    """Carries out jobs one after another in this process.

    Args:
        spec: the engine.
        advance: called with a shard's name and input bytes of it that are worked on, from any thread.
    """

    def __init__(self, spec: EngineSpec, advance: Callable[[str, int], None] | None = None) -> None:
        self._spec = spec
        self._advance = advance or (lambda _, __: None)

    def run(self, jobs: Iterable[Job]) -> Generator[ShardReceipt, None, None]:
        """See `Runner.run`; receipts come in the order of the jobs."""
        yield from carry_out(self._spec, jobs, self._advance)


def carry_out(spec: EngineSpec, jobs: Iterable[Job], advance: Callable[[str, int], None]) -> Iterator[ShardReceipt]:
    """Open the engine that ``spec`` describes, carry out jobs with it in order, close it."""
    from nemotron_fp8.conversion.shard import execute
    from nemotron_fp8.engines.devices import open_engine

    shard = ""

    def count(nbytes: int) -> None:
        advance(shard, nbytes)

    with open_engine(spec, count) as engine:
        for job in jobs:
            shard = job.shard_task.name
            yield execute(job.shard_task, job.opener, job.staging, engine, count)
