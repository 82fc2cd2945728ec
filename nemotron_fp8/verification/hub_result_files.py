"""A result on the Hub, verified without downloading its shards: the Hub records a SHA-256 of each.

Files that git stores are fetched and hashed. Headers of shards, and tensors for a comparison, are read by range.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.documents.manifest import parse_manifest
from nemotron_fp8.errors import SourceError, SourceNotFoundError
from nemotron_fp8.hub.address import parse_address
from nemotron_fp8.progress import ignore_progress
from nemotron_fp8.sources.hub import HubFiles, HubOpener, read_repo
from nemotron_fp8.sources.remote import read_headers, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.local_files import FileDigest
    from nemotron_fp8.documents.manifest import Manifest
    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.progress import Advance
    from nemotron_fp8.sources.files import Opener


@dataclass(slots=True)
class ListedFiles:
    """A result on the Hub, pinned to a commit. Every method may raise HubError."""

    client: HubClient
    address: Address
    listing: Listing
    _manifest: Manifest | None = field(default=None, init=False)
    _headers: dict[str, tuple[Header, str] | SourceError] = field(default_factory=dict, init=False)

    @property
    def name(self) -> str:
        return self.address.repo

    @property
    def opener(self) -> Opener:
        return HubOpener(self.client, self.listing)

    def names(self) -> list[str]:
        return sorted(path for path in self.listing.files if "/" not in path)

    def paths(self) -> list[str]:
        return sorted(self.listing.files)

    def manifest(self) -> Manifest | None:
        if self._manifest is None and MANIFEST in self.listing.files:
            self._manifest = parse_manifest(self.read(MANIFEST))
        return self._manifest

    def read(self, name: str) -> bytes:
        return read_json(HubFiles(self.client, self.listing), name)

    def header(self, name: str) -> tuple[Header, int]:
        if name not in self._headers:
            shards = [name, *(path for path in self.names() if path.endswith(".safetensors") and path != name)]
            self._headers = read_headers(HubFiles(self.client, self.listing), shards)
        found = self._headers[name]
        if isinstance(found, SourceError):
            raise found
        return found[0], self.listing.file(name).size

    def inventory(self) -> Inventory:
        return read_repo(self.client, self.address, self.listing).inventory

    def differing(
        self, files: Mapping[str, FileDigest], threads: int, advance: Advance = ignore_progress
    ) -> dict[str, str]:
        """Compare the Hub's digests of objects, and the bytes of files that git stores."""
        del advance  # hardly any bytes are read
        wrong: dict[str, str] = {}

        def one(name: str) -> None:
            if problem := self._differs(name, files[name]):
                wrong[name] = problem

        parallel_for(max(1, min(threads, len(files))), sorted(files), one)
        return dict(sorted(wrong.items()))

    def _differs(self, name: str, expected: FileDigest) -> str | None:
        file = self.listing.files.get(name)
        if file is None:
            return "missing"
        if (wrong := expected.wrong_size(file.size)) or expected.sha256 is None:
            return wrong
        found = file.sha256 or hashlib.sha256(self.client.read_small(self.listing, name)).hexdigest()
        return expected.wrong_sha256(found)


def open_listed(text: str, options: HubOptions) -> ListedFiles:
    """Open a result by its address.

    Raises:
        SourceNotFoundError: the repository holds no weights.
        HubError, AddressError: the repository cannot be read; the class names the reason.
    """
    address = parse_address(text)
    client = options.client()
    listing = client.listing(address.repo, address.revision)
    if not any(path.endswith(".safetensors") for path in listing.files):
        raise SourceNotFoundError(text, "holds no weights; rerun an interrupted conversion to resume it")
    return ListedFiles(client, address, listing)
