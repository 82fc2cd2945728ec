"""Count the progress of all workers of a conversion."""

from __future__ import annotations

import time
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8.progress import Progress, ShardProgress

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.tasks import ShardTask


class ConversionProgress:
    """Adds up the slices that all workers have finished, for a progress callback.

    Args:
        plan: what is carried out.
        progress: called after every slice, from the thread that finished it.
        clock: seconds, for `Progress.seconds`.
    """

    def __init__(
        self,
        plan: Plan,
        progress: Callable[[Progress], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._totals = {shard_task.name: work_bytes(shard_task) for shard_task in plan.shard_tasks}
        self._source_bytes = sum(
            tensor_task.view.nbytes for shard_task in plan.shard_tasks for tensor_task in shard_task.tensor_tasks
        )
        self._total = sum(self._totals.values())
        self._open: dict[str, int] = {}
        self._closed: set[str] = set()
        self._done = self._skipped = 0
        self._lock = Lock()
        self._progress = progress
        self._clock, self._started = clock, clock()

    def restart(self) -> None:
        """Begin to count anew."""
        with self._lock:
            self._open.clear()
            self._closed.clear()
            self._done = self._skipped = 0
            self._started = self._clock()

    def skip(self, shard_task: ShardTask) -> None:
        """Count a shard that an earlier run had finished."""
        self._close(shard_task.name, skipped=True)

    def finish(self, shard: str) -> None:
        """Count a shard as finished, whatever its worker has told of it."""
        self._close(shard, skipped=False)

    def add(self, shard: str, count: int) -> None:
        """Count input bytes of a shard; a worker that tells more than there is does not count beyond the shard."""
        if self._progress is None:
            return
        with self._lock:
            if shard in self._closed:
                return
            before = self._open.get(shard, 0)
            now = min(before + count, self._totals.get(shard, 0))
            self._open[shard] = now
            self._done += now - before
            state = self._state(shard)
        self._progress(state)

    def _close(self, shard: str, skipped: bool) -> None:
        if self._progress is None:
            return
        with self._lock:
            if shard in self._closed:
                return
            self._closed.add(shard)
            rest = self._totals[shard] - self._open.pop(shard, 0)
            self._done += rest
            if skipped:
                self._skipped += rest
            state = self._state(shard)
        if rest:
            self._progress(state)

    def state(self) -> Progress:
        """How far it is now."""
        with self._lock:
            return self._state("")

    def _state(self, shard: str) -> Progress:
        active = tuple(ShardProgress(name, done, self._totals.get(name, 0)) for name, done in self._open.items())
        seconds = self._clock() - self._started
        return Progress(self._done, self._total, shard, active, self._source_bytes, self._skipped, seconds)


def work_bytes(shard_task: ShardTask) -> int:
    """Input bytes that a unit works on: every tensor that it writes, and every one that it takes an amax of."""
    written = sum(tensor_task.view.nbytes for tensor_task in shard_task.tensor_tasks)
    measured = sum(member.nbytes for group in shard_task.groups for member in group.members)
    again = (
        sum(tensor_task.view.nbytes for tensor_task in shard_task.tensor_tasks if tensor_task.group is not None)
        if shard_task.recipe.stats
        else 0
    )
    return written + measured + again
