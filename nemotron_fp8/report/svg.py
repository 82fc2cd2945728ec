"""The plots of a report as inline SVG, drawn without a plotting library.

Every drawing is 360 units wide and scales to the width of its place: one unit is one pixel of a phone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._display import escape
from nemotron_fp8._utils import format_bytes
from nemotron_fp8.report.series import (
    LINE_COLORS,
    color,
    power_ticks,
    round_ticks,
    row_step,
    size_series,
    thinned,
    whole_ticks,
)
from nemotron_fp8.report.summary import HALF_OCTAVES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.report.summary import Grid, Scales, Sizes


WIDTH = 360
LAYER = "layer"
LONGEST = 28
"""Characters of a label."""
SUPERSCRIPTS = str.maketrans(
    "-0123456789", "\N{SUPERSCRIPT MINUS}\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
CHARACTER = 6.2
"""Upper estimate of the width of a character of the labels, in units."""
TICK = 30
"""Units from one tick of the histogram to the next, at least."""
STEPS = 5
"""Most steps between the ticks of a vertical axis."""
MOST_DOTS = 128
"""Most points of a line that are drawn as dots, with their values as titles."""


def _svg(height: float, label: str, body: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _short(label: str) -> str:
    """Cut a label to its end, which distinguishes it: names come from untrusted files and may have any length."""
    return label if len(label) <= LONGEST else f"...{label[3 - LONGEST :]}"


def heat_map(grid: Grid, ends: tuple[float, float]) -> str:
    """Draw the SQNR by layer (down) and projection (across); the title of a cell has its weight and value."""
    low, high = ends
    rows, columns = [_short(row) for row in grid.rows], [_short(column) for column in grid.columns]
    left = min(max(map(len, [*rows, LAYER])) * CHARACTER + 6, WIDTH / 2)
    top = max(map(len, columns), default=1) * CHARACTER + 6
    width = (WIDTH - left) / max(len(grid.columns), 1)
    height = 14.0 if row_step(len(rows)) == 1 else 10.0
    body = [_text(left - 4, top - 4, LAYER, "end")]
    apart = max(1, math.ceil(CHARACTER * 2 / width))  # the height of a line
    for i, label in list(enumerate(columns))[::apart]:
        x = min(left + (i + 0.5) * width + 3.5, WIDTH - 4)
        body.append(_text(x, top - 4, label, extra=f' transform="rotate(-90 {x:.1f} {top - 4:.1f})"'))
    for i, label in list(enumerate(rows))[:: row_step(len(rows))]:
        body.append(_text(left - 4, top + (i + 0.5) * height + 3.5, label, "end"))
    for (row, column), value in sorted(grid.cells.items()):
        x, y = left + column * width, top + row * height
        shown = "no signal" if math.isnan(value) else f"{value:.2f} dB"
        body.append(
            f'<rect class="cell" x="{x:.2f}" y="{y:.2f}" width="{width - 1:.2f}" height="{height - 1:.2f}"'
            f' fill="{color(value, low, high)}"><title>{escape(grid.names[row, column])}: {shown}</title></rect>'
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
    return _svg(bottom + 26, "Signal-to-quantization-noise ratio by layer and projection", body)


def histogram(scales: Scales, ends: tuple[int, int]) -> str:
    """Draw the number of scales by size, in half powers of two, from the first bin of ``ends`` to the last."""
    if not scales.bins:
        return ""
    first, last = ends
    left, top, height = 14.0, 18.0, 120.0
    width = (WIDTH - 2 * left) / (last - first + 1)
    most = max(scales.bins.values())
    body = [_text(left, 11, f"{most:,} in the highest bar")]
    for place, count in scales.bins.items():
        tall = max(count / most * height, 1.0)  # so that one scale in a million is visible
        low, high = (2 ** (k / HALF_OCTAVES) for k in (place, place + 1))
        body.append(
            f'<rect class="bar" x="{left + (place - first) * width:.2f}" y="{top + height - tall:.2f}"'
            f' width="{max(width - 1, 0.5):.2f}" height="{tall:.2f}">'
            f"<title>{low:.3g} to {high:.3g}: {count:,}</title></rect>"
        )
    for k, exponent in power_ticks(first, last, int((WIDTH - 2 * left) / TICK)).items():
        x = left + (k - first) * width
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + height:.1f}" y2="{top + height + 4:.1f}"/>')
        body.append(_text(x, top + height + 16, "2" + str(exponent).translate(SUPERSCRIPTS), "middle"))
    body.append(f'<line x1="{left}" x2="{WIDTH - left}" y1="{top + height:.1f}" y2="{top + height:.1f}"/>')
    return _svg(top + height + 22, "Distribution of the scales", body)


def size_bars(sizes: Sizes) -> str:
    """Draw the bytes of source and result as bars of one scale; those of the result by kind."""
    series = size_series(sizes)
    most = max(sizes.source or 0, sizes.result, 1)
    body, y = [], 0.0
    for label, kinds in series.items():
        body.append(_text(0, y + 11, f"{label}  {format_bytes(sum(kinds.values()))}"))
        x = 0.0
        for kind, count in kinds.items():
            long = count / most * WIDTH
            body.append(
                f'<rect class="{kind.lower()}" x="{x:.2f}" y="{y + 16:.1f}" width="{long:.2f}" height="18">'
                f"<title>{kind}: {format_bytes(count)}</title></rect>"
            )
            x += long
        y += 44
    x = 0.0
    for kind, count in series["result"].items():
        label = f"{kind} {format_bytes(count)}"
        body.append(f'<rect class="{kind.lower()}" x="{x:.1f}" y="{y + 2:.1f}" width="10" height="10"/>')
        body.append(_text(x + 14, y + 11, label))
        x += 14 + len(label) * CHARACTER + 10
    return _svg(y + 18, "Sizes before and after", body)


class Line(NamedTuple):
    """A line of a plot: its label, and points from left to right."""

    label: str
    points: Sequence[tuple[float, float]]


def line_plot(lines: Sequence[Line], ends: tuple[int, int], across: str, up: str, label: str) -> str:
    """Draw lines above 0 with a common scale; the title of a dot has its values.

    Args:
        lines: the lines.
        ends: first and last whole number of the horizontal axis.
        across: name of the horizontal axis.
        up: name of the vertical axis.
        label: description of the plot.
    """
    first, last = ends
    drawn = [thinned(line.points) for line in lines]
    ticks = round_ticks(max((y for points in drawn for _, y in points), default=0.0), STEPS)
    names = [f"{tick:.6g}" for tick in ticks]
    left, top, tall = max(map(len, names)) * CHARACTER + 6, 20.0, 150.0
    wide, bottom = WIDTH - left - 8, top + tall

    def place(x: float, y: float) -> tuple[float, float]:
        part = (x - first) / (last - first) if last > first else 0.5
        return left + part * wide, bottom - min(max(y / ticks[-1], 0.0), 1.0) * tall

    body = [_text(0, 10, up)]
    for tick, name in zip(ticks, names, strict=True):
        y = place(first, tick)[1]
        body.append(f'<line class="grid" x1="{left:.1f}" x2="{left + wide:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(left - 4, y + 3.5, name, "end"))
    apart = max(len(str(last)), 3) * CHARACTER + 10
    for number in whole_ticks(first, last, max(int(wide / apart), 1)):
        x = place(number, 0)[0]
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>')
        body.append(_text(min(x, WIDTH - len(str(number)) * CHARACTER / 2), bottom + 15, str(number), "middle"))
    body.append(_text(left + wide / 2, bottom + 29, across, "middle"))
    for number, points in enumerate(drawn):
        corners = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        body.append(f'<polyline class="line {_class_of(number)}" points="{path}"/>')
        if len(points) <= MOST_DOTS:
            body += [
                f'<circle class="dot {_class_of(number)}" cx="{x:.1f}" cy="{y:.1f}" r="2">'
                f"<title>{escape(lines[number].label)}, {across} {point[0]:.6g}: {point[1]:.3g}</title></circle>"
                for point, (x, y) in zip(points, corners, strict=True)
            ]
    height = bottom + 32
    for number, line in enumerate(lines if len(lines) > 1 else ()):
        y = height + 12
        body.append(
            f'<line class="line {_class_of(number)}" x1="{left:.1f}" x2="{left + 18:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        body.append(_text(left + 24, y + 3.5, _short(line.label)))
        height += 16
    return _svg(height + 6, label, body)


def _class_of(number: int) -> str:
    """Return the classes of a line: its color, and whether it is dashed."""
    return f"s{number % len(LINE_COLORS)}{' again' if number >= len(LINE_COLORS) else ''}"
