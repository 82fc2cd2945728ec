"""Take the inventory of a checkpoint folder from headers, index and config; no tensor is read.

Every defect of an untrusted file is found here, before anything is written.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.header import Header, read_header
from nemotron_fp8.checkpoint.inventory import (
    CARD,
    CONFIG,
    INDEX,
    MANIFEST,
    MARKER,
    Inventory,
    Shard,
    assemble,
    is_card,
    load_config,
    load_index,
    make_shard,
    shards_of,
    sort_side_files,
    stacks_of,
)
from nemotron_fp8.checkpoint.local_files import links_outside, open_regular, read_small
from nemotron_fp8.errors import SourceLinkError, SourceNotFoundError, SourceReadError, UnfinishedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def read_folder(root: Path) -> Inventory:
    """Take the inventory of a local checkpoint folder.

    Raises:
        SourceNotFoundError: the folder does not exist, or has no weights.
        PickledWeightsError: the only weights are pickles.
        MalformedIndexError, MalformedConfigError, MalformedHeaderError, UnknownDtypeError: a file breaks its
            format.
        MissingShardError, IndexMismatchError: index and shards disagree.
        SourceLinkError: a link leaves the folder.
        UnfinishedError: an in-place conversion of the folder is unfinished.
        SourceReadError: a file cannot be read.
    """
    if not root.is_dir():
        if root.exists():
            raise SourceNotFoundError(str(root), "not a folder; pass a checkpoint folder")
        raise SourceNotFoundError.absent(root, otherwise="for a checkpoint on the Hub, pass hf://owner/name")
    try:
        entries = list(os.scandir(root))
        names = sorted(entry.name for entry in entries if entry.is_file())
    except OSError as error:
        raise SourceReadError(str(root), error.strerror or str(error)) from error
    if MARKER in names:
        raise UnfinishedError(str(root))
    outside = links_outside(root, names)
    _refuse_links(outside, (CONFIG, INDEX, CARD))
    config = load_config(read_small(root / CONFIG)) if CONFIG in names else None
    index_metadata, weight_map = None, None
    if INDEX in names:
        index_metadata, weight_map = load_index(read_small(root / INDEX))
    shard_names = shards_of(str(root), names, weight_map)
    _refuse_links(outside, shard_names)
    shards = tuple(make_shard(name, *read_shard_header(root / name)) for name in shard_names)
    inside = {n: (root / n).stat().st_size for n in names if n not in outside}
    side, left_out = sort_side_files(inside, shard_names)
    left_out += tuple((name, "a link to a file outside of the folder") for name in sorted(outside))
    left_out += tuple(sorted((entry.name, "a folder") for entry in entries if entry.is_dir()))
    inventory = assemble(str(root), shards, weight_map, index_metadata, config, side, left_out)
    if is_card(CARD, inside.get(CARD, -1)):
        inventory = replace(inventory, card=read_small(root / CARD))
    if MANIFEST in inside:
        inventory = replace(inventory, stacks=stacks_of(read_small(root / MANIFEST)))
    return inventory


def _refuse_links(outside: Mapping[str, str], names: Iterable[str]) -> None:
    for name in names:
        if name in outside:
            raise SourceLinkError(name, outside[name])


def read_shard_header(path: Path) -> tuple[Header, int]:
    """Return the header of a local shard and the shard's bytes."""
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        return read_header(fd, path.name, size), size


def inspect_path(path: str | os.PathLike[str]) -> tuple[Shard, ...]:
    """Return the shards of a folder, or the single shard of a file, from headers alone.

    Raises:
        SourceError: as `read_folder`; for a file MalformedHeaderError, UnknownDtypeError or SourceReadError.
    """
    root = Path(path)
    if root.is_dir():
        return read_folder(root).shards
    if not root.exists():
        raise SourceNotFoundError.absent(root, "file or folder")
    return (make_shard(root.name, *read_shard_header(root)),)
