"""The files of a NeMo checkpoint by name, wherever they lie: in a folder, or one after another in a tar."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nemotron_fp8.sources.files import Identity, Opener, SourceFile


OPEN_FILES = 64
"""Files that are open at a time, each with two descriptors: a mapping has its own. A fine grid of chunks has thousands
of files in one output shard, and a process may often open no more than 256."""


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


def files_of_folder(root: Path) -> tuple[Files, PooledOpener]:
    """List a folder and the folders in it, and say what opens the files. Links to folders are not followed.

    Raises:
        SourceReadError: a folder cannot be read.
        SourceLinkError: a file is a link to somewhere else.
    """
    identities: dict[str, Identity] = {}

    def refuse(error: OSError) -> None:
        raise SourceReadError(str(error.filename), error.strerror or str(error)) from error

    for folder, _, names in os.walk(root, onerror=refuse):
        stem = Path(folder).relative_to(root).as_posix()
        for name, identity in identify(Path(folder)).items():  # no pipes, no links that lead nowhere
            if name in names:
                identities[name if stem == "." else f"{stem}/{name}"] = identity
    for name, target in links_outside(root, identities).items():
        raise SourceLinkError(name, target)
    places = {name: Place(name, 0, identity[0]) for name, identity in identities.items()}
    opener = PooledOpener(root, identities)
    return Files(str(root), places, opener), opener


@dataclass
class _Entry:
    """An open file of the pool, and how many calls are in it."""

    file: MappedFile
    users: int = 0


class PooledOpener:
    """Opens files under a folder, and keeps no more than so many of them open.

    Args:
        root: the folder.
        identities: what its files were when the inventory was taken; one that is something else by now is
            refused.
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
        """Give ``root / file``; it is opened when it is first read."""
        return _PooledFile(self, file)

    @contextmanager
    def lease(self, name: str) -> Iterator[MappedFile]:
        """Give an open file, which stays open for as long as it is leased."""
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
        """Close the files that were used longest ago, as far as nobody is in them."""
        idle = [name for name, entry in self._entries.items() if not entry.users]
        for name in idle[: max(0, len(self._entries) + 1 - self.capacity)]:
            self._entries.pop(name).file.close()

    def release(self, name: str, offset: int, length: int) -> None:
        """Give pages back, if the file is open."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None:
                entry.file.release(offset, length)

    def drop(self, name: str) -> None:
        """Close a file if it is open and nobody is in it."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and not entry.users:
                self._entries.pop(name).file.close()


class _PooledFile:
    """A file that is open while it is in use, and for as long after that as the pool has room."""

    def __init__(self, pool: PooledOpener, name: str) -> None:
        self._pool, self._name = pool, name

    def window(self, offset: int, length: int) -> memoryview | None:
        """See `SourceFile.window`. The window holds its mapping, also when the pool closes the file."""
        with self._pool.lease(self._name) as file:
            return file.window(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `SourceFile.read_into`."""
        with self._pool.lease(self._name) as file:
            file.read_into(offset, buffer)

    def release(self, offset: int, length: int) -> None:
        """See `SourceFile.release`."""
        self._pool.release(self._name, offset, length)

    def close(self) -> None:
        """See `SourceFile.close`. A file that the pool has closed was checked then."""
        self._pool.drop(self._name)
