"""What quantising did to the values of a tensor, in figures that are the same on every run.

Partial sums are taken over a fixed grid of elements and added in its order, in float64: neither the memory
budget nor the number of threads shows in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

GRID = 1 << 18
"""Elements of one cell of the grid."""
E4M3_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Cell:
    """Partial sums over one cell of the grid.

    Attributes:
        signal: sum of the squares of the values.
        noise: sum of the squares of the errors.
        max_abs_error: the largest error.
        clamped: values that the clamp changed.
        flushed_to_zero: values other than 0 that became 0.
    """

    signal: float
    noise: float
    max_abs_error: float
    clamped: int
    flushed_to_zero: int


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What quantising did to one tensor.

    Attributes:
        name: the tensor.
        sqnr_db: signal to quantisation noise, ``10 log10(sum w^2 / sum (w - q * scale)^2)``, in dB; infinite
            where there is no error, NaN where there is no signal either.
        max_abs_error: the largest ``|w - q * scale|``.
        clamped: values that the clamp to +-448 changed.
        flushed_to_zero: values other than 0 that became 0.
    """

    name: str
    sqnr_db: float
    max_abs_error: float
    clamped: int
    flushed_to_zero: int


def measure(values: torch.Tensor, codes: torch.Tensor, mult: torch.Tensor, scale: torch.Tensor) -> Cell:
    """Compare values with their codes.

    Args:
        values: bf16, fp16 or fp32.
        codes: float8_e4m3fn of the same shape.
        mult: what the values were multiplied by before the cast, in its dtype; broadcasts against ``values``.
        scale: float32, what a code is multiplied by; broadcasts against ``values``.
    """
    if not values.numel():
        return Cell(0.0, 0.0, 0.0, 0, 0)
    product = values * mult if mult.dtype == values.dtype else values.float() * mult
    clamped = int((product.abs() > E4M3_MAX).sum())
    q = codes.float()
    flushed = int(((q == 0) & (values != 0)).sum())
    w = values.double()
    error = q.mul_(scale).double().sub_(w)
    worst = float(error.abs().max())
    return Cell(float(w.square_().sum()), float(error.square_().sum()), worst, clamped, flushed)


def reduce(name: str, cells: Iterable[Cell]) -> TensorStats:
    """Add up the cells of a tensor, in the order of the grid."""
    signal = noise = worst = 0.0
    clamped = flushed = 0
    for cell in cells:
        signal += cell.signal
        noise += cell.noise
        worst = max(worst, cell.max_abs_error)
        clamped += cell.clamped
        flushed += cell.flushed_to_zero
    if not noise:
        sqnr = math.inf if signal else math.nan
    elif not signal or math.isinf(noise):  # q * scale may round up past the largest float32
        sqnr = -math.inf
    else:
        sqnr = 10 * math.log10(signal / noise)
    return TensorStats(name, sqnr, worst, clamped, flushed)
