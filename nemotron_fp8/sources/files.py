"""Open input files: map them lazily, read at positions, detect changes when they are closed."""

from __future__ import annotations

import mmap
import os
from collections import Counter, OrderedDict
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from nemotron_fp8.errors import SourceChangedError, SourceReadError
from nemotron_fp8.untrusted.regular_files import descriptor_of, is_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from nemotron_fp8.checkpoint.inventory import SideFile
    from nemotron_fp8.checkpoint.tensor_view import TensorView


OPEN_FILES = 32
"""Files of a pool that remain open for reuse.

Two concurrent readers with two descriptors for each mapped file are far below the usual limit of 1,024 descriptors.
"""

Identity = tuple[int, int, int]
"""Size in bytes, modification time in ns and inode of a file, which change with the file. Inode 0 matches any inode."""

MAPPED_AT_ONCE = 2 << 20
"""Bytes that Linux maps at most for one fault in a mapped file, aligned to their size: a large folio of the page cache.

Older kernels map 64 KiB (``fault_around_bytes``).
"""

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)


class SourceFile(Protocol):
    """Open input file. Every method may be called from any thread at any time."""

    def window(self, offset: int, length: int) -> memoryview | None:
        """Return bytes ``[offset, offset + length)`` uncopied, or None where the file cannot be mapped."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` on."""

    def release(self, offset: int, length: int) -> None:
        """Declare bytes unused for now: their resident pages may be dropped."""

    def close(self) -> None:
        """Close the file; check that it has not changed since it was opened."""


class Opener(Protocol):
    """Opens the files of views. Picklable: a task and an opener are all that a worker needs."""

    def open(self, file: str) -> SourceFile:
        """Open a file by the key that extents name it with."""


@runtime_checkable
class Checked(Protocol):
    """Opener that knows checksums of parts of its files."""

    def check(self, views: Iterable[TensorView]) -> None:
        """Compare the parts that some tensors lie in with their checksums.

        Raises:
            SourceError: a part differs.
        """


@runtime_checkable
class Ranged(Protocol):
    """Opener whose reads may be requests to a server.

    Attributes:
        by_range: True if every read fetches its bytes, also those that were read before.
    """

    by_range: bool


def is_ranged(opener: Opener) -> bool:
    """Return True if a second pass over a tensor fetches it again."""
    return isinstance(opener, Ranged) and opener.by_range


