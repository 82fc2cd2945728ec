"""Writes that the system rejects, one call at a time, and file systems that are really full."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tests.faults import fixture
from tests.faults.kills import points
from tests.faults.process import forked, start, wait
from tests.faults.row import Outcome, Row, Share
from tests.faults.tools import STRACE, TMPFS
from tests.faults.world import MODES, Mode, World, base

if TYPE_CHECKING:
    from collections.abc import Iterator

ERRORS = ("ENOSPC", "EIO", "EDQUOT")


class Refused(Row):
    """An error of the system at every call that changes something."""

    name, title = (
        "refused-writes",
        "ENOSPC, EIO, EDQUOT at every write-class call; tmpfs full at 10 sizes, and while it works",
    )
    target = "all: typed error, then resumes"
    partly = MappingProxyType({STRACE: "the errors at every call", TMPFS: "the full file systems"})

    def cases(self, share: Share) -> Iterator[object]:
        """Every point times every error; full file systems by how full."""
        if STRACE not in share.missing:
            yield from self._calls(share.of(1, ci=16))
        if TMPFS not in share.missing:
            yield from list(self._disks())[:: share.of(1, ci=4)]

    def _calls(self, every: int) -> Iterator[object]:
        for mode in MODES:
            found = [call for call in points(mode, 1) if call.name != "write" or "memfd" not in call.what]
            for i, call in enumerate(found):
                for j, error in enumerate(ERRORS):
                    if (i + j) % every == 0:
                        yield "inject", mode, call.name, call.number, error

    def _disks(self) -> Iterator[object]:
        for percent in range(5, 105, 10):
            yield "full", "folder", "", percent, ""
            yield "full", "in-place", "", percent, ""
        for shard in (1, 2, 3):
            for percent in (0, 30, 60, 90):
                yield "fills", "folder", f"model-{shard:05d}-of-00003.safetensors", percent, ""
                yield "fills", "in-place", f"model-{shard:05d}-of-00003.safetensors", percent, ""

    def run(self, case: tuple[str, Mode, str, int, str]) -> Outcome:
        """See `cases`."""
        kind, mode, name, number, error = case
        if kind == "inject":
            return self._refused(mode, name, number, error)
        if kind == "full":
            return self._full(mode, number)
        return self._fills(mode, name, number)

    def _refused(self, mode: Mode, name: str, number: int, error: str) -> Outcome:
        with World(mode) as world:
            ended = forked(world.command(), [f"{name}:error={error}:when={number}"], name)
            wrong = world.broken_now()
            if ended.code and not ended.typed:
                wrong.append(f"not a typed error: {ended.code} {ended.err[-500:]}")
            if ended.code == 0 and not any("INJECTED" in line for line in ended.log):
                wrong.append("not reached")
            reached = "refused, typed" if ended.code else "refused, and not needed"
            return Outcome(wrong + world.resume(), {reached: 1})

    def _full(self, mode: Mode, percent: int) -> Outcome:
        """Too little room from the start: nothing is done, and the error's figure is what is missing."""
        with small_disk() as disk, World(mode, disk, "large") as world:
            sizes = world.made.sizes.values()
            space_needed_and_free = (max(sizes) if mode == "in-place" else sum(sizes)) * percent // 100
            filler = fill(disk, space_needed_and_free)
            before = {path.name for path in disk.iterdir()}
            ended = world.run()
            wrong = _check_full(ended.typed, ended.err)
            if {path.name for path in disk.iterdir()} != before or fixture.tree(world.src) != world.made.source:
                wrong.append("something was left behind")
            if missing := _missing(ended.err):
                fill(disk, space_needed_and_free + missing, filler)
                wrong += [f"with {missing:,} bytes more: {problem}" for problem in world.resume()]
            else:
                wrong.append(f"does not say how much is missing: {ended.err}")
            return Outcome(wrong, {"full from the start": 1})

    def _fills(self, mode: Mode, shard: str, percent: int) -> Outcome:
        """Someone else fills the file system when a shard is about to be made."""
        with small_disk() as disk, World(mode, disk, "large") as world:
            running = start(world.command(), prepare=lambda: at_creation(shard, signal.SIGSTOP))
            _, status = os.waitpid(running.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                return Outcome([f"it did not get to {shard}"])
            filler = fill(disk, world.made.sizes[shard] * percent // 100)
            os.kill(running.pid, signal.SIGCONT)
            ended = wait(running)
            wrong = world.broken_now() + _check_full(ended.typed, ended.err)
            missing = _missing(ended.err)
            free = shutil.disk_usage(disk).free
            if missing is None:
                wrong.append(f"does not say how much is missing: {ended.err}")
            else:
                fill(disk, free + missing, filler)
                wrong += [f"with {missing:,} bytes more: {problem}" for problem in world.resume()]
            return Outcome(wrong, {"filled while it worked": 1})


def _check_full(typed: bool, text: str) -> list[str]:
    return [] if typed and "bytes are still needed" in text else [f"not the error of a full disk: {text}"]


def _missing(text: str) -> int | None:
    found = re.search(r"free ([\d,]+) more", text)
    return int(found[1].replace(",", "")) if found else None


def at_creation(name: str, number: signal.Signals) -> None:
    """Let this process send itself a signal when it begins to stage a shard of this name. Runs in the child only."""
    sent: list[bool] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if (
            event == "open"
            and not sent
            and isinstance(arguments[2], int)
            and arguments[2] & os.O_CREAT
            and arguments[2] & os.O_RDWR
        ):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
            if path.endswith(f"/{name}") and "/work-" in path:
                sent.append(True)
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


@contextmanager
def small_disk(size: int = 24 << 20) -> Iterator[Path]:
    """A file system of its own in memory. Needs root, or the runner inside ``unshare -rm``."""
    path = Path(tempfile.mkdtemp(prefix="faults-disk-", dir=base()))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
        path.rmdir()


def fill(disk: Path, leave: int, filler: Path | None = None) -> Path:
    """Fill a file system until so many bytes are free, in whole blocks; returns the file that fills it."""
    filler = filler or disk / "filler"
    filler.unlink(missing_ok=True)
    info = os.statvfs(disk)
    free = info.f_bavail * info.f_frsize
    with filler.open("wb") as file:
        size = free - -(-leave // info.f_frsize) * info.f_frsize
        if size > 0:
            os.posix_fallocate(file.fileno(), 0, size)
    return filler
