"""Stand-ins that worker processes can import too."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.folder import FolderStaging

if TYPE_CHECKING:
    from nemotron_fp8.write import Sink


@dataclass(frozen=True)
class HangingStaging:
    """Stages into a folder; at the shard ``at`` it writes its process id to ``flag`` and hangs."""

    folder: Path
    at: str
    flag: Path

    def stage(self, name: str, size: int) -> Sink:
        sink = FolderStaging(self.folder, digests=False).stage(name, size)
        if name == self.at:
            announce(self.flag)
            time.sleep(600)
        return sink


@dataclass(frozen=True)
class FailingStaging:
    """Raises at the shard ``at``; at every other one it hangs, and says so in ``flag``."""

    at: str
    flag: Path

    def stage(self, name: str, size: int) -> Sink:
        if name != self.at:
            announce(self.flag)
            time.sleep(600)
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
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(path: Path, seconds: float = 60) -> str:
    """Content of a file as soon as it is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(str(path))
        time.sleep(0.01)
    return path.read_text()
