"""A repository on the Hub as source: inventory from headers alone, files by range or as a whole."""

from __future__ import annotations

import hashlib
import uuid
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.inventory import (
    CARD,
    CONFIG,
    INDEX,
    MANIFEST,
    Inventory,
    assemble,
    copyable,
    is_card,
    load_config,
    load_index,
    make_shard,
    model_weights,
    shards_of,
    sort_side_files,
    stacks_of,
    why_folder_left_out,
)
from nemotron_fp8.checkpoint.model_code import CODE, ModelCode, find_code, names_code
from nemotron_fp8.checkpoint.other_formats import without_weights
from nemotron_fp8.errors import SourceError, SourceNotFoundError, printable
from nemotron_fp8.errors.hub import DigestError
from nemotron_fp8.sources.files import MappedFile
from nemotron_fp8.untrusted import strict_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing
    from nemotron_fp8.sources.files import SourceFile


FIRST_READ = 256 * 1024
"""Bytes of the first request for each shard; most headers are shorter and need no second request."""
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
    top = sorted(path for path in listing.files if "/" not in path)
    config = load_config(read_json(client, listing, CONFIG)) if CONFIG in top else None
    index_metadata, weight_map = None, None
    if INDEX in top:
        index_metadata, weight_map = load_index(read_json(client, listing, INDEX))
    name = str(address)
    archives = [path for path in listing.files if path.lower().endswith(".nemo")]
    if archives and not any(path.endswith(".safetensors") for path in top):
        what = f"holds a NeMo archive, {printable(archives[0])}; archives are read from local disks only"
        raise SourceNotFoundError(name, f"{what}: download it (hf download {address.repo}), then pass the file")
    if weight_map is None and not model_weights(top):
        raise _without_weights(client, listing, name, top)
    shards = shards_of(name, top, weight_map)
    read = {}
    for shard, found in read_headers(client, listing, shards).items():
        if isinstance(found, SourceError):
            raise found
        read[shard] = found
    made = tuple(make_shard(shard, header, listing.file(shard).size) for shard, (header, _) in read.items())
    sizes = {path: listing.file(path).size for path in top if path != ATTRIBUTES}
    code = _find_code(client, listing, config, sizes)
    side, left_out = sort_side_files(sizes, shards, code.files)
    nested = tuple((path, _why_nested(path)) for path in sorted(listing.files) if "/" in path)
    inventory = assemble(name, made, weight_map, index_metadata, config, side, (*left_out, *nested))
    inventory = replace(inventory, notices=(*inventory.notices, *code.notices))
    has_card = CARD in top and is_card(CARD, listing.file(CARD).size)
    card = client.read_small(listing, CARD) if has_card else None
    inventory = replace(inventory, card=card, origin=address.repo, commit=listing.sha)
    if MANIFEST in top and listing.file(MANIFEST).size <= strict_json.MAX_BYTES:
        inventory = replace(inventory, stacks=stacks_of(client.read_small(listing, MANIFEST)))
    digests = {shard: (header.data_start, digest) for shard, (header, digest) in read.items()}
    return HubSource(inventory, listing, digests)


def _why_nested(path: str) -> str:
    """Return the reason why a file in a folder is not copied."""
    return f"in {why_folder_left_out(path.partition('/')[0])}"


def _find_code(
    client: HubClient, listing: Listing, config: Mapping[str, Any] | None, sizes: Mapping[str, int]
) -> ModelCode:
    """Find the code that the configs name; a repository without code, and without its names, needs no request."""
    if not any(name.endswith(CODE) for name in sizes) and not names_code(config):
        return ModelCode()
    return find_code(config, copyable(sizes), lambda name: client.read_small(listing, name))


def _without_weights(client: HubClient, listing: Listing, name: str, top: Sequence[str]) -> SourceError:
    """Return the error of a repository without shards in its top folder."""
    nested = [path for path in listing.files if path.count("/") == 1]
    step = f"; download it (hf download {listing.repo} --local-dir FOLDER)"
    return without_weights(name, top, nested, lambda path: read_json(client, listing, path), "FOLDER/", step)


def read_json(client: HubClient, listing: Listing, name: str) -> bytes:
    """Return a JSON file; of one beyond the size limit, just enough bytes for the loader to reject it."""
    if listing.file(name).size > strict_json.MAX_BYTES:
        return read_bytes(client, listing, name, 0, strict_json.MAX_BYTES + 1)
    return client.read_small(listing, name)


def read_headers(
    client: HubClient, listing: Listing, shards: Sequence[str]
) -> dict[str, tuple[Header, str] | SourceError]:
    """Call `read_header` for several shards in parallel; a shard that breaks the format yields its error.

    Raises:
        HubError: a header cannot be read; the class names the reason.
    """

    def one(view: HubClient, shard: str) -> tuple[Header, str] | SourceError:
        try:
            return read_header(view, listing, shard)
        except SourceError as error:
            return error

    return dict(zip(shards, client.map(one, shards), strict=True))


def read_header(client: HubClient, listing: Listing, shard: str) -> tuple[Header, str]:
    """Read the header of a shard by range requests; return it and the SHA-256 of all bytes before the first tensor.

    Raises:
        MalformedHeaderError, UnknownDtypeError: the header breaks the format.
        HubError: the header cannot be read; the class names the reason.
    """
    from nemotron_fp8.checkpoint.header import LENGTH_BYTES, header_length, parse_header

    size = listing.file(shard).size
    start = read_bytes(client, listing, shard, 0, min(size, FIRST_READ))
    stop = LENGTH_BYTES + header_length(start[:LENGTH_BYTES], size, shard)
    if stop > len(start):
        start += read_bytes(client, listing, shard, len(start), stop)
    header = parse_header(start[LENGTH_BYTES:stop], size, shard)
    return header, hashlib.sha256(start[:stop]).hexdigest()


def read_bytes(client: HubClient, listing: Listing, path: str, start: int, stop: int) -> bytes:
    """Return bytes ``[start, stop)`` of a file of the listing."""
    pieces: list[bytes] = []
    client.read_range(listing, path, start, stop, lambda _offset, data: pieces.append(data))
    return b"".join(pieces)


class RangeFile:
    """A file on the Hub that is read by range requests."""

    def __init__(self, client: HubClient, listing: Listing, path: str) -> None:
        self.client, self.listing, self.path = client, listing, path
        listing.file(path)

    def window(self, offset: int, length: int) -> memoryview | None:
        """Return None: a remote file cannot be mapped."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` by a range request; retry the missing rest after failures."""

        def put(position: int, data: bytes) -> None:
            buffer[position - offset : position - offset + len(data)] = data

        self.client.read_range(self.listing, self.path, offset, offset + len(buffer), put)

    def release(self, offset: int, length: int) -> None:
        """Do nothing: no bytes are held."""

    def close(self) -> None:
        """Do nothing: no file is open."""


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
                return RangeFile(client, self.listing, file)
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
