"""Stop a run at a shard, as an interruption would."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.progress import Progress

SECOND = "model-00002-of-00002.safetensors"


CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")
"""Events of the interpreter that change a file system."""


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


def die_at(number: int) -> None:
    """Let this process kill itself at its ``number``-th change of a file system. Runs in a child only."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in CHANGES and (event != "open" or (isinstance(arguments[2], int) and arguments[2] & os.O_CREAT)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
