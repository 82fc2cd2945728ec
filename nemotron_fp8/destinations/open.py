"""Open a destination by its name: a folder, a repository on the Hub, or a folder of an object store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nemotron_fp8._utils import format_bytes
from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.destinations.comparison import ComparingDestination
from nemotron_fp8.destinations.differences import contents_of
from nemotron_fp8.destinations.folder import FolderDestination, is_occupied, refuse_overlap
from nemotron_fp8.documents.model_card import render_card
from nemotron_fp8.documents.render import planned_sizes
from nemotron_fp8.errors import DestinationExistsError, OverlapError, RecipeError
from nemotron_fp8.errors.stores import StoreAddressError
from nemotron_fp8.hub.address import is_address, may_be_address, parse_address, parse_target
from nemotron_fp8.stores.address import is_store, local_path, parse_store
from nemotron_fp8.stores.connection import require_obstore
from nemotron_fp8.stores.listing import RECORDS

if TYPE_CHECKING:
    from nemotron_fp8.destinations.base import Destination, RunOptions
    from nemotron_fp8.destinations.hub.destination import HubDestination
    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.destinations.store.comparison import ComparingStoreDestination
    from nemotron_fp8.destinations.store.destination import StoreDestination
    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.progress import TransferTracker
    from nemotron_fp8.sources.base import Source
    from nemotron_fp8.stores.address import StoreAddress
    from nemotron_fp8.stores.client import StoreClient


def open_destination(destination: str | os.PathLike[str], options: RunOptions) -> Destination:
    """Return the destination of a name. Nothing is written.

    Args:
        destination: path of a folder; ``hf://owner/name`` or ``hf://owner/name@branch``; or ``s3://bucket/folder``,
            ``gs://bucket/folder`` or ``az://container/folder``.
        options: options of the conversion.

    Raises:
        AddressError: the name looks like an address and is none, or its revision cannot be written to.
        NoTokenError, OfflineError: the repository cannot be written without a token or offline.
        StoreAddressError: the name looks like the address of an object store and is none.
        MissingExtraError: the extra for object stores is not installed.
        RecipeError: an option is set that the kind of destination does not have.
    """
    text = os.fspath(destination)
    if is_store(text):
        return _open_store(text, options)
    text = local_path(text) or text
    address = parse_target(text)
    if address is not None:
        options.hub.require_token(address.repo)
        return HubRepository(address, options)
    _refuse_hub_options(options)
    return LocalFolder(Path(os.path.realpath(text)), options)


def _open_store(text: str, options: RunOptions) -> StoreFolder:
    _refuse_hub_options(options)
    if options.overwrite:
        raise RecipeError(
            "overwrite (--overwrite) needs a destination that exchanges its files at once; an object store cannot, and"
            " readers would see a mixture: name a new folder"
        )
    address = parse_store(text)
    if RECORDS in address.prefix.split("/"):
        raise StoreAddressError(str(address), f"{RECORDS} holds the records of conversions; name another folder")
    require_obstore()
    return StoreFolder(address, options)


def _refuse_hub_options(options: RunOptions) -> None:
    if options.hub.private or options.hub.pull_request:
        raise RecipeError(
            "private (--private) and pull_request (--pr) apply to a destination on the Hub (hf://) only; omit them"
        )


def refuse_occupied(source: str | os.PathLike[str], destination: object, overwrite: bool) -> None:
    """Refuse a local folder with other files before anything heavy is imported; other places are checked later.

    A folder with a manifest may hold the same result already.

    Args:
        source: the source.
        destination: the argument of the caller, which may have any type.
        overwrite: True if other files may be replaced.

    Raises:
        OverlapError: source and destination contain each other.
        DestinationExistsError: the destination is a file, or a folder with files and ``overwrite`` is off.
        WriteError: the place cannot be read.
    """
    if not isinstance(destination, str | os.PathLike) or not (text := os.fspath(destination)) or "\0" in text:
        return
    if isinstance(text, bytes) or "://" in text:
        return
    path = Path(os.path.realpath(text))
    if Path(source).exists():
        refuse_overlap(Path(source), path)
    if is_occupied(path) and not (path.is_dir() and (overwrite or (path / MANIFEST).exists())):
        raise DestinationExistsError(str(path), contents_of(path))


def folder_in_place(source: str | os.PathLike[str]) -> Path:
    """Return the folder whose shards a conversion in place replaces.

    Raises:
        RecipeError: the source is not a local folder.
    """
    text = os.fspath(source)
    if is_address(text) or is_store(text):
        raise RecipeError(
            "a conversion in place replaces the shards of a local folder; for the Hub or an object store, name a"
            " destination (hf://, s3://, gs://, az://)"
        )
    return Path(local_path(text) or text)


def repository_of(result: str | os.PathLike[str]) -> str | None:
    """Return ``owner/name`` of a result on the Hub; None for a folder.

    Raises:
        AddressError: the name looks like an address and is none.
    """
    text = os.fspath(result)
    return parse_address(text).repo if is_address(text) else None


def store_of(result: str | os.PathLike[str]) -> str | None:
    """Return the address of a result in an object store; None for any other place.

    Raises:
        StoreAddressError: the name looks like the address of an object store and is none.
    """
    text = os.fspath(result)
    return str(parse_store(text)) if is_store(text) else None


def store_note(destination: str) -> str | None:
    """Return what a conversion into an object store needs beside its buffers; None for any other destination."""
    if not is_store(destination):
        return None
    from nemotron_fp8.destinations.store.sink import UPLOAD_BYTES

    memory = f"up to {format_bytes(UPLOAD_BYTES)} of memory for each at a time"
    return f"shards are sent while they are made: no disk, and {memory}"


def repository_hint(destination: str) -> str | None:
    """Return the address that a folder ``owner/name`` may be a mistake for; None if its parent folder exists."""
    if (
        is_address(destination)
        or is_store(destination)
        or not may_be_address(destination)
        or Path(destination).parent.exists()
    ):
        return None
    return f"hf://{destination}"


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder as a destination.

    Attributes:
        path: the folder, links resolved.
        options: options of the conversion.
    """

    mode: ClassVar[str] = "folder"
    path: Path
    options: RunOptions

    def check_source(self, source: Source) -> None:
        if source.root is not None:
            refuse_overlap(source.root, self.path)

    def existing(self, plan: Plan, identity: RunIdentity) -> ComparingDestination | None:
        if not is_occupied(self.path) or not self.path.is_dir():
            return None
        return ComparingDestination(self.path, plan, identity, self.options.threads)

    def open(
        self,
        plan: Plan,
        identity: RunIdentity,
        source: Source,
        transfers: TransferTracker,
        *,
        workers: int,
        shares_disk: bool,
    ) -> FolderDestination:
        return FolderDestination(
            self.path,
            source.root,
            identity,
            planned_sizes(plan),
            overwrite=self.options.overwrite,
            restart=self.options.restart,
            digests=self.options.digests,
            threads=self.options.threads,
            label=source.label,
            shards={task.name: task.layout.file_size for task in plan.shard_tasks},
        )


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A repository on the Hub as a destination.

    Attributes:
        address: the repository, with a branch or a pull request.
        options: options of the conversion.
    """

    mode: ClassVar[str] = "hub"
    address: Address
    options: RunOptions

    def check_source(self, source: Source) -> None: ...

    def existing(self, plan: Plan, identity: RunIdentity) -> None: ...

    def open(
        self,
        plan: Plan,
        identity: RunIdentity,
        source: Source,
        transfers: TransferTracker,
        *,
        workers: int,
        shares_disk: bool,
    ) -> HubDestination:
        from nemotron_fp8.destinations.hub.destination import HubDestination, job_options

        options, largest = self.options, max(shard_task.layout.file_size for shard_task in plan.shard_tasks)
        job = job_options(self.address, identity, source.label, options.hub, options.overwrite, options.restart)
        # A prefetch checks the disk for source and output shards, and again for the remaining shards of a resumed run.
        room = 2 * largest if shares_disk and source.is_local else 0
        first_room = source.prefetcher.disk_bytes(plan.shard_tasks, largest, workers) if shares_disk else 0
        return HubDestination(
            options.hub.client(),
            job,
            options.hub.folder(),
            transfers,
            room,
            not shares_disk,
            digests=options.digests,
            first_room=first_room,
            card=render_card(plan, {}, plan.bytes_out),
        )


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A folder of an object store as a destination.

    Attributes:
        address: the folder.
        options: options of the conversion.
    """

    mode: ClassVar[str] = "store"
    address: StoreAddress
    options: RunOptions

    def check_source(self, source: Source) -> None:
        if not is_store(source.label):
            return
        ours, theirs = f"{self.address}/", f"{source.label.rstrip('/')}/"
        if ours.startswith(theirs) or theirs.startswith(ours):
            raise OverlapError(source.label, str(self.address))

    def existing(self, plan: Plan, identity: RunIdentity) -> ComparingStoreDestination | None:
        from nemotron_fp8.destinations.store.comparison import ComparingStoreDestination
        from nemotron_fp8.stores.listing import JOB_FILE

        client = self._client()
        listing = client.listing()
        if MANIFEST not in listing.files or JOB_FILE in listing.files:
            return None
        return ComparingStoreDestination(client, listing, plan, self._spill)

    def open(
        self,
        plan: Plan,
        identity: RunIdentity,
        source: Source,
        transfers: TransferTracker,
        *,
        workers: int,
        shares_disk: bool,
    ) -> StoreDestination:
        from nemotron_fp8.destinations.store.destination import StoreDestination

        return StoreDestination(
            self._client(),
            identity,
            planned_sizes(plan),
            [shard_task.name for shard_task in plan.shard_tasks],
            source.label,
            transfers,
            spill=self._spill,
            restart=self.options.restart,
            digests=self.options.digests,
        )

    def _client(self) -> StoreClient:
        from nemotron_fp8.stores.client import StoreClient

        return StoreClient(self.address, self.options.hub.retry_policy(), on_wait=self.options.hub.on_wait)

    @property
    def _spill(self) -> Path | None:
        folder = self.options.hub.cache_dir
        return None if folder is None else Path(folder)
