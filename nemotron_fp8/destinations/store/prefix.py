"""Records of a job in a folder of an object store: read before a run, discarded at its end or for a new start."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import CONFIG, INDEX, MANIFEST, is_plain_name
from nemotron_fp8.destinations.store.job import (
    MAX_JOB_BYTES,
    MAX_RECEIPT_BYTES,
    RUN_FILE,
    SHARD,
    Job,
    StoreReceipt,
    parse_receipt,
    receipt_path,
)
from nemotron_fp8.errors.stores import ChangedObjectError, MissingObjectError
from nemotron_fp8.progress import ignore_progress
from nemotron_fp8.stores.listing import JOB_FILE, RECORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from nemotron_fp8.progress import Advance
    from nemotron_fp8.stores.client import StoreClient
    from nemotron_fp8.stores.listing import StoredFile, StoreListing


WINDOW_BYTES = 32 << 20
"""Bytes of an object that are read for its digest at a time, in parallel pieces."""
ANNOUNCING = (MANIFEST, CONFIG, INDEX)
"""Files by which a reader finds a result, the last one written first."""
WITHDRAWN = b"{}\n"
"""Content of a config.json that was withdrawn: no engine takes it for a model."""


def job_path(client: StoreClient) -> str:
    """Return the address of the job file, for messages."""
    return f"{client.address}/{JOB_FILE}"


def read_job(client: StoreClient, file: StoredFile) -> Job:
    """Read the job file.

    Raises:
        DamagedJournalError: the file is malformed.
        StoreError: the file cannot be read; the class names the reason.
    """
    return Job.parse(client.read_small(file, MAX_JOB_BYTES), job_path(client))


def own_files(listing: StoreListing) -> dict[str, StoredFile]:
    """Return the files of a folder without the records of a job."""
    return {name: file for name, file in listing.files.items() if not is_record(name)}


def records(listing: StoreListing) -> list[str]:
    """Return the names of the records of a job, without the job file."""
    return [name for name in listing.files if is_record(name) and name != JOB_FILE]


def is_record(name: str) -> bool:
    """Return True if a file is a record of a job; no other file in their folder is touched."""
    folder, _, record = name.partition("/")
    return folder == RECORDS and (
        name in (JOB_FILE, RUN_FILE) or (is_plain_name(record) and record.endswith(f"{SHARD}.json"))
    )


def read_receipts(
    client: StoreClient, listing: StoreListing, job: str, shards: Collection[str], digests: bool = True
) -> dict[str, StoreReceipt]:
    """Return the receipts of shards that are in a folder as they were uploaded.

    An object with another tag, which was perhaps written again with the same bytes, is read for its digest.

    Args:
        client: client of the folder.
        listing: the folder's files.
        job: id of the job.
        shards: names of the shards.
        digests: whether a receipt without a digest counts as none.
    """

    def read(view: StoreClient, name: str) -> StoreReceipt | None:
        try:
            data = view.read_small(listing.files[receipt_path(name)], MAX_RECEIPT_BYTES)
        except (ChangedObjectError, MissingObjectError):
            return None  # another run of the job writes it just now
        receipt = parse_receipt(data, job)
        if receipt is None or receipt.receipt.name != name or (digests and receipt.receipt.sha256 is None):
            return None
        return receipt

    names = [name for name in shards if name in listing.files and receipt_path(name) in listing.files]
    found: dict[str, StoreReceipt] = {}
    for name, receipt in zip(names, client.map(read, names), strict=True):
        shard = listing.files[name]
        if receipt is not None and is_intact(client, receipt, shard):
            found[name] = StoreReceipt(receipt.receipt, shard.etag)
    return found


def is_intact(client: StoreClient, receipt: StoreReceipt, file: StoredFile) -> bool:
    """Return True if an object holds the bytes of a receipt, by its tag or else by its digest."""
    if receipt.matches(file):
        return True
    if file.size != receipt.receipt.size or receipt.receipt.sha256 is None:
        return False
    try:
        return digest_of_object(client, file) == receipt.receipt.sha256
    except (ChangedObjectError, MissingObjectError):
        return False  # another run of the job writes it just now


def digest_of_object(client: StoreClient, file: StoredFile, advance: Advance = ignore_progress) -> str:
    """Return the SHA-256 of an object, whose bytes are read for it.

    Args:
        client: client of the folder.
        file: the object.
        advance: called with the bytes that were read.

    Raises:
        StoreError: the object cannot be read, or changes meanwhile.
    """
    hasher = hashlib.sha256()
    window = memoryview(bytearray(min(WINDOW_BYTES, file.size)))
    for begin in range(0, file.size, WINDOW_BYTES):
        end = min(begin + WINDOW_BYTES, file.size)

        def put(offset: int, data: bytes, begin: int = begin) -> None:
            window[offset - begin : offset - begin + len(data)] = data

        client.read_range(file, begin, end, put)
        hasher.update(window[: end - begin])
        advance(end - begin)
    return hasher.hexdigest()


def withdraw(client: StoreClient, listing: StoreListing, check: Callable[[], None]) -> None:
    """Let no reader find a result whose files change from here on.

    config.json is replaced, not deleted: the replacement has a condition, so that one that arrives late cannot hit the
    file of a later result.

    Args:
        client: client of the folder.
        listing: the folder's files.
        check: called before each request; raises an error if the folder belongs to another job.

    Raises:
        StoreConflictError: another run wrote config.json meanwhile.
    """
    if MANIFEST in listing.files:
        client.delete([MANIFEST], check)
    config = listing.files.get(CONFIG)
    if config is not None and config.size != len(WITHDRAWN):
        client.put_small(CONFIG, WITHDRAWN, replacing=config, check=check)


def discard_result(client: StoreClient, listing: StoreListing, names: Iterable[str], check: Callable[[], None]) -> None:
    """Delete files of an unfinished result; first those by which a reader finds it.

    Args:
        client: client of the folder.
        listing: the folder's files.
        names: the files, of which some may be missing.
        check: called before each request; raises an error if the folder belongs to another job.
    """
    there = [name for name in names if name in listing.files]
    for name in ANNOUNCING:
        if name in there:
            client.delete([name], check)
    rest = [name for name in there if name not in ANNOUNCING]
    if rest:
        client.delete(rest, check)