class MappedFile:
    """Local file, mapped on first use. Only touched pages become resident, until they are released.

    Args:
        path: the file.
        identity: required identity; None accepts any file.
        name: name of the file in messages; None for its path.

    Raises:
        SourceReadError: the file cannot be opened, or a read ends before its range.
        SourceChangedError: on opening, if size, modification time or inode differ from ``identity``; on `close`, if
            they differ from those on opening.
    """

    def __init__(self, path: Path, identity: Identity | None = None, name: str | None = None) -> None:
        self.path, self.name = path, str(path) if name is None else name
        try:
            self._fd = descriptor_of(path)
        except OSError as error:
            raise SourceReadError(self.name, error.strerror or str(error)) from error
        self._identity = _identity(os.fstat(self._fd))
        if identity is not None and not _same(identity, self._identity):
            os.close(self._fd)
            self._fd = -1
            raise SourceChangedError(self.name, identity[0], self._identity[0])
        self.size = self._identity[0]
        self._map: mmap.mmap | None = None
        self._lock = Lock()

    def fileno(self) -> int:
        """Return the descriptor, which this object still owns."""
        return self._fd

    def window(self, offset: int, length: int) -> memoryview | None:
        """Return mapped bytes; None past the end, where touching them would crash the process."""
        if offset + length > self.size or not length:
            return None
        if self._map is None:
            with self._lock:
                if self._map is None:
                    # Private and writable only because torch wants writable buffers: no page is ever written,
                    # and MAP_NORESERVE keeps a 50 GB mapping from counting against the memory that may be
                    # committed.
                    self._map = mmap.mmap(
                        self._fd,
                        self.size,
                        flags=mmap.MAP_PRIVATE | _NORESERVE,
                        prot=mmap.PROT_READ | mmap.PROT_WRITE,
                    )
        return memoryview(self._map)[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` by positioned reads."""
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise SourceReadError(self.name, error.strerror or str(error)) from error
            if not got:
                raise SourceReadError(
                    self.name,
                    f"truncated: {len(buffer) - done:,} bytes are missing at byte {offset + done:,}; fetch it again",
                )
            done += got

    def release(self, offset: int, length: int) -> None:
        """Unmap the pages of a range from this process; a clean page costs nothing to map again.

        A fault maps the pages around its own, too: without those, small ranges of a large file would keep most of it
        resident.
        """
        if self._map is None or not length:
            return
        first, end = offset - offset % MAPPED_AT_ONCE, offset + length
        end += -end % MAPPED_AT_ONCE
        with suppress(OSError):  # a hint: a kernel that rejects it keeps the pages
            self._map.madvise(mmap.MADV_DONTNEED, first, min(end, self.size) - first)

    def close(self) -> None:
        """Close the file and compare size, modification time and inode with those on opening."""
        if self._fd < 0:
            return
        now = _identity(os.fstat(self._fd))
        self._map = None  # unmapped with the last window into it
        os.close(self._fd)
        self._fd = -1
        if now != self._identity:
            raise SourceChangedError(self.name, self._identity[0], now[0])


def _same(was: Identity, now: Identity) -> bool:
    return was[:2] == now[:2] and was[2] in (0, now[2])


def without_inodes(identities: Mapping[str, Identity]) -> dict[str, Identity]:
    """Return identities for another machine, which may see the same files under other inodes."""
    return {name: (size, modified, 0) for name, (size, modified, _) in identities.items()}


def _identity(info: os.stat_result) -> Identity:
    return info.st_size, info.st_mtime_ns, info.st_ino


def identify(root: Path) -> dict[str, Identity]:
    """Return size, modification time (ns) and inode of every file of a folder, by name; links are followed."""
    try:
        return {entry.name: _identity(entry.stat()) for entry in os.scandir(root) if is_file(entry)}
    except OSError as error:
        raise SourceReadError(str(root), error.strerror or str(error)) from error


class FolderOpener:
    """Opens files under a local folder.

    Args:
        root: the folder.
        identities: identities of its files when the inventory was taken (`identify`); a file that differs is
            rejected. None opens any file.
    """

    def __init__(self, root: Path, identities: Mapping[str, Identity] | None = None) -> None:
        self.root, self.identities = root, identities

    def __getstate__(self) -> tuple[Path, Mapping[str, Identity] | None]:
        # The copy is for another process, maybe on another machine: its working folder may differ.
        return self.root.absolute(), None if self.identities is None else without_inodes(self.identities)

    def __setstate__(self, state: tuple[Path, Mapping[str, Identity] | None]) -> None:
        self.root, self.identities = state

    def open(self, file: str) -> SourceFile:
        """Open ``root / file``."""
        return MappedFile(self.root / file, None if self.identities is None else self.identities.get(file))


def side_file_pieces(opener: Opener, side: SideFile, step: int = 1 << 20) -> Callable[[], Iterator[bytes]]:
    """Return a function that reads a side file, ``step`` bytes at a time."""

    def pieces() -> Iterator[bytes]:
        file = opener.open(side.file or side.name)
        for done in range(0, side.size, step):
            buffer = bytearray(min(step, side.size - done))
            file.read_into(side.offset + done, memoryview(buffer))
            yield bytes(buffer)
        file.close()

    return pieces


class OpenFiles:
    """Pool of open files: those in use and the most recently used ones, few even for a checkpoint of many files.

    Args:
        opener: opens the files.
        capacity: files that are open at a time, unless more are in use at once.

    Raises:
        SourceReadError: a file cannot be opened.
        SourceChangedError: a file changed between opening and closing.
    """

    def __init__(self, opener: Opener, capacity: int = OPEN_FILES) -> None:
        self._opener, self._capacity = opener, capacity
        self._files: OrderedDict[str, SourceFile] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._lock = Lock()

    @contextmanager
    def use(self, name: str) -> Iterator[SourceFile]:
        """Yield a file, which stays open inside the ``with`` block."""
        file = self.keep(name)
        try:
            yield file
        finally:
            with self._lock:
                self._users[name] -= 1

    def keep(self, name: str) -> SourceFile:
        """Return a file, which stays open until `close`."""
        with self._lock:
            if name not in self._files:
                self._make_room()
                self._files[name] = self._opener.open(name)
            self._files.move_to_end(name)
            self._users[name] += 1
            return self._files[name]

    def _make_room(self) -> None:
        """Close the least recently used files that nobody is using."""
        idle = [name for name in self._files if not self._users[name]]
        for name in idle[: max(0, len(self._files) + 1 - self._capacity)]:
            self._files.pop(name).close()

    def close(self) -> None:
        """Close all files; raise the error of the first one that has changed."""
        files, self._files = self._files, OrderedDict()
        self._users.clear()
        changed: SourceChangedError | None = None
        for file in files.values():
            try:
                file.close()
            except SourceChangedError as caught:
                changed = changed or caught
        if changed:
            raise changed
