"""Checks of the files for log and metrics, before anything is opened: they must replace or lengthen no other file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.errors import SourceReadError, WriteError
from nemotron_fp8.untrusted.regular_files import read_start

if TYPE_CHECKING:
    from collections.abc import Iterable

STREAMS = ("-", "/dev/stdout", "/dev/stderr", "/dev/fd/1", "/dev/fd/2")
"""Names of the standard streams, whatever they lead to."""
LOG, METRICS = "--log-json", "--metrics"
STARTS = {LOG: b'{"time": "', METRICS: b"# HELP nemotron_fp8_"}
"""First bytes of the files that this package writes."""


def check_files(log: str | None, metrics: str | None, places: Iterable[str]) -> None:
    """Check the files of a command.

    Args:
        log: file of ``--log-json``, or None.
        metrics: file of ``--metrics``, or None.
        places: sources and destinations of the command.

    Raises:
        WriteError: a file lies in a source or a destination, is another file, or is not one to be replaced; or both
            are the same.
    """
    files = {option: name for option, name in ((LOG, log), (METRICS, metrics)) if name is not None}
    if log is not None and metrics is not None and os.path.realpath(log) == os.path.realpath(metrics):
        raise WriteError(log, f"is the file of {LOG} and of {METRICS}; name two files", errno.EINVAL)
    folders = [Path(os.path.realpath(place)) for place in places if "://" not in place and "\0" not in place]
    # A run works beside its destination.
    folders += [folder.with_name(f"{folder.name}.partial") for folder in folders if folder.name]
    for option, name in files.items():
        if option == LOG and name in STREAMS:
            continue
        _refuse_inside(option, name, folders)
        _refuse_other_file(option, name)


def _refuse_inside(option: str, name: str, folders: Iterable[Path]) -> None:
    """Refuse a file in a folder of the command, by its own name or through a link."""
    path = Path(name)
    both = {Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)) / path.name}
    for folder in folders:
        if any(folder in (each, *each.parents) for each in both):
            problem = f"lies in {folder}, a source or destination of the command; choose another file ({option})"
            raise WriteError(name, problem, errno.EINVAL)


def _refuse_other_file(option: str, name: str) -> None:
    """Refuse an existing file that this package has not written, and for metrics everything but a file."""
    try:
        mode = Path(name).stat().st_mode
    except (OSError, ValueError):
        return  # absent, or the attempt to open it tells why not
    if not stat.S_ISREG(mode):
        if stat.S_ISBLK(mode) or (option == METRICS and not stat.S_ISDIR(mode)):
            raise WriteError(name, f"is a pipe or a device; choose a file ({option})", errno.EINVAL)
        return
    try:
        start = read_start(Path(name), len(STARTS[option]))
    except SourceReadError:
        return  # it may be written all the same
    if start and not start.startswith(STARTS[option]):
        what = "log" if option == LOG else "file of metrics"
        raise WriteError(name, f"exists and is no {what} of this command; choose another file ({option})", errno.EEXIST)
