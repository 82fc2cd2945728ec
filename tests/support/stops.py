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


def is_change(event: str, arguments: tuple[object, ...]) -> bool:
    """Return True for an event of the interpreter that changes a file system."""
    return event in CHANGES and (event != "open" or (isinstance(arguments[2], int) and bool(arguments[2] & os.O_CREAT)))


def die_at(number: int) -> None:
    """Let this process kill itself at its ``number``-th change of a file system. Runs in a child only."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if is_change(event, arguments):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run work in a child that dies at its ``number``-th change of a file system; return True if it died."""
    child = os.fork()
    if not child:
        die_at(number)
        try:
            work()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def changes(work: Callable[[], object]) -> int:
    """Return the number of changes of a file system that work makes, in a child."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            count += is_change(event, arguments)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os.write(writer, str(count).encode())
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        return int(file.read())
