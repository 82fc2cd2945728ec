"""Helpers: checks of arguments, byte sizes as text, usable cores, parallel loop, process memory, Markdown escaping."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, TypeVar

from nemotron_fp8._process import stopping
from nemotron_fp8._secrets import holds_credentials, masked
from nemotron_fp8.errors import RecipeError, excerpt
from nemotron_fp8.errors.stores import StoreAddressError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Executor


def shortened(value: object, limit: int = 60) -> str:
    """Return the ``repr`` of an argument for a message, truncated to ``limit`` characters."""
    if isinstance(value, int | float | list | tuple | dict | bytes | None):
        return excerpt(value, limit)
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _is_path(value: object) -> bool:
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str):
        return False
    return text != "" and "\0" not in text


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_percent(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100)


def _is_function(value: object) -> bool:
    return value is None or callable(value)


def _is_progress(value: object) -> bool:
    return isinstance(value, bool) or _is_function(value)


ARGUMENTS: dict[str, tuple[Callable[[object], bool], str]] = {
    "source": (_is_path, "a path or an address (hf://owner/name, s3://bucket/folder)"),
    "path": (_is_path, "a path or an address (hf://owner/name, s3://bucket/folder)"),
    "destination": (_is_path, "a path or an address (hf://owner/name, s3://bucket/folder)"),
    "first": (_is_path, "the path of a result"),
    "second": (_is_path, "the path of a result"),
    "amaxes_file": (_is_path, "the path of a file"),
    "min_share": (_is_percent, "a number from 0 to 100, or None"),
    "threads": (_is_count, "a positive integer, or None for all available cores"),
    "progress": (_is_progress, "a function of one argument, True for a bar, or None"),
    "cluster": (_is_text, "the address of a Ray cluster ('auto', 'HOST:PORT' or 'ray://HOST:PORT'), or None"),
    "base_model": (_is_text, "the name of a model on the Hub (owner/name), or None"),
    "revision": (_is_text, "a branch, tag or commit, or None"),
    "cache_dir": (lambda value: value is None or _is_path(value), "the path of a folder, or None"),
    "retry_seconds": (_is_time, "a number of seconds, 0 or more"),
    "on_wait": (_is_function, "a function of a reason and seconds, or None"),
}
"""Arguments of the public functions and of `HubOptions`: the check of each, and the values that pass."""

PLACES = ("source", "path", "destination", "first", "second")
"""Arguments that may be addresses."""

BYTES = ("max_memory", "max_device_memory", "shard_size")
"""Arguments that are numbers of bytes; max_memory must not be None."""


def check_arguments(**arguments: object) -> None:
    """Check arguments that are named in `ARGUMENTS` or `BYTES`.

    Raises:
        RecipeError: an argument has an unsupported type or value; the message lists the allowed ones.
    """
    for name, value in arguments.items():
        if name in BYTES:
            if value is not None or name == "max_memory":
                parse_bytes(value, name)
            continue
        fits, allowed = ARGUMENTS[name]
        if not fits(value):
            raise RecipeError(f"{name} is {shortened(value)}, not {allowed}", (name,))
        if name in PLACES:
            refuse_credentials(os.fspath(value))  # type: ignore[call-overload]  # a path, as `fits` says


def refuse_credentials(place: str) -> None:
    """Refuse an address with what may be a credential, before it is recorded or printed.

    Raises:
        StoreAddressError: the address has a user or a query. The address is masked.
    """
    # The Hub and the stores explain their own addresses.
    explained = place.startswith(("hf://", "s3://", "gs://", "az://"))
    if not explained and holds_credentials(place) and not os.path.lexists(place):
        problem = "an address has no user and no query; credentials come from the environment"
        raise StoreAddressError(masked(place), problem)


UNITS = {"": 1, "b": 1}
UNITS |= {f"{prefix}ib": 1 << (10 * power) for power, prefix in enumerate("kmgt", 1)}
UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}


def parse_bytes(value: object, name: str = "") -> int:
    """Parse a number of bytes: an integer, or a string like ``"256MiB"``, ``"1.5GB"`` or ``"4096"``.

    Args:
        value: the string or number.
        name: name of the argument, for the message.

    Raises:
        RecipeError: the value is malformed or not positive.
    """
    count = value if isinstance(value, int) and not isinstance(value, bool) else None
    if count is None and isinstance(value, str):
        found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]{0,3})\s*", str(value), re.ASCII)
        if found and found.group(2).lower() in UNITS and (found.group(2) or "." not in found.group(1)):
            count = int(float(found.group(1)) * UNITS[found.group(2).lower()])
    if count is None or count <= 0:
        problem = "write it like 256MiB, 1.5GB or 1000000" if count is None else "it must be positive"
        place = f"{name} (--{name.replace('_', '-')}) is {shortened(value)}, which" if name else shortened(value)
        raise RecipeError(f"{place} is not a number of bytes; {problem}", (name,) if name else ())
    return count


def format_bytes(count: float) -> str:
    """Format a number of bytes with three or four digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible(text: str) -> str:
    """Return text with control characters and marks of direction escaped: names come from untrusted files."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shell_word(word: str, encoding: str = "utf-8") -> str:
    """Quote a word for a shell, so that it can be copied from a terminal.

    A word that the terminal cannot show as it is, like one with a line break, is quoted as ``$'...'`` with the octal
    numbers of its bytes, which bash, zsh and ksh read.

    Args:
        word: the word.
        encoding: encoding of the terminal.
    """
    if word.isprintable():
        with suppress(UnicodeError, LookupError):
            word.encode(encoding)
            return shlex.quote(word)
    shown = (chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\{b:03o}" for b in os.fsencode(word))
    return f"$'{''.join(shown)}'"


def plain_path(name: str) -> str:
    """Return a path that does not begin with a dash, so that commands do not take it for an option."""
    return f".{os.sep}{name}" if name.startswith("-") else name


HUB = "hf://"
"""Start of an address on the Hub."""


def short_name(name: str) -> str:
    """Return the last part of a path, or the name of a repository without owner and revision."""
    if name.startswith(HUB):
        name = name.removeprefix(HUB).partition("@")[0]
    return name.rstrip("/").rpartition("/")[2] or name


def code(text: str) -> str:
    """Escape text from a file for one line of Markdown, so that it is shown and never interpreted."""
    return "".join(c if c.isprintable() and c not in "`|<>[]" else f"\\u{ord(c):04x}" for c in text)


def peak_resident_bytes() -> int | None:
    """Return the peak resident bytes of this process (``VmHWM``); None if the system does not report them."""
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
    """Join the first ``limit`` names, and append the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


