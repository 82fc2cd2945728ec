"""Constants and scale shapes of the number format, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from .errors import GranularityError, NumericsError, RoundingError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

Granularity: TypeAlias = Literal["tensor", "channel", "block"]
"""Elements that share one scale: the tensor, a row, or a block of rows and columns."""

Numerics: TypeAlias = Literal["float32", "original"]
"""Arithmetic of the formula: float32, or the dtype of the tensor, as in the original script."""

ScaleRounding: TypeAlias = Literal["none", "power-of-two", "mx"]
"""Rounding of a scale: none, or up to a power of two by the rule of DeepGEMM or of OCP Microscaling."""

E4M3_MAX = 448.0
"""Largest finite value of float8_e4m3fn: S.1111.110 (OCP 8-bit floating point specification, section 5.3)."""

CANDIDATES = tuple(
    float.fromhex(text)
    for text in (
        "0x1p0",
        "0x1.172b84p0",
        "0x1.306fep0",
        "0x1.4bfdaep0",
        "0x1.6a09e6p0",
        "0x1.8ace54p0",
        "0x1.ae89fap0",
        "0x1.d5818ep0",
    )
)
"""Factors of an amax of which the best is chosen: ``2^(k/8)``, rounded to float32."""

AMAX_FLOOR = 1e-12
"""Lower bound of an amax, so that an all-zero tensor has a finite multiplier."""

EMPTY_AMAX = 16.0
"""Amax of a tensor, row or block without elements, as in the original script."""

INF_BITS = 0x7F80_0000
"""float32 bits of +Inf. Amax bits of this value or above mean that an element is not finite."""

NAN_BITS = 0x7FC0_0000
"""float32 bits of the amax if any element is NaN. The payload and sign of that NaN are ignored."""

NAN_CODE = 0x7F
"""E4M3 code of a NaN product of either sign."""

DEFAULT_BLOCK = (128, 128)
"""Rows and columns of a block at granularity ``block``."""

MX_BLOCK = (1, 32)
"""Rows and columns of a block of OCP Microscaling formats (specification 1.0, section 5.2)."""

LEAST_EXPONENTS: dict[ScaleRounding, int] = {"power-of-two": -22, "mx": -127}
"""Least exponent of a rounded scale.

``power-of-two``: DeepGEMM raises an amax to 1e-4, of which -22 is the exponent. ``mx``: the least exponent of E8M0.
"""

SCALE_1_MANTISSA = 0x60_0000
"""Largest float32 mantissa under which an amax of exponent x has the scale 2^(x - 8): that of 448, 1.75 * 2^8."""


def scale_shape(
    shape: Sequence[int], granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK
) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor: ``[]``, ``[N, 1]`` or ``[ceil(N / b0), ceil(K / b1)]``.

    Args:
        shape: shape of the tensor.
        granularity: elements that share one scale.
        block: rows and columns of a block, ``(b0, b1)``.

    Raises:
        GranularityError: the granularity is unknown, or the block is not two positive sizes.
        ShapeError: the granularity is ``channel`` or ``block``, and the tensor is not 2-D.
    """
    check_granularity(granularity, block)
    if granularity == "tensor":
        return ()
    if len(shape) != 2:
        raise ShapeError("w", shape, f"granularity {granularity!r} needs a 2-D tensor")
    if granularity == "channel":
        return (shape[0], 1)
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def fitted(block: tuple[int, int], shape: Sequence[int]) -> tuple[int, int]:
    """Return a block that is no larger than a matrix, with the same scales: padding is to whole blocks."""
    return min(block[0], max(shape[0], 1)), min(block[1], max(shape[1], 1))


def check_granularity(granularity: object, block: tuple[int, int]) -> None:
    """Reject unknown granularities and invalid blocks.

    Raises:
        GranularityError: the granularity is unknown, or the block is not two positive sizes.
    """
    if granularity not in get_args(Granularity):
        raise GranularityError(granularity, "use 'tensor', 'channel' or 'block'")
    if granularity == "block" and (len(block) != 2 or not all(isinstance(side, int) and side > 0 for side in block)):
        raise GranularityError(granularity, f"block {tuple(block)} is not two positive sizes")


def check_numerics(numerics: object, granularity: Granularity) -> None:
    """Reject unknown numerics, and ``original`` at any granularity except ``tensor``.

    Raises:
        NumericsError: the numerics are unknown.
        GranularityError: ``original`` at granularity ``channel`` or ``block``.
    """
    if numerics not in get_args(Numerics):
        raise NumericsError(numerics)
    if numerics == "original" and granularity != "tensor":
        raise GranularityError(
            granularity, "numerics 'original' supports one scale per tensor only; use granularity 'tensor'"
        )


def check_rounding(rounding: object, numerics: Numerics = "float32") -> None:
    """Reject unknown roundings of scales, and any rounding with numerics ``original``.

    Raises:
        RoundingError: the rounding is unknown, or the numerics are ``original`` and the rounding is not ``none``.
    """
    if rounding not in get_args(ScaleRounding):
        raise RoundingError(rounding, "use 'none', 'power-of-two' or 'mx'")
    if numerics == "original" and rounding != "none":
        raise RoundingError(rounding, "numerics 'original' does not round scales; use numerics 'float32'")
