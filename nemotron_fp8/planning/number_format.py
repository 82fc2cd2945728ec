"""Number formats of quantized weights: element type, scale type, coverage and rounding of scales."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import ldexp, nan, prod
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Mapping


Granularity: TypeAlias = Literal["tensor", "channel", "block", "mx"]
"""Coverage of one scale, as recipes name it: a tensor, an output row, a block of rows and columns, or 32 inputs of an
output row, as in the OCP Microscaling formats."""

Cells: TypeAlias = Literal["tensor", "channel", "block"]
"""Coverage of one scale, as kernels name it: ``mx`` is a block of 1 x 32."""

ScaleRounding: TypeAlias = Literal["none", "power-of-two", "mx"]
"""Rounding of a scale, before the cast.

``none`` stores the quotient amax / 448. The others round it up to a power of two: ``power-of-two`` to 2^-22 at least,
as engines with DeepGEMM do on loading; ``mx`` to any exponent of E8M0, and to 1 for a block of zeros.
"""


ScaleChoice: TypeAlias = Literal["amax", "best"]
"""Choice of a scale, before its rounding.

``amax`` maps the largest absolute value to the largest element. ``best`` takes the scale with the least squared error
among eight from that one up, for output rows only. It is expressed as a larger amax, so that all that follows an amax
is the same for both.
"""


@dataclass(frozen=True, slots=True)
class ElementType:
    """Type of a quantized element.

    Attributes:
        dtype: safetensors name.
        title: display name.
        max: largest finite value.
    """

    dtype: str
    title: str
    max: float


@dataclass(frozen=True, slots=True)
class ScaleType:
    """Type of a scale.

    Attributes:
        dtype: safetensors name, a key of `SCALE_VALUES`.
        title: name for people.
    """

    dtype: str
    title: str

    def unpack(self, data: bytes | bytearray) -> Iterator[float]:
        """Yield the values of the scales in a tensor's bytes."""
        return SCALE_VALUES[self.dtype](data)


def _packed(code: str) -> Callable[[bytes | bytearray], Iterator[float]]:
    return lambda data: (value for (value,) in struct.iter_unpack(f"<{code}", data))


def _bfloat16(data: bytes | bytearray) -> Iterator[float]:
    """Yield bfloat16 values: the upper halves of float32."""
    return (struct.unpack("<f", struct.pack("<I", bits << 16))[0] for (bits,) in struct.iter_unpack("<H", data))


def _e8m0(data: bytes | bytearray) -> Iterator[float]:
    """Yield powers of two: a biased exponent each, and 0xFF for NaN (OCP Microscaling Formats, section 5.4.1)."""
    return (nan if bits == 0xFF else ldexp(1.0, bits - 127) for bits in data)


def float32_bytes(value: float) -> bytes:
    """Return the bytes of a number, rounded to float32, little-endian."""
    return struct.pack("<f", value)


def float32(value: float) -> float:
    """Return a number rounded to float32."""
    (rounded,) = FLOAT32.unpack(float32_bytes(value))
    return rounded


def bfloat16_from(value: float) -> float:
    """Return the smallest bfloat16 that is at least a positive float32 value."""
    bits = int.from_bytes(float32_bytes(value), "little")
    (rounded,) = FLOAT32.unpack((-(-bits >> 16) << 16).to_bytes(4, "little"))
    return rounded


SCALE_VALUES: Mapping[str, Callable[[bytes | bytearray], Iterator[float]]] = {
    "F32": _packed("f"),
    "F16": _packed("e"),
    "BF16": _bfloat16,
    "F8_E8M0": _e8m0,
    "U8": _e8m0,
}
"""Readers of scales, little-endian, by safetensors name. Scales in bytes (``U8``) are E8M0."""


