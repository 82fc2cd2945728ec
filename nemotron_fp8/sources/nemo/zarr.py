"""Locate the chunks of zarr version 2 arrays, as Megatron's ``zarr`` backend writes them.

An array is a folder, a chunk is a file. Source of the format: the zarr v2 specification, and
``dist_checkpointing/strategies/zarr.py`` of Megatron-LM (no compressor, C order, no fill value, the dtype of bf16
arrays patched to ``bfloat16``). Chunks at the upper edges of an array are stored whole: the part beyond the edge is
padding.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.errors.nemo import ChunkSizeError, MissingChunkError, StrayChunkError
from nemotron_fp8.sources.nemo.arrays import Box, Stored, row_major
from nemotron_fp8.sources.nemo.compressed_chunks import Packed
from nemotron_fp8.sources.nemo.zarr_metadata import ZARRAY, Zarray, read_zarray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.sources.nemo.files import Files, Place

_CHUNK = re.compile(r"\d+(?:[./]\d+)*", re.ASCII)


def read_array(files: Files, folder: str, name: str) -> tuple[Stored, dict[str, Packed]]:
    """Return the array in a folder of a checkpoint, and its chunks by the key of their boxes if they are compressed.

    The boxes of a compressed array refer to the decoded chunks of `compressed_chunks`.

    Raises:
        MalformedArrayError: the ``.zarray`` is malformed.
        MissingChunkError, ChunkSizeError, StrayChunkError: the chunks are not those of the ``.zarray``.
    """
    meta = read_zarray(name, files.read(f"{folder}/{ZARRAY}", length=(1 << 20) + 1))
    stem = f"{folder}/"
    there = {
        key: files.places[stem + key]
        for key in (found.removeprefix(stem) for found in files.below(stem))
        if _CHUNK.fullmatch(key)
    }
    boxes = tuple(_boxes(meta, name, stem, there))
    if len(there) > len(boxes):
        known = {meta.key(index) for index in _indexes(meta.grid)}
        stray = next(key for key in there if key not in known)
        problem = f"lies outside the chunk grid {list(meta.grid)} of the array"
        raise StrayChunkError(name, stray, problem)
    packed = {}
    if meta.compressor is not None:
        packed = {stem + key: Packed(name, meta, place) for key, place in there.items()}
    return Stored(name, meta.dtype, meta.shape, boxes), packed


def _indexes(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the indexes of all chunks, row-major; `itertools.product` would hold every side of a grid in memory."""
    for flat in range(prod(grid)):
        index, rest = [], flat
        for side in reversed(grid):
            rest, at = divmod(rest, side)
            index.append(at)
        yield tuple(reversed(index))


def _boxes(meta: Zarray, name: str, stem: str, there: dict[str, Place]) -> Iterator[Box]:
    """Return the boxes of all chunks; stop at the first missing one, so that a huge grid costs nothing."""
    strides = row_major(meta.chunks, meta.dtype)
    for index in _indexes(meta.grid):
        key = meta.key(index)
        place = there.get(key)
        if place is None:
            raise MissingChunkError(name, key, len(there), prod(meta.grid))
        if meta.compressor is None and place.size != meta.chunk_bytes:
            raise ChunkSizeError(name, key, place.size, meta.chunk_bytes)
        start = tuple(i * chunk for i, chunk in zip(index, meta.chunks, strict=True))
        shape = tuple(min(chunk, side - at) for chunk, side, at in zip(meta.chunks, meta.shape, start, strict=True))
        plain = meta.compressor is None
        file, offset = (place.file, place.offset) if plain else (stem + key, 0)
        if not strides:  # of a scalar
            yield Box((0,), (1,), file, offset, (BITS[meta.dtype] // 8,))
        else:
            yield Box(start, shape, file, offset, strides)


def find_arrays(files: Files, folder: str) -> dict[str, str]:
    """Return the folders below ``folder`` that hold a ``.zarray``, by the array's name."""
    end = f"/{ZARRAY}"
    return {
        found.removesuffix(end).removeprefix(f"{folder}/"): found.removesuffix(end)
        for found in files.below(f"{folder}/")
        if found.endswith(end)
    }
