"""The header as every writer writes it, read with one regular expression instead of a JSON parser.

Compact JSON, names in plain ASCII, fields in the usual order: four times faster for 100,000 tensors. Whatever
looks different, or breaks a rule, is left to the full reader, which knows how to say what is wrong.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.checkpoint.header_rules import METADATA_KEY, check_nbytes
from nemotron_fp8.errors import MalformedHeaderError

_INTEGER = r"(?:0|[1-9][0-9]{0,17})"
_TEXT = r'"([ !#-\[\]-~]*)"'
# No more repetitions than a usual header has: the expression's stack takes some 240 bytes for each.
_TENSOR = re.compile(
    r'"([ !#-\[\]-~]+)":\{"dtype":"([A-Z0-9_]+)",'
    rf'"shape":\[((?:{_INTEGER}(?:,{_INTEGER}){{0,63}})?)\],'
    rf'"data_offsets":\[({_INTEGER}),({_INTEGER})\]\}}([,}}])'
)
_METADATA = re.compile(rf'\{{"{METADATA_KEY}":\{{((?:{_TEXT}:{_TEXT}(?:,(?="))?){{0,1000}})\}}([,}}])')
_PAIR = re.compile(rf"{_TEXT}:{_TEXT}")
_VALUES_PER_TENSOR = 8


class Scanned(NamedTuple):
    """A header in the usual form: fields of its tensors as they follow in the JSON, pairs of its metadata."""

    tensors: list[tuple[str, str, tuple[int, ...], int, int]]
    metadata: tuple[tuple[str, str], ...] | None


def scan(text: bytes, max_tensors: int, max_values: int) -> Scanned | None:
    """Read a header in the usual form, every rule for a single tensor checked; None where it is in any other."""
    if not text.isascii() or not text.startswith(b'{"'):
        return None
    line = text.decode("ascii").rstrip(" ")
    metadata: tuple[tuple[str, str], ...] | None = None
    at, mark = 1, ","
    if found := _METADATA.match(line):
        pairs = _PAIR.findall(found.group(1))
        metadata = tuple(sorted(pairs))
        at, mark = found.end(), line[found.end() - 1]
        if len(dict(pairs)) != len(pairs):
            return None
    shapes: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}
    tensors: list[tuple[str, str, tuple[int, ...], int, int]] = []
    while mark == ",":
        tensor = _TENSOR.match(line, at)
        if tensor is None:
            return None
        name, dtype, shape_text, start_text, end_text, mark = tensor.groups()
        key = (dtype, shape_text)
        known = shapes.get(key)
        if known is None:
            known = _shape(dtype, shape_text)
            if known is None:
                return None
            shapes[key] = known
        start, end = int(start_text), int(end_text)
        if end - start != known[1] or name == METADATA_KEY:
            return None
        tensors.append((name, dtype, known[0], start, end))
        at = tensor.end()
    count = len(tensors)
    if at != len(line) or count > max_tensors or count * _VALUES_PER_TENSOR > max_values:
        return None
    return Scanned(tensors, metadata) if len({tensor[0] for tensor in tensors}) == count else None


def _shape(dtype: str, text: str) -> tuple[tuple[int, ...], int] | None:
    """A shape and its bytes; None where the dtype or the shape breaks a rule."""
    if dtype not in BITS:
        return None
    shape = tuple(map(int, text.split(","))) if text else ()
    try:
        return shape, check_nbytes("", dtype, shape, "")
    except MalformedHeaderError:
        return None
