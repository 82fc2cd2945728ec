"""Files of a destination: shards written at offsets, with their digest, and made durable."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import sys
from contextlib import suppress
from threading import Condition, Lock
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import sync_folder
from nemotron_fp8.checkpoint.local_files import HASH_BYTES
from nemotron_fp8.destinations.base import Staged
from nemotron_fp8.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self


WRITE_BYTES = 512 << 10
"""Largest write. For a larger one the kernel looks for larger pages, which took up to ten times as long for 1 MiB."""
WRITEBACK_BYTES = 32 << 20
"""Bytes between two writeback hints: the disk writes while the next bytes are computed."""
_SYNC_FILE_RANGE_WRITE = 2


class FileSink:
    """Sink of a shard in a folder of temporaries; creates the file exclusively.

    Args:
        folder: the folder; no other run works in it.
        name: file name of the shard.
        size: bytes of the shard, reserved at once, so that a full disk is detected before the shard is computed.
        digests: whether to compute the SHA-256 digest, from the bytes as they are written.

    Raises:
        WriteError: the file cannot be created, written or synced.
    """

    def __init__(self, folder: Path, name: str, size: int, digests: bool) -> None:
        self.name, self.size = name, size
        self.path = folder / name
        self._finished = False
        self._written = 0
        self._lock = Lock()
        self._writing = Lock()
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise refused(self.path, error) from error
        try:
            reserve(self._fd, size)
        except OSError as error:
            self.discard()
            raise refused(self.path, error) from error
        self._digest = _StreamingDigest(self._fd, self.path, size) if digests else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            if self._digest:
                self._digest.stop()
            self.discard()

    def write_at(self, offset: int, data: memoryview) -> None:
        data = data.cast("B")
        if not data:
            return
        done = 0
        try:
            with self._writing:  # a file system lets one thread write to a file, and others would wait on a busy core
                while done < len(data):
                    wrote = os.pwrite(self._fd, data[done : done + WRITE_BYTES], offset + done)
                    if not wrote:
                        raise OSError(errno.EIO, "the file system writes no bytes, and reports no error")
                    done += wrote
        except OSError as error:
            raise refused(self.path, error) from error
        with self._lock:
            self._written += done
            due = self._written // WRITEBACK_BYTES > (self._written - done) // WRITEBACK_BYTES
        if due:
            start_writeback(self._fd)
        if self._digest:
            self._digest.wrote(offset, data)

    def finish(self) -> Staged:
        """Close the complete file; `commit_file` makes the file durable."""
        if self._written != self.size:
            raise WriteError(str(self.path), f"{self._written:,} of {self.size:,} bytes were written")
        sha256 = self._digest.hexdigest() if self._digest else None
        try:
            self._close()
        except OSError as error:  # some file systems report a full disk here
            raise refused(self.path, error) from error
        self._finished = True
        return Staged(self.name, self.size, sha256)

    def discard(self) -> None:
        """Close and remove the file."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self.path.unlink()

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1  # closed even if that reports an error
            os.close(fd)


def commit_file(made: Path, size: int, final: Path) -> None:
    """Make a finished shard durable under its final name, on the same file system.

    Raises:
        WriteError: the file cannot be synced or renamed, or no longer has the size that was written.
    """
    try:
        fd = os.open(made, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if (found := os.fstat(fd).st_size) != size:
                problem = f"{found:,} bytes instead of {size:,}: another process changed the file; rerun the command"
                raise WriteError(str(made), problem)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(made, final)
        sync_folder(final.parent)
    except WriteError:
        raise
    except OSError as error:
        raise refused(made, error) from error


def write_file(path: Path, pieces: Iterator[bytes] | Iterator[memoryview], temporary: Path, mode: int = 0o666) -> None:
    """Write and sync a file under a temporary name, then rename it; ``mode`` has the permissions of the file.

    Raises:
        OSError: the file cannot be written, synced or renamed.
    """
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def refused(path: Path, error: OSError) -> WriteError:
    """Return a system error as a WriteError."""
    return WriteError(str(path), error.strerror or str(error), error.errno)


def reserve(fd: int, size: int) -> None:
    """Reserve the bytes of a file; do nothing if the file system does not support that.

    ``posix_fallocate`` would write every block on such a file system.

    Raises:
        OSError: the bytes cannot be reserved, usually because the disk is full.
    """
    if sys.platform != "linux" or not size:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR):
            raise OSError(code, os.strerror(code))


def start_writeback(fd: int) -> None:
    """Start writing dirty pages to the disk, so that the final sync is short; only a hint."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        with suppress(AttributeError):  # a C library without sync_file_range
            libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


class _StreamingDigest:
    """SHA-256 digest of a file, computed by the threads that write it.

    A thread that continues the written prefix hashes its bytes from memory, after the threads before it. Bytes that are
    written ahead of the prefix are read back from the file when the prefix reaches them.
    """

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self._fd, self._path, self._size = fd, path, size
        self._ahead: dict[int, int] = {}
        self._taken = 0
        self._hashed = 0
        self._stopped = False
        self._error: OSError | None = None
        self._hash = hashlib.sha256()
        self._changed = Condition()

    def wrote(self, offset: int, data: memoryview) -> None:
        """Hash a span that was written, or keep it for later; return when its bytes are not needed any more."""
        try:
            with self._changed:
                if offset != self._taken:
                    self._ahead[offset] = offset + len(data)
                    return
                self._taken += len(data)
                while self._hashed < offset and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
            self._hash.update(data)  # only the thread whose turn it is gets here
            self._advance(len(data))
        except OSError as error:
            self._error = error
            self.stop()
        except BaseException:
            self.stop()  # no other thread waits for this one, which may have been interrupted
            raise

    def hexdigest(self) -> str:
        """Return the digest of the file, which is complete."""
        if self._error:
            raise refused(self._path, self._error) from self._error
        if self._hashed != self._size:
            raise WriteError(
                str(self._path), f"only the first {self._hashed:,} of {self._size:,} bytes were written without a gap"
            )
        return self._hash.hexdigest()

    def stop(self) -> None:
        """Stop hashing; no thread waits any longer."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _advance(self, length: int) -> None:
        """Add ``length`` hashed bytes to the prefix, and the spans ahead that follow them."""
        while True:
            with self._changed:
                self._hashed += length
                self._changed.notify_all()
                end = self._ahead.pop(self._taken, None) if self._hashed == self._taken else None
                if end is None or self._stopped:
                    return
                length, self._taken = end - self._taken, end
            self._read_back(end - length, end)

    def _read_back(self, done: int, end: int) -> None:
        buffer = memoryview(bytearray(min(HASH_BYTES, end - done)))
        while done < end:
            got = os.preadv(self._fd, [buffer[: end - done]], done)
            if not got:
                raise OSError(errno.EIO, "the file is shorter than the bytes written to it")
            self._hash.update(buffer[:got])
            done += got
