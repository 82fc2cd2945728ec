"""Sink of a shard that is uploaded while it is made, without a file on the disk."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from threading import Thread
from typing import TYPE_CHECKING

from nemotron_fp8.destinations.base import Staged
from nemotron_fp8.destinations.store.ordered_bytes import AHEAD_BYTES, WAITING_BYTES, OrderedBytes, StoppedError
from nemotron_fp8.errors import WriteError
from nemotron_fp8.errors.store_results import UploadBrokenError
from nemotron_fp8.errors.stores import StoreNoProgressError, StoreUploadError
from nemotron_fp8.stores.client import PART, UPLOADS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from nemotron_fp8.progress import TransferTracker
    from nemotron_fp8.stores.client import StoreClient
    from nemotron_fp8.stores.listing import StoredFile


CLIENT_BYTES = 40 << 20
"""Memory of obstore itself and of the pieces that are written at one moment, as measured on two cores."""
UPLOAD_BYTES = WAITING_BYTES + (UPLOADS + 1) * PART + AHEAD_BYTES + CLIENT_BYTES
"""Most memory of the upload of one shard: bytes that wait, parts in flight, bytes out of order, and the client."""
STOP_SECONDS = 5.0
"""Longest wait for an upload that is given up; its thread does not keep the process alive."""


class OrderedSink(ABC):
    """Sink whose bytes are consumed in order by a thread of its own, and hashed on the way.

    Args:
        name: file name of the shard.
        size: bytes of the shard.
        spill: folder for bytes that come out of order; None for the system's.
        digests: whether to compute the SHA-256 digest.

    Attributes:
        before_end: called before the thread gets the last bytes.

    Raises:
        WriteError: bytes were written out of order, and the temporary file for them cannot be written; or not all bytes
            were written.
    """

    def __init__(self, name: str, size: int, spill: Path | None, digests: bool = True) -> None:
        self.name, self.size = name, size
        self._bytes = OrderedBytes(size, spill)
        self._hash = hashlib.sha256() if digests else None
        self._result: object = None
        self._error: BaseException | None = None
        self.before_end: Callable[[], None] = lambda: None
        self._thread = Thread(target=self._run, name=f"sink of {name}", daemon=True)

    @abstractmethod
    def consume(self, pieces: Iterator[memoryview]) -> object:
        """Use the bytes of the shard and return the handle of the finished one."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bytes.stop(StoppedError())
        self._thread.join(STOP_SECONDS)
        if not self._thread.is_alive():
            self._bytes.close()

    def write_at(self, offset: int, data: memoryview) -> None:
        self._bytes.write_at(offset, data)

    def finish(self) -> Staged:
        """Wait until all bytes are consumed."""
        if missing := self._bytes.missing:
            raise WriteError(self.name, f"only the first {self.size - missing:,} of {self.size:,} bytes were written")
        self.before_end()
        self._bytes.release()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return Staged(self.name, self.size, self._hash.hexdigest() if self._hash else None, self._result)

    def _run(self) -> None:
        try:
            self._result = self.consume(self._hashed())
        except BaseException as error:
            self._error = error
            self._bytes.stop(error)

    def _hashed(self) -> Iterator[memoryview]:
        for piece in self._bytes:
            if self._hash:
                self._hash.update(piece)
            yield piece


class StoreSink(OrderedSink):
    """Uploads a shard in parts as its bytes come; the object appears when the last part has arrived.

    A shard that is given up leaves no object: the store is told to forget its parts.

    Args:
        client: client of the folder.
        name: file name of the shard.
        size: bytes of the shard.
        check: called before the last bytes are sent; raises an error if the object must not appear.
        transfers: receives the progress of the upload.
        spill: folder for bytes that come out of order; None for the system's.
        digests: whether to compute the SHA-256 digest.

    Raises:
        UploadBrokenError: the upload failed, and may succeed if the shard is made again.
        StoreError: the store rejects the upload; the class names the reason.
    """

    def __init__(
        self,
        client: StoreClient,
        name: str,
        size: int,
        check: Callable[[], None],
        transfers: TransferTracker,
        spill: Path | None = None,
        digests: bool = True,
    ) -> None:
        super().__init__(name, size, spill, digests)
        self._client, self._transfers, self.before_end = client, transfers, check
        self._done = 0

    def consume(self, pieces: Iterator[memoryview]) -> StoredFile:
        try:
            return self._client.upload(self.name, self.size, pieces, self._sent)
        except StoreNoProgressError as error:
            raise UploadBrokenError(error.store, self.name, error.reason) from None
        except StoreUploadError as error:
            raise UploadBrokenError(error.store, self.name, error.problem) from None
        finally:
            self._transfers.ended("upload", self.name)

    def _sent(self, count: int) -> None:
        self._done += count
        self._transfers.moved("upload", self.name, self._done, self.size)