E4M3 = ElementType("F8_E4M3", "FP8 (E4M3)", 448.0)
FLOAT32 = ScaleType("F32", "float32")
E8M0 = ScaleType("F8_E8M0", "E8M0")
E8M0_BYTES = ScaleType("U8", "E8M0")
"""E8M0 in tensors of bytes, as loaders of MX checkpoints read it."""
MX_BLOCK = (1, 32)
"""Rows and columns under one scale in the OCP Microscaling formats."""
FINE_ELEMENTS = 1024
"""Fewest elements under a scale for which the scales of a whole tensor are held in memory."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Elements of a matrix ``[N, K]`` under one scale.

    Attributes:
        granularity: unit that one scale covers.
        block: rows and columns under one scale at granularity ``block``.
    """

    granularity: Cells = "tensor"
    block: tuple[int, int] = (128, 128)

    @property
    def rows(self) -> int | None:
        """Rows under one scale; None if one scale covers the whole tensor."""
        if self.granularity == "tensor":
            return None
        return 1 if self.granularity == "channel" else self.block[0]

    @property
    def columns(self) -> int | None:
        """Columns under one scale; None where one scale covers whole rows."""
        return self.block[1] if self.granularity == "block" else None

    @property
    def whole(self) -> bool:
        """True where one scale covers the whole tensor."""
        return self.rows is None

    @property
    def fine(self) -> bool:
        """True where a tensor has so many scales that they are computed and written with the codes of each slice."""
        return self.granularity == "block" and self.block[0] * self.block[1] < FINE_ELEMENTS

    @property
    def held(self) -> Coverage:
        """Coverage of the amaxes that are held for a whole tensor: one amax where the scales are too many to hold."""
        return Coverage("tensor") if self.fine else self

    @property
    def title(self) -> str:
        """Display name of the coverage."""
        height, width = self.block
        return {"tensor": "tensor", "channel": "output row", "block": f"block of {height}x{width}"}[self.granularity]

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales: ``()``, ``(N, 1)`` or ``(ceil(N / rows), ceil(K / columns))``.

        A stack of matrices counts as one matrix, the matrices one below the other; a vector as a matrix of one row.
        """
        if self.granularity == "tensor":
            return ()
        if len(shape) != 2:
            shape = prod(shape[:-1]), shape[-1] if shape else 1
        if self.granularity == "channel":
            return shape[0], 1
        return -(-shape[0] // self.block[0]), -(-shape[1] // self.block[1])

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Return True unless a block of a matrix would be ragged."""
        return self.granularity != "block" or not (shape[0] % self.block[0] or shape[1] % self.block[1])


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """Number format of a quantized weight: every value is ``element * scale``.

    Attributes:
        coverage: elements under one scale.
        element: type of the elements.
        scale: type of the scales.
        scale_rounding: rounding of the scales.
        scale_choice: choice of the scales.
    """

    coverage: Coverage = Coverage()
    element: ElementType = E4M3
    scale: ScaleType = FLOAT32
    scale_rounding: ScaleRounding = "none"
    scale_choice: ScaleChoice = "amax"


PER_TENSOR = NumberFormat()
"""FP8 (E4M3) with one float32 scale for each tensor."""


def coverage_of(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int], whole: Container[tuple[int, ...]]
) -> Coverage | None:
    """Return the coverage of a scale, from the shapes of a weight and its scale tensor.

    Args:
        weight: shape of the weight.
        scale: shape of the scale tensor.
        block: rows and columns of a block; the last block of a row or column may be ragged.
        whole: shapes of a scale tensor that covers a whole weight.

    Returns:
        The coverage; None if the shapes match no granularity.
    """
    if scale in whole:
        return Coverage("tensor", block)
    if len(weight) != 2:
        return None
    if scale == (-(-weight[0] // block[0]), -(-weight[1] // block[1])):
        # With blocks of one row, a weight as wide as one block would be ambiguous; no checkpoint has such a weight.
        return Coverage("block" if scale != (weight[0], 1) or block[0] == 1 else "channel", block)
    return Coverage("channel", block) if scale in ((weight[0], 1), (weight[0],)) else None
