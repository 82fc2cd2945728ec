"""A folder of an object store as destination.

A store has neither a rename nor a lock. Each object appears at once, though, and a conditional write creates a file
only where none is. From these two:

1. ``.nemotron-fp8/job.json`` is created first, by a conditional write, in a folder that is empty otherwise. It holds
   the identity of the conversion: another one is rejected; the same one resumes, or works beside the first.
2. Each shard is uploaded to its place while it is made, and its receipt is written after it.
3. At the end all shards are compared with their receipts by one listing. Then the small files are written, the index
   and ``config.json`` after the others, and last the manifest, by a conditional write.
4. The records are deleted, the job file first.

A reader that looks for ``config.json`` or for the manifest therefore sees no result, or all of it.

A request that was sent before another run took the folder over may still arrive. A run therefore looks at the job file
before each attempt of a request that matters, and once more after the manifest: if the folder has another job by then,
it withdraws what it has announced, and fails. A run that starts over deletes no file that its own result has, too: it
writes over it, so that a late deletion cannot hit the new result.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING

from nemotron_fp8._utils import listed
from nemotron_fp8.checkpoint.inventory import CONFIG, INDEX, MANIFEST
from nemotron_fp8.checkpoint.json_text import compact_json
from nemotron_fp8.destinations.lock_record import LockRecord
from nemotron_fp8.destinations.store.job import RUN_FILE, Job, StoreReceipt, receipt_path, render_receipt
from nemotron_fp8.destinations.store.prefix import (
    WITHDRAWN,
    discard_result,
    is_intact,
    job_path,
    own_files,
    read_job,
    read_receipts,
    records,
    withdraw,
)
from nemotron_fp8.destinations.store.staging import StoreStaging
from nemotron_fp8.errors import is_permanent
from nemotron_fp8.errors.destination import DamagedJournalError, OtherRunError
from nemotron_fp8.errors.store_results import JobLostError, OccupiedPrefixError, StagedObjectError
from nemotron_fp8.errors.stores import (
    ChangedObjectError,
    MissingObjectError,
    StoreConflictError,
    StoreError,
    UnconditionalStoreError,
)
from nemotron_fp8.stores.listing import JOB_FILE, RECORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.progress import TransferTracker
    from nemotron_fp8.stores.client import StoreClient
    from nemotron_fp8.stores.listing import StoredFile, StoreListing


logger = logging.getLogger("nemotron_fp8")
LAST = (INDEX, CONFIG)
"""Small files that are written after all others, in this order; only the manifest follows."""
SMALL_BYTES = 4 << 20
"""Largest file that is sent in one request."""


class StoreDestination:
    """A checkpoint in a folder of a store, which appears with its last file. A context manager.

    Args:
        client: client of the folder.
        identity: identity that an unfinished run must have to be resumed.
        sizes: planned bytes of every file of the result, by name.
        shards: names of the shards.
        source: name of the source, for people who read the job file.
        transfers: receives upload progress and waits.
        spill: folder for bytes that come out of order; None for the system's.
        restart: whether to discard an unfinished run.
        digests: whether the manifest carries SHA-256 digests.

    Attributes:
        bytes_published: bytes of all files that this run has published; 0 if an earlier run has published the result,
            and only its records were left.
    """

    complete = False  # the bytes of the manifest decide, which `publish` gets

    def __init__(
        self,
        client: StoreClient,
        identity: RunIdentity,
        sizes: Mapping[str, int],
        shards: Collection[str],
        source: str,
        transfers: TransferTracker,
        *,
        spill: Path | None = None,
        restart: bool = False,
        digests: bool = True,
    ) -> None:
        self._cancel = Event()
        self._client = client.with_options(on_wait=transfers.waits, cancel=self._cancel)
        self._identity, self._sizes, self._shards, self._source = identity, sizes, shards, source
        self._transfers, self._spill, self._restart, self.digests = transfers, spill, restart, digests
        self._receipts: dict[str, StoreReceipt] = {}
        self._published = False
        self._run = LockRecord.begun()
        self.bytes_published = 0

    @property
    def label(self) -> str:
        return str(self._client.address)

    def __enter__(self) -> Self:
        """Begin the job, or resume it; all checks precede the first write.

        Raises:
            OccupiedPrefixError: the folder holds other files, or a result.
            OtherRunError, DamagedJournalError: an unfinished run cannot be resumed.
            StoreError: the job cannot begin; the class names the reason.
        """
        try:
            self._begin(self._client.listing())
        except StoreConflictError:  # another run has begun meanwhile
            self._restart = False
            listing = self._client.listing()
            if MANIFEST in listing.files and JOB_FILE not in listing.files:
                raise JobLostError(self.label, "is gone") from None
            self._begin(listing)
        self._client.put_small(RUN_FILE, compact_json(self._run.entry()))
        return self

    def _begin(self, listing: StoreListing) -> None:
        file = listing.files.get(JOB_FILE)
        if file is None:
            self._refuse_files(own_files(listing))
            self._client.delete(records(listing))  # of a run that a user or another run has ended
            self._create(Job.new(self._identity, self._source, self._sizes), None)
        elif self._restart and MANIFEST not in listing.files:
            self._start_over(file, listing)
        else:
            self._resume(file, listing)

    def _create(self, job: Job, replacing: StoredFile | None) -> None:
        self._job = job
        self._job_file = self._client.put_small(JOB_FILE, job.render(), create=replacing is None, replacing=replacing)
        try:
            self._client.require_conditions(JOB_FILE)
        except UnconditionalStoreError:
            self._client.delete([JOB_FILE])
            raise

    def _start_over(self, file: StoredFile, listing: StoreListing) -> None:
        """Discard an unfinished run. Its job file is replaced first, so that the run ends if it is still going on."""
        discard = {*self._sizes, *self._files_of(file)}
        self._refuse_strange(listing, discard)
        self._create(Job.new(self._identity, self._source, self._sizes, discard), file)
        self._clean(listing)

    def _clean(self, listing: StoreListing) -> None:
        """Delete what the discarded run has and this one has not; its other files are written over.

        Until the job file says that this is done, every run begins with it.
        """
        check = self.staging.check_job
        withdraw(self._client, listing, check)
        alone = [name for name in self._job.discard if name not in self._sizes]
        discard_result(self._client, listing, [*alone, *records(listing)], check)
        self._job = replace(self._job, discard=())
        self._job_file = self._client.put_small(JOB_FILE, self._job.render(), replacing=self._job_file)

    def _files_of(self, file: StoredFile) -> tuple[str, ...]:
        """Return the files that a job names; none if the job file is damaged."""
        try:
            job = read_job(self._client, file)
        except DamagedJournalError:
            return ()
        return *job.files, *job.discard

    def _resume(self, file: StoredFile, listing: StoreListing) -> None:
        published = MANIFEST in listing.files
        try:
            job = read_job(self._client, file)
            self._identity.check(job.terms, job_path(self._client))
        except (OtherRunError, DamagedJournalError):
            if published:
                self._refuse_files(own_files(listing))
            raise
        except (MissingObjectError, ChangedObjectError):  # since the listing
            raise JobLostError(self.label, "is gone or was replaced") from None
        self._job, self._job_file = job, file
        self._refuse_strange(listing, {*self._sizes, *job.discard})
        if job.discard:
            self._clean(listing)
            return
        self._receipts = read_receipts(self._client, listing, job.id, self._shards, self.digests)
        if self._receipts.keys() != set(self._shards):
            # Another run that has just finished deletes the job file first, then the receipts.
            self.staging.check_job()
            withdraw(self._client, listing, self.staging.check_job)

    def _refuse_strange(self, listing: StoreListing, files: set[str]) -> None:
        """Raise OccupiedPrefixError if there are other files than those of a job."""
        self._refuse_files({name: each for name, each in own_files(listing).items() if name not in files})

    def _refuse_files(self, files: Mapping[str, StoredFile]) -> None:
        """Raise OccupiedPrefixError if there are files."""
        if files:
            kind = "holds other files"
            if MANIFEST in files:
                kind = (
                    "holds a result: of another conversion, of a run that has just finished, or with files that changed"
                )
            raise OccupiedPrefixError(self.label, f"{kind} ({listed(sorted(files))})")

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and not isinstance(error, Exception):
            self._cancel.set()
        # An error about this folder is none of the source.
        if is_permanent(error) and not self._published and getattr(error, "store", None) != self.label:
            with suppress(StoreError):  # the source's error is the one to tell
                self._discard()
        elif isinstance(error, Exception) and not isinstance(error, StoreError):
            # For `status` alone, so that nothing is tried twice.
            quick = self._client.with_options(policy=replace(self._client.policy, seconds=0.0))
            with suppress(StoreError):
                self.staging.check_job()
                quick.put_small(RUN_FILE, compact_json(self._run.over(error).entry()))

    def _discard(self) -> None:
        """Delete what a conversion that can never succeed has written, unless another run of it succeeded.

        The job file is replaced first, so that no other run of the job publishes meanwhile.
        """
        job = Job.new(self._identity, self._source, self._sizes, self._job.files)
        self._job_file = self._client.put_small(JOB_FILE, job.render(), replacing=self._job_file)
        listing, check = self._client.listing(), self.staging.check_job
        if MANIFEST not in listing.files:
            discard_result(self._client, listing, [*job.discard, *records(listing)], check)
        self._forget()

    def finished(self) -> Mapping[str, ShardReceipt]:
        return {name: receipt.receipt for name, receipt in self._receipts.items()}

    @property
    def staging(self) -> StoreStaging:
        return StoreStaging(self._client, self._job_file, self.digests, self._spill, self._transfers)

    def record(self, receipt: ShardReceipt) -> None:
        file: StoredFile = receipt.upload  # type: ignore[assignment]  # this destination's own handle
        self._client.put_small(receipt_path(receipt.name), render_receipt(self._job.id, receipt, file))
        self._receipts[receipt.name] = StoreReceipt(receipt, file.etag)

    def wait(self) -> None: ...

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        sizes = {name: len(data) for name, data in documents.items()} | {name: self._sizes[name] for name in copies}
        sizes |= {name: receipt.size for name, receipt in receipts.items()}
        if self._is_published(documents[MANIFEST], sizes):
            self._published = True
            self._forget()
            return
        try:
            self._publish(receipts, documents, copies)
            self._check_published(documents, sizes)
        except (JobLostError, StoreConflictError, MissingObjectError, StagedObjectError):
            # Another run of the job may have published the result meanwhile, and deleted the job's records.
            if not self._is_published(documents[MANIFEST], sizes):
                self._take_back(documents)
                raise
        self._published = True
        self._forget()
        self.bytes_published = sum(sizes.values())

    def _check_published(self, documents: Mapping[str, bytes], sizes: Mapping[str, int]) -> None:
        """Check, once the manifest is there, that no run which took the folder over has changed the result.

        Raises:
            JobLostError: the folder belongs to another job.
            StagedObjectError: a file is missing, or is not the one of this result.
        """
        self.staging.check_job()
        listing = self._client.listing()
        for name, size in sizes.items():
            self._check_size(listing, name, size)
        self._check_shards(listing, self._receipts)

    def _take_back(self, documents: Mapping[str, bytes]) -> None:
        """Withdraw the files by which a reader finds a result that is not whole, if they are those of this run."""
        with suppress(StoreError):
            if self._holds(MANIFEST, documents[MANIFEST]) is not None:
                self._client.delete([MANIFEST])
            config = self._holds(CONFIG, documents.get(CONFIG, WITHDRAWN))
            if config is not None and CONFIG in documents:
                self._client.put_small(CONFIG, WITHDRAWN, replacing=config)

    def _publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        client, staging = self._client, self.staging
        staging.check_job()
        # What a discarded run has announced here at the last moment.
        withdraw(client, client.listing(), staging.check_job)
        names = {*receipts, *documents, *copies}
        put: dict[str, StoredFile] = {}
        for name, data in documents.items():
            if name not in LAST and name != MANIFEST:
                put[name] = client.put_small(name, data)
        for name, pieces in copies.items():
            put[name] = self._copy(name, pieces())
        listing = client.listing()
        if strange := sorted(own_files(listing).keys() - names):
            raise OccupiedPrefixError(self.label, f"received other files during this run ({listed(strange)})")
        self._check_shards(listing, receipts)
        for name, file in put.items():
            self._check_size(listing, name, file.size)
        for name in LAST:
            if name in documents:
                client.put_small(name, documents[name], check=staging.check_job)
        client.put_small(MANIFEST, documents[MANIFEST], create=True, check=staging.check_job)

    def _copy(self, name: str, pieces: Iterator[bytes]) -> StoredFile:
        """Upload a file of the source, a small one in one request.

        The source may be in a store itself, and obstore cannot read while it asks for bytes.
        """
        if self._sizes[name] <= SMALL_BYTES:
            return self._client.put_small(name, b"".join(pieces))
        done = 0
        with self.staging.stage(name, self._sizes[name]) as sink:
            for piece in pieces:
                sink.write_at(done, memoryview(piece))
                done += len(piece)
            stored: StoredFile = sink.finish().upload  # type: ignore[assignment]  # the sink's own handle
            return stored

    def _check_shards(self, listing: StoreListing, shards: Iterable[str]) -> None:
        """Check that the shards are those of the receipts.

        Raises:
            StagedObjectError: a shard is missing, or has other bytes.
        """
        for name in shards:
            file = listing.files.get(name)
            if file is None:
                raise StagedObjectError(self.label, name, "is missing")
            if not is_intact(self._client, self._receipts[name], file):
                raise StagedObjectError(self.label, name, "is not the file that was uploaded")

    def _check_size(self, listing: StoreListing, name: str, size: int) -> None:
        file = listing.files.get(name)
        if file is None or file.size != size:
            raise StagedObjectError(self.label, name, "is missing" if file is None else "has another size")

    def _is_published(self, manifest: bytes, sizes: Mapping[str, int]) -> bool:
        """Return True if the folder holds the manifest of this very result, and files of the right sizes."""
        if self._holds(MANIFEST, manifest) is None:
            return False
        files = self._client.listing().files
        return all(name in files and files[name].size == size for name, size in sizes.items())

    def _holds(self, name: str, data: bytes) -> StoredFile | None:
        """Return a file if its content is ``data``."""
        file = self._client.head(name)
        if file is None or file.size != len(data) or self._client.read_small(file, len(data)) != data:
            return None
        return file

    def _forget(self) -> None:
        """Delete the records of a published job, the job file first: without it, no run takes up the job again."""
        try:
            listing = self._client.listing()
            if JOB_FILE in listing.files:
                self._client.delete([JOB_FILE], self.staging.check_job)
            self._client.delete(records(listing))
        except JobLostError:  # of another run, whose records they are
            return
        except StoreError as error:
            logger.warning("%s: complete, but %s could not be deleted: %s", self.label, RECORDS, error)
