"""Parse and serialize the header of a safetensors file.

A file is ``N`` as 8 little-endian bytes, ``N`` bytes of JSON and the data section. The JSON maps each
tensor's name to ``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets in bytes from the start of the
data section, which the tensors fill without gap or overlap; ``__metadata__`` maps strings to strings. Source:
the format section of huggingface/safetensors ``README.md`` and its reader ``tensor.rs`` (0.8). This reader rejects
everything that ``tensor.rs`` rejects, and also duplicate names of tensors or metadata keys, empty names, names with NUL
or of more than 512 characters, and tensors of more than 64 dimensions.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.checkpoint.dtypes import BITS, RANK
from nemotron_fp8.errors import MalformedHeaderError, UnknownDtypeError, printable
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded
from nemotron_fp8.untrusted.strict_json import kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


LENGTH_BYTES = 8
"""Bytes before the JSON: its length, unsigned, little-endian."""
FORMAT_MAX_BYTES = 100_000_000
"""Longest JSON that the format allows, in bytes; `Limits.max_bytes` cannot exceed it."""

METADATA_KEY = "__metadata__"
"""Reserved key of the header's metadata; no tensor can have this name."""
U64_MAX = 2**64 - 1
MAX_NAME = 512
"""Longest name of a tensor, in characters; published names have up to about 120. Names are matched with patterns, whose
time may grow with the square of the length."""
MAX_DIMENSIONS = 64
"""Most dimensions of a tensor, as in torch."""

_ALIGNMENT = 8
_MAX_SHOWN = 8
_MAX_DIGITS_SHOWN = 24
_FILE_ORDER = attrgetter("start", "end")
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on a header; the defaults are far above those of published shards.

    Attributes:
        max_bytes: bytes of JSON (at most ``FORMAT_MAX_BYTES``).
        max_tensors: tensors of one file.
        max_depth: nesting of the JSON; a plain header has 3 levels.
        max_values: values of the JSON, objects, arrays and scalars together; a matrix has 8.
    """

    max_bytes: int = strict_json.MAX_BYTES
    max_tensors: int = 1_000_000
    max_depth: int = strict_json.MAX_DEPTH
    max_values: int = strict_json.MAX_VALUES


DEFAULT_LIMITS = Limits()


class Entry(NamedTuple):
    """Tensor of a file.

    Attributes:
        name: key in the header: not empty, no NUL, valid UTF-8. Never a path.
        dtype: safetensors name, a key of ``dtypes.BITS``.
        shape: elements along each dimension, outermost first; ``()`` is a scalar.
        start: first byte, counted from the start of the data section.
        end: byte after the last one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """Header of one file.

    Attributes:
        entries: tensors in the order of their data; empty tensors of one offset in the order of the JSON.
        metadata: pairs of ``__metadata__`` sorted by key; ``()`` for an empty object, ``None`` if it is
            missing or null.
        data_start: byte of the file where the data section starts.
    """

    entries: tuple[Entry, ...]
    metadata: tuple[tuple[str, str], ...] | None
    data_start: int

    @property
    def data_size(self) -> int:
        """Bytes of the data section."""
        return self.entries[-1].end if self.entries else 0

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.data_start + self.data_size


def header_length(first8: bytes, file_size: int, file: str, limits: Limits = DEFAULT_LIMITS) -> int:
    """Read the length of the JSON from the first bytes of a file.

    A reader that cannot seek fetches 8 bytes, calls this function and fetches that many more for `parse_header`.

    Args:
        first8: the first 8 bytes of the file, fewer only if the file is shorter.
        file_size: bytes of the whole file.
        file: name of the file in errors.
        limits: limits on the header.

    Returns:
        Bytes of the JSON, which starts at byte 8.

    Raises:
        MalformedHeaderError: the file is too short for a header, or the length exceeds a limit or the file.
    """
    if file_size < LENGTH_BYTES or len(first8) < LENGTH_BYTES:
        size = min(file_size, len(first8))
        raise MalformedHeaderError(file, f"{size} bytes; a safetensors file has at least {LENGTH_BYTES}")
    length = int.from_bytes(first8[:LENGTH_BYTES], "little")
    if length > FORMAT_MAX_BYTES:
        raise MalformedHeaderError(
            file,
            f"a header of {length:,} bytes, but the format allows {FORMAT_MAX_BYTES:,}; not a safetensors file?",
        )
    if length > limits.max_bytes:
        raise MalformedHeaderError(file, f"a header of {length:,} bytes; the limit is {limits.max_bytes:,}")
    if LENGTH_BYTES + length > file_size:
        raise MalformedHeaderError(
            file,
            f"the header ends at byte {LENGTH_BYTES + length:,}, the file at {file_size:,}: the file is truncated;"
            " fetch it again",
        )
    return length


