"""Where the elements of a tensor lie that ``torch.save`` wrote: a zip archive, stored, not compressed.

Source of the format: PKWARE's APPNOTE for the archive (zip64 included), ``torch/serialization.py`` and
``torch/_utils.py`` for what is in it: ``data.pkl`` describes the tensor, ``data/N`` are the bytes of a storage.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.errors import printable
from nemotron_fp8.errors.nemo import MalformedDistError
from nemotron_fp8.sources.nemo.inert_pickle import Global, Record, read_pickle

if TYPE_CHECKING:
    from nemotron_fp8.sources.nemo.files import Files


STORAGES = {
    "torch.BFloat16Storage": "BF16",
    "torch.HalfStorage": "F16",
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.ByteStorage": "U8",
    "torch.CharStorage": "I8",
    "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.BoolStorage": "BOOL",
}
"""safetensors names of the dtypes of torch's storage classes."""
_REBUILD = "torch._utils._rebuild_tensor_v2"
_ALLOWED = frozenset((*STORAGES, _REBUILD, "collections.OrderedDict"))
_TAIL = 1 << 16
_PICKLE_BYTES = 1 << 16
_MAX_ENTRIES = 64
_END, _END64, _LOCATOR64, _CENTRAL, _LOCAL = (
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
    b"PK\x01\x02",
    b"PK\x03\x04",
)
_FULL = 0xFFFFFFFF
"""A 32-bit field that says: look into the zip64 record."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor in a file.

    Attributes:
        dtype: safetensors name.
        shape: its dimensions.
        strides: bytes from one element to the next, in every dimension.
        offset: byte of the file where its first element lies.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class _Item(NamedTuple):
    """An entry of the archive: its bytes, and where its local header begins in the archive."""

    size: int
    header: int


def read_saved(files: Files, name: str, offset: int, length: int) -> SavedTensor:
    """Find the tensor in the bytes ``[offset, offset + length)`` of a file, in which one archive lies.

    Raises:
        MalformedDistError: they are no such archive, or the tensor's elements do not lie in it.
        ForbiddenPickleError: its description asks for something else than a tensor.
    """
    archive = _Archive(files, name, offset, length)
    data = archive.bytes_of("data.pkl", _PICKLE_BYTES)
    if "byteorder" in archive.items and archive.bytes_of("byteorder", 16) != b"little":
        raise archive.refuse("its elements are big-endian")
    value = read_pickle(data, f"{name} at byte {offset:,}", _ALLOWED)
    try:
        return _tensor(archive, value)
    except (TypeError, ValueError, IndexError, KeyError):
        raise archive.refuse("it describes no tensor in a storage of its own") from None


def _tensor(archive: _Archive, value: Any) -> SavedTensor:
    """The tensor that a ``data.pkl`` describes."""
    if not isinstance(value, Record) or value.kind != _REBUILD:
        raise ValueError
    storage, first, shape, strides = value.args[:4]
    tag, kind, key, _, count = storage.args[0]
    numbers = (first, count, *shape, *strides)
    if tag != "storage" or type(kind) is not Global or type(key) is not str or not key.isdigit():
        raise ValueError
    if len(shape) != len(strides) or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
        raise ValueError
    dtype = STORAGES[kind.name]
    item = BITS[dtype] // 8
    begin, size = archive.place_of(f"data/{key}")
    last = first + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if size != count * item or (0 not in shape and last >= count):
        raise archive.refuse(f"storage {key} has {size:,} bytes, too few for the tensor")
    return SavedTensor(dtype, tuple(shape), tuple(n * item for n in strides), begin + first * item)


class _Archive:
    """A zip archive that lies in a part of a file."""

    def __init__(self, files: Files, name: str, offset: int, length: int) -> None:
        self._files, self._name, self._offset, self._length = files, name, offset, length
        self.items: dict[str, _Item] = {}
        try:
            self._read_directory()
        except (struct.error, UnicodeDecodeError):
            raise self.refuse("no zip archive, or cut off") from None

    def refuse(self, problem: str) -> MalformedDistError:
        """An error about this archive."""
        return MalformedDistError(self._name, f"at byte {self._offset:,}: {problem}")

    def _read(self, at: int, length: int) -> bytes:
        if at < 0 or length < 0 or at + length > self._length:
            raise self.refuse("no zip archive, or cut off")
        return self._files.read(self._name, self._offset + at, length)

    def _read_directory(self) -> None:
        """Find the end record, then the entries; names without the folder that torch puts them in."""
        tail_at = max(0, self._length - _TAIL)
        tail = self._read(tail_at, self._length - tail_at)
        end = tail.rfind(_END)
        if end < 0:
            raise self.refuse("no zip archive, or cut off")
        count, size, at = struct.unpack("<HII", tail[end + 10 : end + 20])
        locator = tail[max(0, end - 20) : end]
        if locator[:4] == _LOCATOR64:
            record = self._read(struct.unpack("<Q", locator[8:16])[0], 56)
            if record[:4] != _END64:
                raise self.refuse("its zip64 record is not where it should be")
            count, size, at = struct.unpack("<QQQ", record[32:56])
        if count > _MAX_ENTRIES or size > _TAIL:
            raise self.refuse(f"{count:,} entries, more than a saved tensor has")
        text = self._read(at, size)
        for _ in range(count):
            if text[:4] != _CENTRAL:
                raise self.refuse("a broken directory")
            method, stored, plain, name_bytes, extra_bytes, comment_bytes, header = struct.unpack(
                "<10xH8xIIHHH8xI", text[:46]
            )
            name = text[46 : 46 + name_bytes].decode("utf-8")
            extra = text[46 + name_bytes : 46 + name_bytes + extra_bytes]
            plain, stored, header = self._wide(extra, plain, stored, header)
            if method != 0 or plain != stored:
                raise self.refuse(f"entry {printable(name)} is compressed")
            short = name.partition("/")[2]
            if short in self.items:
                raise self.refuse(f"entry {printable(name)} stands twice")
            self.items[short] = _Item(plain, header)
            text = text[46 + name_bytes + extra_bytes + comment_bytes :]

    def _wide(self, extra: bytes, plain: int, stored: int, header: int) -> tuple[int, int, int]:
        """Replace the fields that are full by those of the zip64 record, which has only these, in order."""
        values = [plain, stored, header]
        if _FULL not in values:
            return plain, stored, header
        while len(extra) >= 4:
            tag, size = struct.unpack("<HH", extra[:4])
            if tag == 1:
                wide = list(struct.unpack(f"<{size // 8}Q", extra[4 : 4 + size // 8 * 8]))
                values = [wide.pop(0) if value == _FULL and wide else value for value in values]
                break
            extra = extra[4 + size :]
        return values[0], values[1], values[2]

    def place_of(self, name: str) -> tuple[int, int]:
        """Return the byte of the file where an entry's data begins, and its bytes."""
        if name not in self.items:
            raise self.refuse(f"no entry {printable(name)}")
        item = self.items[name]
        local = self._read(item.header, 30)
        if local[:4] != _LOCAL:
            raise self.refuse(f"entry {printable(name)} is not where the directory says")
        name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
        begin = item.header + 30 + name_bytes + extra_bytes
        if begin + item.size > self._length:
            raise self.refuse(f"entry {printable(name)} reaches over the end")
        return self._offset + begin, item.size

    def bytes_of(self, name: str, most: int) -> bytes:
        """Return a small entry."""
        begin, size = self.place_of(name)
        if size > most:
            raise self.refuse(f"entry {printable(name)} has {size:,} bytes, more than a tensor needs")
        return self._files.read(self._name, begin, size)
