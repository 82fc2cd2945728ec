"""A destination that writes nothing: it says whether a folder is the very result that a plan would make."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.local_files import digest_of_file
from nemotron_fp8.destinations.base import Staged
from nemotron_fp8.errors import NemotronFp8Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.planning.receipt import ShardReceipt


class DifferentError(NemotronFp8Error):
    """The folder is something else. Never leaves this library: it ends a comparison early."""

    problem: str
    message = "{problem}"


class ComparingDestination:
    """Takes what would be written and compares it with what is there.

    Args:
        path: the folder.
        digests: whether receipts carry the SHA-256.
        patient: whether a shard may be begun in vain, in a layout that a value which is not finite then changes;
            what differs is told at its end only.
    """

    def __init__(self, path: Path, digests: bool, patient: bool) -> None:
        self.path, self.digests, self.patient = path, digests, patient

    def finished(self) -> Mapping[str, ShardReceipt]:
        """Nothing is taken for granted."""
        return {}

    @property
    def staging(self) -> ComparingDestination:
        """Itself: it holds a path and nothing else."""
        return self

    def stage(self, name: str, size: int) -> ComparingSink:
        """Begin to compare a shard."""
        return ComparingSink(self.path / name, size, self.digests, self.patient)

    def record(self, receipt: ShardReceipt) -> None:
        """Nothing is to be done: the shard is there."""

    def wait(self) -> None:
        """Nothing is under way."""

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """Compare the small files, and the names of all."""
        with _told_as_different():
            there = {entry.name for entry in os.scandir(self.path)}
        if there != receipts.keys() | documents.keys() | copies.keys():
            raise DifferentError(f"{self.path}: other files")
        for name, data in documents.items():
            _same(self.path / name, iter([data]))
        for name, pieces in copies.items():
            _same(self.path / name, pieces())


@contextmanager
def _told_as_different() -> Iterator[None]:
    """What cannot be read, as a folder where a file should be, is not what would be written."""
    try:
        yield
    except NemotronFp8Error:  # some are system errors too
        raise
    except OSError as error:
        raise DifferentError(str(error)) from error


def _must_be_file(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise DifferentError(str(path))


def _same(path: Path, pieces: Iterator[bytes]) -> None:
    _must_be_file(path)
    with _told_as_different(), path.open("rb") as file:
        if any(file.read(len(piece)) != piece for piece in pieces) or file.read(1):
            raise DifferentError(str(path))


class ComparingSink:
    """A shard that is there already; every byte that would be written is compared with it."""

    def __init__(self, path: Path, size: int, digests: bool, patient: bool) -> None:
        self._path, self._size, self._digests, self._patient = path, size, digests, patient
        self._different = False
        with _told_as_different():
            _must_be_file(path)
            if path.stat().st_size != size:
                self._note()
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _note(self) -> None:
        if not self._patient:
            raise DifferentError(str(self._path))
        self._different = True

    def write_at(self, offset: int, data: memoryview) -> None:
        """Compare bytes with those at their place."""
        data = data.cast("B")
        if os.pread(self._fd, len(data), offset) != data:
            self._note()

    def finish(self) -> Staged:
        """All bytes were the same; the digest is that of what is there."""
        if self._different:
            raise DifferentError(str(self._path))
        sha256 = digest_of_file(self._fd) if self._digests else None
        return Staged(self._path.name, self._size, sha256)
