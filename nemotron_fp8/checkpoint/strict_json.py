"""Strict JSON from an untrusted file: what Python's ``json`` lets through and a checkpoint must not contain.

Python's parser keeps the last of two equal keys, takes ``NaN``, turns ``1e999`` into infinity, passes lone
surrogates and recurses as deep as the text says. The grammar is RFC 8259; the further rules are those of
serde_json, which the safetensors library reads with, or stricter.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

from nemotron_fp8.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


MAX_BYTES = 25_000_000
"""Size cap of one JSON text, in bytes."""
MAX_DEPTH = 64
"""Nesting cap; serde_json stops at 127, real headers and configs stay under 10."""
MAX_VALUES = 4_000_000
"""Cap on the values of one text. It bounds the memory of the parsed objects, as ``[[],[],...]`` takes 20
times its text. The scalars of a header of ``MAX_BYTES``, 50 bytes and 7 values each, come to 3.5 million."""
MAX_DIGITS = 300
"""Length cap of one number: up to here every integer is finite as a double, which serde_json requires."""

_KEPT = b'"[]{},'
_NOT_KEPT = bytes(set(range(256)) - set(_KEPT))
_BLOCK = 1 << 20
_OPEN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")
_CLOSE = re.compile(r"(})[ \t\n\r]*")


class _RejectedError(ValueError):
    """A rule of this module is broken; carries the sentence for the caller's error."""


def load_object(
    data: bytes,
    file: str,
    error: Callable[[str, str], Exception],
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
) -> dict[str, Any]:
    """Parse one JSON object, refusing everything that two readers could understand differently.

    Args:
        data: the whole text, UTF-8 without a byte order mark.
        file: the name to put into errors.
        error: makes the exception to raise from ``(file, problem)``; an error class that takes both fits.
        max_bytes: refuse a longer text, in bytes.
        max_depth: refuse deeper nesting; the outermost object is level 1.
        max_values: refuse more values (objects, arrays and scalars together).

    Returns:
        The object. Integers are ``int`` except ``-0``, which is the float that serde_json makes of it.

    Raises:
        Exception: what ``error`` makes, when the text is too long, not UTF-8, not JSON, not an object, nested
            too deep or of too many values, when a key stands twice in one object, when a number is NaN,
            infinite or over 300 characters, or when a string holds half of a surrogate pair.
    """
    return dict(iter_object(data, file, error, max_bytes=max_bytes, max_depth=max_depth, max_values=max_values))


def iter_object(
    data: bytes,
    file: str,
    error: Callable[[str, str], Exception],
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
) -> Iterator[tuple[str, Any]]:
    """Parse one JSON object member by member, so that only what the caller keeps of each stays in memory.

    Arguments, values and errors are those of `load_object`. The text is known to be valid only once the
    iterator is exhausted; each key comes once.
    """
    try:
        yield from _members(data, max_bytes, max_depth, max_values)
    except _RejectedError as rejected:
        # The chain would carry the document (JSONDecodeError.doc), up to max_bytes of it, into every log.
        raise error(file, str(rejected)) from None


