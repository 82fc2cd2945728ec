"""Parse strict JSON from an untrusted file and reject constructs that Python's ``json`` accepts.

Python's parser keeps the last of two equal keys, accepts ``NaN``, turns ``1e999`` into infinity, accepts lone
surrogates and recurses to the depth of the text. The grammar is RFC 8259; the further rules are those of
serde_json, the parser of the safetensors library, or stricter.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

from nemotron_fp8.errors import printable
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Callable


MAX_BYTES = 25_000_000
"""Size cap of one JSON text, in bytes."""
MAX_DEPTH = 64
"""Nesting cap; serde_json allows 127 levels, published headers and configs have fewer than 10."""
MAX_VALUES = 4_000_000
"""Cap on the values of one text. It bounds the memory of the parsed objects: ``[[],[],...]`` takes 20 times the
memory of its text. A header of ``MAX_BYTES`` with scalars only has 3.5 million values: 50 bytes and 7 values each.
"""
MAX_DIGITS = 300
"""Length cap of one number: up to this length every integer is finite as a double, which serde_json requires."""

_MARKS = b'"[]{},'
_NOT_MARKS = bytes(set(range(256)) - set(_MARKS))
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_BLOCK = 1 << 20
_PLAIN_LEVELS = 3
"""Levels that are counted without a loop over brackets: the object, a tensor, its shape."""
_SPACE = re.compile(r"[ \t\n\r]*")
_SYNTAX = {
    "Expecting value": "expected a value",
    "Expecting property name enclosed in double quotes": "expected a key",
    "Illegal trailing comma before end of object": "expected a key",
    "Expecting ':' delimiter": "expected ':'",
    "Expecting ',' delimiter": "expected ',' or '}' (in an array ',' or ']')",
    "Unterminated string starting at": "unterminated string",
    "Invalid control character at": "control character in a string",
}
"""Wording of common syntax errors, by the message of Python's parser."""


class _RejectedError(ValueError):
    """Violation of a rule of this module; its text is the problem for the caller's error."""


def load_object(
    data: bytes,
    file: str,
    error: Callable[[str, str], Exception],
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
) -> dict[str, Any]:
    """Parse one JSON object and reject everything that two parsers could read differently.

    Args:
        data: the whole text, UTF-8 without a byte order mark.
        file: name of the file in errors.
        error: creates the exception to raise from ``(file, problem)``; an error class with these arguments fits.
        max_bytes: reject a longer text, in bytes.
        max_depth: reject deeper nesting; the outermost object is level 1.
        max_values: reject more values (objects, arrays and scalars together).

    Returns:
        The object. Integers are ``int`` except ``-0``, which becomes the float that serde_json makes of it.

    Raises:
        Exception: the exception of ``error``, if the text is too long, not UTF-8, not JSON, not an object, nested
            too deep or of too many values, if an object has a duplicate key, if a number is NaN, infinite or over
            300 characters, or if a string contains half of a surrogate pair.
    """
    value = load_value(data, file, error, max_bytes=max_bytes, max_depth=max_depth, max_values=max_values)
    if type(value) is not dict:
        raise error(file, f"the top level is {kind(value)}, not an object")
    return value


def load_value(
    data: bytes,
    file: str,
    error: Callable[[str, str], Exception],
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
    surrogates: bool = False,
) -> Any:
    """Parse one JSON value like `load_object`.

    Args:
        data, file, error, max_bytes, max_depth, max_values: as in `load_object`.
        surrogates: accept half of a surrogate pair in a string.

    Raises:
        Exception: as `load_object`.
    """
    with guarded(lambda problem: error(file, problem)):
        try:
            return _parse(data, max_bytes, max_depth, max_values, surrogates)
        except _RejectedError as rejected:
            # The chain would carry the document (JSONDecodeError.doc), up to max_bytes of it, into every log.
            problem = str(rejected)
    raise error(file, problem) from None


