"""A destination that writes nothing and compares the result with a complete one in an object store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.destinations.base import Staging
from nemotron_fp8.destinations.comparison import DifferentError
from nemotron_fp8.destinations.store.prefix import own_files, records
from nemotron_fp8.destinations.store.sink import OrderedSink
from nemotron_fp8.documents.manifest import parse_manifest
from nemotron_fp8.errors import MalformedManifestError
from nemotron_fp8.untrusted.strict_json import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.checkpoint.local_files import FileDigest
    from nemotron_fp8.destinations.base import Staged
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.stores.client import StoreClient
    from nemotron_fp8.stores.listing import StoreListing


class ComparingStoreDestination:
    """Compares a result with the manifest in a folder of a store, and with the sizes of its files. A context manager.

    The shards in the store are not read: their digests in the manifest are compared. `verify` reads them.

    Args:
        client: client of the folder.
        listing: the folder's files, with a manifest.
        plan: plan of the conversion.
        spill: folder for bytes that come out of order; None for the system's.
    """

    complete = False
    bytes_published = 0
    digests = True

    def __init__(self, client: StoreClient, listing: StoreListing, plan: Plan, spill: Path | None) -> None:
        self._client, self._listing, self._plan, self._spill = client, listing, plan, spill
        self._manifest = b""
        self._files: Mapping[str, FileDigest] = {}

    @property
    def label(self) -> str:
        return str(self._client.address)

    def __enter__(self) -> Self:
        """Compare the names and sizes of the files with the manifest.

        Raises:
            DifferentError: they differ, or the manifest has no digests.
        """
        listing = self._listing
        self._manifest = self._client.read_small(listing.file(MANIFEST), MAX_BYTES)
        try:
            manifest = parse_manifest(self._manifest)
        except MalformedManifestError as error:
            raise DifferentError(str(error)) from error
        self._files = manifest.files
        there = {name: file.size for name, file in own_files(listing).items() if name != MANIFEST}
        if not manifest.has_digests or there != {name: file.size for name, file in manifest.files.items()}:
            raise DifferentError(f"{self.label}: not the files of the manifest, or it has no digests")
        if self._plan.recipe.nonfinite != "keep":  # else a shard may get another layout
            for shard_task in self._plan.shard_tasks:
                if there.get(shard_task.name) != shard_task.layout.file_size:
                    raise DifferentError(f"{self.label}: {shard_task.name}")
        return self

    def __exit__(self, *_: object) -> None: ...

    def finished(self) -> Mapping[str, ShardReceipt]:
        return {}

    @property
    def staging(self) -> DigestStaging:
        return DigestStaging(self._files, self._spill)

    def record(self, receipt: ShardReceipt) -> None: ...

    def wait(self) -> None: ...

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        del receipts, copies  # their digests are in the manifest
        if documents[MANIFEST] != self._manifest:
            raise DifferentError(f"{self.label}: {MANIFEST}")
        self._client.delete(records(self._listing))  # which a run left that was stopped while it deleted them


@dataclass(frozen=True, slots=True)
class DigestStaging(Staging):
    """Compares the digests of shards with those of a manifest.

    Attributes:
        files: size and digest of each file of the manifest, by name.
        spill: folder for bytes that come out of order; None for the system's.
    """

    files: Mapping[str, FileDigest]
    spill: Path | None = None

    def stage(self, name: str, size: int) -> DigestSink:
        return DigestSink(name, size, self.files.get(name), self.spill)


class DigestSink(OrderedSink):
    """Hashes a shard and keeps nothing of it.

    Args:
        name: file name of the shard.
        size: bytes of the shard.
        expected: size and digest of the shard in the manifest; None if it lists no such shard.
        spill: folder for bytes that come out of order; None for the system's.

    Raises:
        DifferentError: on `finish`, if the digest is another one.
    """

    def __init__(self, name: str, size: int, expected: FileDigest | None, spill: Path | None) -> None:
        super().__init__(name, size, spill)
        self._expected = expected

    def finish(self) -> Staged:
        staged = super().finish()
        expected = self._expected
        if expected is None or (expected.size, expected.sha256) != (staged.size, staged.sha256):
            raise DifferentError(self.name)
        return staged

    def consume(self, pieces: Iterator[memoryview]) -> None:
        for _ in pieces:
            pass
