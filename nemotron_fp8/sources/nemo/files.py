"""Files of a NeMo checkpoint by name, in a folder or in a tar."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.checkpoint.local_files import links_outside
from nemotron_fp8.errors import SourceLinkError, SourceReadError
from nemotron_fp8.sources.files import MappedFile, identify, without_inodes
from nemotron_fp8.untrusted.regular_files import why_unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nemotron_fp8.sources.files import Identity, Opener, SourceFile


OPEN_FILES = 64
"""Files that are open at a time, with two descriptors each: a mapping has its own.

A fine grid of chunks has thousands of files in one output shard, and the limit of a process is often 256.
"""


class Place(NamedTuple):
    """Location of a file: ``size`` bytes from byte ``offset`` of ``opener.open(file)``."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class Files:
    """Files of a checkpoint.

    Attributes:
        source: name of the checkpoint in messages.
        places: location of every file, by its name relative to the checkpoint, with ``/`` between folders.
        opener: opens the files of places.
    """

    source: str
    places: Mapping[str, Place]
    opener: Opener

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return bytes ``[offset, offset + length)`` of a file, fewer at its end; all without ``length``.

        Raises:
            SourceReadError: the file does not exist or cannot be read.
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
        """Yield the names of files that begin with ``folder`` (with its ``/``), in order; ``""`` for all."""
        for i in range(bisect_left(self._names, folder), len(self._names)):
            if not self._names[i].startswith(folder):
                return
            yield self._names[i]

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self.places)


def files_of_folder(root: Path) -> tuple[Files, PooledOpener]:
    """List a folder and its subfolders, and create the opener of the files. Links to folders are not followed.

    Raises:
        SourceReadError: a folder cannot be read, or a file in it is a pipe, a device or a link to nowhere.
        SourceLinkError: a link leaves the folder.
    """
    identities: dict[str, Identity] = {}

    def refuse(error: OSError) -> None:
        raise SourceReadError(str(error.filename), error.strerror or str(error)) from error

    for folder, _, names in os.walk(root, onerror=refuse):
        stem = Path(folder).relative_to(root).as_posix()
        found = identify(Path(folder))
        for name in names:
            if name not in found and (why := why_unreadable(Path(folder) / name)):
                raise SourceReadError(str(Path(folder) / name), why)
        for name, identity in found.items():
            if name in names:
                identities[name if stem == "." else f"{stem}/{name}"] = identity
    for name, target in links_outside(root, identities).items():
        raise SourceLinkError(name, target)
    places = {name: Place(name, 0, identity[0]) for name, identity in identities.items()}
    opener = PooledOpener(root, identities)
    return Files(str(root), places, opener), opener


@dataclass
class _Entry:
    """Open file of the pool, and the number of calls that use it."""

    file: MappedFile
    users: int = 0


class PooledOpener:
    """Opens files under a folder and keeps a limited number of them open.

    Args:
        root: the folder.
        identities: identities of its files when the inventory was taken; a file that differs is rejected.
        capacity: files open at a time.
    """

    def __init__(self, root: Path, identities: Mapping[str, Identity], capacity: int = OPEN_FILES) -> None:
        self.root, self.identities, self.capacity = root, identities, capacity
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> tuple[Path, Mapping[str, Identity], int]:
        return self.root.absolute(), without_inodes(self.identities), self.capacity

    def __setstate__(self, state: tuple[Path, Mapping[str, Identity], int]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # open files of its own in every process

    def open(self, file: str) -> SourceFile:
        """Return ``root / file``; the file is opened on first use."""
        return _PooledFile(self, file)

    @contextmanager
    def lease(self, name: str) -> Iterator[MappedFile]:
        """Yield an open file, which stays open inside the ``with`` block."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                self._make_room()
                entry = _Entry(MappedFile(self.root / name, self.identities.get(name)))
                self._entries[name] = entry
            self._entries.move_to_end(name)
            entry.users += 1
        try:
            yield entry.file
        finally:
            with self._lock:
                entry.users -= 1

    def _make_room(self) -> None:
        """Close the least recently used files that nobody is using."""
        idle = [name for name, entry in self._entries.items() if not entry.users]
        for name in idle[: max(0, len(self._entries) + 1 - self.capacity)]:
            self._entries.pop(name).file.close()

    def release(self, name: str, offset: int, length: int) -> None:
        """Drop pages if the file is open."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None:
                entry.file.release(offset, length)

    def drop(self, name: str) -> None:
        """Close a file if it is open and nobody is using it."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and not entry.users:
                self._entries.pop(name).file.close()


class _PooledFile:
    """File that is open while in use, and afterwards as long as the pool has room."""

    def __init__(self, pool: PooledOpener, name: str) -> None:
        self._pool, self._name = pool, name

    def window(self, offset: int, length: int) -> memoryview | None:
        """Return mapped bytes. The window keeps its mapping even if the pool closes the file."""
        with self._pool.lease(self._name) as file:
            return file.window(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self._pool.lease(self._name) as file:
            file.read_into(offset, buffer)

    def release(self, offset: int, length: int) -> None:
        self._pool.release(self._name, offset, length)

    def close(self) -> None:
        """Close the file, unless the pool has closed and checked it already."""
        self._pool.drop(self._name)
