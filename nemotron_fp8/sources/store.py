"""A folder of an object store as source: inventory from headers alone, tensors by range, no file on the disk."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.checkpoint.inventory import CARD, CONFIG, INDEX, MANIFEST, make_shard, without_remnants
from nemotron_fp8.errors import SourceNotFoundError
from nemotron_fp8.sources.base import Source, parse_shard_size, refuse_shard_size
from nemotron_fp8.sources.nemo.remote import is_nemo_listing, read_nemo_files
from nemotron_fp8.sources.read_ahead import HELD, SEGMENT, ReadAhead
from nemotron_fp8.sources.remote import read_header, read_inventory
from nemotron_fp8.stores.address import parse_store
from nemotron_fp8.stores.client import StoreClient
from nemotron_fp8.stores.connection import require_obstore
from nemotron_fp8.stores.listing import JOB_FILE, StoreListing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from typing_extensions import Self

    from nemotron_fp8.checkpoint.inventory import Inventory, Shard
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.progress import TransferTracker
    from nemotron_fp8.sources.files import SourceFile
    from nemotron_fp8.sources.remote import RemoteFiles
    from nemotron_fp8.stores.address import StoreAddress

SHARD = ".safetensors"
MAX_WHOLE = HELD * SEGMENT
"""Bytes of the largest side file that is held whole; nothing is read ahead then."""
Item = TypeVar("Item")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreFiles:
    """Files of a folder in a store (`nemotron_fp8.sources.remote.RemoteFiles`)."""

    client: StoreClient
    listing: StoreListing

    def names(self) -> Collection[str]:
        return self.listing.files.keys()

    def size(self, name: str) -> int:
        return self.listing.file(name).size

    def read_whole(self, name: str) -> bytes:
        return self.client.read_small(self.listing.file(name))

    def read_range(self, name: str, start: int, stop: int, put: Callable[[int, bytes], None]) -> None:
        self.client.read_range(self.listing.file(name), start, stop, put)

    def map(self, call: Callable[[RemoteFiles, Item], T], items: Iterable[Item]) -> list[T]:
        return self.client.map(lambda view, item: call(StoreFiles(view, self.listing), item), items)


@dataclass
class StoreOpener:
    """Opens files of a listing, each at the version that was listed. Picklable; a copy reads through its own client.

    Attributes:
        client: the client.
        listing: the files that may be opened.
        whole: names of small files that are fetched whole on their first read, so that their digest can be checked.
        by_range: True, as `nemotron_fp8.sources.files.Ranged` says.
    """

    client: StoreClient
    listing: StoreListing
    whole: frozenset[str] = frozenset()
    by_range: bool = field(default=True, init=False, repr=False, compare=False)
    _view: StoreClient | None = field(default=None, init=False, repr=False, compare=False)
    _ahead: ReadAhead = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._ahead = ReadAhead(self._fetch)

    def __reduce__(self) -> tuple[type[StoreOpener], tuple[StoreClient, StoreListing, frozenset[str]]]:
        return StoreOpener, (self.client, self.listing, self.whole)

    def open(self, file: str) -> SourceFile:
        """Open a file by its name in the folder.

        Raises:
            UnlistedObjectError: the file is not in the listing.
        """
        found = self.listing.file(file)
        if file in self.whole:
            return _WholeFile(lambda: (self._view or self.client).read_small(found))
        return _StoreFile(self._ahead, file, found.size)

    def attach(self, client: StoreClient | None) -> None:
        """Read through another view of the client; None for the client itself."""
        self._view = client

    def _fetch(self, name: str, offset: int, buffer: memoryview, closed: Event | None) -> None:
        def put(position: int, data: bytes) -> None:
            buffer[position - offset : position - offset + len(data)] = data

        client = self._view or self.client
        if closed is not None:
            client = client.linked(closed)
        client.read_range(self.listing.file(name), offset, offset + len(buffer), put)


class _StoreFile:
    """File in a store (`nemotron_fp8.sources.files.SourceFile`). A replaced file is noticed by every read."""

    def __init__(self, ahead: ReadAhead, name: str, size: int) -> None:
        self._ahead, self._name, self._size = ahead, name, size

    def window(self, offset: int, length: int) -> memoryview | None:
        """Return None: a remote file cannot be mapped."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if len(buffer):
            self._ahead.read_into(self._name, self._size, offset, buffer)

    def release(self, offset: int, length: int) -> None:
        """Do nothing: bytes that were read are not held."""

    def close(self) -> None:
        self._ahead.close(self._name)


