"""Convert every unexpected exception of a reader into the error of its kind of data."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from nemotron_fp8.errors import NemotronFp8Error, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


LONGEST = 120
"""Maximum characters of the text of an exception in a message."""


@contextmanager
def guarded(refuse: Callable[[str], Exception]) -> Iterator[None]:
    """Convert any exception of the block into an error about the data that the block reads.

    Rules of a format are checked one by one, each with its own message. This is the net below them: no order of bytes
    may end in a traceback. Errors of this library, of the operating system and of memory pass unchanged.

    Args:
        refuse: returns the error for a problem.
    """
    try:
        yield
    except (NemotronFp8Error, OSError, MemoryError):
        raise
    except Exception as error:
        # The exception is not chained: some hold the whole document, and their text is untrusted.
        raise refuse(f"malformed: {describe(error)}") from None


def describe(error: BaseException) -> str:
    """Return an exception as a few words on one line: of a ValueError its text, of any other its class too."""
    text = printable(" ".join(str(error)[: 4 * LONGEST].split()), LONGEST)[1:-1]
    if type(error) is ValueError and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
