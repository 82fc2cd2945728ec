"""How far a file was read by code that does not tell: hf_xet opens and reads by itself what it uploads."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.progress import TransferTracker


LOOK_SECONDS = 0.5


@contextmanager
def upload_told(
    transfers: TransferTracker, path: Path, size: int, check: Callable[[], None]
) -> Iterator[Callable[[int], None]]:
    """Tell how far the upload of a file is, for as long as the context lasts; gives what to call with a position.

    Args:
        transfers: is told.
        path: the file, under the name that it is told by.
        size: its bytes.
        check: called whenever bytes were read; may raise, to come to an end there.
    """

    def moved(position: int) -> None:
        transfers.moved("upload", path.name, position, size)

    def sent(position: int) -> None:
        check()
        moved(position)

    try:
        sent(0)
        with watched(path, moved):
            yield sent
        sent(size)
    finally:
        transfers.ended("upload", path.name)


@contextmanager
def watched(path: Path, told: Callable[[int], None]) -> Iterator[None]:
    """Tell from time to time how far this process has read a file, for as long as the context lasts.

    Args:
        path: the file.
        told: called from a thread of its own with the position, whenever it is another; less than before where the
            reading has begun again.
    """
    over = Event()
    real, last = os.path.realpath(path), 0

    def look() -> None:
        nonlocal last
        while not over.wait(LOOK_SECONDS):
            position = _position(real)
            if position not in (0, last):
                last = position
                told(position)

    watcher = Thread(target=look, name="reading", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _position(path: str) -> int:
    """The farthest position of this process in a file that it has open; 0 where the system does not tell.

    Source: proc_pid_fdinfo(5) of Linux.
    """
    farthest = 0
    try:
        for entry in Path("/proc/self/fd").iterdir():
            try:
                if str(entry.readlink()) == path:
                    info = Path("/proc/self/fdinfo", entry.name).read_text(encoding="ascii")
                    farthest = max(farthest, int(info.partition("\n")[0].removeprefix("pos:")))
            except OSError:  # closed meanwhile
                continue
    except OSError:
        return 0
    return farthest
