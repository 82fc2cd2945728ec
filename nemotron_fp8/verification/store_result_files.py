"""A result in an object store. A store records no SHA-256 of its own, so that the bytes of each file are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemotron_fp8.destinations.store.prefix import digest_of_object, own_files
from nemotron_fp8.errors import SourceNotFoundError
from nemotron_fp8.progress import ignore_progress
from nemotron_fp8.sources.store import StoreFiles, StoreOpener, read_store, refuse_unfinished
from nemotron_fp8.stores.address import parse_store
from nemotron_fp8.stores.client import StoreClient
from nemotron_fp8.verification.remote_result_files import RemoteResultFiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.local_files import FileDigest
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.progress import Advance
    from nemotron_fp8.sources.files import Opener
    from nemotron_fp8.stores.listing import StoreListing


READERS = 4
"""Files that are hashed at the same time; each is read in parallel pieces."""


@dataclass(slots=True)
class StoreResultFiles(RemoteResultFiles):
    """A result in a store, at the versions of one listing. Every method may raise StoreError."""

    client: StoreClient
    listing: StoreListing

    @property
    def name(self) -> str:
        return str(self.client.address)

    @property
    def opener(self) -> Opener:
        return StoreOpener(self.client, self.listing)

    def inventory(self) -> Inventory:
        return read_store(StoreFiles(self.client, self.listing))

    def differing(
        self, files: Mapping[str, FileDigest], threads: int, advance: Advance = ignore_progress
    ) -> dict[str, str]:
        return RemoteResultFiles.differing(self, files, min(threads, READERS), advance)

    def digest_of(self, name: str, advance: Advance) -> str:
        return digest_of_object(self.client, self.listing.file(name), advance)


def open_in_store(text: str, options: HubOptions) -> StoreResultFiles:
    """Open a result by its address.

    Args:
        text: address of the folder.
        options: limits of retries, and what is called before each.

    Raises:
        SourceNotFoundError: the folder holds no weights, or an unfinished result.
        StoreError, StoreAddressError: the folder cannot be read; the class names the reason.
    """
    client = StoreClient(parse_store(text), options.retry_policy(), on_wait=options.on_wait)
    listing = client.listing()
    refuse_unfinished(listing)
    listing = replace(listing, files=own_files(listing))
    if not any(path.endswith(".safetensors") for path in listing.files):
        raise SourceNotFoundError(text, "holds no weights; rerun an interrupted conversion to resume it")
    return StoreResultFiles(StoreFiles(client, listing), client, listing)
