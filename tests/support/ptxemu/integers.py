"""Integer and comparison instructions that numpy lacks, on one value per lane or one for all."""

from __future__ import annotations

import numpy as np

from .errors import UnsupportedError
from .formats import NAN32, Bits


def prmt(a: Bits, b: Bits, c: Bits) -> Bits:
    joined = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    out = np.uint32(0)
    for number in range(4):
        selector = (c >> np.uint32(4 * number)) & np.uint32(15)
        place = (selector & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        byte = ((joined >> place) & np.uint64(255)).astype(np.uint32)
        replicated = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        byte = np.where(selector & np.uint32(8), replicated, byte).astype(np.uint32)
        out = out | (byte << np.uint32(8 * number))
    return out


def shl(value: Bits, amount: Bits, bits: int) -> Bits:
    """Shift to the left; an amount of ``bits`` or more gives zero."""
    kind = np.asarray(value).dtype.type
    clipped = np.minimum(amount, np.uint32(bits - 1)).astype(kind)
    return np.where(amount >= np.uint32(bits), kind(0), value << clipped)


def shr(value: Bits, amount: Bits, bits: int) -> Bits:
    """Shift to the right; an amount of ``bits`` or more fills with the sign, or with zeros if unsigned."""
    kind = np.asarray(value).dtype.type
    clipped = np.minimum(amount, np.uint32(bits - 1)).astype(kind)
    if np.dtype(kind).kind == "i":
        return value >> clipped
    return np.where(amount >= np.uint32(bits), kind(0), value >> clipped)


def div(a: Bits, b: Bits) -> Bits:
    """Return the quotient toward zero; all ones for a division by zero, as the hardware does."""
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        quotient = a // safe
    else:
        wider = object if a.dtype.itemsize == 8 else np.int64
        magnitude = np.abs(a.astype(wider)) // np.abs(safe.astype(wider))
        quotient = np.where((a < 0) != (safe < 0), -magnitude, magnitude).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient).astype(a.dtype)


def rem(a: Bits, b: Bits) -> Bits:
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    return (a - div(a, b) * b).astype(a.dtype)


def mul_high(a: Bits, b: Bits, signed: bool) -> Bits:
    """Return the upper 64 bits of a product."""
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    kind = np.int64 if signed else np.uint64
    wide = (a.view(kind).astype(object) * b.view(kind).astype(object)) >> 64
    return np.asarray(wide & ((1 << 64) - 1), dtype=np.uint64)


def popc(a: Bits) -> Bits:
    return np.asarray(sum(((np.asarray(a) >> np.uint32(i)) & np.uint32(1)) for i in range(32)), np.uint32)


def clz(a: Bits) -> Bits:
    a = np.asarray(a)
    return np.where(a == 0, 32, 32 - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


def max_relu(a: Bits, b: Bits) -> Bits:
    """Return the largest of two signed integers and zero."""
    return np.maximum(np.maximum(a, b), np.asarray(a).dtype.type(0))


def min_relu(a: Bits, b: Bits) -> Bits:
    """Return the smaller of two signed integers, or zero if it is negative."""
    return np.maximum(np.minimum(a, b), np.asarray(a).dtype.type(0))


def compare(a: Bits, b: Bits, name: str) -> np.ndarray:
    """Compare float32 bits; a name with ``u`` at its end is true for NaN."""
    x, y = np.asarray(a).view(np.float32), np.asarray(b).view(np.float32)
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    operators = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    operator = operators.get(name.removesuffix("u"))
    if operator is None:
        raise UnsupportedError(f"comparison {name}")
    return operator(x, y) | unordered if name.endswith("u") else operator(x, y) & ~unordered


def extreme(a: Bits, b: Bits, name: str, nan: bool) -> Bits:
    """Return ``max`` or ``min`` of float32 bits; with ``nan`` a NaN operand gives NaN, otherwise the other operand."""
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    nan_a, nan_b = np.isnan(a.view(np.float32)), np.isnan(b.view(np.float32))
    key_a, key_b = _order(a), _order(b)
    out = np.where(key_a >= key_b if name == "max" else key_a <= key_b, a, b)
    out = np.where(nan_a, b, np.where(nan_b, a, out))
    return np.where(nan_a | nan_b if nan else nan_a & nan_b, NAN32, out)


def _order(bits: Bits) -> np.ndarray:
    """Return keys in the order of float32 values, -0 below +0."""
    magnitude = (bits & np.uint32(0x7FFFFFFF)).astype(np.int64)
    return np.where(bits >> np.uint32(31), -magnitude - 1, magnitude)


def to_integer(a: Bits, kind: str) -> Bits:
    """Convert float32 bits to ``s32`` or ``u32``: toward zero, saturated, zero for NaN."""
    value = np.trunc(np.asarray(a).view(np.float32).astype(np.float64))
    low, high = (-(2.0**31), 2.0**31 - 1) if kind == "s32" else (0.0, 2.0**32 - 1)
    value = np.where(np.isnan(value), 0.0, np.clip(value, low, high))
    return value.astype(np.int64).astype(np.uint32) if kind == "u32" else value.astype(np.int32).view(np.uint32)