class _WholeFile:
    """Small file in a store, fetched by its first read and held until it is closed."""

    def __init__(self, fetch: Callable[[], bytes]) -> None:
        self._fetch = fetch
        self._content: bytes | None = None

    def window(self, offset: int, length: int) -> memoryview | None:
        """Return None: a remote file cannot be mapped."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self._content is None:
            self._content = self._fetch()
        buffer[:] = self._content[offset : offset + len(buffer)]

    def release(self, offset: int, length: int) -> None:
        """Do nothing: the file is held until it is closed."""

    def close(self) -> None:
        self._content = None


@dataclass(frozen=True, slots=True)
class StorePrefetcher:
    """Prefetcher of a store: reads report their waits, and nothing is copied to a disk.

    Attributes:
        opener: opener of the source.
    """

    opener: StoreOpener

    def start(
        self, transfers: TransferTracker, workers: int = 1, largest_output: int = 0, *, whole_shards: bool = True
    ) -> StorePrefetch:
        return StorePrefetch(self.opener, transfers)

    def disk_bytes(self, shard_tasks: Sequence[ShardTask], largest_output: int, workers: int) -> int:
        return 0

    def for_workers(self) -> StorePrefetcher:
        return self


class StorePrefetch:
    """Reads of one conversion, whose end cancels those that are left."""

    def __init__(self, opener: StoreOpener, transfers: TransferTracker) -> None:
        self._opener, self._transfers = opener, transfers
        self._over = Event()

    def __enter__(self) -> Self:
        self._opener.attach(self._opener.client.with_options(on_wait=self._transfers.waits, cancel=self._over))
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._opener.attach(None)

    def shard_tasks(self, left: Sequence[ShardTask]) -> Sequence[ShardTask]:
        return left

    def done(self, name: str) -> None:
        """Do nothing: no file is held."""


def open_store(
    text: str,
    shard_size: str | int | None,
    on_wait: Callable[[str, float], None] | None = None,
    policy: RetryPolicy | None = None,
) -> Source:
    """Take the inventory of a folder in an object store and create its opener. No tensor is read.

    Args:
        text: address of the folder.
        shard_size: bytes of tensors in a shard of the result, for a NeMo checkpoint only.
        on_wait: called before a request is retried, with the reason and the seconds until then.
        policy: limits and waits of retries; None for the defaults.

    Raises:
        SourceError: the folder holds no readable checkpoint, or an unfinished result; the class names the reason.
        StoreError, StoreAddressError: the store rejects a request, or the address is malformed.
        MissingExtraError: obstore is not installed.
        RecipeError: ``shard_size`` is malformed, or set for a source that has shards.
    """
    address, shard = _folder_of(parse_store(text))
    require_obstore()
    client = StoreClient(address, policy or RetryPolicy(), on_wait=on_wait)
    listing = client.listing()
    if shard is not None and shard not in listing.files:
        raise SourceNotFoundError(text, "no such file in the store; check bucket and folder")
    if not listing.files:
        raise SourceNotFoundError(str(address), "no files in this folder of the store; check bucket and folder")
    refuse_unfinished(listing)
    files = StoreFiles(client, listing)
    with listing.naming():
        if shard is None and is_nemo_listing(listing.files):
            size = parse_shard_size(shard_size)
            opener = StoreOpener(client, listing)
            source = read_nemo_files(files, str(address), size, opener)
            stamps = {name: file.stamp for name, file in listing.files.items()}
            inventory = _held(source.inventory)
            return Source(inventory, source.opener, None, stamps, StorePrefetcher(opener), str(address))
        refuse_shard_size(shard_size)
        return _read(files, address, shard)


def inspect_store(
    text: str, on_wait: Callable[[str, float], None] | None = None, policy: RetryPolicy | None = None
) -> tuple[Shard, ...]:
    """Return the shards of a folder, or the single shard of a file, from headers alone; arguments as `open_store`.

    Raises:
        SourceError, StoreError, StoreAddressError, MissingExtraError: as `open_store`.
    """
    address, name = _folder_of(parse_store(text))
    if name is None:
        return open_store(text, None, on_wait, policy).inventory.shards
    require_obstore()
    client = StoreClient(address, policy or RetryPolicy(), on_wait=on_wait)
    file = client.head(name)
    if file is None:
        raise SourceNotFoundError(text, "no such file in the store; check bucket and folder")
    listing = StoreListing(address, {name: file})
    with listing.naming():
        header, _ = read_header(StoreFiles(client, listing), name)
    return (make_shard(name, header, file.size),)


def _folder_of(address: StoreAddress) -> tuple[StoreAddress, str | None]:
    """Return the folder of an address, and the name of the shard if it names one."""
    if not address.prefix.endswith(SHARD):
        return address, None
    return address.parent(), address.prefix.rpartition("/")[2]


def refuse_unfinished(listing: StoreListing) -> None:
    """Check that a folder holds no unfinished result.

    Raises:
        SourceNotFoundError: a conversion writes into it, or was stopped.
    """
    if JOB_FILE in listing.files and MANIFEST not in listing.files:
        raise SourceNotFoundError(listing.label, "unfinished; rerun the conversion to resume it")


def read_store(files: StoreFiles, shard: str | None = None) -> Inventory:
    """Return the inventory of a checkpoint of safetensors shards in a store; of one shard alone, if it is named.

    Raises:
        SourceError: there is no readable checkpoint; the class names the reason.
    """
    address = files.listing.address
    inventory, _ = read_inventory(files, str(address), f"{_COPY[address.scheme]} {address} FOLDER", (), shard)
    return inventory if shard is None else replace(inventory, source=str(address.child(shard)))


def _read(files: StoreFiles, address: StoreAddress, shard: str | None) -> Source:
    """Open a checkpoint of safetensors shards, or one shard."""
    inventory = _held(without_remnants(read_store(files, shard)))
    # The opener travels with every job: it lists the files that are read, not those beside them.
    used = [shard.name for shard in inventory.shards] + [side.file or side.name for side in inventory.side_files]
    listing = replace(files.listing, files=_only(files.listing.files, used))
    small = [side.name for side in inventory.side_files if side.file is None and side.size <= MAX_WHOLE]
    opener = StoreOpener(files.client, listing, frozenset(small))
    stamped = (*used, CONFIG, INDEX, *(CARD,) * (inventory.card is not None))
    stamps = {name: files.listing.files[name].stamp for name in stamped if name in files.listing.files}
    return Source(inventory, opener, None, stamps, StorePrefetcher(opener), inventory.source)


_COPY = {"s3": "aws s3 cp --recursive", "gs": "gcloud storage cp -r", "az": "azcopy copy --recursive"}
"""Commands that copy a folder of a store."""


def _only(files: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    return {name: files[name] for name in names}


def _held(inventory: Inventory) -> Inventory:
    """Add the memory of the reads ahead."""
    total = sum(shard.size for shard in inventory.shards)
    return replace(inventory, opener_bytes=inventory.opener_bytes + min(HELD * SEGMENT, total))
