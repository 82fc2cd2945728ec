"""Error that rounding to FP8 makes by itself, with which a measured one is compared.

A number with m bits of mantissa, between two powers of two, is rounded to the nearest of steps of 2^-m of the lower
power. Rounding errors are uniform over a step s, with a mean square of s^2/12. At x times the lower power (x from 1 to
2), the signal-to-noise ratio is therefore 12 * 4^m * x^2. This gives the least value at x = 1, and the largest one at
x = 2. Over weights of many sizes, log2(x) is uniform, and the mean of the noise is that of the signal times
(1/(12 * 4^m)) * (3/4)/ln 4. Nothing in it depends on the distribution of the weights, as long as they have many
values, except that numbers below the smallest normal one have coarser steps: such weights, and those that became 0,
lower the ratio.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._display import counted

if TYPE_CHECKING:
    from nemotron_fp8.documents.stats_json import Figures

MANTISSA = 3
"""Bits of mantissa of E4M3, the element type of all layouts."""


class ExpectedError(NamedTuple):
    """Signal-to-quantization-noise ratio of rounding alone, in dB.

    Attributes:
        low: ratio of weights at the lower end of the numbers between two powers of two.
        typical: ratio of weights of many sizes.
        high: ratio of weights at the upper end.
    """

    low: float
    typical: float
    high: float


def rounding_error(mantissa: int) -> ExpectedError:
    """Return the error of rounding to the nearest number with some bits of mantissa."""
    least = 12 * 4.0**mantissa
    return ExpectedError(*(10 * math.log10(ratio) for ratio in (least, least * math.log(4) / 0.75, 4 * least)))


def expected_text(figures: Figures) -> str:
    """Return if the measured errors are as expected of FP8, as sentences; empty without a measured error."""
    typical = figures.typical
    if typical is None:
        return ""
    expected = rounding_error(MANTISSA)
    ends = f"{expected.low:.1f} to {expected.high:.1f} dB"
    if typical < expected.low:
        verdict = f"The median, {typical:.1f} dB, is worse than expected of FP8"
    elif typical > expected.high:
        verdict = (
            f"The median, {typical:.1f} dB, is better than rounding to FP8 gives, as of weights that are numbers of few"
            " bits already"
        )
    else:
        verdict = f"The median, {typical:.1f} dB, is as expected of FP8"
    basis = (
        f"rounding to E4M3, with {MANTISSA} bits of mantissa, gives {expected.typical:.1f} dB for weights of many"
        f" sizes, and {ends} for others, unless many are far below the largest one under their scale, or few different"
        " values occur (derived from the step between neighboring numbers)"
    )
    low = sum(t.sqnr_db < expected.low for t in figures.tensors)
    below = ""
    if low:
        of = f"{counted(low, 'tensor')} of {len(figures.tensors):,} {'is' if low == 1 else 'are'} below that"
        below = f" {of}: many of their weights are small beside the largest one under their scale."
    return f"{verdict}: {basis}.{below}"


CLAMPED = (
    "Scales are derived from the largest values, so that only a rounded scale lets a value exceed the largest FP8"
    " number; the clamp sets it to that number, as rounding would."
)
"""Meaning of the number of clamped values."""
