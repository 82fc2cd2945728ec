"""Standard streams of the command: open ones only, and writes that cannot end in a traceback."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO


def prepare() -> None:
    """Open /dev/null for every closed standard stream, and let the others escape what they cannot encode.

    Without it, the next file that is opened would get the descriptor of the closed stream, and a message of a library
    would be written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            _replace(number)
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  (a number)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # a stream of a caller, which has no such method
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _replace(number: int) -> None:
    """Let a descriptor refer to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def silence(stream: TextIO) -> None:
    """Direct the rest of a stream to /dev/null, so that Python does not fail when it flushes the stream at its end."""
    with suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        if number in (1, 2):
            _replace(number)


redirect: Callable[[str], None] | None = None
"""Function that takes each line for stderr instead: ``--log-json -`` makes JSON of it."""


def write_error(text: str) -> None:
    """Write to stderr. A stream that cannot be written is silenced: nobody can be told, and the work goes on."""
    write_aside(sys.stderr, text)


def write_aside(stream: TextIO, text: str) -> None:
    """Write to a stream whose text is not the result; failures silence it."""
    if redirect is not None and stream is sys.stderr:
        for line in filter(None, text.splitlines()):
            redirect(line)
        return
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        silence(stream)


def finish() -> None:
    """Flush stdout.

    Raises:
        OSError: the end of the results cannot be written.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        silence(sys.stdout)
        raise