T = TypeVar("T")


def check_stopping() -> None:
    """Raise KeyboardInterrupt if the command has been told to end; called between two pieces of long work."""
    if stopping.is_set():
        raise KeyboardInterrupt


LONGEST_WAIT = 2.0
"""Seconds that a command waits for its threads once it has been told to end."""


def within(seconds: float, call: Callable[[], object]) -> None:
    """Run a call that may never return, and wait for at most ``seconds``."""
    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


def shut_down(pool: Executor) -> None:
    """Cancel the calls of a pool that have not begun, and wait for the others.

    A command that has been told to end waits for `LONGEST_WAIT` at most: a server may not answer for minutes.
    """
    if not stopping.is_set():
        pool.shutdown(wait=True, cancel_futures=True)
        return
    pool.shutdown(wait=False, cancel_futures=True)
    within(LONGEST_WAIT, pool.shutdown)


def parallel_for(workers: int, jobs: Iterable[T], work: Callable[[T], None]) -> None:
    """Call ``work`` on every job, in their order, on ``workers`` threads including the caller's.

    A free thread takes the next job, so an endless iterable costs no memory. After the first exception, or an
    interruption of the caller (Ctrl-C), the other threads finish their current job, and the exception is raised. Once
    the command is told to end (`stopping`), no job is begun, and every thread raises KeyboardInterrupt.
    """
    supply, lock, stop = iter(jobs), Lock(), Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                check_stopping()
                with lock:
                    job = next(supply, stop)
                if job is stop:
                    return
                work(job)  # type: ignore[arg-type]  # everything except the sentinel is a job
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
