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


class DiskSpaceError(WriteError):
    """The destination's file system, or a quota on it, has no room for the result.

    Attributes:
        path: the destination.
        needed: bytes that are still to be written.
        free: bytes that the file system says are free.
        missing: bytes that must be freed; 0 where the file system says there is room (a quota then).
    """

    def __init__(self, path: str, needed: int, free: int, errno: int | None = None) -> None:
        self.needed, self.free, self.missing = needed, free, max(0, needed - free)
        room = (
            f"free {self.missing:,} more"
            if self.missing
            else "which the file system says it has; free some, or raise the quota"
        )
        super().__init__(
            path,
            f"no room: {needed:,} bytes are still to be written and {free:,} are free; {room}, then run the"
            " same command again: finished shards are not made again",
            errno,
        )


class DamagedJournalError(DestinationError):
    """The journal of an unfinished conversion is not what was written.

    Attributes:
        path: the journal.
        line: the first line that is wrong, counted from 1.
        problem: what is wrong.
    """

    def __init__(self, path: str, line: int, problem: str = "") -> None:
        self.path, self.line, self.problem = path, line, problem or f"line {line:,} is damaged"
        super().__init__(f"{path}: {self.problem}; start over with restart=True (--restart)")


class OtherRunError(DestinationError):
    """An unfinished conversion stands where this one would, and is not of the same source and recipe.

    Attributes:
        path: its journal.
        what: what differs: ``recipe``, ``source``, ``plan``, ``version``, ``mode`` or ``schema``.
        problem: the same in words.
        final: whether it cannot be started over: shards of the source are replaced already.
    """

    def __init__(self, path: str, what: str, problem: str, final: bool = False) -> None:
        self.path, self.what, self.problem, self.final = path, what, problem, final
        way = "give it the same source and options, or discard it and start over with restart=True (--restart)"
        if final:
            same = "restore it, or fetch the checkpoint again" if what == "source" else "finish it as it was begun"
            way = f"shards are replaced already, it cannot be started over: {same}"
        super().__init__(f"{path}: an unfinished conversion, but {problem}; {way}")


class InPlaceError(DestinationError):
    """A folder cannot be converted in place, or what was begun cannot be carried on.

    Attributes:
        source: the folder.
    """

    def __init__(self, source: str, problem: str) -> None:
        self.source = source
        super().__init__(f"{source}: {problem}")
