"""Stand-ins that worker processes can import too."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from nemotron_fp8.destinations.base import Staging
from nemotron_fp8.destinations.folder_staging import FolderStaging

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from nemotron_fp8.destinations.base import Sink

HANG = 600.0
"""Seconds after which what is waited for is taken to have hung. Nothing that works depends on it, loaded or not."""


@dataclass(frozen=True)
class HangingStaging(Staging):
    """Stages into a folder; at the shard ``at`` it writes its process id to ``flag`` and hangs for ever."""

    folder: Path
    at: str
    flag: Path
    digests: bool = False

    def stage(self, name: str, size: int) -> Sink:
        sink = FolderStaging(self.folder, self.digests).stage(name, size)
        if name == self.at:
            announce(self.flag)
            Event().wait()
        return sink


@dataclass(frozen=True)
class FailingStaging(Staging):
    """Raises at the shard ``at``; at every other one it hangs, and says so in ``flag``."""

    at: str
    flag: Path

    def stage(self, name: str, size: int) -> Sink:
        if name != self.at:
            announce(self.flag)
            Event().wait()
        while not self.flag.exists():
            time.sleep(0.01)
        raise LocalError(f"{size} bytes refused")


class LocalError(Exception):
    """Cannot be pickled: its constructor wants an argument that pickle does not give it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.handle = open(os.devnull)  # noqa: PTH123, SIM115  (what makes it unpicklable)


def announce(flag: Path) -> None:
    """Write this process's id to a file, all at once."""
    part = flag.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.rename(flag)


def alive(pid: int) -> bool:
    """Return True if a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(path: Path, seconds: float = HANG, process: subprocess.Popen[str] | None = None) -> str:
    """Content of a file as soon as it is there.

    Raises:
        ChildProcessError: the process that should make it has ended without.
        TimeoutError: it has hung.
    """
    end = time.monotonic() + seconds
    while not path.exists():
        if process is not None and process.poll() is not None and not path.exists():
            raise ChildProcessError(f"ended with {process.returncode}: {process.communicate()[1]}")
        if time.monotonic() > end:
            raise TimeoutError(str(path))
        time.sleep(0.01)
    return path.read_text()


def wait_until(holds: Callable[[], bool], seconds: float = HANG) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: it has not become so.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.1)


class Watched:
    """A process that is somebody else's child, known by more than a number that another may get."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def wait(self) -> None:
        """Wait until it has ended.

        Raises:
            TimeoutError: it does not.
        """
        ready, _, _ = select.select([self._fd], [], [], HANG)
        os.close(self._fd)
        if not ready:
            raise TimeoutError(f"process {self.pid} goes on")
