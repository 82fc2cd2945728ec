"""How far a check is: bytes looked at, stage by stage."""

from __future__ import annotations

import time
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8.results import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    Advance = Callable[[int], None]
    """Takes bytes that were looked at; from any thread."""


def unseen(_: int) -> None:
    """An `Advance` for nobody."""


class Gauge:
    """Adds up the bytes of a check for a progress callback.

    Args:
        progress: called after every piece, from the thread that finished it; None for nobody.
        clock: seconds, for `Progress.seconds`, which count from the beginning of each stage.
    """

    def __init__(
        self, progress: Callable[[Progress], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress, self._clock, self._lock = progress, clock, Lock()

    def stage(self, name: str, total: int, source_bytes: int | None = None) -> Advance:
        """Begin a stage.

        Args:
            name: what is done, in a word or two.
            total: bytes to look at; what is looked at twice counts twice.
            source_bytes: the same with everything counted once; None where nothing is looked at twice.

        Returns:
            What to call with the bytes of every piece.
        """
        progress, started, done = self._progress, self._clock(), 0
        if progress is None:
            return unseen

        def advance(count: int) -> None:
            nonlocal done
            with self._lock:
                done += count
                seconds = self._clock() - started
                once = total if source_bytes is None else source_bytes
                state = Progress(done, total, "", source_bytes=once, seconds=seconds, stage=name)
            progress(state)

        return advance