def read_header(fd: int, file: str, file_size: int | None = None, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Read and check the header of an open file, whose position is neither used nor moved.

    Args:
        fd: descriptor open for reading.
        file: name of the file in errors.
        file_size: bytes of the file, ``None`` to ask the descriptor.
        limits: limits on the header.

    Returns:
        The checked header.

    Raises:
        MalformedHeaderError: the header breaks a rule (`parse_header`), or the file has shrunk.
        UnknownDtypeError: safetensors defines no such dtype.
        OSError: the file cannot be read.
    """
    size = os.fstat(fd).st_size if file_size is None else file_size
    length = header_length(_read_at(fd, LENGTH_BYTES, 0), size, file, limits)
    text = _read_at(fd, length, LENGTH_BYTES)
    if len(text) != length:
        raise MalformedHeaderError(
            file, f"only {len(text):,} of the header's {length:,} bytes can be read: the file was truncated"
        )
    return parse_header(text, size, file, limits)


def parse_header(text: bytes, file_size: int, file: str, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Check the JSON of a header against the format and the size of its file.

    Args:
        text: the JSON, exactly the bytes that `header_length` announced.
        file_size: bytes of the whole file.
        file: name of the file in errors.
        limits: limits on the header.

    Returns:
        The checked header: entries dense, in order, each with the bytes of its dtype and shape.

    Raises:
        MalformedHeaderError: the JSON breaks a rule of the format or exceeds a limit.
        UnknownDtypeError: safetensors defines no such dtype.
    """
    with guarded(lambda problem: MalformedHeaderError(file, problem)):
        return _parse(text, file_size, file, limits)


def _parse(text: bytes, file_size: int, file: str, limits: Limits) -> Header:
    """Parse a header without the net below its rules."""
    members = strict_json.load_object(
        text,
        file,
        MalformedHeaderError,
        max_bytes=min(limits.max_bytes, FORMAT_MAX_BYTES),
        max_depth=limits.max_depth,
        max_values=limits.max_values,
    )
    metadata = check_metadata(members.pop(METADATA_KEY, None), file)
    _check_count(len(members), file, limits)
    sizes: _Sizes = {}
    entries = [_entry(name, info, file, sizes) for name, info in members.items()]
    entries.sort(key=_FILE_ORDER)
    header = Header(tuple(entries), metadata, LENGTH_BYTES + len(text))
    _check_dense(header, file_size, file)
    return header


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
    file: str = "output",
    limits: Limits = DEFAULT_LIMITS,
) -> Header:
    """Place tensors as ``safetensors.torch.save_file`` does: by dtype (``dtypes.RANK``), then by name, without gaps.

    Names compare as UTF-8 bytes; for valid text that is the order of code points, so ``str`` compares alike.

    Args:
        tensors: name, dtype (a key of ``dtypes.BITS``) and shape of each, in any order.
        metadata: pairs of ``__metadata__``, ``None`` to write none.
        file: name of the file in errors.
        limits: limits on the header; with the default limits, a reader rejects a file beyond them.

    Returns:
        The header that `serialize` writes, its ``data_start`` included.

    Raises:
        MalformedHeaderError: the format or a limit does not allow a name, a shape or a metadata pair.
        UnknownDtypeError: safetensors defines no such dtype.
    """
    ordered = []
    sizes: _Sizes = {}
    for name, dtype, shape in tensors:
        check_name(name, file)
        rank = check_dtype(name, dtype, file)
        ordered.append((rank, name, dtype, *_checked(name, dtype, shape, file, sizes)))
    _check_count(len(ordered), file, limits)
    ordered.sort(key=itemgetter(0, 1))
    entries: list[Entry] = []
    end = 0
    names: set[str] = set()
    for _, name, dtype, dimensions, size in ordered:
        if name in names:
            raise MalformedHeaderError(file, "duplicate name", name)
        names.add(name)
        start, end = end, end + size
        entries.append(Entry(name, dtype, dimensions, start, end))
    if end > U64_MAX:
        raise MalformedHeaderError(file, f"{end:,} bytes of data overflow 64 bits")
    if metadata is not None:
        pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
        metadata = check_metadata(dict(pairs), file)
        if len(metadata or ()) != len(pairs):
            raise MalformedHeaderError(file, f"{METADATA_KEY} has a duplicate key")
    unplaced = Header(tuple(entries), metadata, 0)
    length = len(_json(unplaced))
    if length > min(limits.max_bytes, FORMAT_MAX_BYTES):
        raise MalformedHeaderError(file, f"a header of {length:,} bytes; the limit is {limits.max_bytes:,}")
    return Header(unplaced.entries, unplaced.metadata, LENGTH_BYTES + length)


