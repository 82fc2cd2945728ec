"""Series, colors and ticks of the plots, shared by the SVG and the PNG files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nemotron_fp8.report.summary import HALF_OCTAVES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.report.summary import Grid, Scales, Sizes


MOST_DB = 10_000.0
"""Largest SQNR that a scale of colors shows; float32 values cannot have a tenth of it."""
COLORS = {"source": "#7a8794", "FP8": "#3b6fb6", "scales": "#e08a1e", "other": "#7a8794"}
"""Colors of the kinds of bytes, on a light background."""
# Perceptually uniform, and readable without distinguishing red from green. Source: eight colors of matplotlib's viridis
# (CC0).
RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
NO_SIGNAL = "#9e9e9e"
"""Color of a weight without signal."""
LEAST_RANGE_DB = 1.0
"""Smallest range of the color scale, so that differences of a hundredth of a dB remain invisible."""
LINE_COLORS = ("#3b6fb6", "#b86200", "#1b7f5c", "#8a4fb0", "#b3403a", "#5c6670")
"""Colors of lines on a light background; further lines are dashed, in the same colors."""
DARK_LINE_COLORS = ("#7fb0f0", "#f0a94a", "#5cc79b", "#c79be8", "#f08a80", "#a9b4be")
"""The same on a dark background."""
MOST_POINTS = 512
"""Most points of a line; more are less than a pixel apart on a phone."""
LEAST_HIGH = 1e-30
"""Largest value of a plot that counts as 0."""
LABELED_ROWS = 48
"""Up to this number of layers every row has a label; above, every fourth one."""


def decibels(value: float) -> str:
    """Return an SQNR as text: in dB, ``exact`` without noise, ``none`` without signal, ``lost`` for minus infinity."""
    if math.isnan(value):
        return "none"
    return f"{value:.2f} dB" if math.isfinite(value) else ("exact" if value > 0 else "lost")


def size_series(sizes: Sizes) -> dict[str, dict[str, int]]:
    """Return the bytes of each bar by kind: ``source``, if its size is known, and ``result``."""
    result = {"FP8": sizes.codes, "scales": sizes.scales, "other": sizes.unquantized}
    return ({} if sizes.source is None else {"source": {"source": sizes.source}}) | {"result": result}


def color_range(grids: list[Grid]) -> tuple[float, float]:
    """Return the SQNR at both ends of the color scale, common to all grids that are shown together."""
    finite = [value for grid in grids for value in grid.cells.values() if abs(value) <= MOST_DB]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    pad = max(LEAST_RANGE_DB - (high - low), 0.0) / 2
    return math.floor(10 * (low - pad)) / 10, math.ceil(10 * (high + pad)) / 10


def color(value: float, low: float, high: float) -> str:
    """Return the color of an SQNR between the ends of the scale; gray for NaN."""
    if math.isnan(value):
        return NO_SIGNAL
    part = min(max((value - low) / (high - low), 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(part), len(RAMP) - 2)
    ends = [[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in RAMP[i : i + 2]]
    return "#" + "".join(f"{round(a + (b - a) * (part - i)):02x}" for a, b in zip(*ends, strict=True))


def row_step(rows: int) -> int:
    """Return the number of rows from one label to the next."""
    return 1 if rows <= LABELED_ROWS else 4


def bins_of(all_scales: list[Scales]) -> tuple[int, int] | None:
    """Return the first and the last bin of histograms that are shown together; None if there is no scale."""
    places = [place for scales in all_scales for place in scales.bins]
    return (min(places), max(places)) if places else None


def power_ticks(first: int, last: int, room: int) -> dict[int, int]:
    """Return the bins that begin at a power of two, and its exponent: at most ``room`` of them."""
    powers = [k for k in range(first, last + 2) if k % HALF_OCTAVES == 0]
    return {k: k // HALF_OCTAVES for k in powers[:: max(1, math.ceil(len(powers) / room))]}


def round_ticks(high: float, room: int) -> list[float]:
    """Return ticks from 0 to the first one at or above ``high``, at steps of 1, 2 or 5 times a power of ten.

    Args:
        high: the largest value; 0 or less counts as 1.
        room: most steps.
    """
    high = high if high > LEAST_HIGH else 1.0
    step = 10.0 ** math.floor(math.log10(high / room))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if math.ceil(high / (step * factor)) <= room)
    return [step * number for number in range(math.ceil(high / step) + 1)]


def whole_ticks(first: int, last: int, room: int) -> list[int]:
    """Return at most ``room`` + 1 numbers from ``first`` to ``last``, at steps of 1, 2 or 5 times a power of ten."""
    step = max(1, math.ceil(round_ticks(max(last - first, 1) / room, 1)[1]))
    return list(range(-(-first // step) * step, last + 1, step))


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS` points: of neighboring ones the highest."""
    step = math.ceil(len(points) / MOST_POINTS) or 1
    return [max(points[at : at + step], key=lambda point: point[1]) for at in range(0, len(points), step)]
