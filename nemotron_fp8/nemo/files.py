"""The files of a NeMo checkpoint by name, wherever they lie: in a folder, or one after another in a tar."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.errors import SourceChangedError, SourceReadError
from nemotron_fp8.read import MappedFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nemotron_fp8.read import Opener, SourceFile

OPEN_FILES = 128
"""Files that are open at a time. A fine grid of chunks has thousands of them in one output shard."""


class Place(NamedTuple):
    """Where the bytes of a file lie: ``size`` bytes from byte ``offset`` of what ``opener.open(file)``
    gives.
    """

    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint.

    Attributes:
        source: how a person calls it.
        places: where every file lies, by its name relative to the checkpoint, with ``/`` between folders.
        opener: opens what places name.
    """

    source: str
    places: Mapping[str, Place]
    opener: Opener

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return bytes ``[offset, offset + length)`` of a file, fewer where it ends; all without ``length``.

        Raises:
            SourceReadError: there is no such file, or it cannot be read.
        """
        place = self.places.get(name)
        if place is None:
            raise SourceReadError(f"{self.source}/{name}", "no such file")
        rest = max(0, place.size - offset)
        buffer = bytearray(rest if length is None else min(length, rest))
        file = self.opener.open(place.file)
        try:
            file.read_into(place.offset + offset, memoryview(buffer))
        finally:
            file.close()
        return bytes(buffer)

    def below(self, folder: str) -> Iterator[str]:
        """Names of the files that begin with ``folder`` (write its ``/``), in order; ``""`` for all."""
        for i in range(bisect_left(self._names, folder), len(self._names)):
            if not self._names[i].startswith(folder):
                return
            yield self._names[i]

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self.places)


def files_of_folder(root: Path) -> Files:
    """List a folder and the folders in it. Links to files are followed, links to folders are not.

    Raises:
        SourceReadError: a folder cannot be read.
    """
    places: dict[str, Place] = {}

    def refuse(error: OSError) -> None:
        raise SourceReadError(str(error.filename), error.strerror or str(error)) from error

    for folder, _, names in os.walk(root, onerror=refuse):
        stem = Path(folder).relative_to(root).as_posix()
        for name in names:
            path = Path(folder, name)
            if path.is_file():  # not a pipe, not a link that leads nowhere
                key = name if stem == "." else f"{stem}/{name}"
                places[key] = Place(key, 0, path.stat().st_size)
    return Files(str(root), places, PooledOpener(root))


@dataclass
class _Entry:
    """An open file of the pool, and how many calls are in it."""

    file: MappedFile
    users: int = 0


@dataclass
class _Pool:
    """Open files, the least recently used first."""

    capacity: int
    entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)
    lock: Lock = field(default_factory=Lock)

    @contextmanager
    def lease(self, path: Path) -> Iterator[MappedFile]:
        """Give the open file of a path; it stays open for as long as it is leased."""
        key = str(path)
        with self.lock:
            entry = self.entries.get(key)
            if entry is None:
                self._make_room()
                entry = self.entries[key] = _Entry(MappedFile(path))
            self.entries.move_to_end(key)
            entry.users += 1
        try:
            yield entry.file
        finally:
            with self.lock:
                entry.users -= 1

    def _make_room(self) -> None:
        idle = [key for key, entry in self.entries.items() if not entry.users]
        for key in idle[: len(self.entries) + 1 - self.capacity]:
            self.entries.pop(key).file.close()

    def release(self, path: Path, offset: int, length: int) -> None:
        """Give pages back, if the file is open."""
        with self.lock:
            entry = self.entries.get(str(path))
            if entry is not None:
                entry.file.release(offset, length)

    def drop(self, path: Path) -> None:
        """Close a file if nobody uses it."""
        with self.lock:
            entry = self.entries.get(str(path))
            if entry is not None and not entry.users:
                self.entries.pop(str(path)).file.close()


class PooledOpener:
    """Opens files under a folder, and keeps no more than so many of them open.

    Args:
        root: the folder.
        capacity: files open at a time.
    """

    def __init__(self, root: Path, capacity: int = OPEN_FILES) -> None:
        self.root, self.capacity = root, capacity
        self._pool = _Pool(capacity)

    def __getstate__(self) -> tuple[Path, int]:
        return self.root, self.capacity

    def __setstate__(self, state: tuple[Path, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # a pool of its own in every process

    def open(self, file: str) -> SourceFile:
        """Give ``root / file``; it is opened when it is first read."""
        return _PooledFile(self._pool, self.root / file)


class _PooledFile:
    """A file that is open while it is in use, and for as long after that as the pool has room."""

    def __init__(self, pool: _Pool, path: Path) -> None:
        self._pool, self._path = pool, path
        self._identity = self._stat()

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise SourceReadError(str(self._path), error.strerror or str(error)) from error
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def window(self, offset: int, length: int) -> memoryview | None:
        """See `SourceFile.window`. The window holds its mapping, also when the pool closes the file."""
        with self._pool.lease(self._path) as file:
            return file.window(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `SourceFile.read_into`."""
        with self._pool.lease(self._path) as file:
            file.read_into(offset, buffer)

    def release(self, offset: int, length: int) -> None:
        """See `SourceFile.release`."""
        self._pool.release(self._path, offset, length)

    def close(self) -> None:
        """Check that the file is what it was when this was made; let the pool close it."""
        self._pool.drop(self._path)
        now = self._stat()
        if now != self._identity:
            raise SourceChangedError(str(self._path), self._identity[0], now[0])
