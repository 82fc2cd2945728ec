"""How a source's bytes come to where shards are made: at hand already, or fetched a little ahead of their use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from nemotron_fp8.checkpoint.inventory import CARD, CONFIG, INDEX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.progress import TransferTracker
    from nemotron_fp8.sources.files import Identity, Opener


class Prefetcher(Protocol):
    """Has the source's bytes at hand while shards are made. A context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def shard_tasks(self, left: Sequence[ShardTask]) -> Iterable[ShardTask]:
        """The units of ``left``: a sequence where all can be made at once, else one by one as their bytes arrive.

        Raises:
            NemotronFp8Error: while it is iterated over, if bytes cannot be had.
        """

    def done(self, name: str) -> None:
        """Say that a unit is made: what was fetched for it may go."""


class PrefetcherFactory(Protocol):
    """What makes the supply of a source, for one conversion."""

    def supply(self, largest_output: int, workers: int, transfers: TransferTracker) -> Prefetcher:
        """Make the supply.

        Args:
            largest_output: bytes of the largest shard that is staged on the same disk; 0 where it is not.
            workers: how many units are in the making at a time.
            transfers: is told what is on its way.
        """

    def room(self, shard_tasks: Sequence[ShardTask], largest_output: int, workers: int) -> int:
        """Bytes that such a supply takes of its disk at any one time to have these units made, staged shards too."""


class NoPrefetch:
    """The supply of a local source."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def shard_tasks(self, left: Sequence[ShardTask]) -> Sequence[ShardTask]:
        """See `Prefetcher.shard_tasks`: all."""
        return left

    def done(self, name: str) -> None:
        """See `Prefetcher.done`: nothing was fetched."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that can be read.

    Attributes:
        inventory: what it holds.
        opener: opens the files that the inventory's views are made of; picklable.
        root: the local folder, or archive, that it lies in; None where it is not local.
        stamps: what shows that a file of it is still the same when a later run carries on, by file.
        supplier: makes what fetches its files ahead of their use; None where they are at hand.
        label: what it is called with its commit, where it has one.
    """

    inventory: Inventory
    opener: Opener
    root: Path | None
    stamps: Mapping[str, str] = field(default_factory=dict)
    supplier: PrefetcherFactory | None = None
    label: str = ""


def local_stamps(inventory: Inventory, identities: Mapping[str, Identity]) -> dict[str, str]:
    """Size and modification time of the files that a conversion is made from.

    No inode: a later run may meet the same file under another one, on another mount of its file system.
    """
    names = [shard.name for shard in inventory.shards] + [side.name for side in inventory.side_files]
    names += [name for name in (INDEX, CONFIG) if name in identities]
    names += [CARD] * (inventory.card is not None)
    return {name: stamp(identities[name]) for name in names if name in identities}


def stamp(identity: Identity) -> str:
    """Size and modification time of a file as a journal holds them."""
    return f"{identity[0]} {identity[1]}"
