"""Compressed chunks: decoded whole by tensorstore, a few of them kept, and read from like files.

Whole chunks are all that a compressor can give. What is kept, and what decoding takes beside it, is counted
against the memory budget before anything is read (`held_bytes`).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from nemotron_fp8.errors import SourceReadError
from nemotron_fp8.errors.nemo import TensorStoreError
from nemotron_fp8.sources.nemo.zarr_metadata import NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.sources.files import Opener, SourceFile
    from nemotron_fp8.sources.nemo.files import Place
    from nemotron_fp8.sources.nemo.zarr_metadata import Zarray

DECODING = 2
"""Chunks that decoding one takes beside those that are kept: tensorstore's own copy and the result."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A compressed chunk.

    Attributes:
        array: the array that it belongs to.
        meta: that array's description.
        place: where the compressed bytes lie.
    """

    array: str
    meta: Zarray
    place: Place


def kept_chunks(packed: Mapping[str, Packed]) -> int:
    """Chunks to keep so that rows which several chunks share do not decode them again and again."""
    return max((chunk.meta.grid[-1] if chunk.meta.grid else 1 for chunk in packed.values()), default=0)


def held_bytes(packed: Mapping[str, Packed]) -> int:
    """Bytes that decoding takes at the most: chunks that are kept, one in the making, one compressed."""
    largest = max((chunk.meta.chunk_bytes for chunk in packed.values()), default=0)
    stored = max((chunk.place.size for chunk in packed.values()), default=0)
    return (kept_chunks(packed) + DECODING) * largest + stored if packed else 0


def decode(chunk: Packed, data: bytes) -> memoryview:
    """Return the elements of a compressed chunk, row-major, padding included.

    Raises:
        TensorStoreError: tensorstore is not installed, does not know the compressor, or finds the chunk broken.
    """
    meta = chunk.meta
    try:
        import numpy as np
        import tensorstore as ts
    except ImportError:
        problem = "its chunks are compressed; install tensorstore: pip install 'nemotron_fp8[nemo]'"
        raise TensorStoreError(chunk.array, problem) from None
    zarray = {
        "zarr_format": 2,
        "shape": meta.chunks,
        "chunks": meta.chunks,
        "dtype": NAMES[meta.dtype],
        "compressor": meta.compressor,
        "fill_value": None,
        "filters": None,
        "order": "C",
    }
    try:
        context = ts.Context()
        store = ts.KvStore.open("memory://", context=context).result()
        store[".zarray"] = json.dumps(zarray).encode()
        store[".".join("0" for _ in meta.chunks)] = data
        opened = ts.open({"driver": "zarr", "kvstore": {"driver": "memory"}}, context=context, open=True)
        values: Any = opened.result().read().result()
    except Exception as error:  # tensorstore raises ValueError and others, by the kind of damage
        told = " ".join(str(error).split())[:160]
        raise TensorStoreError(chunk.array, f"tensorstore cannot decode a chunk: {told}") from None
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


class ChunkOpener:
    """Opens files as another opener does, and compressed chunks as if they were plain ones.

    Args:
        opener: opens everything else, and the compressed bytes.
        packed: the compressed chunks, by the key that boxes name them with.
    """

    def __init__(self, opener: Opener, packed: Mapping[str, Packed]) -> None:
        self._opener, self._packed = opener, packed
        self._kept: OrderedDict[str, memoryview] = OrderedDict()
        self._lock = Lock()
        self._capacity = kept_chunks(packed)

    def __getstate__(self) -> tuple[Opener, Mapping[str, Packed]]:
        return self._opener, self._packed

    def __setstate__(self, state: tuple[Opener, Mapping[str, Packed]]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # chunks of its own in every process

    def open(self, file: str) -> SourceFile:
        """See `Opener.open`."""
        chunk = self._packed.get(file)
        return self._opener.open(file) if chunk is None else _ChunkFile(self, file, chunk)

    def read(self, key: str, file: SourceFile, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of a decoded chunk, whose compressed bytes are in ``file``.

        One at a time: two threads that decoded at once would take twice the memory that is planned.
        """
        with self._lock:
            if key not in self._kept:
                while len(self._kept) >= self._capacity:
                    self._kept.popitem(last=False)
                place = self._packed[key].place
                data = bytearray(place.size)
                file.read_into(place.offset, memoryview(data))
                self._kept[key] = decode(self._packed[key], bytes(data))
            self._kept.move_to_end(key)
            source = self._kept[key]
            if offset + len(buffer) > len(source):
                raise SourceReadError(key, f"the decoded chunk ends at byte {len(source):,}")
            buffer[:] = source[offset : offset + len(buffer)]


class _ChunkFile:
    """A compressed chunk as a file of its elements. Never mapped: a window would keep the chunk from going."""

    def __init__(self, opener: ChunkOpener, key: str, chunk: Packed) -> None:
        self._opener, self._key = opener, key
        self._file = opener._opener.open(chunk.place.file)

    def window(self, offset: int, length: int) -> memoryview | None:
        """See `SourceFile.window`."""
        del offset, length
        return None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `SourceFile.read_into`."""
        self._opener.read(self._key, self._file, offset, buffer)

    def release(self, offset: int, length: int) -> None:
        """See `SourceFile.release`."""

    def close(self) -> None:
        """See `SourceFile.close`."""
        self._file.close()
