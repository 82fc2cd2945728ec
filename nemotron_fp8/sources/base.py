"""Interfaces of a source: its inventory, its files, and the prefetcher that fetches them ahead of their use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from nemotron_fp8._utils import parse_bytes
from nemotron_fp8.checkpoint.inventory import CARD, CONFIG, INDEX
from nemotron_fp8.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.progress import TransferTracker
    from nemotron_fp8.sources.files import Identity, Opener


DEFAULT_SHARD_SIZE = "5GB"
"""Bytes of tensors in a shard of the result if the source has no shards of its own."""


def parse_shard_size(shard_size: str | int | None) -> int:
    """Return the bytes of a shard of the result of a NeMo checkpoint.

    Raises:
        RecipeError: the size is malformed.
    """
    return parse_bytes(DEFAULT_SHARD_SIZE if shard_size is None else shard_size, "shard_size")


def refuse_shard_size(shard_size: str | int | None) -> None:
    """Raise RecipeError if a shard size is set, for a source that has shards of its own."""
    if shard_size is not None:
        raise RecipeError(
            "a shard size (--shard-size) applies to NeMo checkpoints only: this source has shards of its own; omit it"
        )


class Prefetch(Protocol):
    """Files of a source during one conversion. A context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def shard_tasks(self, left: Sequence[ShardTask]) -> Iterable[ShardTask]:
        """Return the tasks of ``left``: a sequence if all can start at once, else one by one as their files arrive.

        Raises:
            NemotronFp8Error: a file cannot be fetched; raised during the iteration.
        """

    def done(self, name: str) -> None:
        """Release the prefetched files of the finished shard ``name``."""


class Prefetcher(Protocol):
    """Fetches the files of a source ahead of their use. Picklable; it holds no file and no thread until `start`."""

    def start(
        self, transfers: TransferTracker, workers: int = 1, largest_output: int = 0, *, whole_shards: bool = True
    ) -> Prefetch:
        """Return the prefetch of one conversion.

        Args:
            transfers: tracks the downloads.
            workers: shards in progress at the same time.
            largest_output: bytes of the largest output shard in the same cache folder; 0 if shards go elsewhere.
            whole_shards: whether shards are fetched here; False if workers on other machines fetch their own.
        """

    def disk_bytes(self, shard_tasks: Sequence[ShardTask], largest_output: int, workers: int) -> int:
        """Return the peak bytes of the cache folder during these tasks, output shards included."""

    def for_workers(self) -> Prefetcher:
        """Return the prefetcher that travels with each job to another machine."""


@dataclass(frozen=True, slots=True)
class NoPrefetch:
    """Prefetcher and prefetch of files on a local disk: a no-op."""

    def start(
        self, transfers: TransferTracker, workers: int = 1, largest_output: int = 0, *, whole_shards: bool = True
    ) -> NoPrefetch:
        return self

    def disk_bytes(self, shard_tasks: Sequence[ShardTask], largest_output: int, workers: int) -> int:
        return 0

    def for_workers(self) -> NoPrefetch:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def shard_tasks(self, left: Sequence[ShardTask]) -> Sequence[ShardTask]:
        return left

    def done(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Source:
    """Checkpoint that is ready to read.

    Attributes:
        inventory: tensors and files of the checkpoint.
        opener: opens the files that the inventory's views refer to; picklable.
        root: the local folder or archive; None if the checkpoint is not local.
        stamps: fingerprint of each file, by name; a later run resumes only if every fingerprint agrees.
        prefetcher: fetches files ahead of their use.
        address: address with the commit, if the checkpoint is in a repository.
    """

    inventory: Inventory
    opener: Opener
    root: Path | None
    stamps: Mapping[str, str] = field(default_factory=dict)
    prefetcher: Prefetcher = field(default_factory=NoPrefetch)
    address: str = ""

    @property
    def is_local(self) -> bool:
        """True if every file is on a local disk."""
        return self.root is not None

    @property
    def label(self) -> str:
        """Name of the checkpoint in messages: its address with the commit, else its path."""
        return self.address or self.inventory.source


def local_stamps(inventory: Inventory, identities: Mapping[str, Identity]) -> dict[str, str]:
    """Return size and modification time of every file that a conversion reads.

    The inode is left out: another mount of the same file system may number it differently.
    """
    names = [shard.name for shard in inventory.shards] + [side.name for side in inventory.side_files]
    names += [name for name in (INDEX, CONFIG) if name in identities]
    names += [CARD] * (inventory.card is not None)
    return {name: stamp(identities[name]) for name in names if name in identities}


def stamp(identity: Identity) -> str:
    """Return size and modification time of a file in the form of a journal."""
    return f"{identity[0]} {identity[1]}"
