"""The plots of a report as inline SVG, drawn without a plotting library, and their colors.

Every drawing is 360 units wide and scales to the width that it is given: one unit is one pixel of a phone.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from nemotron_fp8._utils import format_bytes

if TYPE_CHECKING:
    from nemotron_fp8.report.summary import Grid, Scales, Sizes


WIDTH = 360
LEAST_RANGE_DB = 1.0
"""Colors span at least so much: differences of a hundredth of a dB must not look like something."""
# Perceptually even and readable without telling red from green. Source: matplotlib's viridis (CC0), eight of its
# colors.
RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
LAYER = "layer"
LONGEST = 28
"""Characters of a label."""
SUPERSCRIPTS = str.maketrans(
    "-0123456789", "\N{SUPERSCRIPT MINUS}\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
CHARACTER = 6.2
"""Width of a character of the labels, in units, on the safe side."""


def color(value: float, low: float, high: float) -> str:
    """Return the color of a value between two ends; gray for what is no number."""
    if math.isnan(value):
        return "#9e9e9e"
    part = min(max((value - low) / (high - low), 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(part), len(RAMP) - 2)
    ends = [[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in RAMP[i : i + 2]]
    return "#" + "".join(f"{round(a + (b - a) * (part - i)):02x}" for a, b in zip(*ends, strict=True))


def span(grids: list[Grid]) -> tuple[float, float]:
    """The SQNR at both ends of the colors, the same for grids that stand side by side."""
    finite = [value for grid in grids for value in grid.cells.values() if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    pad = max(LEAST_RANGE_DB - (high - low), 0.0) / 2
    return math.floor(10 * (low - pad)) / 10, math.ceil(10 * (high + pad)) / 10


def _svg(height: float, label: str, body: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _short(label: str) -> str:
    """The end of a label, which tells it from others: names are strangers' text and may be of any length."""
    return label if len(label) <= LONGEST else f"...{label[3 - LONGEST :]}"


def heat_map(grid: Grid, ends: tuple[float, float]) -> str:
    """SQNR by layer (down) and projection (across); every cell tells its weight and value."""
    low, high = ends
    rows, columns = [_short(row) for row in grid.rows], [_short(column) for column in grid.columns]
    left = min(max(map(len, [*rows, LAYER])) * CHARACTER + 6, WIDTH / 2)
    top = max(map(len, columns), default=1) * CHARACTER + 6
    width = (WIDTH - left) / max(len(grid.columns), 1)
    height = 14.0 if len(grid.rows) <= 48 else 10.0
    body = [_text(left - 4, top - 4, LAYER, "end")]
    apart = max(1, math.ceil(CHARACTER * 2 / width))  # a line of text is taller than its characters are wide
    for i, label in list(enumerate(columns))[::apart]:
        x = min(left + (i + 0.5) * width + 3.5, WIDTH - 4)
        body.append(_text(x, top - 4, label, extra=f' transform="rotate(-90 {x:.1f} {top - 4:.1f})"'))
    every = 1 if len(grid.rows) <= 48 else 4
    for i, label in enumerate(rows):
        if i % every == 0:
            body.append(_text(left - 4, top + (i + 0.5) * height + 3.5, label, "end"))
    for (row, column), value in sorted(grid.cells.items()):
        x, y = left + column * width, top + row * height
        told = "no signal" if math.isnan(value) else f"{value:.2f} dB"
        body.append(
            f'<rect class="cell" x="{x:.2f}" y="{y:.2f}" width="{width - 1:.2f}" height="{height - 1:.2f}"'
            f' fill="{color(value, low, high)}"><title>{escape(grid.names[row, column])}: {told}</title></rect>'
        )
    bottom = top + len(grid.rows) * height + 10
    for i in range(64):
        shade = color(low + (high - low) * i / 63, low, high)
        body.append(
            f'<rect x="{left + i * (WIDTH - left) / 64:.2f}" y="{bottom:.1f}"'
            f' width="{(WIDTH - left) / 64 + 0.4:.2f}" height="8" fill="{shade}"/>'
        )
    body += [
        _text(left, bottom + 21, f"{low:g} dB"),
        _text(WIDTH, bottom + 21, f"{high:g} dB", "end"),
        _text((left + WIDTH) / 2, bottom + 21, "SQNR", "middle"),
    ]
    return _svg(bottom + 26, "Signal to quantization noise by layer and projection", body)


