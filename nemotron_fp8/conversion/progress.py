"""Progress of all workers of a conversion."""

from __future__ import annotations

import time
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8._utils import format_bytes
from nemotron_fp8.events import emit
from nemotron_fp8.progress import Progress, ShardProgress, TransferTracker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nemotron_fp8.planning.tasks import ShardTask


class ConversionProgress:
    """Counter of the bytes that all workers have processed, for a progress callback.

    Args:
        shard_tasks: tasks of the conversion.
        callback: called after every slice, from the thread that finished the slice; None for no reports.
        clock: returns seconds, for `Progress.seconds`.

    Attributes:
        transfers: tracks downloads and uploads for the same callback.
        wanted: True if there is a callback.
    """

    def __init__(
        self,
        shard_tasks: Sequence[ShardTask],
        callback: Callable[[Progress], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._totals = {shard_task.name: work_bytes(shard_task) for shard_task in shard_tasks}
        self._source_bytes = sum(
            stored.nbytes
            for shard_task in shard_tasks
            for tensor_task in shard_task.tensor_tasks
            for stored in tensor_task.view.stored
        )
        self._total = sum(self._totals.values())
        self._open: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._closed: set[str] = set()
        self._done = self._skipped = 0
        self._lock = Lock()
        self._clock, self._started = clock, clock()
        self.wanted = callback is not None
        self.transfers = TransferTracker(callback, clock)
        self.transfers.begin(self._state(""))

    def restart(self) -> None:
        """Reset every count."""
        with self._lock:
            self._open.clear()
            self._since.clear()
            self._closed.clear()
            self._done = self._skipped = 0
            self._started = self._clock()

    def skip(self, shard: str) -> None:
        """Count a shard that an earlier run has finished, and log it."""
        self._close(shard, skipped=True)
        emit("shard.resumed", f"{shard}: finished by an earlier run", shard=shard)

    def finish(self, shard: str, size: int) -> None:
        """Count all bytes of a shard as processed, also those that its worker has not reported, and log it.

        Args:
            shard: the output file.
            size: its bytes.
        """
        self._close(shard, skipped=False)
        since = self._since.pop(shard, None)
        seconds = 0.0 if since is None else self._clock() - since
        speed = f" in {seconds:.2f} s, {format_bytes(size / seconds)}/s" if seconds else ""
        text = f"{shard}: finished, {format_bytes(size)}{speed}"
        rate = round(size / seconds) if seconds else None
        emit("shard.finished", text, shard=shard, bytes=size, seconds=round(seconds, 3), bytes_per_second=rate)

    def add(self, shard: str, count: int) -> None:
        """Count processed input bytes of a shard, at most the bytes of the shard."""
        if shard not in self._since:
            self._since[shard] = self._clock()
        if not self.wanted:
            return
        with self._lock:
            if shard in self._closed:
                return
            before = self._open.get(shard, 0)
            now = min(before + count, self._totals.get(shard, 0))
            self._open[shard] = now
            self._done += now - before
            state = self._state(shard)
        self.transfers.update(state)

    def _close(self, shard: str, skipped: bool) -> None:
        if not self.wanted:
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
            self.transfers.update(state)

    def _state(self, shard: str) -> Progress:
        active = tuple(ShardProgress(name, done, self._totals.get(name, 0)) for name, done in self._open.items())
        seconds = self._clock() - self._started
        return Progress(self._done, self._total, shard, active, self._source_bytes, self._skipped, seconds)


def work_bytes(shard_task: ShardTask) -> int:
    """Return the input bytes of a task: tensors to write, members of scale groups, and tensors for error statistics."""
    written = sum(tensor_task.view.nbytes for tensor_task in shard_task.tensor_tasks)
    measured = sum(member.nbytes for group in shard_task.groups for member in group.members)
    again = (
        sum(tensor_task.view.nbytes for tensor_task in shard_task.tensor_tasks if tensor_task.group is not None)
        if shard_task.recipe.stats
        else 0
    )
    return written + measured + again
