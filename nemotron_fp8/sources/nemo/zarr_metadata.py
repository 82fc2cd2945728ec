"""Read the `.zarray` metadata of a zarr array."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.errors import excerpt
from nemotron_fp8.errors.nemo import MalformedArrayError
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Callable


COMPRESSORS = frozenset(("blosc", "bz2", "gzip", "zlib", "zstd"))
"""Compressors that `compressed_chunks` decodes."""
COMPRESSED = frozenset(("BF16", "F16", "F32"))
"""safetensors names of the dtypes that occur in compressed arrays."""

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
"""Cap on a dimension, so that the product of eight stays a small integer."""


@dataclass(frozen=True, slots=True)
class Zarray:
    """Checked ``.zarray``.

    Attributes:
        shape: dimensions of the array.
        chunks: dimensions of a chunk, padding included.
        dtype: safetensors name.
        separator: separator of the indexes in a chunk's name.
        compressor: settings of the compressor; None for uncompressed chunks.
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
        """Bytes of an uncompressed chunk."""
        return prod(self.chunks) * BITS[self.dtype] // 8

    def key(self, index: tuple[int, ...]) -> str:
        """Return the name of a chunk."""
        return self.separator.join(map(str, index)) or "0"


def read_zarray(array: str, data: bytes) -> Zarray:
    """Check a ``.zarray``.

    Raises:
        MalformedArrayError: the metadata breaks zarr's rules, or describes something unsupported: another version,
            Fortran order, filters, a big-endian or structured dtype.
    """

    def broken(_: str, problem: str) -> MalformedArrayError:
        return MalformedArrayError(array, f"{ZARRAY}: {problem}")

    meta = strict_json.load_object(data, ZARRAY, broken, max_bytes=1 << 20, max_values=10_000)
    with guarded(lambda problem: broken(ZARRAY, problem)):
        return _checked(meta, lambda problem: broken(ZARRAY, problem))


def _checked(meta: dict[str, Any], refuse: Callable[[str], MalformedArrayError]) -> Zarray:
    """Return the checked metadata of an array."""
    if meta.get("zarr_format") != 2:
        raise refuse(f"zarr_format is {excerpt(meta.get('zarr_format'))}, only 2 is supported")
    if meta.get("order") != "C":
        raise refuse(f"order is {excerpt(meta.get('order'))}, only 'C' is supported")
    if meta.get("filters"):
        raise refuse("filters are not supported")
    dtype = meta.get("dtype")
    if type(dtype) is not str or dtype not in DTYPES:
        hint = "; a bf16 array has dtype 'bfloat16'" if dtype == "<V2" else ""
        raise refuse(f"dtype {excerpt(dtype)} is not one of {', '.join(DTYPES)}{hint}")
    shape, chunks = (_sides(meta.get(key), key, refuse) for key in ("shape", "chunks"))
    if len(shape) != len(chunks):
        raise refuse(f"shape has {len(shape)} dimensions, chunks have {len(chunks)}")
    separator = meta.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise refuse(f"dimension_separator is {excerpt(separator)}, must be '.' or '/'")
    compressor = meta.get("compressor")
    if compressor is not None and (type(compressor) is not dict or type(compressor.get("id")) is not str):
        raise refuse("compressor is neither null nor an object with an id")
    if compressor is not None and compressor["id"] not in COMPRESSORS:
        raise refuse(f"compressor {excerpt(compressor['id'])} is not one of {', '.join(sorted(COMPRESSORS))}")
    if compressor is not None and DTYPES[dtype] not in COMPRESSED:
        raise refuse(f"compressed arrays of dtype {dtype!r} are not supported")
    return Zarray(shape, chunks, DTYPES[dtype], separator, compressor)


def _sides(value: object, key: str, refuse: Callable[[str], MalformedArrayError]) -> tuple[int, ...]:
    """Return a checked list of dimensions."""
    if type(value) is not list or len(value) > MAX_DIMENSIONS:
        raise refuse(f"{key} is not a list of at most {MAX_DIMENSIONS} integers")
    for side in value:
        if type(side) is not int or not 1 <= side <= MAX_SIDE:
            raise refuse(f"{key} holds {excerpt(side)}, must be integers from 1 to {MAX_SIDE:,}")
    return tuple(value)
