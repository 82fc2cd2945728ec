"""Write JSON: compact for journals, indented as transformers writes its files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def compact_json(value: object) -> bytes:
    """Serialize a value as ASCII JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def same_json(one: object, other: object) -> bool:
    """Return True if two parsed values are the same JSON: types count (1, 1.0 and true differ)."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return one == other


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