def _members(data: bytes, max_bytes: int, max_depth: int, max_values: int) -> Iterator[tuple[str, Any]]:
    if len(data) > max_bytes:
        raise _RejectedError(f"{len(data):,} bytes of JSON, the limit is {max_bytes:,}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as bad:
        raise _RejectedError(f"not UTF-8: byte {bad.start:,} is 0x{data[bad.start]:02x}") from None
    if text.startswith("\ufeff"):
        raise _RejectedError("starts with a byte order mark, which JSON does not allow")
    _check_size(data, max_depth, max_values)
    opened = _OPEN.match(text)
    if opened is None:
        value, _ = _scan(text, len(text) - len(text.lstrip(" \t\n\r")))
        raise _RejectedError(f"the top level is {kind(value)}, not an object")
    escapes = "\\u" in text  # UTF-8 cannot hold a surrogate, so only an escape can bring one
    seen: set[str] = set()
    at = opened.end()
    following = _CLOSE.match(text, at)
    while following is None or following[1] == ",":
        if text[at : at + 1] != '"':
            raise _RejectedError(f"not JSON: a key is due at character {at:,}")
        key, at = _scan(text, at)
        colon = _COLON.match(text, at)
        if colon is None:
            raise _RejectedError(f"not JSON: ':' is due at character {at:,}")
        value, at = _scan(text, colon.end())
        if escapes:
            _check_surrogates(key)
            _check_surrogates(value)
        if key in seen:
            raise _RejectedError(f"the key {printable(key)} stands twice in one object")
        seen.add(key)
        yield key, value
        following = _NEXT.match(text, at)
        if following is None:
            raise _RejectedError(f"not JSON: ',' or '}}' is due at character {at:,}")
        at = following.end()
    if following.end() != len(text):
        raise _RejectedError(f"not JSON: the object ends before character {following.end():,}, more text follows")


def _scan(text: str, at: int) -> tuple[Any, int]:
    """Parse the value that starts at ``at``; the value and the position after it."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as bad:
        raise _RejectedError(f"not JSON: {bad.msg} at character {bad.pos:,}") from None
    except RecursionError:  # reached only by a caller that has used up the stack itself
        raise _RejectedError("nested too deep for the stack that is left") from None


def _check_size(data: bytes, max_depth: int, max_values: int) -> None:
    """Refuse by depth and count before parsing, so that neither the stack nor memory follows the text.

    Exact on any prefix that a parser would accept, which is as far as a parser recurses.
    """
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_KEPT)
    # A value has at most one key and is itself at most one string: four quotes.
    if plain.count(b'"') > 4 * max_values:
        raise _RejectedError(f"more than {max_values:,} values, which is the limit")
    depth, values, inside = 0, 1, 0
    for at in range(0, len(plain), _BLOCK):
        pieces = plain[at : at + _BLOCK].split(b'"')
        marks = b"".join(pieces[inside::2])
        inside = (inside + len(pieces) - 1) % 2
        brackets = marks.translate(None, b",")
        values += len(marks) - brackets.count(b"]") - brackets.count(b"}")
        if values > max_values:
            raise _RejectedError(f"more than {max_values:,} values, which is the limit")
        for mark in brackets:
            if mark in b"[{":
                depth += 1
                if depth > max_depth:
                    raise _RejectedError(f"nested deeper than {max_depth} levels, which is the limit")
            else:
                depth -= 1


def _check_surrogates(value: object) -> None:
    """Refuse half of a surrogate pair anywhere in a parsed value (its depth is capped already)."""
    if type(value) is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _RejectedError(f"the string {printable(value)} holds half of a surrogate pair") from None
    elif type(value) is dict:
        for key, item in value.items():
            _check_surrogates(key)
            _check_surrogates(item)
    elif type(value) is list:
        for item in value:
            _check_surrogates(item)


def kind(value: object) -> str:
    """What JSON calls a parsed value: ``"a string"``, ``"null"``..., for an error message."""
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
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RejectedError(f"the key {printable(key)} stands twice in one object")
            seen.add(key)
    return made


def _integer(text: str) -> int | float:
    if len(text) > MAX_DIGITS:
        raise _RejectedError(f"an integer of {len(text):,} characters, the limit is {MAX_DIGITS}")
    return int(text) if text != "-0" else -0.0


def _number(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise _RejectedError(f"a number of {len(text):,} characters, the limit is {MAX_DIGITS}")
    value = float(text)
    if math.isinf(value):
        raise _RejectedError(f"the number {printable(text, 40)} is too large for a double")
    return value


def _constant(text: str) -> NoReturn:
    raise _RejectedError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_constant
)


def compact_json(value: object) -> bytes:
    """Serialize a value as ASCII JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii")


_CONTAINERS = (dict, list, tuple)


def pretty_json(value: Mapping[str, object]) -> bytes:
    """Serialize an object as UTF-8 JSON, indented by two spaces, as transformers writes its files."""
    return (_indented(value, "\n") + "\n").encode("utf-8", "surrogatepass")


def _indented(value: object, newline: str) -> str:
    """Return the text of ``json.dumps(indent=2)``, whose encoder in Python takes several times as long."""
    if not isinstance(value, _CONTAINERS) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner, (begin, end) = f"{newline}  ", "{}" if isinstance(value, dict) else "[]"
    if not any(isinstance(item, _CONTAINERS) for item in (value.values() if isinstance(value, dict) else value)):
        body = json.dumps(value, ensure_ascii=False, separators=(f",{inner}", ": "))[1:-1]
    elif isinstance(value, dict):
        body = f",{inner}".join(f"{json.dumps(k, ensure_ascii=False)}: {_indented(v, inner)}" for k, v in value.items())
    else:
        body = f",{inner}".join(_indented(item, inner) for item in value)
    return f"{begin}{inner}{body}{newline}{end}"
