"""Locate the elements of a tensor in a file that ``torch.save`` wrote: a zip archive of uncompressed entries.

Format of the entries (``torch/serialization.py``, ``torch/_utils.py``): ``data.pkl`` describes the tensor, ``data/N``
holds the bytes of a storage. The checksums of storages are compared later (`payload_checks`); torch can write an
archive without any (``torch.serialization.set_crc32_options``).
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.errors import NemotronFp8Error, printable
from nemotron_fp8.errors.nemo import MalformedDistError
from nemotron_fp8.sources.nemo.inert_pickle import Global, Record, read_pickle
from nemotron_fp8.untrusted.guard import guarded

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
_PICKLE_BYTES = 1 << 16
_MAX_ENTRIES = 64
_MAX_READ = (1 << 16) + 22
"""Cap on one read of `zipfile`: its largest one looks for an end record of 22 bytes before a comment of 64 KiB."""
_LOCAL = struct.Struct("<4s2xH18xHH")
"""Signature, flags, length of name and length of extra fields of a local header."""
_ENCRYPTED = 0x2041
"""Flags of encrypted entries and of encrypted directories."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """Tensor in a file.

    Attributes:
        dtype: safetensors name.
        shape: dimensions.
        strides: bytes from one element to the next, in every dimension.
        offset: byte of the file where its first element lies.
        storage: byte of the file where its storage begins, the bytes of the storage, and their CRC-32; None if the
            archive has no checksums.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: tuple[int, int, int] | None


def read_saved(files: Files, name: str, offset: int, length: int) -> SavedTensor:
    """Locate the tensor in the bytes ``[offset, offset + length)`` of a file, which are one archive.

    Raises:
        MalformedDistError: the bytes are not such an archive, or the archive lacks elements of the tensor.
        ForbiddenPickleError: the description refers to something other than a tensor.
    """
    with guarded(lambda problem: MalformedDistError(name, f"at byte {offset:,}: {problem}")):
        return _read(_Archive(files, name, offset, length), f"{name} at byte {offset:,}")


def _read(archive: _Archive, where: str) -> SavedTensor:
    data = archive.bytes_of("data.pkl", _PICKLE_BYTES)
    if "byteorder" in archive.items and archive.bytes_of("byteorder", 16) != b"little":
        raise archive.refuse("big-endian elements are not supported")
    value = read_pickle(data, where, _ALLOWED)
    with guarded(lambda _: archive.refuse("data.pkl does not describe a tensor in a storage of its own")):
        found = _tensor(archive, value)
    if archive.has_checksums and zlib.crc32(data) != archive.items["data.pkl"].CRC:
        raise archive.refuse("entry 'data.pkl' does not match its CRC-32; fetch the file again")
    return found


def _tensor(archive: _Archive, value: Any) -> SavedTensor:
    """Return the tensor that a ``data.pkl`` describes."""
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
        raise archive.refuse(f"storage {key} has {size:,} bytes, which do not match the tensor")
    stated = (begin, size, archive.items[f"data/{key}"].CRC) if archive.has_checksums else None
    return SavedTensor(dtype, tuple(shape), tuple(n * item for n in strides), begin + first * item, stated)


class _Part:
    """Part of a file as `zipfile` reads it."""

    def __init__(self, files: Files, name: str, offset: int, length: int) -> None:
        self._files, self._name, self._offset, self._length = files, name, offset, length
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError("seek before the beginning")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, length: int = -1, /) -> bytes:
        rest = max(0, self._length - self._at)
        count = rest if length < 0 else min(length, rest)
        if count > _MAX_READ:
            raise ValueError(f"more entries than a saved tensor has, in {count:,} bytes of directory")
        data = self._files.read(self._name, self._offset + self._at, count)
        self._at += len(data)
        return data


class _Archive:
    """Zip archive in a part of a file.

    Attributes:
        items: entries by name, without the folder that torch puts them in.
    """

    def __init__(self, files: Files, name: str, offset: int, length: int) -> None:
        self._name, self._offset, self._length = name, offset, length
        self._part = _Part(files, name, offset, length)
        self.items: dict[str, zipfile.ZipInfo] = {}
        with guarded(lambda problem: self.refuse(f"not a zip archive, or truncated ({problem})")):
            try:
                with zipfile.ZipFile(self._part) as archive:
                    entries = archive.infolist()
            except OSError as error:  # of zipfile, about an offset before the beginning
                if isinstance(error, NemotronFp8Error):
                    raise
                raise ValueError(str(error)) from None
        if len(entries) > _MAX_ENTRIES:
            raise self.refuse(f"{len(entries):,} entries, the limit for a saved tensor is {_MAX_ENTRIES}")
        if entries and all(entry.header_offset for entry in entries):
            raise self.refuse("its first entry is not at the beginning of the archive")
        for entry in entries:
            self._add(entry)

    def _add(self, entry: zipfile.ZipInfo) -> None:
        shown = printable(entry.filename)
        if entry.flag_bits & _ENCRYPTED:
            raise self.refuse(f"entry {shown} is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise self.refuse(f"entry {shown} is compressed, which torch.save never does")
        short = entry.filename.partition("/")[2]
        if short in self.items:
            raise self.refuse(f"entry {shown} occurs twice")
        self.items[short] = entry

    @property
    def has_checksums(self) -> bool:
        """True unless torch was told to leave the checksums out: all of them are 0 then."""
        return any(entry.CRC for entry in self.items.values() if entry.file_size)

    def refuse(self, problem: str) -> MalformedDistError:
        """Return an error about this archive."""
        return MalformedDistError(self._name, f"at byte {self._offset:,}: {problem}")

    def place_of(self, name: str) -> tuple[int, int]:
        """Return the byte of the file where an entry's data begins, and its bytes."""
        if name not in self.items:
            raise self.refuse(f"entry {printable(name)} is missing")
        entry = self.items[name]
        written = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        local = self._read(entry.header_offset, _LOCAL.size)
        signature, flags, name_bytes, extra_bytes = _LOCAL.unpack(local)
        if signature != b"PK\x03\x04":
            raise self.refuse(f"entry {printable(name)} is not at the offset in the directory")
        if self._read(entry.header_offset + _LOCAL.size, name_bytes) != written or flags & _ENCRYPTED:
            raise self.refuse(f"entry {printable(name)} has another name or encryption than in the directory")
        begin = entry.header_offset + _LOCAL.size + name_bytes + extra_bytes
        if begin + entry.file_size > self._length:
            raise self.refuse(f"entry {printable(name)} ends beyond the archive")
        return self._offset + begin, entry.file_size

    def bytes_of(self, name: str, most: int) -> bytes:
        """Return the data of an entry of at most ``most`` bytes."""
        begin, size = self.place_of(name)
        if size > most:
            raise self.refuse(f"entry {printable(name)} has {size:,} bytes, the limit is {most:,}")
        return self._read(begin - self._offset, size)

    def _read(self, at: int, length: int) -> bytes:
        self._part.seek(at)
        data = self._part.read(length)
        if len(data) != length:
            raise self.refuse("not a zip archive, or truncated")
        return data
