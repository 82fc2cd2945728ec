"""Errors of a destination: a folder, a file, or an unfinished conversion."""

from __future__ import annotations

from nemotron_fp8.errors.base import DestinationError


class DestinationExistsError(DestinationError, FileExistsError):
    """The destination already exists with other contents.

    Attributes:
        path: the destination.
        problem: the existing contents.
    """

    path: str
    problem: str
    message = "{path}: {problem}; choose another destination, or overwrite it with overwrite=True (--overwrite)"


class OverlapError(DestinationError, ValueError):
    """Source and destination overlap: one contains the other.

    Attributes:
        source: the source's resolved path.
        destination: the destination's resolved path.
    """

    source: str
    destination: str
    message = "{destination}: inside the source {source}, or contains the source; choose a separate folder"


class DestinationBusyError(DestinationError):
    """Another process is writing the same destination.

    Attributes:
        path: the destination's partial folder.
        owner: the other process; empty if unknown.
    """

    path: str
    owner: str = ""
    message = "{path}: in use by {_owner}, which writes the same destination; wait for it to finish"

    @property
    def _owner(self) -> str:
        return self.owner or "another process"


class ForeignFolderError(DestinationError):
    """The folder of unfinished work belongs to another user, who could swap files in it before they are published.

    Attributes:
        path: the folder.
        owner: user id of its owner.
        user: user id of this process.
    """

    path: str
    owner: int
    user: int
    message = (
        "{path}: belongs to user {owner}, not to you (user {user}), and its owner could replace files in it before they"
        " are published; remove it, or choose another destination"
    )


class WriteError(DestinationError, OSError):
    """A file of the destination cannot be written.

    Attributes:
        path: the file.
        errno: error number of the system; None if the system reported no number.
    """

    path: str
    problem: str
    errno: int | None = None
    message = "{path}: {problem}"


class DiskSpaceError(WriteError):
    """The destination's file system, or a quota on it, has too little space for the result.

    Attributes:
        path: the destination.
        needed: bytes still to write.
        free: free bytes that the file system reports.
        missing: bytes to free; 0 if the file system reports enough free space, so that a quota is the likely cause.
    """

    def __init__(self, path: str, needed: int, free: int, errno: int | None = None) -> None:
        self.needed, self.free, self.missing = needed, free, max(0, needed - free)
        numbers = f"{needed:,} bytes are still needed and {free:,} are free"
        problem = (
            f"not enough space: {numbers}; free {self.missing:,} more"
            if self.missing
            else f"the write failed although {numbers}: a quota is probably exceeded; raise it or free space"
        )
        super().__init__(path, f"{problem}, then rerun the same command: finished shards are kept", errno)


class DamagedJournalError(DestinationError):
    """The journal of an unfinished conversion is damaged.

    Attributes:
        path: the journal.
        line: the first damaged line, counted from 1.
    """

    path: str
    line: int
    problem: str
    message = "{path}: {problem}; discard it and start over with --restart (restart=True)"

    def __init__(self, path: str, line: int, problem: str = "") -> None:
        super().__init__(path, line, problem or f"line {line:,} is damaged")


class OtherRunError(DestinationError):
    """The destination holds an unfinished conversion of another source or recipe.

    Attributes:
        path: journal of the unfinished conversion.
        what: the difference: ``recipe``, ``source``, ``plan``, ``version``, ``mode`` or ``schema``.
        problem: the difference in words.
        final: True if the run cannot be restarted, because shards of the source are already replaced.
    """

    path: str
    what: str
    problem: str
    final: bool = False
    message = "{path}: an unfinished conversion is here, but {problem}; {_advice}"

    @property
    def _advice(self) -> str:
        if not self.final:
            return "rerun with the original source and options, or discard it with --restart (restart=True)"
        source = "restore the source, or fetch the checkpoint again"
        same = source if self.what == "source" else "finish it with the original options"
        return f"shards are already replaced, so it cannot be started over: {same}"


class InPlaceError(DestinationError):
    """A folder cannot be converted in place, or its conversion cannot be resumed.

    Attributes:
        source: the folder.
    """

    source: str
    problem: str
    message = "{source}: {problem}"
