"""A destination that writes nothing: it says whether a folder is the very result that a plan would make."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nemotron_fp8.errors import NemotronFp8Error
from nemotron_fp8.manifest import digest_of_file
from nemotron_fp8.write import Staged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.unit import Receipt


class DifferentError(NemotronFp8Error):
    """The folder is something else. Never leaves this library: it ends a comparison early."""


class ComparingDestination:
    """Takes what would be written and compares it with what is there."""

    def __init__(self, path: Path, digests: bool) -> None:
        self.path, self.digests = path, digests

    def finished(self) -> Mapping[str, Receipt]:
        """Nothing is taken for granted."""
        return {}

    @property
    def staging(self) -> ComparingDestination:
        """Itself: it holds a path and nothing else."""
        return self

    def stage(self, name: str, size: int) -> ComparingSink:
        """Begin to compare a shard."""
        return ComparingSink(self.path / name, size, self.digests)

    def record(self, receipt: Receipt) -> None:
        """Nothing is to be done: the shard is there."""

    def wait(self) -> None:
        """Nothing is under way."""

    def publish(
        self,
        receipts: Mapping[str, Receipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """Compare the small files, and the names of all."""
        there = {entry.name for entry in os.scandir(self.path)}
        if there != receipts.keys() | documents.keys() | copies.keys():
            raise DifferentError(f"{self.path}: other files")
        for name, data in documents.items():
            _same(self.path / name, iter([data]))
        for name, pieces in copies.items():
            _same(self.path / name, pieces())


def _same(path: Path, pieces: Iterator[bytes]) -> None:
    with path.open("rb") as file:
        if any(file.read(len(piece)) != piece for piece in pieces) or file.read(1):
            raise DifferentError(str(path))


class ComparingSink:
    """A shard that is there already; every byte that would be written is compared with it."""

    def __init__(self, path: Path, size: int, digests: bool) -> None:
        self._path, self._size, self._digests = path, size, digests
        if not path.is_file() or path.is_symlink() or path.stat().st_size != size:
            raise DifferentError(str(path))
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write_at(self, offset: int, data: memoryview) -> None:
        """Compare bytes with those at their place."""
        data = data.cast("B")
        if os.pread(self._fd, len(data), offset) != data:
            raise DifferentError(str(self._path))

    def finish(self) -> Staged:
        """All bytes were the same; the digest is that of what is there."""
        sha256 = digest_of_file(self._fd) if self._digests else None
        return Staged(self._path.name, self._size, sha256)
