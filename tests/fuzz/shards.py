"""Mutations of shards: of header and data apart, and of tensors, so that the file stays well-formed."""

from __future__ import annotations

import json
import struct
from math import prod
from typing import TYPE_CHECKING, Any

from tests.fuzz.json_mutations import Members, Raw, encoded, mutate_json
from tests.fuzz.values import FLOATS, integer, is_big, many, mutate_bytes, pick, text

if TYPE_CHECKING:
    from random import Random

HEADER_KEYS = ("__metadata__", "dtype", "shape", "data_offsets", "model.layers.0.self_attn.q_proj.weight", "x")
DTYPES = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "I16", "U16", "F16", "BF16", "I32", "U32",
    "F32", "C64", "F64", "I64", "U64", "bf16", "torch.bfloat16", "",
)  # fmt: skip
BYTES = {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "F32": 4,
    "I32": 4,
    "F64": 8,
    "I64": 8,
    "C64": 8,
}  # fmt: skip
NUMBERS = (0.0, -1.0, float("nan"), float("inf"), float("-inf"), 3e38, *FLOATS[:9])

Tensor = tuple[str, list[int], bytes]
"""Dtype, shape, bytes."""


def mutate_shard(chance: Random, data: bytes) -> bytes:
    """Return a mutation of a shard, which is rarely well-formed."""
    size = struct.unpack("<Q", data[:8])[0]
    head, body = data[8 : 8 + size], data[8 + size :]

    def change(tree: Any) -> None:
        tensors = [i for i, (key, _) in enumerate(tree) if key != "__metadata__"]
        _redescribe(chance, tree, pick(chance, tensors), len(body))

    kind = chance.random()
    if kind < 0.75:
        head = mutate_json(chance, head, HEADER_KEYS, change)
        if chance.random() < 0.2:
            body += bytes(pick(chance, (1, 8, 64, 5000)))
        return struct.pack("<Q", len(head)) + head + body
    if kind < 0.85:
        return struct.pack("<Q", integer(chance) & ((1 << 64) - 1)) + head + body
    if kind < 0.92:
        return data[:8] + mutate_bytes(chance, head) + body
    if kind < 0.96:
        return data[: 8 + size] + mutate_bytes(chance, body)
    return pick(chance, (b"", data[:7], data[:8], data[: 8 + size], b"\x80\x04", b"PK\x03\x04", bytes(100), data * 2))


def _redescribe(chance: Random, tree: Any, at: int, size: int) -> None:
    """Change dtype, shape and place of a tensor in a header, so that they agree or nearly do."""
    name, fields = tree[at]
    shape = pick(
        chance, ([], [0], [1], [size], [size // 2], [1] * 8, [1] * 70, [1] * 5000, [0, 2**63], [2**32, 2**32], [2**31,
        2**31, 0], [integer(chance)], [integer(chance), integer(chance)], [-1], [1.0, 2], [True], [2**16] * 4, ),
    )  # fmt: skip
    start = pick(chance, (0, 0, size, size - 1, integer(chance)))
    offsets = pick(
        chance, ([start, size], [0, size], [start, start], [size, 0], [start], [0, 1, 2], [start, integer(chance)])
    )
    changes = {"dtype": pick(chance, DTYPES), "shape": shape, "data_offsets": offsets}
    both = ("dtype", "shape")
    for key in pick(chance, (("dtype",), ("shape",), ("data_offsets",), both, (*both, "data_offsets"))):
        fields[:] = [(known, changes[key] if known == key else value) for known, value in fields]
    if chance.random() < 0.2:
        tree[at] = (text(chance), fields)
    if chance.random() < 0.05 and not isinstance(name, Raw):
        empty = Members([("dtype", "F32"), ("shape", [0]), ("data_offsets", [0, 0])])
        tree.extend((f"{name[:20]}{i}", empty) for i in range(20_000 if is_big(chance) else many(chance)))


def tensors_of(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a good shard, and its metadata."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, fields in header.items():
        start, end = fields["data_offsets"]
        tensors[name] = (fields["dtype"], fields["shape"], body[start:end])
    return tensors, metadata


def shard_of(tensors: dict[str, Tensor], metadata: object) -> bytes:
    """Return a well-formed shard."""
    tree: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    parts, at = [], 0
    for name, (dtype, shape, values) in tensors.items():
        tree[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(values)]}
        parts.append(values)
        at += len(values)
    head = encoded(json.dumps(tree, ensure_ascii=False))
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(parts)


def change_tensors(chance: Random, data: bytes) -> bytes:
    """Return a well-formed shard whose tensors differ, first of all FP8 tensors and scales."""
    tensors, metadata = tensors_of(data)
    for _ in range(pick(chance, (1, 1, 2))):
        chosen = [name for name in tensors if "scale" in name or tensors[name][0] == "F8_E4M3"]
        if not chosen or chance.random() < 0.15:
            chosen = list(tensors)
        if not chosen:
            break
        name = pick(chance, chosen)
        kind = chance.randrange(8)
        if kind < 4:
            tensors[name] = another(chance, *tensors[name])
        elif kind == 4:
            del tensors[name]
        elif kind == 5:
            stem = name.removesuffix("_scale")
            names = (f"{stem}_scale_inv", f"{stem}_scale", name.replace("weight", "input_scale"), text(chance))
            tensors[pick(chance, names)] = tensors.pop(name)
        elif kind == 6:
            other = pick(chance, ("_scale", "_scale_inv", "_zero_point", "_shape", "_packed", text(chance)))
            tensors[name + other] = another(chance, *tensors[name])
        else:
            dtype, shape, values = tensors[name]
            tensors[name] = (dtype, shape, mutate_bytes(chance, values).ljust(len(values), b"\xff")[: len(values)])
    return shard_of(tensors, metadata)


def another(chance: Random, dtype: str, shape: list[int], values: bytes) -> Tensor:
    """Return another tensor, of bytes that fit."""
    kind, count = chance.randrange(6), prod(shape)
    if kind == 0:
        shapes = (
            [],
            [1],
            [count],
            [1, count],
            [count, 1],
            [1, 1, count],
            [0],
            [0, 4],
            [*shape, 1],
            [2, 2],
            shape[::-1],
        )
        shape = pick(chance, shapes)
    elif kind == 1:
        dtype = pick(chance, tuple(BYTES))
    elif kind == 2:
        dtype, shape = pick(chance, tuple(BYTES)), pick(chance, ([], [1], [2], [3, 3], [1, 1, 1, 1], [0]))
    elif dtype in ("F32", "F64"):
        form = "<f" if dtype == "F32" else "<d"
        values = b"".join(struct.pack(form, pick(chance, NUMBERS)) for _ in range(min(count, 2000)))
    else:
        values = bytes([pick(chance, (0, 0x7F, 0x80, 0xFF, 0x7E, 1))]) * len(values)
    wanted = BYTES.get(dtype, 2) * prod(shape)
    return dtype, shape, (values * (wanted // max(len(values), 1) + 1))[:wanted].ljust(wanted, b"\0")
