"""Arrays in zarr version 2, as Megatron's ``zarr`` backend writes them: one folder an array, one file a chunk.

Source of the format: the zarr v2 specification, and ``dist_checkpointing/strategies/zarr.py`` of Megatron-LM
(no compressor, C order, no fill value, the dtype of bf16 arrays patched to ``bfloat16``). Chunks at the upper
edges of an array are stored whole: what reaches over the edge is padding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint import strict_json
from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.errors.nemo import ChunkSizeError, MalformedArrayError, MissingChunkError, StrayChunkError
from nemotron_fp8.nemo.arrays import Box, Stored, row_major
from nemotron_fp8.nemo.chunks import COMPRESSORS, NAMES, Packed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.nemo.files import Files, Place


ZARRAY = ".zarray"
DTYPES: dict[str, str] = {
    "bfloat16": "BF16",
    "<f2": "F16",
    "<f4": "F32",
    "<f8": "F64",
    "|b1": "BOOL",
    "|i1": "I8",
    "|u1": "U8",
    "<i2": "I16",
    "<u2": "U16",
    "<i4": "I32",
    "<u4": "U32",
    "<i8": "I64",
    "<u8": "U64",
}
"""safetensors names of zarr's dtypes, little-endian only."""
MAX_DIMENSIONS = 8
MAX_SIDE = 1 << 48
"""Cap on a dimension; with it every product of eight fits in Python's integers without being a burden."""
_CHUNK = re.compile(r"\d+(?:[./]\d+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Zarray:
    """A checked ``.zarray``.

    Attributes:
        shape: dimensions of the array.
        chunks: dimensions of a chunk, padding included.
        dtype: safetensors name.
        separator: what stands between the indexes in a chunk's name.
        compressor: the compressor's own settings; None where chunks are plain bytes.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    separator: str
    compressor: dict[str, Any] | None

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks in every dimension."""
        return tuple(-(-side // chunk) for side, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk when it is not compressed."""
        return prod(self.chunks) * BITS[self.dtype] // 8

    def key(self, index: tuple[int, ...]) -> str:
        """Name of a chunk."""
        return self.separator.join(map(str, index)) or "0"


def read_zarray(array: str, data: bytes) -> Zarray:
    """Check a ``.zarray``.

    Raises:
        MalformedArrayError: it breaks zarr's rules, or describes what is not read: another version, Fortran
            order, filters, a big-endian or structured dtype.
    """

    def broken(_: str, problem: str) -> MalformedArrayError:
        return MalformedArrayError(array, f"{ZARRAY}: {problem}")

    meta = strict_json.load_object(data, ZARRAY, broken, max_bytes=1 << 20, max_values=10_000)

    def refuse(problem: str) -> MalformedArrayError:
        return broken(ZARRAY, problem)

    if meta.get("zarr_format") != 2:
        raise refuse(f"zarr_format is {meta.get('zarr_format')!r:.40}, only 2 is read")
    if meta.get("order") != "C":
        raise refuse(f"order is {meta.get('order')!r:.40}, only 'C' is read")
    if meta.get("filters"):
        raise refuse("it has filters, which are not read")
    dtype = meta.get("dtype")
    if type(dtype) is not str or dtype not in DTYPES:
        hint = "; a bf16 array must say 'bfloat16'" if dtype == "<V2" else ""
        raise refuse(f"dtype {dtype!r:.80} is not one of {', '.join(DTYPES)}{hint}")
    shape, chunks = (_sides(meta.get(key), key, refuse) for key in ("shape", "chunks"))
    if len(shape) != len(chunks):
        raise refuse(f"shape has {len(shape)} dimensions, chunks have {len(chunks)}")
    separator = meta.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise refuse(f"dimension_separator is {separator!r:.40}, must be '.' or '/'")
    compressor = meta.get("compressor")
    if compressor is not None and (type(compressor) is not dict or type(compressor.get("id")) is not str):
        raise refuse("compressor is neither null nor an object with an id")
    if compressor is not None and compressor["id"] not in COMPRESSORS:
        raise refuse(f"compressor {compressor['id']!r:.40} is not one of {', '.join(sorted(COMPRESSORS))}")
    if compressor is not None and DTYPES[dtype] not in NAMES:
        raise refuse(f"a compressed array of dtype {dtype!r}, of which none is read")
    return Zarray(shape, chunks, DTYPES[dtype], separator, compressor)


def _sides(value: object, key: str, refuse: Any) -> tuple[int, ...]:
    """A list of dimensions, checked."""
    if type(value) is not list or len(value) > MAX_DIMENSIONS:
        raise refuse(f"{key} is not a list of at most {MAX_DIMENSIONS} integers")
    for side in value:
        if type(side) is not int or not 1 <= side <= MAX_SIDE:
            raise refuse(f"{key} holds {side!r:.40}, must be integers from 1 to {MAX_SIDE:,}")
    return tuple(value)


def read_array(files: Files, folder: str, name: str) -> tuple[Stored, dict[str, Packed]]:
    """Return the array in a folder of a checkpoint, and its chunks by the key of their boxes if they are compressed.

    The boxes of a compressed array lie in files that `nemotron_fp8.nemo.chunks` makes out of the chunks.

    Raises:
        MalformedArrayError: its ``.zarray`` is broken.
        MissingChunkError, ChunkSizeError, StrayChunkError: its chunks are not those that it asks for.
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
        problem = f"lies outside the grid {list(meta.grid)} that shape and chunks make"
        raise StrayChunkError(name, stray, problem)
    packed = {}
    if meta.compressor is not None:
        packed = {stem + key: Packed(name, meta, place) for key, place in there.items()}
    return Stored(name, meta.dtype, meta.shape, boxes), packed


def _indexes(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indexes of all chunks, row-major. `itertools.product` would hold every side of a grid in memory first."""
    for flat in range(prod(grid)):
        index, rest = [], flat
        for side in reversed(grid):
            rest, at = divmod(rest, side)
            index.append(at)
        yield tuple(reversed(index))


def _boxes(meta: Zarray, name: str, stem: str, there: dict[str, Place]) -> Iterator[Box]:
    """The boxes of all chunks; stops at the first that is missing, so a huge grid costs nothing."""
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
