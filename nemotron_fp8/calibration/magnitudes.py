"""Largest magnitude of values that come in parts, or a percentile of their magnitudes, exactly and in any order.

A percentile is taken from a histogram: one count for each magnitude of bfloat16, to which values of other dtypes are
rounded up. Counts are integers, so neither the order of the parts nor the number of threads changes the result.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

BINS = 1 << 15
"""Magnitudes of bfloat16: a float32 without its sign and its lower 16 bits."""
PIECE = 1 << 20
"""Values that are counted at a time."""


class Magnitudes:
    """Magnitudes of some values.

    Args:
        counted: True to count them, for a percentile.

    Attributes:
        largest: the largest magnitude; None before the first value; NaN if a value is NaN.
        counts: number of values of each magnitude, int64 ``[BINS]``; None if they are not counted.
    """

    def __init__(self, counted: bool = False) -> None:
        self.largest: float | None = None
        self.counts = torch.zeros(BINS, dtype=torch.int64) if counted else None

    def add(self, other: Magnitudes) -> None:
        """Add the values of another one, whose counts are shared with it or added."""
        if other.largest is None:
            return
        self.largest = other.largest if self.largest is None else _larger(self.largest, other.largest)
        if self.counts is not None and other.counts is not None:
            self.counts += other.counts

    def amax(self, percentile: float | None) -> float:
        """Return the largest magnitude, or the smallest one that a percentage of the values does not exceed.

        Args:
            percentile: the percentage, from 0 to 100; None for all values.
        """
        assert self.largest is not None
        if percentile is None or self.counts is None or not math.isfinite(self.largest):
            return self.largest
        below = self.counts.cumsum(0)
        # The decimal that the user wrote, not the binary number next to it.
        wanted = math.ceil(Fraction(repr(percentile)) * int(below[-1]) / 100)
        place = int(torch.searchsorted(below, max(wanted, 1)))
        value = float(torch.tensor(place << 16, dtype=torch.int32).view(torch.float32))
        return min(value, self.largest)  # a value of more digits is rounded up


def magnitudes_of(values: torch.Tensor, counted: bool) -> Magnitudes:
    """Return the magnitudes of a floating-point tensor, on any device."""
    found = Magnitudes(counted)
    if not values.numel():
        return found
    least, most = (abs(float(value)) for value in values.aminmax())
    found.largest = _larger(least, most)
    if counted and math.isfinite(found.largest):
        flat = values.reshape(-1)
        total = torch.zeros(BINS, dtype=torch.int64, device=values.device)
        for begin in range(0, len(flat), PIECE):
            total += torch.bincount(_bins(flat[begin : begin + PIECE]), minlength=BINS)
        found.counts = total.cpu()
    return found


def _bins(values: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the bfloat16 magnitudes that are next to finite values, from above: int16 or int32."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16) & BINS - 1
    bits = values.float().view(torch.int32) & (1 << 31) - 1
    return (bits + (1 << 16) - 1) >> 16


def _larger(one: float, other: float) -> float:
    """Return the larger of two magnitudes; NaN if one is NaN."""
    return max(one, other) if not math.isnan(one + other) else math.nan
