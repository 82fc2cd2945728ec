"""Mutations of pickles by opcode: dropped, repeated, moved, replaced; values that cost a careless reader much."""

from __future__ import annotations

import pickletools
import struct
from typing import TYPE_CHECKING

from tests.fuzz.values import INTEGERS, is_big, many, mutate_bytes, pick, text

if TYPE_CHECKING:
    from random import Random

MEMO = 1 << 20
"""First number of the memo that the bombs use, beyond those of a good pickle."""
GLOBALS = (
    "os system", "builtins eval", "builtins getattr", "torch load", "torch Size", "torch bfloat16", "torch float32",
    "torch int64", "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch BFloat16Storage",
    "torch FloatStorage", "a b", "a.b c.d", "torch.distributed.checkpoint.metadata TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata Metadata", "torch.distributed.checkpoint.metadata BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata MetadataIndex", "torch.distributed.checkpoint.metadata ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata TensorProperties", "torch.distributed.checkpoint.filesystem _StorageInfo",
    "torch.distributed.checkpoint.metadata MEM_FORMAT_ENCODING",
)  # fmt: skip
SINGLE = (
    b"(", b")", b"0", b"1", b"2", b"N", b"R", b"b", b"s", b"u", b"a", b"e", b"t", b"l", b"d", b"]", b"}", b"\x81",
    b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"Q", b"o", b".",
    b"\x97", b"\x98",
)  # fmt: skip


def string(value: str) -> bytes:
    """Return the opcode of a string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """Return the opcode of an integer, in the form that pickles have."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return (b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))) + data


def put(memo: int) -> bytes:
    """Store the top of the stack."""
    return b"r" + struct.pack("<I", memo)


def get(memo: int) -> bytes:
    """Fetch what was stored."""
    return b"j" + struct.pack("<I", memo)


def value(chance: Random) -> bytes:
    """Return a program that leaves one value on the stack."""
    kind = chance.randrange(12)
    if kind < 3:
        return number(pick(chance, INTEGERS))
    if kind < 5:
        return string(text(chance))
    if kind < 7:
        return pick(chance, (b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"G" + struct.pack(">d", float("nan"))))
    if kind < 8:
        module, name = pick(chance, GLOBALS).split(" ")
        if chance.random() < 0.3:
            return f"c{module}\n{name}\n".encode()
        return string(module) + string(name) + b"\x93"
    if kind < 9:
        module, name = pick(chance, GLOBALS).split(" ")
        return f"c{module}\n{name}\n".encode() + pick(chance, (b")R", b")\x81", b"}R", b")R}b", b"N\x85R", b")}\x92"))
    if kind < 10:
        return (
            number(pick(chance, (1, 2, 3, 4)))
            + number(pick(chance, INTEGERS))
            + pick(chance, (b"\x86", b"\x86\x85", b"\x86\x86"))
        )
    return bomb(chance)


def bomb(chance: Random) -> bytes:
    """Return a value that is small in the pickle, and large or deep for whoever prints, compares or copies it."""
    levels = pick(chance, (5, 20, 30, 100, 1000))
    deep = pick(chance, (1000, 5000, 100_000)) if is_big(chance) else pick(chance, (50, 500, 1500))
    count = many(chance) if not is_big(chance) else 200_000
    shared = MEMO + 1
    begin = string("x" * 100) + put(MEMO)
    record = f"c{pick(chance, GLOBALS[-6:]).replace(' ', chr(10))}\n".encode() + b")R"
    fields = b"}(" + b"".join(string(f"k{i}") + b"N" for i in range(count)) + b"ub"
    return pick(
        chance,
        (
            lambda: begin + b"".join(get(MEMO + i) + b"\x86" + put(MEMO + i + 1) for i in range(levels)),
            lambda: (
                begin + b"".join(b"](" + get(MEMO + i) * 2 + b"e" + put(MEMO + i + 1) + b"\x86" for i in range(levels))
            ),
            lambda: b"]" + put(MEMO) + get(MEMO) + b"a",
            lambda: b"}" + put(MEMO) + string("a") + get(MEMO) + b"s",
            lambda: b"]" + b"\x85" * deep,
            lambda: b")" + b"\x85" * deep,
            lambda: b"]" * deep + b"a" * (deep - 1),
            lambda: number(1 << pick(chance, (100, 2000, 100_000))),
            lambda: b"\x8a\xff" + b"\x7f" * 255,
            lambda: string("x" * (1 << 21 if is_big(chance) else 10_000)),
            lambda: string("\x1b[2J\u202e\n" * 50),
            lambda: b"(" + number(1) * count + b"t",
            lambda: b"](" + number(1) * count + b"e",
            lambda: record + fields + put(shared) + b"](" + get(shared) * min(count, 20_000) + b"e\x86",
            lambda: b"X" + struct.pack("<I", pick(chance, (1 << 31, (1 << 32) - 1, 1 << 20))) + b"abc",
            lambda: b"\x8d" + struct.pack("<Q", pick(chance, (1 << 62, 1 << 33))) + b"abc",
            lambda: b"I" + b"9" * pick(chance, (10, 4400, 100_000)) + b"\n",
            lambda: b"L" + b"9" * pick(chance, (10, 4400, 100_000)) + b"L\n",
            lambda: b"F1e999\n",
            lambda: b"V\\ud800\n",
            lambda: b"S'" + b"a" * count + b"'\n",
        ),
    )()


def mutate_pickle(chance: Random, data: bytes) -> bytes:
    """Return a mutation of a good pickle of protocol 2 or later."""
    kind = chance.random()
    if kind < 0.08:
        return mutate_bytes(chance, data)
    if kind < 0.12:
        return b"\x80\x02" + value(chance) + b"."
    try:
        parts = parts_of(data)
    except ValueError:  # it is a mutation already
        return mutate_bytes(chance, data)
    for _ in range(pick(chance, (1, 1, 1, 2, 4))):
        if len(parts) < 2:
            break
        at = chance.randrange(1, len(parts))
        name, raw = parts[at]
        kind = chance.random()
        if kind < 0.45:
            # In place of a value, so that the rest of the program keeps its meaning.
            values = [
                i
                for i, (opcode, _) in enumerate(parts)
                if opcode.startswith(("BININT", "LONG1", "BINUNICODE", "SHORT_BINU"))
            ]
            at = pick(chance, values) if values else at
            parts[at] = ("NEW", value(chance))
        elif kind < 0.55:
            del parts[at]
        elif kind < 0.63:
            parts.insert(at, parts[at])
        elif kind < 0.7:
            other = chance.randrange(1, len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind < 0.8:
            parts.insert(at, ("NEW", pick(chance, SINGLE)))
        elif kind < 0.87:
            parts[at] = ("NEW", pick(chance, SINGLE))
        elif kind < 0.93:
            parts.insert(at, ("NEW", value(chance) + pick(chance, (b"0", b"", b"\x86"))))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            parts.insert(at, ("NEW", value(chance) * pick(chance, (1, 2, 2, 2, many(chance)))))
        else:
            parts[at] = ("NEW", mutate_bytes(chance, raw))
    return b"".join(raw for _, raw in parts)


def parts_of(data: bytes) -> list[tuple[str, bytes]]:
    """Return the opcodes of a pickle, each with its bytes; frames are left out."""
    found = [(opcode.name, at or 0) for opcode, _, at in pickletools.genops(data)]
    ends = [at for _, at in found[1:]] + [len(data)]
    return [(name, data[at:end]) for (name, at), end in zip(found, ends, strict=True) if name != "FRAME"]