def _parse(data: bytes, max_bytes: int, max_depth: int, max_values: int, surrogates: bool) -> Any:
    if len(data) > max_bytes:
        raise _RejectedError(f"{len(data):,} bytes of JSON; the limit is {max_bytes:,}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as bad:
        raise _RejectedError(f"not UTF-8: byte {bad.start:,} is 0x{data[bad.start]:02x}") from None
    if text.startswith("\ufeff"):
        raise _RejectedError("starts with a byte order mark, which JSON forbids; save the file without it")
    _check_size(data, max_depth, max_values)
    decoder = _SMALL_INTEGERS if _only_small_integers(data) else _ANY_NUMBERS
    try:
        value, end = decoder.raw_decode(text, _after_space(text, 0))
    except json.JSONDecodeError as bad:
        raise _RejectedError(f"not JSON: {_SYNTAX.get(bad.msg, bad.msg)} at character {bad.pos:,}") from None
    except RecursionError:  # only if the caller has used up the stack
        raise _RejectedError("nested too deep for the remaining stack") from None
    end = _after_space(text, end)
    if end != len(text):
        raise _RejectedError(f"not JSON: more text follows the value, from character {end:,} on")
    if not surrogates and "\\u" in text:  # UTF-8 cannot encode a surrogate: only an escape yields one
        _check_surrogates(value)
    return value


def _after_space(text: str, at: int) -> int:
    """Return the position of the first character at or after ``at`` that is not white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _check_size(data: bytes, max_depth: int, max_values: int) -> None:
    """Check depth and count before parsing, so that neither the stack nor memory depends on the text.

    Both are exact on any prefix that a parser would accept, and a parser recurses no further.
    """
    marks = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_MARKS)
    # A value has at most one key and is itself at most one string: four quotes.
    if marks.count(b'"') > 4 * max_values:
        raise _RejectedError(f"over the limit of {max_values:,} values")
    # Two adjacent quotes do not change whether the text after them is inside a string.
    marks = _outside_strings(marks.replace(b'""', b""))
    brackets = marks.translate(_BRACKETS, b",")
    if 1 + len(marks) - brackets.count(b"]") > max_values:
        raise _RejectedError(f"over the limit of {max_values:,} values")
    # Each round removes the innermost pairs, one level; a usual header has no bracket left for the loop.
    inner = brackets
    for _ in range(min(_PLAIN_LEVELS, max_depth)):
        inner = inner.replace(b"[]", b"")
    if not inner:
        return
    depth = 0
    for mark in brackets:
        if mark == ord("["):
            depth += 1
            if depth > max_depth:
                raise _RejectedError(f"nested deeper than {max_depth} levels, which is the limit")
        else:
            depth -= 1


def _outside_strings(marks: bytes) -> bytes:
    """Return the brackets and commas outside of strings."""
    parts: list[bytes] = []
    inside = 0
    for at in range(0, len(marks), _BLOCK):
        pieces = marks[at : at + _BLOCK].split(b'"')
        parts += pieces[inside::2]
        inside = (inside + len(pieces) - 1) % 2
    return b"".join(parts)


def _check_surrogates(value: object) -> None:
    """Reject half of a surrogate pair anywhere in a parsed value, whose depth is already capped."""
    if type(value) is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _RejectedError(f"the string {printable(value)} contains half of a surrogate pair") from None
    elif type(value) is dict:
        for key, item in value.items():
            _check_surrogates(key)
            _check_surrogates(item)
    elif type(value) is list:
        for item in value:
            _check_surrogates(item)


def kind(value: object) -> str:
    """Return the JSON name of a parsed value (``"a string"``, ``"null"``) for an error message."""
    return _KINDS.get(type(value), type(value).__name__)


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "an integer",
    float: "a number with a fraction, an exponent or -0",
    bool: "a boolean",
    type(None): "null",
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of an object as a dict; reject a duplicate key."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RejectedError(f"duplicate key {printable(key)} in one object")
            seen.add(key)
    return made


def _integer(text: str) -> int | float:
    if len(text) > MAX_DIGITS:
        raise _RejectedError(f"an integer of {len(text):,} characters; the limit is {MAX_DIGITS}")
    return int(text) if text != "-0" else -0.0


def _number(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise _RejectedError(f"a number of {len(text):,} characters; the limit is {MAX_DIGITS}")
    value = float(text)
    if math.isinf(value):
        raise _RejectedError(f"the number {printable(text, 40)} is too large for a double")
    return value


def _constant(text: str) -> NoReturn:
    raise _RejectedError(f"{text} is not valid JSON")


def _only_small_integers(data: bytes) -> bool:
    """Return True if `int` can parse every integer of a text: none is -0, and none exceeds the cap of digits."""
    return b"-0" not in data and _LONG_NUMBER not in data.translate(_DIGITS_AS_ZERO)


_DIGITS_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER = b"0" * MAX_DIGITS
_ANY_NUMBERS = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_constant
)
_SMALL_INTEGERS = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_number, parse_constant=_constant)
"""Decoder with the same rules, but without a Python call for each integer: a fifth less time for a header."""
