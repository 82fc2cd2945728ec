"""Bytes of a shard, written at offsets by many threads and read in order by one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections import deque
from threading import Condition
from typing import TYPE_CHECKING

from nemotron_fp8.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


WAITING_BYTES = 32 << 20
"""Bytes in order that may wait for the reader; beyond them, the thread that writes in order waits."""
AHEAD_BYTES = 128 << 20
"""Bytes beyond a gap that are kept in memory; further ones go to a temporary file."""
PIECE_BYTES = 4 << 20
"""Largest piece that the reader gets."""


class StoppedError(Exception):
    """The shard is given up. Internal: ends the reader's iterator, and so the upload."""


class OrderedBytes:
    """Buffer that puts the bytes of a shard into order, within bounded memory. Thread-safe.

    A thread whose bytes follow those before waits while the reader is behind. A thread whose bytes lie beyond a gap
    never waits, because it may be the one that fills the gap later.

    Args:
        size: bytes of the shard.
        folder: folder of the temporary file; None for the system's.
        waiting, ahead: limits of the bytes in memory, as in `WAITING_BYTES` and `AHEAD_BYTES`. The pieces that are
            written at one moment come on top of the first.
    """

    def __init__(
        self, size: int, folder: Path | None = None, waiting: int = WAITING_BYTES, ahead: int = AHEAD_BYTES
    ) -> None:
        self.size = size
        self.spilled = 0
        self._folder, self._most_waiting, self._most_ahead = folder, waiting, ahead
        self._changed = Condition()
        self._queue: deque[bytes | _Spilled] = deque()
        self._waiting = 0
        self._ahead: dict[int, bytes | _Spilled] = {}
        self._held = 0
        self._taken = 0
        self._released = False
        self._error: BaseException | None = None
        self._file = -1

    def write_at(self, offset: int, data: memoryview) -> None:
        """Take bytes at an offset; every byte comes once.

        Raises:
            WriteError: the temporary file cannot be written.
            BaseException: the error that `stop` was called with.
        """
        piece = bytes(data.cast("B"))  # the caller uses its buffer again
        if not piece:
            return
        with self._changed:
            self._raise_if_stopped()
            if offset != self._taken:
                self._keep(offset, piece)
                return
            self._append(piece)
            while (ahead := self._ahead.pop(self._taken, None)) is not None:
                if isinstance(ahead, bytes):
                    self._held -= len(ahead)
                self._append(ahead)
            self._changed.notify_all()
            # Nobody waits once all bytes are here: the reader gets the last ones only after `release`.
            while self._waiting > self._most_waiting and self._taken < self.size and self._error is None:
                self._changed.wait()
            self._raise_if_stopped()

    def __iter__(self) -> Iterator[memoryview]:
        """Yield all bytes in order, at most `PIECE_BYTES` at a time, the last ones after `release`.

        Only one thread may iterate.

        Raises:
            WriteError: the temporary file cannot be read.
            StoppedError: `stop` was called.
        """
        done = 0
        while done < self.size:
            with self._changed:
                while not self._queue and self._error is None:
                    self._changed.wait()
                if self._error is not None:
                    raise StoppedError
                piece = self._queue.popleft()
            for begin in range(0, len(piece), PIECE_BYTES):
                part = self._part(piece, begin)
                done += len(part)
                if done == self.size:
                    self._wait_for_release()
                yield part
            if isinstance(piece, bytes):
                with self._changed:
                    self._waiting -= len(piece)
                    self._changed.notify_all()

    @property
    def missing(self) -> int:
        """Bytes that were not written, from the first gap on."""
        with self._changed:
            return self.size - self._taken

    def release(self) -> None:
        """Let the reader have the last bytes."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def stop(self, error: BaseException) -> None:
        """End all waits: writers get ``error``, the reader StoppedError. The first call counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """Remove the temporary file; nobody writes or reads any more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _wait_for_release(self) -> None:
        with self._changed:
            while not self._released and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise StoppedError

    def _raise_if_stopped(self) -> None:
        if self._error is not None:
            raise self._error

    def _append(self, piece: bytes | _Spilled) -> None:
        self._queue.append(piece)
        self._taken += len(piece)
        if isinstance(piece, bytes):
            self._waiting += len(piece)

    def _keep(self, offset: int, piece: bytes) -> None:
        if self._held + len(piece) <= self._most_ahead:
            self._held += len(piece)
            self._ahead[offset] = piece
            return
        try:
            self._ahead[offset] = self._spill(piece)
        except OSError as error:
            raise self._refused(error) from error

    def _spill(self, piece: bytes) -> _Spilled:
        if self._file < 0:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            # Without a name from the start, so that a killed process leaves nothing behind.
            with tempfile.TemporaryFile(dir=self._folder, prefix="nemotron_fp8-") as file:
                self._file = os.dup(file.fileno())
        begin, rest = self.spilled, memoryview(piece)
        while rest:
            wrote = os.pwrite(self._file, rest, begin + len(piece) - len(rest))
            if not wrote:
                raise OSError(errno.EIO, "the file system writes no bytes, and reports no error")
            rest = rest[wrote:]
        self.spilled += len(piece)
        return _Spilled(begin, len(piece))

    def _part(self, piece: bytes | _Spilled, begin: int) -> memoryview:
        length = min(PIECE_BYTES, len(piece) - begin)
        if isinstance(piece, bytes):
            return memoryview(piece)[begin : begin + length]
        buffer = memoryview(bytearray(length))
        done = 0
        try:
            while done < length:
                got = os.preadv(self._file, [buffer[done:]], piece.begin + begin + done)
                if not got:
                    raise OSError(errno.EIO, "the file is shorter than the bytes written to it")
                done += got
        except OSError as error:
            raise self._refused(error) from error
        return buffer

    def _refused(self, error: OSError) -> WriteError:
        problem = f"{error.strerror or error} (temporary file of a shard whose bytes come out of order; TMPDIR)"
        return WriteError(str(self._folder or tempfile.gettempdir()), problem, error.errno)


class _Spilled:
    """Bytes in the temporary file."""

    __slots__ = ("_length", "begin")

    def __init__(self, begin: int, length: int) -> None:
        self.begin, self._length = begin, length

    def __len__(self) -> int:
        return self._length
