"""Shared by all kernels: exact widening, integer magnitudes, the multiplier, the cast."""

# Triton compiles these functions from their source: parameters are pointers and tiles that no Python
# annotation describes, constants are written in capitals, and the decorator is untyped.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

# The combination of `tl.max`, which alone the interpreter runs at speed; `tl.max` itself widens to int32 first.
from triton.language.standard import _elementwise_max

from .. import formats

E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
AMAX_FLOOR = tl.constexpr(formats.AMAX_FLOOR)
INF_BITS = tl.constexpr(formats.INF_BITS)
NAN_BITS = tl.constexpr(formats.NAN_BITS)


@triton.jit
def widen(x):
    """float32 of bf16, fp16 or float32, exactly."""
    if x.dtype == tl.bfloat16:
        # A shift of the bits: exact by definition, and the interpreter holds bf16 as raw integers.
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def magnitude(x):
    """Return the bits without the sign, in the input's own format and width; they order as absolute values do.

    16 bits stay 16 bits: their maxima go two to an instruction, and take half the registers.
    """
    if x.dtype == tl.float32:  # noqa: SIM108  (a statement that Triton decides when it compiles)
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True) & 0x7FFF
    return bits


@triton.jit
def largest(bits, axis: tl.constexpr):
    """Return the int32 maximum of magnitudes along an axis, or with None of them all."""
    return tl.reduce(bits, axis, _elementwise_max).to(tl.int32)


@triton.jit
def float32_bits(bits, dtype: tl.constexpr):
    """int32 bits of float32 for magnitudes in the format ``dtype``; every NaN becomes ``NAN_BITS``."""
    if dtype == tl.bfloat16:
        wide = bits << 16
    elif dtype == tl.float16:
        wide = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    else:
        wide = bits
    return tl.where(wide > INF_BITS, NAN_BITS, wide)


@triton.jit
def multiplier(bits):
    """448 / amax by IEEE division (Triton's ``/`` is approximate), with the floor; NaN passes through."""
    amax = bits.to(tl.float32, bitcast=True)
    amax = tl.where(amax < AMAX_FLOOR, AMAX_FLOOR, amax)
    return tl.div_rn(tl.full(amax.shape, E4M3_MAX, tl.float32), amax)


@triton.jit
def inverse(mult):
    """The stored scale, 1 / mult by IEEE division, with the one NaN that the reference stores."""
    scale = tl.div_rn(tl.full(mult.shape, 1.0, tl.float32), mult)
    bits = scale.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > INF_BITS, NAN_BITS, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode(x, mult, ORIGINAL: tl.constexpr):
    """E4M3 of ``x * mult``; with ORIGINAL the product is rounded to the dtype of ``x`` first.

    No clamp: the hardware's cast (``cvt.rn.satfinite.e4m3x2.f32``) saturates at 448, and gives 0x7F for the
    canonical NaN that a float32 multiplication yields (PTX ISA, sections on cvt and on floating-point NaN).
    """
    product = widen(x) * mult
    if ORIGINAL:
        product = widen(product.to(x.dtype))
    return product.to(tl.float8e4nv)
