"""A result on the Hub, verified without downloading its shards: the Hub records a SHA-256 of each.

Files that git stores are fetched and hashed. Headers of shards, and tensors for a comparison, are read by range.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.errors import SourceNotFoundError
from nemotron_fp8.hub.address import parse_address
from nemotron_fp8.sources.hub import HubFiles, HubOpener, read_repo
from nemotron_fp8.verification.remote_result_files import RemoteResultFiles

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.progress import Advance
    from nemotron_fp8.sources.files import Opener


@dataclass(slots=True)
class HubResultFiles(RemoteResultFiles):
    """A result on the Hub, pinned to a commit. Every method may raise HubError."""

    client: HubClient
    address: Address
    listing: Listing

    @property
    def name(self) -> str:
        return self.address.repo

    @property
    def opener(self) -> Opener:
        return HubOpener(self.client, self.listing)

    def inventory(self) -> Inventory:
        return read_repo(self.client, self.address, self.listing).inventory

    def digest_of(self, name: str, advance: Advance) -> str:
        """Return the Hub's digest of an object, or that of the bytes of a file that git stores."""
        del advance  # hardly any bytes are read
        recorded = self.listing.file(name).sha256
        return recorded or hashlib.sha256(self.client.read_small(self.listing, name)).hexdigest()


def open_listed(text: str, options: HubOptions) -> HubResultFiles:
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
    return HubResultFiles(HubFiles(client, listing), client, address, listing)
