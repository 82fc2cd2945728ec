"""Floating-point formats of PTX, calculated from values and independent of torch.

float64 holds every float32, the products of two float32 and all quanta of the small formats exactly. Registers hold
bits, so that functions take and return unsigned integers. Arithmetic returns the canonical NaN of PTX.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

Bits: TypeAlias = np.ndarray
"""Unsigned integers: one per lane, or one for all lanes."""

U4, F4 = np.uint32, np.float32
NAN32 = np.uint32(0x7FFFFFFF)
SIGN, MAGNITUDE, INFINITY = U4(0x80000000), U4(0x7FFFFFFF), U4(0x7F800000)


class Open:
    """Choices that the PTX ISA leaves open; tests try both.

    Attributes:
        abs_keeps_nan: ``abs`` of a 16-bit NaN clears its sign; otherwise the result is 0x7FFF.
        widening_keeps_nan: float16 to float32 keeps the payload of a NaN; otherwise it is canonical.
    """

    abs_keeps_nan = True
    widening_keeps_nan = False


def canonical(bits: Bits) -> Bits:
    """Replace every float32 NaN by the canonical one."""
    return np.where((bits & MAGNITUDE) > INFINITY, NAN32, bits)


def flush(bits: Bits) -> Bits:
    """Replace float32 subnormals by zeros of the same sign (``.ftz``)."""
    return np.where((bits & INFINITY) == 0, bits & SIGN, bits)


def _value(bits: Bits) -> np.ndarray:
    return np.asarray(bits).view(F4)


def _bits(value: np.ndarray) -> Bits:
    return np.asarray(value, dtype=F4).view(U4)


def mul(a: Bits, b: Bits) -> Bits:
    return canonical(_bits(_value(a) * _value(b)))


def add(a: Bits, b: Bits) -> Bits:
    return canonical(_bits(_value(a) + _value(b)))


def sub(a: Bits, b: Bits) -> Bits:
    return canonical(_bits(_value(a) - _value(b)))


def div(a: Bits, b: Bits) -> Bits:
    return canonical(_bits(_value(a) / _value(b)))


def fma(a: Bits, b: Bits, c: Bits) -> Bits:
    """Return a * b + c, rounded once: the sum is rounded to odd in float64, then to float32."""
    with np.errstate(all="ignore"):
        product = _value(a).astype(np.float64) * _value(b).astype(np.float64)
        addend = _value(c).astype(np.float64)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = np.asarray(total).view(np.int64)
        inexact = np.isfinite(total) & np.isfinite(error) & (error != 0) & ((bits & 1) == 0)
        away = (error > 0) == (total > 0)
        odd = np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(np.float64)
        return canonical(_bits(odd.astype(F4)))


def _encode(bits: Bits, exponent: int, mantissa: int, bias: int, largest: int, overflow: int, nan: int) -> Bits:
    """Return the codes of float32 ``bits`` in a smaller format, rounded to nearest even.

    Args:
        bits: float32 bits.
        exponent: bits of the exponent.
        mantissa: bits of the mantissa.
        bias: bias of the exponent.
        largest: code of the largest finite value.
        overflow: code of larger values, without the sign.
        nan: code of NaN.
    """
    bits = np.asarray(bits)
    with np.errstate(invalid="ignore"):  # a signaling NaN
        value = np.abs(bits.view(F4).astype(np.float64))
    sign = (bits >> U4(31)).astype(np.uint32)
    nans = np.isnan(value)
    infinite = np.isinf(value)
    finite = np.where(nans | infinite, 0.0, value)
    power = np.where(finite == 0, 1 - bias, np.frexp(finite)[1] - 1)
    power = np.maximum(power, 1 - bias)
    steps = np.rint(np.ldexp(finite, mantissa - power)).astype(np.int64)
    # In quanta: fewer steps than 2^mantissa are subnormal, and 2^(mantissa + 1) carries into the exponent.
    code = ((power + bias - 1).astype(np.int64) << mantissa) + steps
    code = np.where(infinite | (code > largest), overflow, code).astype(np.uint32)
    code = code | (sign << U4(exponent + mantissa))
    return np.where(nans, U4(nan), code).astype(np.uint32)


def to_e4m3(bits: Bits) -> Bits:
    """Convert as ``cvt.rn.satfinite.e4m3``: values above 448 and Inf become 448 (0x7E), NaN becomes 0x7F."""
    return _encode(bits, 4, 3, 7, 0x7E, 0x7E, 0x7F)


def to_bf16(bits: Bits) -> Bits:
    return _encode(bits, 8, 7, 127, 0x7F7F, 0x7F80, 0x7FFF)


def to_f16(bits: Bits) -> Bits:
    return _encode(bits, 5, 10, 15, 0x7BFF, 0x7C00, 0x7FFF)


def from_f16(codes: Bits) -> Bits:
    """Return the float32 bits of float16 codes."""
    codes = np.asarray(codes).astype(np.uint32)
    sign, exponent, mantissa = codes >> U4(15), (codes >> U4(10)) & U4(31), codes & U4(0x3FF)
    normal = np.ldexp(1024.0 + mantissa, exponent.astype(np.int64) - 25)
    value = np.where(exponent == 0, np.ldexp(mantissa.astype(np.float64), -24), normal)
    bits = np.where(exponent == 31, INFINITY, _bits(value)) | (sign << U4(31))
    nan = (sign << U4(31)) | U4(0x7FC00000) | (mantissa << U4(13)) if Open.widening_keeps_nan else NAN32
    return np.where((exponent == 31) & (mantissa != 0), nan, bits).astype(np.uint32)


def from_bf16(codes: Bits) -> Bits:
    """Return the float32 bits of bf16 codes."""
    return canonical(np.asarray(codes).astype(np.uint32) << U4(16))


def e4m3_to_f16(codes: Bits) -> Bits:
    """Return the float16 codes of E4M3 codes; NaN becomes 0x7FFF."""
    codes = np.asarray(codes).astype(np.uint32)
    sign, exponent, mantissa = codes >> U4(7), (codes >> U4(3)) & U4(15), codes & U4(7)
    # float16 has bias 15 and 10 bits of mantissa. The subnormal numbers of E4M3 are normal there.
    normal = ((exponent + U4(8)) << U4(10)) | (mantissa << U4(7))
    subnormal = np.array([0x0000, 0x1800, 0x1C00, 0x1E00, 0x2000, 0x2100, 0x2200, 0x2300], dtype=np.uint32)[mantissa]
    value = np.where(exponent == 0, subnormal, normal) | (sign << U4(15))
    return np.where((exponent == 15) & (mantissa == 7), U4(0x7FFF), value).astype(np.uint32)


def abs16(codes: Bits, kind: str) -> Bits:
    """Return ``abs`` of 16-bit floats, ``f16`` or ``bf16``."""
    codes = np.asarray(codes).astype(np.uint32) & U4(0x7FFF)
    if Open.abs_keeps_nan:
        return codes
    return np.where(codes > U4(0x7C00 if kind == "f16" else 0x7F80), U4(0x7FFF), codes)
