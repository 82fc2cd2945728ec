"""Take the inventory of a checkpoint folder from headers, index and config; no tensor is read.

Every defect of an untrusted file is found here, before anything is written.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import JOURNAL, OUT
from nemotron_fp8.checkpoint.header import Header, read_header
from nemotron_fp8.checkpoint.inventory import (
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    INDEX,
    MANIFEST,
    MARKER,
    SINGLE,
    Inventory,
    Shard,
    assemble,
    copyable,
    is_adapter,
    is_card,
    load_config,
    load_index,
    make_shard,
    model_weights,
    shards_beside,
    shards_of,
    sort_side_files,
    stacks_of,
    why_folder_left_out,
)
from nemotron_fp8.checkpoint.local_files import links_outside, read_small
from nemotron_fp8.checkpoint.model_code import find_code
from nemotron_fp8.checkpoint.other_formats import POINTER_BYTES, base_of, other_file, refuse_pointer, without_weights
from nemotron_fp8.errors import (
    AdapterError,
    NestedCheckpointsError,
    OneShardError,
    SourceLinkError,
    SourceNotFoundError,
    SourceReadError,
    UnfinishedError,
)
from nemotron_fp8.untrusted.regular_files import MISSING, is_file, open_regular, why_unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from nemotron_fp8.errors import SourceError


SNAPSHOTS = "snapshots"
"""Folder of a model in the Hub cache, with one folder for each revision."""


def refuse_working(root: Path) -> None:
    """Refuse the working folder of a conversion.

    Raises:
        SourceNotFoundError: the folder is one.
    """
    if root.name.endswith(".partial") and os.path.lexists(root / JOURNAL) and os.path.lexists(root / OUT):
        problem = (
            "an unfinished conversion, not a checkpoint; run the same command again to resume it (status shows it)"
        )
        raise SourceNotFoundError(str(root), problem)


def read_folder(root: Path, shard: str | None = None) -> Inventory:
    """Take the inventory of a local checkpoint folder.

    Args:
        root: the folder.
        shard: name of the only shard to take; None for all shards of the checkpoint.

    Raises:
        SourceNotFoundError: the folder does not exist, or has no weights; the subclass names what it holds instead.
        PickledWeightsError: the only weights are pickles.
        AdapterError: the only weights are an adapter.
        LfsPointerError: a file was not fetched with Git LFS.
        MalformedIndexError, MalformedConfigError, MalformedHeaderError, UnknownDtypeError: a file breaks its
            format.
        MissingShardError, IncompleteShardsError, IndexMismatchError: index and shards disagree.
        OneShardError: ``shard`` is one of several shards.
        SourceLinkError: a link leaves the folder.
        UnfinishedError: an in-place conversion of the folder is unfinished.
        SourceReadError: a file cannot be read.
    """
    refuse_working(root)
    if not root.is_dir():
        if root.exists():
            raise SourceNotFoundError(str(root), "not a folder; pass a checkpoint folder")
        raise SourceNotFoundError.absent(root, otherwise="for a checkpoint on the Hub, pass hf://owner/name")
    try:
        entries = list(os.scandir(root))
        names = sorted(entry.name for entry in entries if is_file(entry))
        odd = {entry.name: why for entry in entries if (why := _why_unreadable(entry))}
    except OSError as error:
        raise SourceReadError(str(root), error.strerror or str(error)) from error
    if MARKER in names:
        raise UnfinishedError(str(root))
    _refuse_odd(root, odd, (CONFIG, INDEX))
    outside = links_outside(root, names)
    _refuse_links(outside, (CONFIG, INDEX, CARD))
    inside = {n: (root / n).stat().st_size for n in names if n not in outside}
    _refuse_pointers(root, inside, (CONFIG, INDEX))
    config = load_config(read_small(root / CONFIG)) if CONFIG in names else None
    index_metadata, weight_map = None, None
    if INDEX in names:
        index_metadata, weight_map = load_index(read_small(root / INDEX))
    if shard is not None:
        refuse_one_of_several(root, shard, weight_map)
        if shard not in (weight_map or {}).values():
            index_metadata, weight_map = None, None
    # A link to a missing shard of an index is a missing shard: `shards_of` says how many tensors it holds.
    _refuse_odd(root, odd, model_weights(odd) if weight_map is None else set(weight_map.values()) & _present(odd))
    if shard is None and weight_map is None and not model_weights(names):
        raise _without_weights(root, names, inside)
    shard_names = (shard,) if shard is not None else shards_of(str(root), names, weight_map)
    _refuse_links(outside, [name for name in shard_names if name != shard])  # the caller named that link
    shards = tuple(make_shard(name, *read_shard_header(root / name)) for name in shard_names)
    code = find_code(config, copyable(inside), lambda name: read_small(root / name))
    side, left_out = sort_side_files(inside, shard_names, code.files)
    _refuse_pointers(root, inside, [CARD, *(file.name for file in side)])
    left_out += tuple((name, "a link to a file outside of the folder") for name in sorted(outside.keys() - {shard}))
    left_out += tuple(sorted((name, why) for name, why in odd.items()))
    inventory = assemble(str(root), shards, weight_map, index_metadata, config, side, left_out)
    inventory = replace(inventory, notices=(*inventory.notices, *code.notices))
    if is_card(CARD, inside.get(CARD, -1)):
        inventory = replace(inventory, card=read_small(root / CARD))
    if MANIFEST in inside:
        inventory = replace(inventory, stacks=stacks_of(read_small(root / MANIFEST)))
    return inventory


def _why_unreadable(entry: os.DirEntry[str]) -> str | None:
    """Return what an entry of a folder is, if it is not a regular file."""
    if is_file(entry):
        return None
    path = Path(entry.path)
    return why_folder_left_out(entry.name) if path.is_dir() else why_unreadable(path)


def _present(odd: Mapping[str, str]) -> set[str]:
    """Return the names of odd files that are there, unlike links to nowhere."""
    return {name for name, why in odd.items() if not why.endswith(MISSING)}


def _refuse_odd(root: Path, odd: Mapping[str, str], names: Iterable[str]) -> None:
    """Raise SourceReadError for the first of some files that the conversion needs and that is not a regular file."""
    if not odd:
        return
    for name in names:
        if name in odd:
            raise SourceReadError(str(root / name), f"{odd[name]}; fetch the file again")


def refuse_one_of_several(root: Path, shard: str, weight_map: Mapping[str, str] | None) -> None:
    """Raise OneShardError if a shard is one of several, by the index or by its name."""
    count = shards_beside(shard, weight_map)
    if count > 1:
        raise OneShardError(str(root / shard), count, str(root))


def _without_weights(root: Path, names: Sequence[str], inside: Mapping[str, int]) -> SourceError:
    """Return the error of a folder without shards, which names the checkpoints in its folders."""
    home = Path(os.path.realpath(root))
    for cache, snapshots in ((home, root / SNAPSHOTS), (home.parent, root)):
        if snapshots.name == SNAPSHOTS and (cache / SNAPSHOTS).is_dir() and _is_cache(cache):
            return NestedCheckpointsError(str(root), "the folder of a model in the Hub cache", _revisions(snapshots))
    nested = [path.relative_to(root).as_posix() for path in sorted(root.glob("*/*"))]
    readable = [name for name in names if name in inside]
    return without_weights(str(root), readable, nested, lambda name: read_small(root / name), f"{root}/")


def _is_cache(folder: Path) -> bool:
    """Return True for the folder of a model in the Hub cache."""
    return folder.name.startswith("models--") or (folder / "blobs").is_dir()


def _revisions(snapshots: Path) -> tuple[str, ...]:
    """Return the folders of the revisions that hold a checkpoint, that of the main branch first."""
    main = snapshots.parent / "refs" / "main"
    first = read_small(main).decode("ascii", "replace").strip() if main.is_file() else ""
    marks = (CONFIG, INDEX, SINGLE)
    found = {path.parent for path in snapshots.glob("*/*") if path.name in marks}
    return tuple(str(path) for path in sorted(found, key=lambda path: (path.name != first, path.name)))


def _refuse_pointers(root: Path, sizes: Mapping[str, int], names: Iterable[str]) -> None:
    """Raise LfsPointerError for the first file that was not fetched with Git LFS."""
    for name in names:
        if sizes.get(name, POINTER_BYTES + 1) <= POINTER_BYTES:
            refuse_pointer(name, str(root), read_small(root / name))


def refuse_pointer_file(path: Path) -> None:
    """Raise LfsPointerError if a single file was not fetched with Git LFS."""
    with open_regular(path) as fd:
        refuse_pointer(path.name, str(path.parent), os.pread(fd, POINTER_BYTES, 0))


def wrong_file(path: Path) -> SourceError:
    """Return the error of a single file that is no shard."""
    name, config = path.name, path.with_name(ADAPTER_CONFIG)
    if is_adapter(name):
        return AdapterError(str(path), (name,), base_of(read_small(config)) if config.is_file() else None)
    return other_file(str(path), name)


def _refuse_links(outside: Mapping[str, str], names: Iterable[str]) -> None:
    for name in names:
        if name in outside:
            raise SourceLinkError(name, outside[name])


def read_shard_header(path: Path) -> tuple[Header, int]:
    """Return the header of a local shard and the shard's bytes."""
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        refuse_pointer(path.name, str(path.parent), os.pread(fd, POINTER_BYTES, 0))
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
