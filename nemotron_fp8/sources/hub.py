"""A repository on the Hub as source: inventory from headers alone, files by range or as a whole."""

from __future__ import annotations

import hashlib
import uuid
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from nemotron_fp8.checkpoint.inventory import CARD, CONFIG, INDEX, Inventory
from nemotron_fp8.errors.hub import DigestError
from nemotron_fp8.sources.files import MappedFile
from nemotron_fp8.sources.remote import RangeFile, read_inventory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing
    from nemotron_fp8.sources.files import SourceFile
    from nemotron_fp8.sources.remote import RemoteFiles

Item = TypeVar("Item")
T = TypeVar("T")

ATTRIBUTES = ".gitattributes"
"""File of every repository that is neither copied nor reported as left out."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A checkpoint on the Hub, pinned to a commit.

    Attributes:
        inventory: its tensors and files.
        listing: files at that commit; no other file is ever requested.
        header_digests: bytes of each shard's header and their SHA-256.
    """

    inventory: Inventory
    listing: Listing
    header_digests: Mapping[str, tuple[int, str]]

    @property
    def stamps(self) -> dict[str, str]:
        """Digest of each used file; a later run of the same job must find the same digests."""
        used = (*(shard.name for shard in self.inventory.shards), CONFIG, INDEX)
        used += (CARD,) * (self.inventory.card is not None)
        files = self.listing.files
        return {name: files[name].sha256 or files[name].blob or "" for name in used if name in files}

    def check_header(self, name: str, path: Path) -> None:
        """Check that a downloaded shard begins with the header that the plan was made from.

        The Hub has no digest of a range, so only the whole file proves the header.

        Raises:
            DigestError: the header differs.
        """
        length, expected = self.header_digests[name]
        with path.open("rb") as file:
            actual = hashlib.sha256(file.read(length)).hexdigest()
        if actual != expected:
            raise DigestError(self.listing.repo, name, expected, actual, 1)


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of a repository (`nemotron_fp8.sources.remote.RemoteFiles`)."""

    client: HubClient
    listing: Listing

    def names(self) -> Collection[str]:
        return self.listing.files.keys()

    def size(self, name: str) -> int:
        return self.listing.file(name).size

    def read_whole(self, name: str) -> bytes:
        return self.client.read_small(self.listing, name)

    def read_range(self, name: str, start: int, stop: int, put: Callable[[int, bytes], None]) -> None:
        self.client.read_range(self.listing, name, start, stop, put)

    def map(self, call: Callable[[RemoteFiles, Item], T], items: Iterable[Item]) -> list[T]:
        return self.client.map(lambda view, item: call(HubFiles(view, self.listing), item), items)


def read_repo(client: HubClient, address: Address, listing: Listing | None = None) -> HubSource:
    """Read the inventory of a repository; of each shard only the header is fetched.

    Args:
        client: the client.
        address: the repository.
        listing: its files; None to request them.

    Raises:
        SourceError: the repository holds no readable checkpoint, or its index names a file that is not listed.
        HubError: the repository cannot be read; the class names the reason.
    """
    listing = listing or client.listing(address.repo, address.revision)
    fetch = f"hf download {listing.repo} --local-dir FOLDER"
    inventory, digests = read_inventory(HubFiles(client, listing), str(address), fetch, (ATTRIBUTES,))
    return HubSource(replace(inventory, origin=address.repo, commit=listing.sha), listing, digests)


@dataclass
class HubOpener:
    """Opens files of a listing. Picklable.

    Each unpickled copy downloads its own files and deletes them when it is garbage-collected.
    A shard is read from its download, or by range if it was not downloaded. Any other file is downloaded once and
    checked against the listing.

    Attributes:
        client, listing: client and listing.
        folder: private folder for downloads; None to read everything by range.
        local: prefetched files by name; `nemotron_fp8.sources.hub_prefetch.Prefetch` puts the shards there.
        fetched: other downloaded files by name.
    """

    client: HubClient
    listing: Listing
    folder: Path | None = None
    local: dict[str, Path] = field(default_factory=dict)
    fetched: dict[str, Path] = field(default_factory=dict)
    _view: HubClient | None = field(default=None, init=False, repr=False, compare=False)

    def __getstate__(self) -> tuple[HubClient, Listing, Path | None, dict[str, Path]]:
        return self.client, self.listing, self.folder, self.local

    def __setstate__(self, state: tuple[HubClient, Listing, Path | None, dict[str, Path]]) -> None:
        self.client, self.listing, self.folder, self.local = state
        self.fetched, self._view = {}, None
        # A worker process has a copy for each shard, and only that copy knows what it has downloaded.
        weakref.finalize(self, _unlink, self.fetched)

    def open(self, file: str) -> SourceFile:
        """Open a file by its path in the repository.

        Raises:
            UnlistedFileError: the file is not in the listing.
            HubError: the file cannot be downloaded; the class names the reason.
        """
        client = self._view or self.client
        path = self.local.get(file) or self.fetched.get(file)
        if path is None:
            if file.endswith(".safetensors") or self.folder is None:
                return RangeFile(HubFiles(client, self.listing), file)
            path = self.folder / f"{uuid.uuid4().hex}.side"
            client.download(self.listing, file, path)
            self.fetched[file] = path
        return MappedFile(path, name=f"{self.listing.label}: {file}")

    def drop_fetched(self) -> None:
        """Remove downloaded files that were not prefetched; an open file stays readable."""
        _unlink(self.fetched)

    def attach(self, client: HubClient, folder: Path) -> None:
        """Read through ``client`` and download into ``folder`` until `detach`."""
        self._view, self.folder = client, folder

    def detach(self) -> None:
        """Forget all downloads and their folder, which the caller removes."""
        self.local.clear()
        self.fetched.clear()
        self._view = self.folder = None


def _unlink(fetched: dict[str, Path]) -> None:
    """Remove downloaded files and clear the dict."""
    for path in fetched.values():
        path.unlink(missing_ok=True)
    fetched.clear()
