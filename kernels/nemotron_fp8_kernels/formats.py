"""The numbers and shapes of the formats. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from .errors import GranularityError, NumericsError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

Granularity: TypeAlias = Literal["tensor", "channel", "block"]
"""Span of one scale: the tensor, a row of it, or a block of rows and columns."""

Numerics: TypeAlias = Literal["float32", "original"]
"""Arithmetic of the formula: float32, or the tensor's own dtype as the original script ran it."""

E4M3_MAX = 448.0
"""Largest finite value of float8_e4m3fn: S.1111.110 (OCP 8-bit floating point specification, section 5.3)."""

AMAX_FLOOR = 1e-12
"""An amax below this counts as this, so that an all-zero tensor has a finite multiplier."""

EMPTY_AMAX = 16.0
"""The amax of a tensor (row, block) without elements, as in the original script."""

INF_BITS = 0x7F80_0000
"""float32 bits of +Inf: an amax whose bits are at least this comes from a tensor that is not finite."""

NAN_BITS = 0x7FC0_0000
"""float32 bits that stand for an amax when any element is NaN, whatever that NaN's payload and sign."""

NAN_CODE = 0x7F
"""The E4M3 code written for a NaN product, whatever its sign."""

DEFAULT_BLOCK = (128, 128)
"""Rows and columns under one scale at granularity ``block``."""


def scale_shape(
    shape: Sequence[int], granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK
) -> tuple[int, ...]:
    """Shape of the scales of a tensor: ``[]``, ``[N, 1]`` or ``[ceil(N / b0), ceil(K / b1)]``.

    Raises:
        GranularityError: an unknown granularity, or a block that is not two positive sizes.
        ShapeError: ``channel`` or ``block`` of a tensor that is not 2-D.
    """
    check_granularity(granularity, block)
    if granularity == "tensor":
        return ()
    if len(shape) != 2:
        raise ShapeError("w", shape, f"granularity {granularity!r} is for 2-D tensors")
    if granularity == "channel":
        return (shape[0], 1)
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def check_granularity(granularity: object, block: tuple[int, int]) -> None:
    """Refuse unknown granularities and impossible blocks.

    Raises:
        GranularityError: naming what was given.
    """
    if granularity not in get_args(Granularity):
        raise GranularityError(granularity, "use 'tensor', 'channel' or 'block'")
    if granularity == "block" and (len(block) != 2 or min(block) < 1):
        raise GranularityError(granularity, f"block {tuple(block)} is not two positive sizes")


def check_numerics(numerics: object, granularity: Granularity) -> None:
    """Refuse unknown numerics, and ``original`` at any granularity but ``tensor``.

    Raises:
        NumericsError: unknown numerics.
        GranularityError: ``original`` at granularity ``channel`` or ``block``.
    """
    if numerics not in get_args(Numerics):
        raise NumericsError(numerics)
    if numerics == "original" and granularity != "tensor":
        raise GranularityError(granularity, "numerics 'original' knows one scale per tensor only")
