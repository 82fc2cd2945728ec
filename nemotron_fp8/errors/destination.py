"""A result that cannot be put where it was asked for."""

from __future__ import annotations

from nemotron_fp8.errors.base import DestinationError


class DestinationExistsError(DestinationError, FileExistsError):
    """The destination holds something else already.

    Attributes:
        path: the destination.
    """

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}; choose another destination or overwrite it (--overwrite)")


class OverlapError(DestinationError, ValueError):
    """Source and destination lie inside each other.

    Attributes:
        source, destination: the two paths, resolved.
    """

    def __init__(self, source: str, destination: str) -> None:
        self.source, self.destination = source, destination
        super().__init__(f"{destination}: lies in the source, or the source in it ({source}); choose a folder apart")


class DestinationBusyError(DestinationError):
    """Another process is making this destination.

    Attributes:
        path: its partial folder.
        owner: who that is, as far as is known.
    """

    def __init__(self, path: str, owner: str = "") -> None:
        self.path, self.owner = path, owner
        who = owner or "another process"
        super().__init__(f"{path}: in use by {who}, which makes the same destination; wait for it")


class WriteError(DestinationError, OSError):
    """The destination cannot be written.

    Attributes:
        path: the file.
        errno: the system's number of the error; None where the system did not refuse.
    """

    def __init__(self, path: str, problem: str, errno: int | None = None) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")
        self.errno = errno
