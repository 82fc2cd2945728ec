"""What the safetensors format demands of a name, a dtype, a shape and a metadata map, read or written.

Each check takes the file's name for the error and raises ``MalformedHeaderError`` (or its
``UnknownDtypeError``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.dtypes import BITS, RANK
from nemotron_fp8.checkpoint.strict_json import kind
from nemotron_fp8.errors import MalformedHeaderError, UnknownDtypeError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


METADATA_KEY = "__metadata__"
"""The header's own key, which no tensor can have."""

U64_MAX = 2**64 - 1
_MAX_SHOWN = 8
_MAX_DIGITS_SHOWN = 24


def check_metadata(value: object, file: str) -> tuple[tuple[str, str], ...] | None:
    """The pairs of ``__metadata__`` sorted by key, every key and value a string; ``None`` stays ``None``."""
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
    """A tensor's name: a string of valid UTF-8, not empty, without NUL, not the header's own key."""
    if type(name) is not str:
        raise MalformedHeaderError(file, f"a tensor's name is {kind(name)}, not a string")
    if not name:
        raise MalformedHeaderError(file, "a tensor's name is empty", name)
    if "\0" in name:
        raise MalformedHeaderError(file, "the name holds a NUL character", name)
    if name == METADATA_KEY:
        raise MalformedHeaderError(file, "this name is the header's own and no tensor can have it", name)
    _check_text(name, file, "a tensor's name")


def _check_text(text: object, file: str, what: str) -> None:
    if type(text) is not str:
        raise MalformedHeaderError(file, f"{what} is {kind(text)}, not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise MalformedHeaderError(file, f"{what} {printable(text)} holds half of a surrogate pair") from None


def check_dtype(name: str, dtype: object, file: str) -> int:
    """A dtype's position in a written file (``dtypes.RANK``)."""
    if type(dtype) is not str:
        raise MalformedHeaderError(file, f"dtype is {kind(dtype)}, not a string", name)
    rank = RANK.get(dtype)
    if rank is None:
        raise UnknownDtypeError(file, dtype, name)
    return rank


def check_integers(values: Iterable[object], what: str, name: str, file: str) -> None:
    """Integers that an unsigned 64-bit reader takes; by exact type, as ``True`` is an instance of ``int``."""
    for value in values:
        if type(value) is not int:
            raise MalformedHeaderError(file, f"{what} holds {kind(value)}, not only integers", name)
        if not 0 <= value <= U64_MAX:
            problem = "is negative" if value < 0 else "is over 64 bits"
            raise MalformedHeaderError(file, f"{what} holds {brief([value])}, which {problem}", name)


def check_nbytes(name: str, dtype: str, shape: Sequence[int], file: str) -> int:
    """Bytes of a dense tensor, refusing what 64-bit arithmetic (the format's own) would wrap."""
    check_integers(shape, "shape", name, file)
    bits = BITS[dtype]
    count = 1
    for dimension in shape:
        count *= dimension
        # At each step: a later dimension of 0 must not hide that a 64-bit reader has overflowed by then.
        if count > U64_MAX:
            raise MalformedHeaderError(file, f"the elements of shape {brief(shape)} overflow 64 bits", name)
    bits *= count
    if bits > U64_MAX:
        raise MalformedHeaderError(file, f"the bits of {dtype} {brief(shape)} overflow 64 bits", name)
    if bits % 8:
        raise MalformedHeaderError(file, f"{dtype} {brief(shape)} is {bits:,} bits, not whole bytes", name)
    return bits // 8


def brief(values: Sequence[int]) -> str:
    """A shape for an error message, short however long it is."""
    shown = ", ".join(_digits(value) for value in values[:_MAX_SHOWN])
    return f"[{shown}]" if len(values) <= _MAX_SHOWN else f"[{shown}, ...] ({len(values):,} dimensions)"


def _digits(value: int) -> str:
    """An integer for an error message; one of hundreds of digits by its length only."""
    text = str(value)
    return text if len(text) <= _MAX_DIGITS_SHOWN else f"{text[:8]}...({len(text)} digits)"
