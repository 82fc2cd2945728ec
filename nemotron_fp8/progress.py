"""Progress of a conversion or a verification, as reported to callbacks."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable


Direction = Literal["download", "upload"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Progress of a file in transit from or to the Hub.

    Attributes:
        direction: ``download`` or ``upload``.
        name: the file.
        done: bytes transferred; None while unknown, as in an upload over Xet, which reports none.
        total: bytes of the file.
    """

    direction: Direction
    name: str
    done: int | None
    total: int


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """Progress of one shard.

    Attributes:
        name: the output file.
        done: input bytes processed, counted as in `Progress`.
        total: input bytes to process.
    """

    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a conversion or of a stage of a verification.

    Attributes:
        done: input bytes processed; a quantized tensor is read twice and counts twice (or more, if other shards
            depend on its amax).
        total: input bytes to process.
        shard: the output file that advanced last.
        active: the output files in progress, one for each worker.
        source_bytes: bytes of the source's tensors, each counted once.
        skipped: bytes of ``done`` that an earlier run had finished.
        seconds: wall time since the conversion or the stage began.
        transfers: downloads and uploads in progress.
        waiting: delay until a transfer is retried, and the reason, such as ``8 s: owner/name: the Hub answers 503``;
            empty if no transfer waits.
        stage: name of the verification's stage; ``done`` and ``seconds`` restart with each stage.
    """

    done: int
    total: int
    shard: str
    active: tuple[ShardProgress, ...] = ()
    source_bytes: int = 0
    skipped: int = 0
    seconds: float = 0.0
    transfers: tuple[Transfer, ...] = ()
    waiting: str = ""
    stage: str = ""


if TYPE_CHECKING:
    from collections.abc import Callable

    Advance = Callable[[int], None]
    """Callback that receives the number of bytes just checked, from any thread."""


def ignore_progress(_: int) -> None:
    """Do nothing; the `Advance` of a check without a progress callback."""


class StageProgress:
    """Counter of the bytes that a check has processed, for a progress callback.

    Args:
        progress: called after every piece, from the thread that finished it; None for no reports.
        clock: returns seconds, for `Progress.seconds`, which restarts with each stage.
    """

    def __init__(
        self, progress: Callable[[Progress], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress, self._clock, self._lock = progress, clock, Lock()

    def stage(self, name: str, total: int, source_bytes: int | None = None) -> Advance:
        """Begin a stage.

        Args:
            name: name of the stage, one or two words.
            total: bytes to check; bytes that are checked twice count twice.
            source_bytes: the same with every byte counted once; None if no byte is checked twice.

        Returns:
            The callback for the bytes of every piece.
        """
        progress, started, done = self._progress, self._clock(), 0
        if progress is None:
            return ignore_progress

        def advance(count: int) -> None:
            nonlocal done
            with self._lock:
                done += count
                seconds = self._clock() - started
                once = total if source_bytes is None else source_bytes
                state = Progress(done, total, "", source_bytes=once, seconds=seconds, stage=name)
            progress(state)

        return advance


class TransferTracker:
    """Combined progress of shards and of transfers, for a progress callback; thread-safe.

    A copy in another process reports to nobody.

    Args:
        progress: the callback; None for no reports.
        clock: returns seconds, for `Progress.seconds`.
    """

    def __init__(
        self, progress: Callable[[Progress], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress, self._clock = progress, clock
        self._lock = Lock()
        self._last = Progress(0, 0, "")
        self._since = self._clock()
        self._moving: dict[tuple[Direction, str], Transfer] = {}
        self._waiting = ""
        self._elsewhere: dict[str, tuple[tuple[Transfer, ...], str]] = {}

    def __reduce__(self) -> tuple[type[TransferTracker], tuple[None]]:
        return TransferTracker, (None,)

    def begin(self, progress: Progress) -> None:
        """Set the initial state of a conversion, because transfers may precede the first shard."""
        with self._lock:
            self._last, self._since = progress, self._clock()

    def update(self, progress: Progress) -> None:
        """Report the progress of shards, together with the current transfers."""
        self.begin(progress)
        self._report()

    def moved(self, direction: Direction, name: str, done: int | None, total: int) -> None:
        """Report the transferred bytes of a file; None if unknown, and fewer than before if the transfer restarted."""
        known = None if done is None else min(done, total)
        with self._lock:
            self._moving[direction, name] = Transfer(direction, name, known, total)
            self._waiting = ""
        self._report()

    def ended(self, direction: Direction, name: str) -> None:
        """Report the end of a file's transfer."""
        with self._lock:
            self._moving.pop((direction, name), None)
        self._report()

    def waits(self, reason: str, seconds: float) -> None:
        """Report a retry after a delay in seconds, with its reason."""
        with self._lock:
            self._waiting = f"{seconds:.0f} s: {reason}"
        self._report()

    def elsewhere(self, shard: str, moving: tuple[Transfer, ...], waiting: str) -> None:
        """Report all transfers of a shard on another machine, and the retry that the shard waits for."""
        with self._lock:
            if (moving, waiting) == self._elsewhere.get(shard, ((), "")):
                return
            self._elsewhere[shard] = moving, waiting
        self._report()

    def _report(self) -> None:
        if self._progress is None:
            return
        with self._lock:
            seconds = (
                self._last.seconds + self._clock() - self._since
            )  # add the time since the last progress of a shard
            there = self._elsewhere.values()
            moving = (*self._moving.values(), *(transfer for each, _ in there for transfer in each))
            waiting = self._waiting or next((reason for _, reason in there if reason), "")
            now = replace(self._last, seconds=seconds, transfers=moving, waiting=waiting)
        self._progress(now)
