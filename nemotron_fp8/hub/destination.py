"""The Hub as the pipeline's destination: shards are written to a work folder and uploaded while the next is made."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from nemotron_fp8.errors import WriteError
from nemotron_fp8.hub.errors import StagingMismatchError
from nemotron_fp8.journal import entry_receipt, receipt_entry
from nemotron_fp8.write import FileSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.hub.contents import Content
    from nemotron_fp8.hub.staging import StagedShard, Staging
    from nemotron_fp8.unit import Receipt
    from nemotron_fp8.write import Sink

NOTE_SCHEMA = 1


class HubDestination:
    """Uploads each shard to the staging branch as soon as its receipt is known. A context manager.

    At most two shards are on the disk: one in the making and one on its way.

    Args:
        staging: the way to the Hub.
        folder: a private work folder.
    """

    def __init__(self, staging: Staging, folder: Path) -> None:
        self.staging, self.folder = staging, folder
        self._finished: dict[str, Receipt] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[StagedShard] | None = None

    def __enter__(self) -> Self:
        """Find what is staged already.

        Raises:
            HubError: the class says why the job cannot go on.
        """
        for name, shard in self.staging.open().items():
            self._finished[name] = self._receipt(shard)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def finished(self) -> Mapping[str, Receipt]:
        """See `nemotron_fp8.write.Destination.finished`."""
        return self._finished

    def stage(self, name: str, size: int) -> Sink:
        """See `nemotron_fp8.write.Destination.stage`."""
        return FileSink(self.folder, name, size, digests=True)

    def record(self, receipt: Receipt) -> None:
        """Begin to upload a finished shard, once the one before has arrived.

        Raises:
            HubError: the upload before this one failed; the class says why.
        """
        self.wait()
        self._upload = self._pool.submit(self._send, receipt)

    def wait(self) -> None:
        """Wait for the upload that is on its way."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def _send(self, receipt: Receipt) -> StagedShard:
        path = self.folder / receipt.name
        if receipt.sha256 is None:
            raise WriteError(str(path), "has no digest, and the Hub takes none without")
        staged = self.staging.stage(receipt.name, path, receipt.sha256, receipt.size, note_of(receipt))
        path.unlink()
        return staged

    def publish(
        self,
        receipts: Mapping[str, Receipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """See `nemotron_fp8.write.Destination.publish`."""
        self.wait()
        if self.staging.published is not None:
            return
        small: dict[str, Content] = dict(documents)
        for number, (name, pieces) in enumerate(copies.items()):
            path = self.folder / f"side-{number}"
            try:
                with path.open("wb") as file:
                    for piece in pieces():
                        file.write(piece)
            except OSError as error:
                if isinstance(error, WriteError):
                    raise
                raise WriteError(str(path), error.strerror or str(error)) from error
            small[name] = path
        shards = {name: (receipt.sha256 or "", receipt.size) for name, receipt in receipts.items()}
        self.staging.publish(shards, small)

    def _receipt(self, shard: StagedShard) -> Receipt:
        try:
            receipt = receipt_of(shard.note)
        except (ValueError, TypeError, KeyError) as error:
            problem = "its note is not one of this version"
            raise StagingMismatchError(self.staging.repo, self.staging.branch.ref, shard.name, problem) from error
        if (receipt.name, receipt.size, receipt.sha256) != (shard.name, shard.size, shard.sha256):
            raise StagingMismatchError(
                self.staging.repo, self.staging.branch.ref, shard.name, "its note is another shard's"
            )
        return receipt


def note_of(receipt: Receipt) -> bytes:
    """A receipt as JSON, the same for the same receipt."""
    return json.dumps({"schema": NOTE_SCHEMA, **receipt_entry(receipt)}, sort_keys=True).encode()


def receipt_of(note: bytes) -> Receipt:
    """The receipt that `note_of` wrote.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    entry = json.loads(note)
    if entry["schema"] != NOTE_SCHEMA:
        raise ValueError("another schema")
    return entry_receipt(entry)
