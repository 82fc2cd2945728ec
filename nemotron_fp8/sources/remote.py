"""A checkpoint in a repository or an object store: its inventory from headers alone, its files by range."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

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
    shards_beside,
    shards_of,
    sort_side_files,
    stacks_of,
    why_folder_left_out,
)
from nemotron_fp8.checkpoint.model_code import CODE, ModelCode, find_code, names_code
from nemotron_fp8.checkpoint.other_formats import without_weights
from nemotron_fp8.errors import OneShardError, SourceError, SourceNotFoundError, printable
from nemotron_fp8.untrusted import strict_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from nemotron_fp8.checkpoint.header import Header

Item = TypeVar("Item")
T = TypeVar("T")

FIRST_READ = 256 * 1024
"""Bytes of the first request for each shard; most headers are shorter and need no second request."""


class RemoteFiles(Protocol):
    """Files of a listing, which a client fetches. Every method may raise the errors of its client."""

    def names(self) -> Collection[str]:
        """Return the paths of all files, with ``/`` between folders."""

    def size(self, name: str) -> int:
        """Return the bytes of a file.

        Raises:
            SourceError: the listing has no such file.
        """

    def read_whole(self, name: str) -> bytes:
        """Return a small file; its digest is checked where the listing has one."""

    def read_range(self, name: str, start: int, stop: int, put: Callable[[int, bytes], None]) -> None:
        """Call ``put(offset, data)`` with the bytes ``[start, stop)`` of a file, in any order and from any thread."""

    def map(self, call: Callable[[RemoteFiles, Item], T], items: Iterable[Item]) -> list[T]:
        """Call ``call(view, item)`` for all items, several in parallel; the view is canceled by the first error."""


def read_inventory(
    files: RemoteFiles, name: str, fetch: str, ignored: Collection[str] = (), shard: str | None = None
) -> tuple[Inventory, dict[str, tuple[int, str]]]:
    """Read the inventory of a checkpoint; of each shard only the header is fetched.

    Args:
        files: its files.
        name: its name in messages.
        fetch: command that copies the checkpoint to a local disk, for messages.
        ignored: names of files that are neither copied nor reported as left out.
        shard: name of the only shard to take; None for all shards of the checkpoint.

    Returns:
        The inventory; and of each shard the bytes of its header and their SHA-256.

    Raises:
        SourceError: there is no readable checkpoint, or its index names a file that is not listed.
        OneShardError: ``shard`` is one of several shards.
    """
    top = sorted(path for path in files.names() if "/" not in path)
    config = load_config(read_json(files, CONFIG)) if CONFIG in top else None
    index_metadata, weight_map = None, None
    if INDEX in top:
        index_metadata, weight_map = load_index(read_json(files, INDEX))
    if shard is not None:
        count = shards_beside(shard, weight_map)
        if count > 1:
            raise OneShardError(f"{name}/{shard}", count, name)
        if shard not in (weight_map or {}).values():
            index_metadata, weight_map = None, None
    archives = [path for path in files.names() if path.lower().endswith(".nemo")]
    if archives and not any(path.endswith(".safetensors") for path in top):
        what = f"holds a NeMo archive, {printable(archives[0])}; archives are read from local disks only"
        raise SourceNotFoundError(name, f"{what}: download it ({fetch}), then pass the file")
    if shard is None and weight_map is None and not model_weights(top):
        raise _without_weights(files, name, top, fetch)
    shards = shards_of(name, top, weight_map) if shard is None else (shard,)
    read = {}
    for each, found in read_headers(files, shards).items():
        if isinstance(found, SourceError):
            raise found
        read[each] = found
    made = tuple(make_shard(each, header, files.size(each)) for each, (header, _) in read.items())
    sizes = {path: files.size(path) for path in top if path not in ignored}
    code = _find_code(files, config, sizes)
    side, left_out = sort_side_files(sizes, shards, code.files)
    nested = tuple((path, _why_nested(path)) for path in sorted(files.names()) if "/" in path)
    inventory = assemble(name, made, weight_map, index_metadata, config, side, (*left_out, *nested))
    inventory = replace(inventory, notices=(*inventory.notices, *code.notices))
    if CARD in top and is_card(CARD, files.size(CARD)):
        inventory = replace(inventory, card=files.read_whole(CARD))
    if MANIFEST in top and files.size(MANIFEST) <= strict_json.MAX_BYTES:
        inventory = replace(inventory, stacks=stacks_of(files.read_whole(MANIFEST)))
    return inventory, {each: (header.data_start, digest) for each, (header, digest) in read.items()}


def _why_nested(path: str) -> str:
    """Return the reason why a file in a folder is not copied."""
    return f"in {why_folder_left_out(path.partition('/')[0])}"


def _find_code(files: RemoteFiles, config: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> ModelCode:
    """Find the code that the configs name; a checkpoint without code, and without its names, needs no request."""
    if not any(name.endswith(CODE) for name in sizes) and not names_code(config):
        return ModelCode()
    return find_code(config, copyable(sizes), files.read_whole)


def _without_weights(files: RemoteFiles, name: str, top: Sequence[str], fetch: str) -> SourceError:
    """Return the error of a checkpoint without shards in its top folder."""
    nested = [path for path in files.names() if path.count("/") == 1]
    step = f"; download it ({fetch})"
    return without_weights(name, top, nested, lambda path: read_json(files, path), "FOLDER/", step)


def read_json(files: RemoteFiles, name: str) -> bytes:
    """Return a JSON file; of one beyond the size limit, just enough bytes for the loader to reject it."""
    if files.size(name) > strict_json.MAX_BYTES:
        return read_bytes(files, name, 0, strict_json.MAX_BYTES + 1)
    return files.read_whole(name)


def read_headers(files: RemoteFiles, shards: Sequence[str]) -> dict[str, tuple[Header, str] | SourceError]:
    """Call `read_header` for several shards in parallel; a shard that breaks the format yields its error."""

    def one(view: RemoteFiles, shard: str) -> tuple[Header, str] | SourceError:
        try:
            return read_header(view, shard)
        except SourceError as error:
            return error

    return dict(zip(shards, files.map(one, shards), strict=True))


def read_header(files: RemoteFiles, shard: str) -> tuple[Header, str]:
    """Read the header of a shard by range requests; return it and the SHA-256 of all bytes before the first tensor.

    Raises:
        MalformedHeaderError, UnknownDtypeError: the header breaks the format.
    """
    from nemotron_fp8.checkpoint.header import LENGTH_BYTES, header_length, parse_header

    size = files.size(shard)
    start = read_bytes(files, shard, 0, min(size, FIRST_READ))
    stop = LENGTH_BYTES + header_length(start[:LENGTH_BYTES], size, shard)
    if stop > len(start):
        start += read_bytes(files, shard, len(start), stop)
    header = parse_header(start[LENGTH_BYTES:stop], size, shard)
    return header, hashlib.sha256(start[:stop]).hexdigest()


def read_bytes(files: RemoteFiles, name: str, start: int, stop: int) -> bytes:
    """Return bytes ``[start, stop)`` of a file."""
    buffer = bytearray(stop - start)
    _read_into(files, name, start, memoryview(buffer))
    return bytes(buffer)


def _read_into(files: RemoteFiles, name: str, start: int, buffer: memoryview) -> None:
    def put(position: int, data: bytes) -> None:
        buffer[position - start : position - start + len(data)] = data

    if len(buffer):
        files.read_range(name, start, start + len(buffer), put)


class RangeFile:
    """Remote file that is read by range requests (`nemotron_fp8.sources.files.SourceFile`)."""

    def __init__(self, files: RemoteFiles, name: str) -> None:
        self.files, self.name = files, name
        files.size(name)

    def window(self, offset: int, length: int) -> memoryview | None:
        """Return None: a remote file cannot be mapped."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` by range requests; retry the missing rest after failures."""
        _read_into(self.files, self.name, offset, buffer)

    def release(self, offset: int, length: int) -> None:
        """Do nothing: no bytes are held."""

    def close(self) -> None:
        """Do nothing: no file is open."""
