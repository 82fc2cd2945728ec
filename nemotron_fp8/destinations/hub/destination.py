"""A repository on the Hub as destination: each shard is uploaded while the next one is made."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import temporaries
from nemotron_fp8._utils import shut_down
from nemotron_fp8.destinations.folder_staging import FolderStaging
from nemotron_fp8.destinations.hub.card_check import refuse_front_matter
from nemotron_fp8.destinations.hub.commit import Uploaded, upload_reported
from nemotron_fp8.destinations.hub.job import JobOptions, job_digest
from nemotron_fp8.destinations.hub.staging import HubStaging
from nemotron_fp8.errors import NemotronFp8Error, WriteError
from nemotron_fp8.errors.hub import StagingMismatchError
from nemotron_fp8.hub.options import require_space
from nemotron_fp8.planning.receipt import entry_receipt, receipt_entry
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.destinations.hub.commit import Content
    from nemotron_fp8.destinations.hub.job import StagedShard
    from nemotron_fp8.destinations.hub.upload import UploadStaging
    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.progress import TransferTracker


NOTE_SCHEMA = 1
"""Version of the JSON in a shard's note."""


def job_options(
    target: Address, identity: RunIdentity, source: str, options: HubOptions, overwrite: bool, restart: bool
) -> JobOptions:
    """Return destination and options of the job that publishes one result."""
    return JobOptions(
        target.repo,
        job_digest(identity),
        source,
        revision=target.revision or "main",
        private=options.private,
        pull_request=options.pull_request,
        overwrite=overwrite,
        restart=restart,
    )


class HubDestination:
    """Uploads each recorded shard to the staging branch and publishes all of them at the end. A context manager.

    The disk holds the shards in progress and one in transit.

    Args:
        client: the client, with a token that may write.
        options: destination and options of the job.
        parent: folder in which to create a private folder.
        transfers: receives upload progress and waits.
        room: bytes that must be free before the start; 0 for no check.
        first_room: bytes that must be free before a job begins anew; a resumed one may need less.
        card: the result's README.md as far as it is known; its front matter is validated before the start.
        digests: whether the manifest carries SHA-256 digests.
        elsewhere: True if workers on other machines convert and upload the shards, and this machine only commits.
    """

    def __init__(
        self,
        client: HubClient,
        options: JobOptions,
        parent: Path,
        transfers: TransferTracker,
        room: int = 0,
        elsewhere: bool = False,
        *,
        digests: bool = True,
        first_room: int = 0,
        card: bytes = b"",
    ) -> None:
        self._cancel = Event()
        self._client = client.with_options(on_wait=transfers.waits, cancel=self._cancel)
        self.job = HubStaging(self._client, options)
        self._elsewhere, self.digests = elsewhere, digests
        self._uploads: UploadStaging | None = None
        self.bytes_published = 0
        self._parent, self._transfers, self._room = parent, transfers, room
        self._first_room, self._card = first_room, card
        self._finished: dict[str, ShardReceipt] = {}
        self._stack = ExitStack()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[StagedShard] | None = None

    @property
    def label(self) -> str:
        return str(self.job.published)

    @property
    def complete(self) -> bool:
        return self.job.published is not None

    def __enter__(self) -> Self:
        """Open the job and read the receipts of shards that are staged already.

        All checks precede the first change on the Hub.

        Raises:
            LocalDiskError: the disk has too little free space.
            CardRefusedError: the Hub rejects the card's front matter.
            HubError: the job cannot begin; the class names the reason.
        """
        self.folder = self._stack.enter_context(temporaries(self._parent))
        try:
            require_space(self.job.repo, self.folder, self._room)
            for name, shard in self.job.begin(self._ready).items():
                self._finished[name] = self._receipt(shard)
            if self._elsewhere:
                from nemotron_fp8.destinations.hub.upload import upload_staging

                self._uploads = upload_staging(self.job, self._parent)
        except BaseException:
            self._stack.close()
            raise
        return self

    def _ready(self, new: bool) -> None:
        """Check disk and card before anything changes on the Hub."""
        if new:
            require_space(self.job.repo, self.folder, self._first_room)
        refuse_front_matter(self._client, self.job.repo, self._card)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error, finish the upload in transit, so that no later run repeats that shard. Ctrl-C cancels it.
        if kind is not None and not issubclass(kind, Exception):
            self._cancel.set()
        shut_down(self._pool)
        self._stack.close()

    def finished(self) -> Mapping[str, ShardReceipt]:
        return self._finished

    @property
    def staging(self) -> FolderStaging | UploadStaging:
        """Private folder from which shards are uploaded, or uploads from other machines."""
        if self._uploads is not None:
            return self._uploads
        return FolderStaging(self.folder, digests=True, uses_cache=True)

    def record(self, receipt: ShardReceipt) -> None:
        """Wait for the previous upload, then start uploading this shard in the background.

        Raises:
            HubError: the previous upload failed; the class names the reason.
        """
        self.wait()
        self._upload = self._pool.submit(self._send, receipt)

    def wait(self) -> None:
        """Wait for the upload in transit."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def _send(self, receipt: ShardReceipt) -> StagedShard:
        path = self.folder / receipt.name
        if receipt.sha256 is None:
            raise WriteError(str(path), "the shard has no digest, which the Hub requires")
        if self._uploads is not None:
            assert isinstance(receipt.upload, Uploaded)  # this destination's own handle, back from a worker
            return self.job.stage(receipt.name, receipt.upload, receipt.sha256, receipt.size, note_of(receipt))
        with upload_reported(self._transfers, self._client, path, receipt.size) as sent:
            staged = self.job.stage(receipt.name, path, receipt.sha256, receipt.size, note_of(receipt), sent)
        path.unlink()
        return staged

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
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
        problem = "its note is malformed or of another version"
        with guarded(lambda _: StagingMismatchError(self.job.repo, self.job.branch.ref, shard.name, problem)):
            receipt = receipt_of(shard.note)
        if (receipt.name, receipt.size, receipt.sha256) != (shard.name, shard.size, shard.sha256):
            raise StagingMismatchError(
                self.job.repo, self.job.branch.ref, shard.name, "its note belongs to another shard"
            )
        return receipt


def write_side(path: Path, pieces: Iterator[bytes]) -> None:
    """Write a file that is copied from the source to a path that the client can read."""
    try:
        with path.open("xb") as file:
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        if isinstance(error, NemotronFp8Error):
            raise
        raise WriteError(str(path), error.strerror or str(error)) from error


def note_of(receipt: ShardReceipt) -> bytes:
    """Return a receipt as JSON; equal receipts yield equal bytes."""
    return json.dumps({"schema": NOTE_SCHEMA, **receipt_entry(receipt)}, sort_keys=True).encode()


def receipt_of(note: bytes) -> ShardReceipt:
    """Parse a receipt that `note_of` rendered.

    Raises:
        ValueError: the note is not a receipt of this schema.
    """
    entry = strict_json.load_object(note, "note", lambda _, problem: ValueError(problem))
    if entry.get("schema") != NOTE_SCHEMA:
        raise ValueError("another schema")
    return entry_receipt(entry)
