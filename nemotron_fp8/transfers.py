"""What is on its way from or to the Hub, added to the progress of a conversion."""

from __future__ import annotations

import time
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8.results import Progress, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.results import Direction


class Transfers:
    """Stands between a conversion and its progress callback. Its methods may be called from any thread.

    Args:
        progress: the callback; None where nobody listens.
    """

    def __init__(self, progress: Callable[[Progress], None] | None) -> None:
        self._progress = progress
        self._lock = Lock()
        self._last = Progress(0, 0, "")
        self._since = time.monotonic()
        self._moving: dict[tuple[Direction, str], Transfer] = {}
        self._waiting = ""
        self._elsewhere: dict[str, tuple[tuple[Transfer, ...], str]] = {}

    def begin(self, progress: Progress) -> None:
        """Take the state that a conversion begins from; transfers may come before any work."""
        with self._lock:
            self._last, self._since = progress, time.monotonic()

    def update(self, progress: Progress) -> None:
        """Take the progress of the work on shards, and pass it on with what is on its way."""
        self.begin(progress)
        self._tell()

    def moved(self, direction: Direction, name: str, done: int, total: int) -> None:
        """Say how much of a file has moved; less than before where it had to begin again."""
        with self._lock:
            self._moving[direction, name] = Transfer(direction, name, min(done, total), total)
            self._waiting = ""
        self._tell()

    def ended(self, direction: Direction, name: str) -> None:
        """Say that a file is not on its way any more."""
        with self._lock:
            self._moving.pop((direction, name), None)
        self._tell()

    def waits(self, reason: str, seconds: float) -> None:
        """Say that something is tried again after so many seconds."""
        with self._lock:
            self._waiting = f"{seconds:.0f} s: {reason}"
        self._tell()

    def elsewhere(self, shard: str, moving: tuple[Transfer, ...], waiting: str) -> None:
        """Take all that is on its way for a shard on another machine, and what that one waits for."""
        with self._lock:
            if (moving, waiting) == self._elsewhere.get(shard, ((), "")):
                return
            self._elsewhere[shard] = moving, waiting
        self._tell()

    def _tell(self) -> None:
        if self._progress is None:
            return
        with self._lock:
            seconds = self._last.seconds + time.monotonic() - self._since  # the work may stand still meanwhile
            there = self._elsewhere.values()
            moving = (*self._moving.values(), *(transfer for each, _ in there for transfer in each))
            waiting = self._waiting or next((reason for _, reason in there if reason), "")
            now = replace(self._last, seconds=seconds, transfers=moving, waiting=waiting)
        self._progress(now)