def bins_of(all_scales: list[Scales]) -> tuple[int, int] | None:
    """The first and the last bin of histograms that stand side by side; None where there is no scale."""
    places = [place for scales in all_scales for place in scales.bins]
    return (min(places), max(places)) if places else None


def histogram(scales: Scales, ends: tuple[int, int]) -> str:
    """How many scales there are of each size, in half powers of two, from one bin to another."""
    from nemotron_fp8.report.summary import HALF_OCTAVES

    if not scales.bins:
        return ""
    first, last = ends
    left, top, height = 14.0, 18.0, 120.0
    width = (WIDTH - 2 * left) / (last - first + 1)
    most = max(scales.bins.values())
    body = [_text(left, 11, f"{most:,} in the highest bar")]
    for place, count in scales.bins.items():
        tall = max(count / most * height, 1.0)  # one of a million must still be seen
        low, high = (2 ** (k / HALF_OCTAVES) for k in (place, place + 1))
        body.append(
            f'<rect class="bar" x="{left + (place - first) * width:.2f}" y="{top + height - tall:.2f}"'
            f' width="{max(width - 1, 0.5):.2f}" height="{tall:.2f}">'
            f"<title>{low:.3g} to {high:.3g}: {count:,}</title></rect>"
        )
    powers = [k for k in range(first, last + 2) if k % HALF_OCTAVES == 0]
    step = max(1, math.ceil(len(powers) * 30 / (WIDTH - 2 * left)))
    for k in powers[::step]:
        x = left + (k - first) * width
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + height:.1f}" y2="{top + height + 4:.1f}"/>')
        body.append(_text(x, top + height + 16, "2" + str(k // HALF_OCTAVES).translate(SUPERSCRIPTS), "middle"))
    body.append(f'<line x1="{left}" x2="{WIDTH - left}" y1="{top + height:.1f}" y2="{top + height:.1f}"/>')
    return _svg(top + height + 22, "Distribution of the scales", body)


def size_bars(sizes: Sizes) -> str:
    """Bytes before and after, to one measure; after, by what they are."""
    most = max(sizes.source or 0, sizes.result, 1)
    rows: list[tuple[str, list[tuple[str, int]]]] = []
    if sizes.source is not None:
        rows.append((f"source  {format_bytes(sizes.source)}", [("source", sizes.source)]))
    parts = [("FP8", sizes.codes), ("scales", sizes.scales), ("kept", sizes.unquantized)]
    rows.append((f"result  {format_bytes(sizes.result)}", parts))
    body, y = [], 0.0
    for label, pieces in rows:
        body.append(_text(0, y + 11, label))
        x = 0.0
        for kind, count in pieces:
            long = count / most * WIDTH
            body.append(
                f'<rect class="{kind.lower()}" x="{x:.2f}" y="{y + 16:.1f}" width="{long:.2f}" height="18">'
                f"<title>{kind}: {format_bytes(count)}</title></rect>"
            )
            x += long
        y += 44
    x = 0.0
    for kind, count in parts:
        label = f"{kind} {format_bytes(count)}"
        body.append(f'<rect class="{kind.lower()}" x="{x:.1f}" y="{y + 2:.1f}" width="10" height="10"/>')
        body.append(_text(x + 14, y + 11, label))
        x += 14 + len(label) * CHARACTER + 10
    return _svg(y + 18, "Sizes before and after", body)
