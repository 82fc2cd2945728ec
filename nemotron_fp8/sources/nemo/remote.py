"""Take the inventory of a NeMo checkpoint in a repository or an object store, from small files and ranges alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemotron_fp8.sources.hub import ATTRIBUTES, HubFiles
from nemotron_fp8.sources.nemo.files import Files, Place
from nemotron_fp8.sources.nemo.inventory import read_nemo
from nemotron_fp8.sources.nemo.side_files import MODEL_CONFIG
from nemotron_fp8.sources.remote import read_bytes

if TYPE_CHECKING:
    from collections.abc import Collection

    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing
    from nemotron_fp8.sources.base import Source
    from nemotron_fp8.sources.files import Opener
    from nemotron_fp8.sources.remote import RemoteFiles


MAX_WHOLE = 64 << 20
"""Largest file, in bytes, that is fetched whole and checked against the listing, if all of it is needed."""


def is_nemo_listing(names: Collection[str]) -> bool:
    """Return True if the files of a repository or of a folder in a store are an unpacked NeMo checkpoint."""
    return MODEL_CONFIG in names


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
    source = read_nemo_files(HubFiles(client, listing), name, shard_size, opener, (ATTRIBUTES,))
    return replace(source, stamps={path: file.sha256 or file.blob or "" for path, file in listing.files.items()})


def read_nemo_files(
    files: RemoteFiles, name: str, shard_size: int, opener: Opener, ignored: Collection[str] = ()
) -> Source:
    """Take the inventory of a NeMo checkpoint from remote files. No chunk is fetched.

    Args:
        files: the files.
        name: name of the checkpoint in messages.
        shard_size: bytes of tensors in a shard of the result.
        opener: opens the files by path; chunks are read through it.
        ignored: names of files that are neither copied nor reported as left out.

    Raises:
        NemoError, SourceError: as `nemotron_fp8.sources.nemo.inventory.open_nemo`, and the errors of the client.
    """
    places = {path: Place(path, 0, files.size(path)) for path in files.names() if path not in ignored}
    return read_nemo(_ListedFiles(name, places, opener, files), shard_size, None)


@dataclass(frozen=True)
class _ListedFiles(Files):
    """Files of a listing, read without its opener, which may fetch a whole file to open it."""

    remote: RemoteFiles

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return bytes of a file. A small file that is read whole is checked against its digest."""
        size = self.remote.size(name)
        stop = size if length is None else min(size, offset + length)
        if offset == 0 and stop == size <= MAX_WHOLE:
            return self.remote.read_whole(name)
        return read_bytes(self.remote, name, offset, stop) if offset < stop else b""
