"""Stop a run at a shard, as an interruption would."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.progress import Progress

SECOND = "model-00002-of-00002.safetensors"


class StoppedError(Exception):
    """The error with which a test stops a run."""


def stop_at(shard: str) -> object:
    """A callback that stops a run when it comes to a shard."""

    def callback(progress: Progress) -> None:
        if progress.shard == shard:
            raise StoppedError

    return callback


def stop_when_marked(folder: Path) -> Callable[[Progress], None]:
    """A callback that stops a run in place when it comes to a shard, and one is replaced already."""
    seen = 0

    def callback(progress: Progress) -> None:
        nonlocal seen
        seen += (folder / "nemotron_fp8.unfinished").exists() and progress.shard == SECOND
        if seen > 1:
            raise StoppedError

    return callback
