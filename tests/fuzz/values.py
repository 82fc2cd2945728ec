"""Hostile values that several formats share, and mutations of plain bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

T = TypeVar("T")

BIG_SHARE = 0.03
"""Share of inputs that hold some megabytes."""
TEXTS = (
    "", " ", "\0", "a\0b", "\n", "a\nb", "\r", "\t", "\x1b[2J", "\x7f", "\x9b31m", "\u202e", "\u2028", "\u2066",
    "\u200f", "\ufeff", "\ufffe", "\ufffd", "é", "e\u0301", "日本", "\U0001f600", "\U0010ffff", "x" * 300, "x" * 5000,
    "x" * 30_000, ".", "..", "/", "//", "../x", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "~", "$HOME",
    "C:\\x", "a\\b", "CON", "*", "?", "[", "(", "(?P<", "a{99999}", "(a+)+$", "^", "$", ".*", "%s%n", "{0}", "{}",
    "`x`", "$(x)", "<script>alert(1)</script>", "<!-- x -->", "-->", "&lt;", "|", "a|b", "'", '"', "\\", "null", "true",
    "NaN", "Infinity", "nan", "inf", "-inf", "0", "-1", "1e999", "0x10", "1_000", "9" * 300, "9" * 6000, "1.5", "model",
    "model.safetensors", "config.json", "README.md", "nemotron_fp8.json", "model-00001-of-00002.safetensors",
    "model-99999-of-99999.safetensors", "model-00001-of-99999999999999999999.safetensors", "owner/name", "hf://a/b",
    "F8_E4M3", "BF16", "F32", "I64", "F4", "weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight",
    "model.layers.99999999999999999999.mlp.up_proj.weight", "error: x", "Traceback (most recent call last)x"[:9],
)  # fmt: skip
INTEGERS = (
    0, 1, -1, 2, 3, 7, 8, 15, 16, 17, 127, 128, 255, 256, 1000, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**40, 2**48, 2**52, 2**53, 2**53 + 1, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**100, -(2**31), -(2**63),
    -(2**64), 10**18, 10**299, 10**300, -(10**299),
)  # fmt: skip
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-320, 1e-45, 1e15, 1e16, 1e22, 1e38, 1e39, 1e300, 1.7976931348623157e308)
BYTES = (0, 1, 0x0A, 0x22, 0x28, 0x2E, 0x5B, 0x7F, 0x80, 0x81, 0xC0, 0xED, 0xEF, 0xFE, 0xFF)


def pick(chance: Random, values: Sequence[T]) -> T:
    """Return one of the values."""
    return values[chance.randrange(len(values))]


def is_big(chance: Random) -> bool:
    """Return True for the share of inputs that are big."""
    return chance.random() < BIG_SHARE


def many(chance: Random) -> int:
    """Return a number of repetitions: mostly small, sometimes thousands."""
    return pick(chance, (2, 3, 10, 50, 100, 1000, 5000))


def text(chance: Random) -> str:
    """Return a hostile text without halves of surrogate pairs."""
    if is_big(chance):
        return pick(chance, ("A", "é", "\U0001f600", "\n", " ", "\\", '"', "../", "\u202e")) * (1 << 19)
    found = pick(chance, TEXTS)
    return found if chance.random() < 0.8 else found + pick(chance, TEXTS)


def integer(chance: Random) -> int:
    """Return an integer at the edge of something."""
    kind = chance.random()
    if kind < 0.8:
        return pick(chance, INTEGERS)
    return chance.randrange(-300, 300) if kind < 0.95 else chance.getrandbits(pick(chance, (16, 40, 64, 500)))


def mutate_bytes(chance: Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or replace a few bytes."""
    made = bytearray(data)
    for _ in range(pick(chance, (1, 1, 1, 2, 4))):
        at = chance.randrange(len(made) + 1)
        size = min(pick(chance, (1, 1, 2, 4, 8, 64)), len(made) - at)
        kind = chance.randrange(8)
        if kind == 0 and size:
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del made[at : at + size]
        elif kind == 2:
            made[at:at] = made[at : at + size] * many(chance)
        elif kind == 3:
            made[at:at] = bytes([pick(chance, BYTES)]) * size
        elif kind == 4 and size:
            made[at] = pick(chance, BYTES)
        elif kind == 5:
            del made[at:]
        elif kind == 6:
            width, form = pick(chance, ((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
            made[at : at + width] = struct.pack(f"<{form}", integer(chance) & ((1 << 8 * width) - 1))
        else:
            other = chance.randrange(len(made) + 1)
            made[at : at + size] = made[other : other + size]
    return bytes(made)
