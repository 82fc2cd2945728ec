"""Destinations: where finished shards are staged and, all at once, published."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Thread
from typing import TYPE_CHECKING, Protocol

from nemotron_fp8.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from nemotron_fp8.unit import Receipt

HASH_BYTES = 1 << 20
"""Bytes that the digest reads at a time; from the page cache, right after they were written."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A finished file.

    Attributes:
        name: its file name.
        size: its bytes.
        sha256: hexadecimal digest of its bytes; None where digests are off.
    """

    name: str
    size: int
    sha256: str | None


class Sink(Protocol):
    """A shard in the making. Leaving its context without `finish` discards it."""

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write_at(self, offset: int, data: memoryview) -> None:
        """Put bytes at their place; from any thread, in any order, every byte once."""

    def finish(self) -> Staged:
        """Make the shard durable and say what it is."""


class Destination(Protocol):
    """Where the result goes."""

    def stage(self, name: str, size: int) -> Sink:
        """Begin a shard of ``size`` bytes."""

    def publish(
        self,
        receipts: Mapping[str, Receipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """Let the staged shards and the small files appear, all at once; called once, at the end.

        Args:
            receipts: of all shards, by name.
            documents: small files by name.
            copies: files taken over from the source by name, each as a function that gives its bytes in
                pieces.
        """


class FileSink:
    """Writes a shard into a folder under a temporary name, and renames it when it is complete and durable.

    Args:
        folder: the folder, on one file system with its final place.
        name: the shard's file name.
        size: its bytes.
        digests: whether to take the SHA-256, on a thread that follows the writes through the page cache.

    Raises:
        WriteError: the system refuses to create, write or sync the file.
    """

    def __init__(self, folder: Path, name: str, size: int, digests: bool) -> None:
        self.name, self.size = name, size
        self._final = folder / name
        self._path = folder / f"{name}.part"
        self._done = False
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._path, flags, 0o666)
        except OSError as error:
            raise WriteError(str(self._path), error.strerror or str(error)) from error
        self._digest = _Follower(self._fd, size) if digests else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._done:
            return
        if self._digest:
            self._digest.stop()
        os.close(self._fd)
        with suppress(OSError):
            self._path.unlink()

    def write_at(self, offset: int, data: memoryview) -> None:
        """See `Sink.write_at`."""
        data = data.cast("B")
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], offset + done)
        except OSError as error:
            raise WriteError(str(self._path), error.strerror or str(error)) from error
        if self._digest:
            self._digest.wrote(offset, len(data))

    def finish(self) -> Staged:
        """Wait for the digest, sync, rename."""
        try:
            written = os.fstat(self._fd).st_size
            if written != self.size:
                raise WriteError(str(self._path), f"{written:,} bytes written, {self.size:,} planned")
            sha256 = self._digest.hexdigest() if self._digest else None
            os.fsync(self._fd)
            self._done = True
            os.close(self._fd)
            os.rename(self._path, self._final)
        except OSError as error:
            if isinstance(error, WriteError):
                raise
            raise WriteError(str(self._path), error.strerror or str(error)) from error
        return Staged(self.name, self.size, sha256)


class _Follower:
    """SHA-256 of a file while it is written: hashes the gapless beginning as it grows."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._size = fd, size
        self._spans: dict[int, int] = {}
        self._ready = 0
        self._stopped = False
        self._error: OSError | None = None
        self._hash = hashlib.sha256()
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()

    def wrote(self, offset: int, length: int) -> None:
        """Note that a span is in the file."""
        with self._changed:
            self._spans[offset] = offset + length
            before = self._ready
            while (end := self._spans.pop(self._ready, None)) is not None and end > self._ready:
                self._ready = end
            if self._ready > before:
                self._changed.notify()

    def hexdigest(self) -> str:
        """Wait until the whole file is hashed."""
        if self._ready != self._size:
            raise WriteError("digest", f"bytes {self._ready:,} and on were not all written")
        self._thread.join()
        if self._error:
            raise WriteError("digest", self._error.strerror or str(self._error)) from self._error
        return self._hash.hexdigest()

    def stop(self) -> None:
        """Give up."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        done = 0
        buffer = memoryview(bytearray(HASH_BYTES))
        try:
            while done < self._size:
                with self._changed:
                    while self._ready <= done and not self._stopped:
                        self._changed.wait()
                    ready = self._ready
                    if self._stopped:
                        return
                while done < ready and not self._stopped:
                    got = os.preadv(self._fd, [buffer[: min(HASH_BYTES, ready - done)]], done)
                    self._hash.update(buffer[:got])
                    done += got
        except OSError as error:
            self._error = error