def serialize(header: Header) -> bytes:
    """Serialize a header: the length, compact JSON in raw UTF-8, spaces to a multiple of 8.

    The bytes equal those of ``safetensors.torch.save_file`` for a header of `build_header` with at most one metadata
    key; with several keys, the order of that library varies between runs, and this function sorts.

    Args:
        header: header of `build_header`. A header of `parse_header` is written in the same form, so the result can be
            shorter or longer than its ``data_start``.

    Returns:
        The header's bytes, ``header.data_start`` of them for a header of `build_header`.
    """
    text = _json(header)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _json(header: Header) -> bytes:
    """Return the JSON, padded so that 8 bytes and the JSON are a multiple of 8 together."""
    members: list[str] = []
    if header.metadata is not None:
        members.append(f'"{METADATA_KEY}":{_COMPACT.encode(dict(header.metadata))}')
    # Formatted by hand: the encoder's tree of dicts takes over twice as long, most of it garbage collection.
    members += [
        f'{_COMPACT.encode(entry.name)}:{{"dtype":"{entry.dtype}",'
        f'"shape":[{",".join(map(str, entry.shape))}],"data_offsets":[{entry.start},{entry.end}]}}'
        for entry in header.entries
    ]
    text = f"{{{','.join(members)}}}".encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _read_at(fd: int, count: int, offset: int) -> bytes:
    """Read ``count`` bytes at ``offset``, fewer only at the end of the file."""
    parts: list[bytes] = []
    while count > 0:
        part = os.pread(fd, count, offset)
        if not part:
            break
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return b"".join(parts)


def _check_count(count: int, file: str, limits: Limits) -> None:
    if count > limits.max_tensors:
        raise MalformedHeaderError(file, f"{count:,} tensors; the limit is {limits.max_tensors:,}")


_Sizes = dict[tuple[object, ...], tuple[tuple[int, ...], int]]
"""Checked shapes and their bytes, by dtype and dimensions: a header has a few kinds of tensors."""


def _entry(name: str, info: object, file: str, sizes: _Sizes) -> Entry:
    """Return the entry of a tensor as `strict_json` read it, with every rule for a single tensor checked.

    Conditions are inlined: a call for each of 100,000 tensors would cost more than the check itself.
    """
    if not name or "\0" in name or len(name) > MAX_NAME:
        check_name(name, file)
    if type(info) is not dict:
        raise MalformedHeaderError(file, f"its entry is {kind(info)}, not an object", name)
    try:
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    except KeyError as missing:
        raise MalformedHeaderError(file, f"field {missing} is missing", name) from None
    if type(dtype) is not str or dtype not in BITS:
        check_dtype(name, dtype, file)
    if type(shape) is not list:
        raise MalformedHeaderError(file, f"shape is {kind(shape)}, not an array", name)
    if type(offsets) is not list or len(offsets) != 2:
        found = f"an array of length {len(offsets):,}" if type(offsets) is list else kind(offsets)
        raise MalformedHeaderError(file, f"data_offsets is {found}, not an array of two integers", name)
    start, end = offsets
    if type(start) is not int or type(end) is not int or not 0 <= start <= end <= U64_MAX:
        check_integers(offsets, "data_offsets", name, file)
        raise MalformedHeaderError(file, f"data_offsets [{start:,}, {end:,}] have an end before the start", name)
    dimensions, size = _checked(name, dtype, shape, file, sizes)
    if size != end - start:
        raise MalformedHeaderError(
            file,
            f"{dtype} {brief(shape)} takes {size:,} bytes; data_offsets [{start:,}, {end:,}] span {end - start:,}",
            name,
        )
    return Entry(name, sys.intern(dtype), dimensions, start, end)


def _checked(name: str, dtype: str, shape: Sequence[int], file: str, sizes: _Sizes) -> tuple[tuple[int, ...], int]:
    """Return a checked shape and its bytes; a shape that was checked before is looked up."""
    for dimension in shape:
        if type(dimension) is not int:  # True and 1.0 equal 1, so the look-up would accept them
            check_integers(shape, "shape", name, file)
    if len(shape) > MAX_DIMENSIONS:
        check_integers(shape, "shape", name, file)
        raise MalformedHeaderError(file, f"{len(shape):,} dimensions; the limit is {MAX_DIMENSIONS}", name)
    key = (dtype, *shape)
    known = sizes.get(key)
    if known is None:
        known = sizes[key] = (tuple(shape), check_nbytes(name, dtype, shape, file))
    return known


