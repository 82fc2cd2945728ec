"""State of a conversion into an object store, by its records there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.destinations.journal import Terms
from nemotron_fp8.destinations.lock_record import MAX_BYTES as MAX_RECORD_BYTES
from nemotron_fp8.destinations.lock_record import LockRecord
from nemotron_fp8.destinations.status import Finished, Pace, Status, advice_for, complete_status, life_of
from nemotron_fp8.destinations.store.job import RUN_FILE, receipt_path
from nemotron_fp8.destinations.store.prefix import job_path, own_files, read_job
from nemotron_fp8.documents.manifest import parse_manifest
from nemotron_fp8.errors.stores import ChangedObjectError, MissingObjectError
from nemotron_fp8.stores.listing import JOB_FILE
from nemotron_fp8.untrusted.strict_json import MAX_BYTES

if TYPE_CHECKING:
    from nemotron_fp8.stores.client import StoreClient
    from nemotron_fp8.stores.listing import StoreListing

TRIES = 3
"""Readings of a folder whose job ends while it is read."""


def store_status(client: StoreClient, named: str) -> Status:
    """Return the state of a folder in a store as a destination.

    One listing is read, and the records of job and run, or the manifest.

    Args:
        client: client of the folder.
        named: the destination as it was named.

    Raises:
        DamagedJournalError: the job file is damaged.
        MalformedManifestError: the manifest is damaged.
        StoreError: the folder cannot be read; the class names the reason.
    """
    for _ in range(TRIES):
        listing = client.listing()
        try:
            if MANIFEST in listing.files:
                return _complete(client, listing, named)
            if JOB_FILE in listing.files:
                return _unfinished(client, listing, named)
        except (ChangedObjectError, MissingObjectError):  # published, or discarded, since the listing
            continue
        what = "only other files are there" if own_files(listing) else "no files are there"
        return Status(named, advice=f"{what}: no result, and no unfinished conversion")
    return Status(named, notices=("the folder changes while it is read; run status again",))


def _complete(client: StoreClient, listing: StoreListing, named: str) -> Status:
    manifest = parse_manifest(client.read_small(listing.file(MANIFEST), MAX_BYTES))
    there = {name: file.size for name, file in own_files(listing).items()}
    status = complete_status(named, "store", manifest, there.get)
    if JOB_FILE in listing.files:
        left = "the conversion is published, and its records are left over: the same command deletes them"
        return replace(status, notices=(*status.notices, left))
    return status


def _unfinished(client: StoreClient, listing: StoreListing, named: str) -> Status:
    begun = listing.file(JOB_FILE)
    job = read_job(client, begun)
    terms = Terms.of(job.terms, job_path(client))
    shards = {name: size for name, size in job.files.items() if name.endswith(".safetensors")}
    receipts = {name: listing.files.get(receipt_path(name)) for name in shards if name in listing.files}
    # Receipts of a discarded run are older than the job file that replaced its own.
    counted = {} if job.discard else {name: record for name, record in receipts.items() if record}
    finished = sorted(
        (
            Finished(name, listing.file(name).size, record.modified)
            for name, record in counted.items()
            if record.modified >= begun.modified
        ),
        key=lambda shard: shard.at or 0.0,
    )
    run = _newest_run(client, listing)
    state, process = life_of(run)
    # The record of a run is written by the clock of the store, like the receipts.
    start = listing.file(RUN_FILE).modified if RUN_FILE in listing.files else begun.modified
    if run is not None and run.ended is not None and run.since is not None:
        start -= run.ended - run.since  # the record was replaced at the end of the run
    this_run = [shard for shard in finished if (shard.at or 0.0) >= start]
    done = sum(shard.size for shard in finished)
    left = len(shards) - len(finished), sum(shards.values()) - sum(shards[shard.name] for shard in finished)
    pace = Pace.of(start, this_run)
    status = Status(
        named,
        "store",
        state,
        process,
        shards_done=len(finished),
        shards_total=len(shards),
        bytes_done=done,
        bytes_total=sum(shards.values()),
        seconds=pace.seconds,
        bytes_per_second=pace.bytes_per_second,
        recent_bytes_per_second=pace.recent,
        seconds_left=pace.left(*left, None),
        last=max([begun.modified, *(shard.at or 0.0 for shard in finished)]),
        source=job.source,
        recipe=terms.recipe,
        plan=terms.plan,
        version=terms.version,
        command=run.command if run else "",
        error=run.error if run else "",
    )
    return replace(status, advice=advice_for(status))


def _newest_run(client: StoreClient, listing: StoreListing) -> LockRecord | None:
    """Return the record of the newest run; None if it is missing, or is none."""
    file = listing.files.get(RUN_FILE)
    if file is None or file.size > MAX_RECORD_BYTES:
        return None
    try:
        return LockRecord.parse(client.read_small(file, MAX_RECORD_BYTES))
    except (ChangedObjectError, MissingObjectError):  # another run has begun, or has ended
        return None
