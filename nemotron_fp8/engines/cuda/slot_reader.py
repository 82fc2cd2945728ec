"""Reads into pinned slots: cached bytes through the page cache, other bytes past it.

Copying a cached page is cheaper than reading the disk. Filling the page cache with bytes that are read once costs a
copy and evicts pages of other processes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8.engines.cuda.memory_plan import PAGE, round_up
from nemotron_fp8.sources.files import MappedFile

if TYPE_CHECKING:
    from nemotron_fp8.engines.cuda.schedule import Load
    from nemotron_fp8.sources.reader import Reader


WARM_SHARE = 0.5
"""Smallest cached share of a span that is read through the page cache."""
_CACHESTAT = 451
"""Number of the system call on every architecture (Linux 6.5)."""


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    """``struct cachestat`` of linux/mman.h, in pages."""

    _fields_ = (
        ("cache", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


def cached_share(fd: int, offset: int, length: int) -> float | None:
    """Return the share of a span that is in the page cache; None if the operating system does not report it."""
    if sys.platform != "linux" or not length:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    span, counts = _Range(offset, length), _Counts()
    if libc.syscall(ctypes.c_long(_CACHESTAT), fd, ctypes.byref(span), ctypes.byref(counts), 0):
        return None
    pages = (offset + length - 1) // PAGE - offset // PAGE + 1
    return min(1.0, int(counts.cache) / pages)


class SlotReader:
    """Fills slots with loads. Any thread may call it.

    Args:
        reader: opens the files, and reads files that are not local.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._lock = Lock()
        self._direct: dict[str, _DirectFile | None] = {}

    def close(self) -> None:
        """Close the files that were opened with O_DIRECT."""
        files, self._direct = self._direct, {}
        for file in files.values():
            if file is not None:
                file.close()

    def fill(self, load: Load, slot: memoryview) -> None:
        """Read all bytes of a load into its slot.

        Raises:
            SourceReadError: a file cannot be read or ends early.
        """
        for read in load.reads:
            direct = self._file(read.file)
            if direct is None or not direct.read(read.offset, read.length, slot, read.at):
                self._reader.file(read.file).read_into(read.offset, slot[read.at : read.at + read.length])
        for index in load.gathered:
            piece = load.pieces[index]
            target = slot[piece.at : piece.at + piece.end - piece.begin]
            self._reader.gather(piece.view, piece.begin, piece.end, target)

    def _file(self, name: str) -> _DirectFile | None:
        """Return a file that is opened with O_DIRECT; None if that is impossible."""
        with self._lock:
            if name not in self._direct:
                file = self._reader.file(name)
                self._direct[name] = _open(file.fileno()) if isinstance(file, MappedFile) else None
            return self._direct[name]


def _open(fd: int) -> _DirectFile | None:
    try:
        return _DirectFile(fd)
    except (OSError, AttributeError):  # a file system or an operating system without O_DIRECT
        return None


class _DirectFile:
    """A local file, reopened with O_DIRECT through its descriptor, so that a rename does not change the file."""

    def __init__(self, fd: int) -> None:
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        self._refused = False

    def close(self) -> None:
        os.close(self._fd)

    def read(self, offset: int, length: int, slot: memoryview, at: int) -> bool:
        """Read a span unless most of it is cached; return True if it was read.

        Whole pages are read into whole pages of the slot, so bytes around the span are overwritten.
        """
        share = cached_share(self._fd, offset, length)
        if self._refused or share is None or share >= WARM_SHARE:
            return False
        head = offset % PAGE
        begin, done, wanted = offset - head, 0, head + length
        target = slot[at - head : at - head + round_up(wanted, PAGE)]
        try:
            while done < wanted:
                got = os.preadv(self._fd, [target[done:]], begin + done)
                done += got
                if got % PAGE or not got:
                    break  # the end of the file
        except OSError as error:
            if error.errno != errno.EINVAL:
                return False  # the buffered read fails with the same error and reports it
            self._refused = True
            return False
        return done >= wanted
