"""A local folder as destination: staged beside the final place, published by one rename.

``<destination>.partial`` holds ``out/``, in which the result is made, and a lock. The commit point is the
rename of ``out/``; until then the destination is what it was.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.errors import (
    DestinationBusyError,
    DestinationExistsError,
    NemotronFp8Error,
    OverlapError,
    WriteError,
)
from nemotron_fp8.write import FileSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nemotron_fp8.unit import Receipt
    from nemotron_fp8.write import Sink

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class FolderDestination:
    """Makes a checkpoint folder that appears all at once. Use it as a context manager: what is not published
    goes.

    Args:
        path: the final folder.
        source: the source's folder, which must not lie in the destination or around it; None where it is no
            folder.
        overwrite: whether to replace a folder that is there already.
        digests: whether receipts carry the SHA-256.

    Raises:
        OverlapError: source and destination lie inside each other.
        DestinationExistsError: the destination is a file, or a folder with something in it and ``overwrite``
            is off.
        DestinationBusyError: another process makes the same destination.
        WriteError: the system refuses to write.
    """

    def __init__(self, path: Path, source: Path | None, *, overwrite: bool, digests: bool) -> None:
        self.path = Path(os.path.realpath(path))
        self.overwrite, self.digests = overwrite, digests
        if source is not None:
            refuse_overlap(source, self.path)
        if self.occupied() and (not overwrite or not self.path.is_dir()):
            what = "holds files already" if self.path.is_dir() else "is a file"
            raise DestinationExistsError(str(self.path), what)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.out = self.partial / "out"
        self._lock = -1

    def occupied(self) -> bool:
        """Whether the destination is there and is not an empty folder."""
        return is_occupied(self.path)

    def __enter__(self) -> FolderDestination:
        with _typed(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock = os.open(self.partial / "lock", flags, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise DestinationBusyError(str(self.partial)) from None
            if self.out.exists():  # of a run that was killed
                shutil.rmtree(self.out)
            self.out.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)

    def stage(self, name: str, size: int) -> Sink:
        """See `nemotron_fp8.write.Destination.stage`."""
        return FileSink(self.out, name, size, self.digests)

    def publish(
        self,
        receipts: Mapping[str, Receipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """See `nemotron_fp8.write.Destination.publish`."""
        for name, receipt in receipts.items():
            size = (self.out / name).stat().st_size if (self.out / name).is_file() else -1
            if size != receipt.size:
                raise WriteError(str(self.out / name), f"{size:,} bytes staged, its receipt says {receipt.size:,}")
        with _typed(self.out):
            for name, data in documents.items():
                _write_new(self.out / name, iter([data]))
            for name, pieces in copies.items():
                _write_new(self.out / name, pieces())
            sync_folder(self.out)
            if self.occupied():
                _exchange(self.out, self.path, self.partial / "old")
            else:
                os.rename(self.out, self.path)
            sync_folder(self.path.parent)


def is_occupied(path: Path) -> bool:
    """Whether something is at ``path`` that is not an empty folder."""
    if not path.is_dir():
        return os.path.lexists(path)
    return any(os.scandir(path))


def refuse_overlap(source: Path, destination: Path) -> None:
    """Raise OverlapError where a source and a destination, or its partial folder, lie in each other, links followed."""
    a, b = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
    if a == b or a in b.parents or b in a.parents:
        raise OverlapError(str(a), str(b))
    partial = b.with_name(f"{b.name}.partial")  # which is removed in the end
    if a == partial or partial in a.parents:
        raise OverlapError(str(a), str(partial))


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    """Turn what the system refuses into an error of ours."""
    try:
        yield
    except NemotronFp8Error:
        raise
    except OSError as error:
        raise WriteError(str(error.filename or path), error.strerror or str(error)) from error


def _write_new(path: Path, pieces: Iterator[bytes]) -> None:
    """Write a file that must not be there yet, and sync it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    with os.fdopen(fd, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path, aside: Path) -> None:
    """Let ``new`` and ``old`` change places in one step; where the system cannot, by way of ``aside``."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        with suppress(AttributeError):  # a C library without renameat2
            if not libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE):
                return
    # Two renames: for a moment there is no destination, but never half of one.
    os.rename(old, aside)
    os.rename(new, old)
