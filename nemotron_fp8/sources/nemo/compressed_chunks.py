"""Decode compressed zarr chunks, cache a few of them, and read them like files.

Only whole chunks can be decoded. The memory budget counts cached chunks and the memory of decoding before
anything is read (`held_bytes`). The standard library decodes zlib, gzip and bz2, because its decompressors stop
at a given size; numcodecs, the codecs of the zarr project, has no such limit for them.
"""

from __future__ import annotations

import bz2
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8.errors import SourceReadError
from nemotron_fp8.errors.nemo import ChunkDecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nemotron_fp8.sources.files import Opener, SourceFile
    from nemotron_fp8.sources.nemo.files import Place
    from nemotron_fp8.sources.nemo.zarr_metadata import Zarray

DECODING = 2
"""Peak memory of decoding a chunk, in chunks, besides the cache: the decompressor's own copy and the result."""
_STREAMS: dict[str, Callable[[], zlib._Decompress | bz2.BZ2Decompressor]] = {
    "zlib": zlib.decompressobj,
    "gzip": partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS),
    "bz2": bz2.BZ2Decompressor,
}


@dataclass(frozen=True, slots=True)
class Packed:
    """Compressed chunk.

    Attributes:
        array: name of its array.
        meta: metadata of the array.
        place: location of the compressed bytes.
    """

    array: str
    meta: Zarray
    place: Place


def kept_chunks(packed: Mapping[str, Packed]) -> int:
    """Return the number of chunks to cache so that rows across several chunks do not decode them repeatedly."""
    return max((chunk.meta.grid[-1] if chunk.meta.grid else 1 for chunk in packed.values()), default=0)


def held_bytes(packed: Mapping[str, Packed]) -> int:
    """Return the peak bytes of decoding: cached chunks, `DECODING` more, and a compressed chunk."""
    largest = max((chunk.meta.chunk_bytes for chunk in packed.values()), default=0)
    stored = max((chunk.place.size for chunk in packed.values()), default=0)
    return (kept_chunks(packed) + DECODING) * largest + stored if packed else 0


def decode(chunk: Packed, data: bytes) -> memoryview:
    """Return the elements of a compressed chunk, row-major, padding included.

    A chunk that decodes to more bytes than its array's chunks have is rejected before that memory is allocated.

    Raises:
        ChunkDecodeError: numcodecs is needed and not installed, does not support the compressor's settings, or the
            chunk is broken.
    """
    compressor, size = chunk.meta.compressor or {}, chunk.meta.chunk_bytes
    stream = _STREAMS.get(compressor["id"])
    try:
        return memoryview(_decode_stream(stream(), data, size) if stream else _decode_block(compressor, data, size))
    except ImportError:
        problem = (
            f"chunks compressed by {compressor['id']} need numcodecs; install it: pip install 'nemotron_fp8[nemo]'"
        )
        raise ChunkDecodeError(chunk.array, problem) from None
    except Exception as error:  # decompressors raise ValueError, RuntimeError, OSError, ... by the kind of damage
        problem = " ".join(str(error).split())[:160]
        raise ChunkDecodeError(
            chunk.array, f"a chunk cannot be decoded ({problem}); fetch the checkpoint again"
        ) from None


def _decode_stream(stream: zlib._Decompress | bz2.BZ2Decompressor, data: bytes, size: int) -> bytes:
    found = stream.decompress(data, size + 1)
    if not stream.eof:
        raise ValueError(f"its stream is truncated, or has more than the expected {size:,} bytes")
    if len(found) != size:
        raise ValueError(f"{len(found):,} bytes, expected {size:,}")
    if stream.unused_data:
        raise ValueError(f"{len(stream.unused_data):,} bytes follow its stream")
    return found


def _decode_block(compressor: Mapping[str, object], data: bytes, size: int) -> bytearray:
    """Decode a format whose header states the decoded size (blosc, zstd); zstd may leave the size out."""
    import numcodecs

    stated = int.from_bytes(data[4:8], "little") if compressor["id"] == "blosc" else _zstd_size(data)
    if stated not in (None, size):
        raise ValueError(f"{stated:,} bytes by its header, expected {size:,}")
    found = bytearray(size)
    numcodecs.get_codec(dict(compressor)).decode(data, found)
    return found


def _zstd_size(data: bytes) -> int | None:
    """Return the content size that a zstd frame states; None if it states none (RFC 8878, section 3.1.1.1)."""
    descriptor = data[4]
    single_segment = descriptor >> 5 & 1
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    at = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0) if width else None


class ChunkOpener:
    """Opens files of another opener, and compressed chunks as if they were uncompressed.

    Args:
        opener: opens all other files, and the compressed bytes.
        packed: compressed chunks, by the key of their boxes.
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
        chunk = self._packed.get(file)
        return self._opener.open(file) if chunk is None else _ChunkFile(self, file, chunk)

    def read(self, key: str, file: SourceFile, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of a decoded chunk, whose compressed bytes are in ``file``.

        One chunk is decoded at a time: two threads decoding at once would exceed the planned memory.
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
                raise SourceReadError(
                    key, f"the decoded chunk has {len(source):,} bytes, {offset + len(buffer):,} are needed"
                )
            buffer[:] = source[offset : offset + len(buffer)]


class _ChunkFile:
    """Compressed chunk as a file of its elements. Never mapped: a window would keep the chunk in memory."""

    def __init__(self, opener: ChunkOpener, key: str, chunk: Packed) -> None:
        self._opener, self._key = opener, key
        self._file = opener._opener.open(chunk.place.file)

    def window(self, offset: int, length: int) -> memoryview | None:
        del offset, length
        return None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._opener.read(self._key, self._file, offset, buffer)

    def release(self, offset: int, length: int) -> None:
        pass

    def close(self) -> None:
        self._file.close()