def _check_dense(header: Header, file_size: int, file: str) -> None:
    """Check that the tensors fill the data section: no gap, no overlap, no byte before, after or past the end."""
    end = 0
    previous: str | None = None
    for entry in header.entries:
        if entry.start != end:
            gap = "a gap after" if entry.start > end else "an overlap with"
            before = "the start of the data section" if previous is None else f"tensor {printable(previous)}"
            raise MalformedHeaderError(
                file,
                f"starts at byte {entry.start:,} of the data section instead of byte {end:,}: {gap} {before}",
                entry.name,
            )
        end, previous = entry.end, entry.name
    if header.file_size != file_size:
        have = file_size - header.data_start
        problem = "bytes are missing; fetch the file again" if have < end else "bytes at the end belong to no tensor"
        raise MalformedHeaderError(file, f"tensors take {end:,} bytes, but the data section has {have:,}: {problem}")


def check_metadata(value: object, file: str) -> tuple[tuple[str, str], ...] | None:
    """Check ``__metadata__`` and return its pairs sorted by key; return None for None."""
    if value is None:
        return None
    if type(value) is not dict:
        raise MalformedHeaderError(file, f"{METADATA_KEY} is {kind(value)}, not an object of strings")
    for key, text in value.items():
        if type(text) is not str:
            raise MalformedHeaderError(file, f"{METADATA_KEY}[{printable(key)}] is {kind(text)}, not a string")
        _check_text(key, file, f"a key of {METADATA_KEY}")
        _check_text(text, file, f"{METADATA_KEY}[{printable(key)}]")
    return tuple(sorted(value.items()))


def check_name(name: object, file: str) -> None:
    """Check a tensor's name: a string of valid UTF-8, not empty, no NUL, not the reserved key."""
    if type(name) is not str:
        raise MalformedHeaderError(file, f"a tensor's name is {kind(name)}, not a string")
    if not name:
        raise MalformedHeaderError(file, "a tensor's name is empty", name)
    if len(name) > MAX_NAME:
        raise MalformedHeaderError(file, f"the name has {len(name):,} characters; the limit is {MAX_NAME}", name)
    if "\0" in name:
        raise MalformedHeaderError(file, "the name contains a NUL character", name)
    if name == METADATA_KEY:
        raise MalformedHeaderError(
            file, "this name is reserved for the metadata of the header; rename the tensor", name
        )
    _check_text(name, file, "a tensor's name")


def _check_text(text: object, file: str, what: str) -> None:
    if type(text) is not str:
        raise MalformedHeaderError(file, f"{what} is {kind(text)}, not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise MalformedHeaderError(file, f"{what} {printable(text)} contains half of a surrogate pair") from None


def check_dtype(name: str, dtype: object, file: str) -> int:
    """Check a dtype and return its position in a written file (``dtypes.RANK``)."""
    if type(dtype) is not str:
        raise MalformedHeaderError(file, f"dtype is {kind(dtype)}, not a string", name)
    rank = RANK.get(dtype)
    if rank is None:
        raise UnknownDtypeError(file, dtype, name)
    return rank


def check_integers(values: Iterable[object], what: str, name: str, file: str) -> None:
    """Reject values other than unsigned 64-bit integers; by exact type, because ``True`` is an ``int`` too."""
    for value in values:
        if type(value) is not int:
            raise MalformedHeaderError(file, f"{what} contains {kind(value)} instead of an integer", name)
        if not 0 <= value <= U64_MAX:
            problem = "is negative" if value < 0 else "exceeds 64 bits"
            raise MalformedHeaderError(file, f"{what} contains {brief([value])}, which {problem}", name)


def check_nbytes(name: str, dtype: str, shape: Sequence[int], file: str) -> int:
    """Return the bytes of a dense tensor; reject a shape that overflows 64-bit arithmetic, which the format uses."""
    check_integers(shape, "shape", name, file)
    bits = BITS[dtype]
    count = 1
    for dimension in shape:
        count *= dimension
        # Check at each step: a later dimension of 0 would hide that a 64-bit reader has already overflowed.
        if count > U64_MAX:
            raise MalformedHeaderError(file, f"the elements of shape {brief(shape)} overflow 64 bits", name)
    bits *= count
    if bits > U64_MAX:
        raise MalformedHeaderError(file, f"the bits of {dtype} {brief(shape)} overflow 64 bits", name)
    if bits % 8:
        raise MalformedHeaderError(
            file, f"{dtype} {brief(shape)} takes {bits:,} bits, not a whole number of bytes", name
        )
    return bits // 8


def brief(values: Sequence[int]) -> str:
    """Return a shape for an error message, abbreviated if it is long."""
    shown = ", ".join(_digits(value) for value in values[:_MAX_SHOWN])
    return f"[{shown}]" if len(values) <= _MAX_SHOWN else f"[{shown}, ...] ({len(values):,} dimensions)"


def _digits(value: int) -> str:
    """Return an integer for an error message; a long one is abbreviated to 8 digits and its length."""
    text = str(value)
    return text if len(text) <= _MAX_DIGITS_SHOWN else f"{text[:8]}...({len(text)} digits)"
