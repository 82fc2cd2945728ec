"""Byte sizes as text, usable cores, a parallel loop, process memory, Markdown escaping."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, TypeVar

from nemotron_fp8.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


UNITS = {"": 1, "b": 1}
UNITS |= {f"{prefix}ib": 1 << (10 * power) for power, prefix in enumerate("kmgt", 1)}
UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}


def parse_bytes(text: str | int) -> int:
    """Return a number of bytes from ``"256MiB"``, ``"1.5GB"``, ``"4096"`` or a number.

    Raises:
        RecipeError: it is not understood, or not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text), re.ASCII)
        if not found or found.group(2).lower() not in UNITS:
            raise RecipeError(f"{text!r} is no amount of memory; write it like 256MiB, 1.5GB or 1000000")
        count = int(float(found.group(1)) * UNITS[found.group(2).lower()])
    if count <= 0:
        raise RecipeError(f"{text!r} is no amount of memory: it must be positive")
    return count


def format_bytes(count: float) -> str:
    """Return a number of bytes for people: three or four digits and a binary unit."""
    for shard_task in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {shard_task}" if shard_task == "B" else f"{count:.1f} {shard_task}"
        count /= 1024
    return f"{count:.1f} TiB"


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def code(text: str) -> str:
    """Text from a file, fit to stand in one line of Markdown: what would be obeyed instead of shown is escaped."""
    return "".join(c if c.isprintable() and c not in "`|<>[]" else f"\\u{ord(c):04x}" for c in text)


def peak_resident_bytes() -> int | None:
    """The most bytes this process has had resident (``VmHWM``); None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def listed(names: list[str], limit: int = 4) -> str:
    """A few names, and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


T = TypeVar("T")


def parallel_for(workers: int, jobs: Iterable[T], work: Callable[[T], None]) -> None:
    """Call ``work`` on every job, in order of the jobs, on ``workers`` threads, the caller's own among them.

    Jobs are drawn when a thread is free, so an endless supply costs no memory. The first exception stops the
    others after the job that they are at and is raised here; so is one that interrupts the caller (Ctrl-C).
    """
    supply, lock, stop = iter(jobs), Lock(), Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                with lock:
                    job = next(supply, stop)
                if job is stop:
                    return
                work(job)  # type: ignore[arg-type]  # what is not the sentinel is a job
        except BaseException as error:
            errors.append(error)
            stop.set()

    helpers = [Thread(target=run, name=f"slices-{i}", daemon=True) for i in range(1, workers)]
    for helper in helpers:
        helper.start()
    try:
        run()
        for helper in helpers:
            helper.join()
    except BaseException:
        stop.set()
        for helper in helpers:
            helper.join()
        raise
    if errors:
        raise errors[0]
