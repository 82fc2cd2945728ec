"""Staging of shards in an object store, from whichever machine makes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemotron_fp8.destinations.base import Staging
from nemotron_fp8.destinations.store.sink import StoreSink
from nemotron_fp8.errors.store_results import JobLostError
from nemotron_fp8.progress import TransferTracker
from nemotron_fp8.stores.listing import JOB_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.stores.client import StoreClient
    from nemotron_fp8.stores.listing import StoredFile


UPLOAD_WAITS = (5.0, 30.0, 120.0)
"""Seconds before a shard is made again whose upload broke; the client has retried its parts for minutes by then."""


@dataclass(frozen=True, slots=True)
class StoreStaging(Staging):
    """Staging that uploads each shard to its place from the worker that makes it. Picklable.

    Attempts at a shard share its place: they send the same bytes, and each object appears at once. A worker that was
    presumed lost and finishes late is therefore harmless.

    Attributes:
        client: client of the folder; each process has its own credentials.
        job: the job file of this run.
        digests: whether receipts carry SHA-256 digests.
        spill: folder for bytes that come out of order beyond what memory may hold; None for the system's.
        transfers: receives upload progress; None without a listener.
    """

    client: StoreClient
    job: StoredFile
    digests: bool = True
    spill: Path | None = None
    transfers: TransferTracker | None = None

    @property
    def upload_waits(self) -> tuple[float, ...]:
        return tuple(wait for wait in UPLOAD_WAITS if wait < self.client.policy.seconds)

    def reporting_to(self, transfers: TransferTracker) -> StoreStaging:
        return replace(self, client=self.client.with_options(on_wait=transfers.waits), transfers=transfers)

    def stage(self, name: str, size: int) -> StoreSink:
        # A shard appears with its last bytes: a run whose folder was taken over must not write any more of them.
        transfers = self.transfers or TransferTracker(None)
        return StoreSink(self.client, name, size, self.check_job, transfers, self.spill, self.digests)

    def probe(self) -> None:
        # Reads the job file with the credentials of this node.
        self.check_job()

    def check_job(self) -> None:
        """Check that the folder still belongs to this job.

        Raises:
            JobLostError: the job file is gone, or is that of another job.
        """
        found = self.client.head(JOB_FILE)
        if found is None:
            raise JobLostError(str(self.client.address), "is gone")
        if (found.etag, found.size) != (self.job.etag, self.job.size):
            raise JobLostError(str(self.client.address), "was replaced")
