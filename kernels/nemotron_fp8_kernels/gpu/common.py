"""Functions of all kernels: exact widening, integer magnitudes, multiplier and cast."""

# Triton compiles these functions from their source: no Python annotation describes pointers and tiles, constants
# have names in capitals, and the decorator is untyped.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

# The function that `tl.max` reduces with. The interpreter has a fast path for it alone, and `tl.max` itself widens
# to int32 first.
from triton.language.standard import _elementwise_max

from .. import formats

E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
AMAX_FLOOR = tl.constexpr(formats.AMAX_FLOOR)
INF_BITS = tl.constexpr(formats.INF_BITS)
NAN_BITS = tl.constexpr(formats.NAN_BITS)
CARRY = tl.constexpr((1 << 23) - 1 - formats.SCALE_1_MANTISSA)
MOST_POWER_OF_TWO, MOST_MX = (tl.constexpr(127 - exponent) for exponent in formats.LEAST_EXPONENTS.values())

VECTOR = 8
"""Elements of a vector: 16 bytes of 16-bit weights, 32 of float32, and 8 bytes of codes.

With EDGES, a kernel divides adjacent weights into whole vectors, which start at an aligned address, and up to 7 weights
before and after them, the edges. ``phase`` is the position of the first weight of the tensor in its vector, 0 to 7.

If the codes have another phase, the vectors are those of the weights, which are two thirds of the bytes. The first code
of a vector is then aligned to WIDTH codes: 4, 2 or 1 instead of 8. Stores of WIDTH codes remain coalesced, because
the compiler exchanges codes between threads through shared memory.
"""


@triton.jit
def divide(at, count):
    """Divide ``count`` adjacent elements: return those before the first whole vector, and those in whole vectors.

    ``at``: position of the first element, counted from the beginning of a vector. The second result is a multiple of
    8, also for the compiler, so that a mask is constant over a vector.
    """
    head = (-at & 7).to(tl.int32)
    return head, tl.maximum(count - head, 0) // 8 * 8


@triton.jit
def edges(head, span, count):
    """Return where 16 lanes find the elements before and after the whole vectors, and which lanes find one.

    ``head`` and ``span``: results of `divide`; ``count``: elements in all. All are scalars, or of shape [rows, 1].
    """
    lane = tl.arange(0, 16)
    if head.type.is_block():
        lane = lane[None, :]
    before = lane < 8
    at = tl.where(before, lane, head + span + lane - 8)
    return at, at < tl.where(before, tl.minimum(head, count), count)


@triton.jit
def widen(x):
    """Convert bf16, fp16 or float32 to float32 exactly."""
    if x.dtype == tl.bfloat16:
        # A shift of the bits is exact by definition, and the interpreter stores bf16 as raw integers.
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def magnitude(x):
    """Return the bits of ``x`` without the sign, at the width of ``x``; their order is that of absolute values.

    16-bit inputs keep 16 bits: an instruction computes two maxima, and they need half the registers.
    """
    if x.dtype == tl.float32:  # noqa: SIM108  (Triton evaluates the statement at compile time)
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True) & 0x7FFF
    return bits


@triton.jit
def largest(bits, axis: tl.constexpr):
    """Return the int32 maximum of magnitudes along an axis, or of all with None."""
    return tl.reduce(bits, axis, _elementwise_max).to(tl.int32)


@triton.jit
def float32_bits(bits, dtype: tl.constexpr):
    """Convert magnitudes of ``dtype`` to int32 bits of float32; every NaN becomes ``NAN_BITS``."""
    if dtype == tl.bfloat16:
        wide = bits << 16
    elif dtype == tl.float16:
        wide = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    else:
        wide = bits
    return tl.where(wide > INF_BITS, NAN_BITS, wide)


@triton.jit
def multiplier(bits, ROUNDING: tl.constexpr):
    """Return 448 / amax by IEEE division, with the floor, or a power of two; NaN propagates.

    Triton's ``/`` is approximate.
    """
    amax = bits.to(tl.float32, bitcast=True)
    if ROUNDING == "none":
        amax = tl.where(amax < AMAX_FLOOR, AMAX_FLOOR, amax)
        mult = tl.div_rn(tl.full(amax.shape, E4M3_MAX, tl.float32), amax)
    else:
        # The sum carries into the exponent if the mantissa exceeds that of 448.
        exponent = 262 - ((tl.maximum(bits, 0) + CARRY) >> 23)
        if ROUNDING == "mx":
            exponent = tl.where(bits > 0, tl.minimum(exponent, MOST_MX), 127)
        else:
            exponent = tl.minimum(exponent, MOST_POWER_OF_TWO)
        other = tl.where(amax == float("inf"), 0, NAN_BITS)
        mult = tl.where(amax < float("inf"), exponent << 23, other).to(tl.float32, bitcast=True)
    return mult


@triton.jit
def inverse(mult, ROUNDING: tl.constexpr):
    """Return the stored scale: 1 / mult by IEEE division, with the NaN bits of the reference.

    A power of two needs no division: the exponents of both add up to that of 2^127, unless the scale is subnormal.
    """
    if ROUNDING == "none":
        scale = tl.div_rn(tl.full(mult.shape, 1.0, tl.float32), mult)
        bits = scale.to(tl.int32, bitcast=True)
    else:
        bits = tl.maximum(0x7F000000 - mult.to(tl.int32, bitcast=True), 0x400000)
        bits = tl.where(mult > 0, bits, tl.where(mult == 0, INF_BITS, NAN_BITS))
    bits = tl.where((bits & 0x7FFFFFFF) > INF_BITS, NAN_BITS, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode(x, mult, ORIGINAL: tl.constexpr):
    """Cast ``x * mult`` to E4M3; with ORIGINAL the product is first rounded to the dtype of ``x``.

    A clamp is unnecessary: the hardware cast (``cvt.rn.satfinite.e4m3x2.f32``) saturates at 448. It returns 0x7F
    for the canonical NaN of a float32 multiplication (PTX ISA, sections on cvt and on floating-point NaN).
    """
    product = widen(x) * mult
    if ORIGINAL:
        product = widen(product.to(x.dtype))
    return product.to(tl.float8e4nv)
