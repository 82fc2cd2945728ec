"""Take the inventory of a NeMo checkpoint in a repository on the Hub, from small files and ranges alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemotron_fp8.sources.hub import ATTRIBUTES, read_bytes
from nemotron_fp8.sources.nemo.files import Files, Place
from nemotron_fp8.sources.nemo.inventory import read_nemo
from nemotron_fp8.sources.nemo.side_files import MODEL_CONFIG

if TYPE_CHECKING:
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing
    from nemotron_fp8.sources.base import Source
    from nemotron_fp8.sources.files import Opener


MAX_WHOLE = 64 << 20
"""Largest file, in bytes, that is fetched whole and checked against the listing, if all of it is needed."""


def is_nemo_listing(listing: Listing) -> bool:
    """Return True if a repository holds an unpacked NeMo checkpoint."""
    return MODEL_CONFIG in listing.files


def read_nemo_listing(client: HubClient, listing: Listing, name: str, shard_size: int, opener: Opener) -> Source:
    """Take the inventory of a NeMo checkpoint on the Hub. No chunk is fetched.

    Args:
        client, listing: client and listing of the repository.
        name: name of the checkpoint in messages.
        shard_size: bytes of tensors in a shard of the result.
        opener: opens files of the repository by path (`nemotron_fp8.sources.hub.HubOpener`); chunks are read
            through it.

    Raises:
        NemoError, SourceError: as `nemotron_fp8.sources.nemo.inventory.open_nemo`.
        HubError: a file cannot be fetched; the class names the reason.
    """
    # Every repository has a .gitattributes of its own, so leaving it out needs no notice.
    places = {path: Place(path, 0, file.size) for path, file in listing.files.items() if path != ATTRIBUTES}
    source = read_nemo(_ListedFiles(name, places, opener, client, listing), shard_size, None)
    return replace(source, stamps={path: file.sha256 or file.blob or "" for path, file in listing.files.items()})


@dataclass(frozen=True)
class _ListedFiles(Files):
    """Files of a listing, read without its opener, which may fetch a whole file to open it."""

    client: HubClient
    listing: Listing

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return bytes of a file. A small file that is read whole is checked against its digest."""
        size = self.listing.file(name).size
        stop = size if length is None else min(size, offset + length)
        if offset == 0 and stop == size <= MAX_WHOLE:
            return self.client.read_small(self.listing, name)
        return read_bytes(self.client, self.listing, name, offset, stop) if offset < stop else b""
