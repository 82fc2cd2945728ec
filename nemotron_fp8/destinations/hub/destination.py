"""The Hub as the pipeline's destination: shards are written to a work folder and uploaded while the next is made."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import check_space, temporaries
from nemotron_fp8.destinations.folder_staging import FolderStaging
from nemotron_fp8.destinations.hub.card_check import refuse_front_matter
from nemotron_fp8.destinations.hub.commit import Uploaded
from nemotron_fp8.destinations.hub.job import job_digest
from nemotron_fp8.destinations.hub.staging import HubStaging
from nemotron_fp8.errors import NemotronFp8Error, WriteError
from nemotron_fp8.errors.hub import StagingMismatchError
from nemotron_fp8.hub.progress_bars import without_bars
from nemotron_fp8.hub.upload_progress import upload_told
from nemotron_fp8.planning.receipt import entry_receipt, receipt_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.destinations.hub.commit import Content
    from nemotron_fp8.destinations.hub.job import StagedShard
    from nemotron_fp8.destinations.hub.upload import UploadStaging
    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.progress import TransferTracker


NOTE_SCHEMA = 1


def staging_for(
    target: Address, terms: RunIdentity, source: str, options: HubOptions, overwrite: bool, restart: bool
) -> HubStaging:
    """The way of one job to a repository."""
    return HubStaging(
        options.client(),
        target.repo,
        job_digest(terms),
        source,
        revision=target.revision or "main",
        private=options.private,
        pull_request=options.pull_request,
        overwrite=overwrite,
        restart=restart,
    )


class HubDestination:
    """Uploads each shard to the staging branch as soon as its receipt is known. A context manager.

    On the disk are the shards in the making and one on its way.

    Args:
        job: the way to the Hub.
        parent: where to make a private folder.
        transfers: is told what is on its way.
        room: bytes that the disk must have free before the start; 0 not to look.
        first_room: bytes that it must have free before a job begins anew; what is left of one may take fewer.
        card: the result's README.md as far as it is known; what counts is its front matter.
        digests: whether the manifest carries SHA-256 digests.
        elsewhere: whether shards are made and uploaded on other machines, so that only commits are left to do here.
    """

    def __init__(
        self,
        job: HubStaging,
        parent: Path,
        transfers: TransferTracker,
        room: int = 0,
        elsewhere: bool = False,
        *,
        digests: bool = True,
        first_room: int = 0,
        card: bytes = b"",
    ) -> None:
        self.job, self.digests = job, digests
        self._elsewhere = elsewhere
        self._uploads: UploadStaging | None = None
        self.bytes_published = 0
        self._parent, self._transfers, self._room = parent, transfers, room
        self._first_room, self._card = first_room, card
        self._finished: dict[str, ShardReceipt] = {}
        self._stack = ExitStack()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[StagedShard] | None = None
        job.client.patience.on_wait = transfers.waits
        job.client.patience.stop = self._stop = Event()

    def __enter__(self) -> Self:
        """Find what is staged already.

        Raises:
            LocalDiskError: the disk has no room.
            CardRefusedError: the Hub does not take the card's front matter.
            HubError: the class says why the job cannot go on. A refusal comes before anything is changed on the Hub.
        """
        self.folder = self._stack.enter_context(temporaries(self._parent))
        self._stack.enter_context(without_bars())
        try:
            check_space(self.job.repo, self.folder, self._room)
            for name, shard in self.job.open(self._ready).items():
                self._finished[name] = self._receipt(shard)
            if self._elsewhere:
                from nemotron_fp8.destinations.hub.upload import upload_staging

                self._uploads = upload_staging(self.job, self._parent)
        except BaseException:
            self._stack.close()
            raise
        return self

    def _ready(self, new: bool) -> None:
        """Refuse what can be refused before anything is changed on the Hub."""
        if new:
            check_space(self.job.repo, self.folder, self._first_room)
        refuse_front_matter(self.job.client, self.job.repo, self._card)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the shard on its way is finished, so that no later run makes it again. Ctrl-C must not wait.
        if kind is not None and not issubclass(kind, Exception):
            self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stack.close()

    def finished(self) -> Mapping[str, ShardReceipt]:
        return self._finished

    @property
    def label(self) -> str:
        return str(self.job.published)

    @property
    def complete(self) -> bool:
        return self.job.published is not None

    @property
    def staging(self) -> FolderStaging | UploadStaging:
        """The private folder from which shards are uploaded."""
        if self._uploads is not None:
            return self._uploads
        return FolderStaging(self.folder, digests=True, uses_cache=True)

    def record(self, receipt: ShardReceipt) -> None:
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

    def _send(self, receipt: ShardReceipt) -> StagedShard:
        path = self.folder / receipt.name
        if receipt.sha256 is None:
            raise WriteError(str(path), "has no digest, and the Hub takes none without")
        if self._uploads is not None:
            assert isinstance(receipt.upload, Uploaded)  # this destination's own handle, back from a worker
            return self.job.stage(receipt.name, receipt.upload, receipt.sha256, receipt.size, note_of(receipt))

        with upload_told(self._transfers, path, receipt.size, self.job.client.patience.check) as sent:
            staged = self.job.stage(receipt.name, path, receipt.sha256, receipt.size, note_of(receipt), sent)
        path.unlink()
        return staged

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """See `nemotron_fp8.destinations.base.Destination.publish`."""
        self.wait()
        small: dict[str, Content] = dict(documents)
        for number, (name, pieces) in enumerate(copies.items()):
            path = self.folder / f"side-{number}"
            write_side(path, pieces())
            small[name] = path
        shards = {name: (receipt.sha256 or "", receipt.size) for name, receipt in receipts.items()}
        self.job.publish(shards, small)
        beside = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in small.values())
        self.bytes_published = sum(receipt.size for receipt in receipts.values()) + beside

    def _receipt(self, shard: StagedShard) -> ShardReceipt:
        try:
            receipt = receipt_of(shard.note)
        except (ValueError, TypeError, KeyError) as error:
            problem = "its note is not one of this version"
            raise StagingMismatchError(self.job.repo, self.job.branch.ref, shard.name, problem) from error
        if (receipt.name, receipt.size, receipt.sha256) != (shard.name, shard.size, shard.sha256):
            raise StagingMismatchError(self.job.repo, self.job.branch.ref, shard.name, "its note is another shard's")
        return receipt


def write_side(path: Path, pieces: Iterator[bytes]) -> None:
    """Put a file that is taken over from the source where the client can read it."""
    try:
        with path.open("xb") as file:
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        if isinstance(error, NemotronFp8Error):
            raise
        raise WriteError(str(path), error.strerror or str(error)) from error


def note_of(receipt: ShardReceipt) -> bytes:
    """A receipt as JSON, the same for the same receipt."""
    return json.dumps({"schema": NOTE_SCHEMA, **receipt_entry(receipt)}, sort_keys=True).encode()


def receipt_of(note: bytes) -> ShardReceipt:
    """The receipt that `note_of` wrote.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    entry = json.loads(note)
    if entry["schema"] != NOTE_SCHEMA:
        raise ValueError("another schema")
    return entry_receipt(entry)
