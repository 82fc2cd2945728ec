"""Where checkpoints come from: a name as a person gives it to an inventory and a way to open its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.budget import parse_bytes
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.source import CARD, CONFIG, INDEX, read_folder

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from nemotron_fp8.files import Identity, Opener
    from nemotron_fp8.source import Inventory


DEFAULT_SHARD_SIZE = "5GB"
"""Bytes of tensors in a shard of the result, where the source has no shards to go by."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that can be read.

    Attributes:
        inventory: what it holds.
        opener: opens the files that the inventory's views are made of; picklable.
        root: the local folder, or archive, that it lies in; None where it is not local.
        stamps: what shows that a file of it is still the same when a later run carries on, by file.
    """

    inventory: Inventory
    opener: Opener
    root: Path | None
    stamps: Mapping[str, str] = field(default_factory=dict)


def open_source(source: str | os.PathLike[str], shard_size: str | int | None = None) -> Source:
    """Take the inventory of a source and say how to open its files. No tensor is read.

    Args:
        source: a checkpoint folder, a NeMo checkpoint's folder, or a ``.nemo`` archive.
        shard_size: bytes of tensors in a shard, as a number or like ``"5GB"``, for a NeMo checkpoint; a
            checkpoint of safetensors shards has its own.

    Raises:
        SourceError: it is no checkpoint that can be read; the class says why.
        RecipeError: ``shard_size`` is not understood, or given for a source that has shards.
    """
    from nemotron_fp8.files import FolderOpener, identify
    from nemotron_fp8.nemo.inventory import is_nemo, open_nemo

    root = Path(source)
    if is_nemo(root):
        return open_nemo(root, parse_bytes(DEFAULT_SHARD_SIZE if shard_size is None else shard_size))
    if shard_size is not None:
        raise RecipeError("a shard size is for NeMo checkpoints; this source has shards of its own")
    # Before the inventory: what changes from here on is noticed when it is read.
    identities = identify(root) if root.is_dir() else {}
    inventory = read_folder(root)
    return Source(inventory, FolderOpener(root, identities), root, local_stamps(inventory, identities))


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
