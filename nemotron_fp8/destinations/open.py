"""Open a destination by its name: a folder, or a repository on the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.destinations.comparison import ComparingDestination
from nemotron_fp8.destinations.folder import FolderDestination, is_occupied, refuse_overlap
from nemotron_fp8.documents.model_card import render_card
from nemotron_fp8.documents.render import planned_sizes
from nemotron_fp8.errors import DestinationExistsError, RecipeError
from nemotron_fp8.hub.address import is_address, may_be_address, parse_address, parse_target

if TYPE_CHECKING:
    from nemotron_fp8.destinations.base import Destination, RunOptions
    from nemotron_fp8.destinations.hub.destination import HubDestination
    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.progress import TransferTracker
    from nemotron_fp8.sources.base import Source


def open_destination(destination: str | os.PathLike[str], options: RunOptions) -> Destination:
    """Return the destination of a name. Nothing is written.

    Args:
        destination: path of a folder, or ``hf://owner/name`` or ``hf://owner/name@branch``.
        options: options of the conversion.

    Raises:
        AddressError: the name looks like an address and is none, or its revision cannot be written to.
        NoTokenError, OfflineError: the repository cannot be written without a token or offline.
        RecipeError: an option for repositories is set for a folder.
    """
    text = os.fspath(destination)
    address = parse_target(text)
    if address is not None:
        options.hub.require_token(address.repo)
        return HubRepository(address, options)
    if options.hub.private or options.hub.pull_request:
        raise RecipeError(
            "private (--private) and pull_request (--pr) apply to a destination on the Hub (hf://) only; omit them"
        )
    return LocalFolder(Path(os.path.realpath(text)), options)


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
        raise DestinationExistsError(str(path), "already holds other files" if path.is_dir() else "is a file")


def folder_in_place(source: str | os.PathLike[str]) -> Path:
    """Return the folder whose shards a conversion in place replaces.

    Raises:
        RecipeError: the source is not a local folder.
    """
    if is_address(os.fspath(source)):
        raise RecipeError(
            "a conversion in place replaces the shards of a local folder; for the Hub, name a destination (hf://)"
        )
    return Path(source)


def repository_of(result: str | os.PathLike[str]) -> str | None:
    """Return ``owner/name`` of a result on the Hub; None for a folder.

    Raises:
        AddressError: the name looks like an address and is none.
    """
    text = os.fspath(result)
    return parse_address(text).repo if is_address(text) else None


def repository_hint(destination: str) -> str | None:
    """Return the address that a folder ``owner/name`` may be a mistake for; None if its parent folder exists."""
    if is_address(destination) or not may_be_address(destination) or Path(destination).parent.exists():
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
