"""Calculated, not measured: tables and plot of docs/cluster.md, ``python -m benchmarks.simulation.table [--check]``.

The source is benchmarks/results/cluster-340b.jsonl. With ``--check`` nothing is written, and a page or a plot that
differs from the results is an error.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS, ROOT, read
from benchmarks.drawing import BLUE, GRAY, INK, ORANGE, SOFT, line, svg, table, text
from benchmarks.tables.cluster import label
from tools.pages import filled, put

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENT = ROOT / "docs" / "cluster.md"
PLOT = "cluster-340b.svg"
BEGIN, END = "<!-- calculated: benchmarks/simulation/table.py -->", "<!-- end of calculated figures -->"
COLORS = (GRAY, ORANGE, "#4c9a6a", BLUE)


def checks_table(checks: list[dict[str, Any]], measured: list[dict[str, Any]]) -> str:
    """Return a row for each measured run: measured and calculated seconds, and the error of the calculation."""
    rows = [["", "workers", "threads of each", "measured (s)", "calculated (s)", "error"]]
    runs = {(run["case"], run["workers"], run["threads"]): run for run in measured if run["what"] == "run"}
    for check in checks:
        run = runs[check["case"], check["workers"], check["threads"]]
        error = "fitted" if check["fitted"] else f"{check['calculated'] / check['measured'] - 1:+.0%}"
        figures = [f"{check[key]:.2f}" for key in ("measured", "calculated")]
        rows.append([label(run), str(run["workers"]), str(run["threads"]), *figures, error])
    return table(rows)


def by_storage(points: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group the calculated runs by storage, in the order of nodes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        found.setdefault(point["storage"], []).append(point)
    return found


def nodes_table(points: list[dict[str, Any]]) -> str:
    """Return the calculated times by nodes and storage."""
    groups = by_storage(points)
    rows = [["nodes", *(f"storage of {name}" for name in groups)]]
    columns = zip(*groups.values(), strict=True)
    rows += [[str(column[0]["nodes"]), *(clock(point["seconds"]) for point in column)] for column in columns]
    bounds = (clock(group[0]["storage_seconds"]) for group in groups.values())
    rows.append(["reading alone", *bounds])
    return table(rows).replace("|---|", "|---:|", 1)


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, like ``12:04 min``; below a minute, in seconds."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d} min" if whole >= 60 else f"{seconds:.0f} s"


def nodes_plot(points: list[dict[str, Any]]) -> str:
    """Draw seconds by nodes on logarithmic axes, a line per storage; the dashed line is perfect scaling."""
    groups = by_storage(points)
    left, right, top, bottom = 80, 540, 30, 330
    nodes = [point["nodes"] for point in next(iter(groups.values()))]
    seconds = [point["seconds"] for point in points]
    low, high = 10 ** math.floor(math.log10(min(seconds))), 10 ** math.ceil(math.log10(max(seconds)))

    def at(count: float, time: float) -> tuple[float, float]:
        x = left + (right - left) * math.log2(count / nodes[0]) / math.log2(nodes[-1] / nodes[0])
        return x, bottom - (bottom - top) * math.log10(time / low) / math.log10(high / low)

    parts = []
    for count in nodes:
        x, _ = at(count, low)
        parts += [line(x, top, x, bottom, "#e3e5e9"), text(x, bottom + 20, str(count), "middle")]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            tick = digit * 10.0**power
            if low <= tick <= high:
                _, y = at(nodes[0], tick)
                parts += [line(left, y, right, y, "#e3e5e9"), text(left - 8, y + 4, f"{tick:,.0f} s", "end")]
    parts.append(text((left + right) / 2, bottom + 42, "nodes", "middle"))
    best = min(point["seconds"] for point in points if point["nodes"] == nodes[0])
    ends = (at(nodes[0], best), at(nodes[-1], max(low, best / nodes[-1])))
    if best / nodes[-1] < low:
        ends = (ends[0], at(best / low, low))
    parts.append(line(*ends[0], *ends[1], SOFT, ' stroke-dasharray="5 4"'))
    labels: list[float] = []
    for (name, group), color in zip(groups.items(), COLORS, strict=True):
        places = [at(point["nodes"], point["seconds"]) for point in group]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in places]
        y = max([places[-1][1], *(label + 17 for label in labels[-1:])])
        labels.append(y)
        parts.append(text(right + 12, y + 4, f"storage of {name}", extra=f' fill="{color}"'))
    parts.append(line(right + 12, top + 12, right + 40, top + 12, SOFT, ' stroke-dasharray="5 4"'))
    parts.append(text(right + 46, top + 16, "as fast as one node,", extra=f' fill="{INK}"'))
    parts.append(text(right + 46, top + 33, "times the nodes"))
    return svg(720, 386, "Calculated seconds of Nemotron-4-340B by nodes and storage", parts)


def figures() -> tuple[str, str]:
    """Return the generated part of the page, and the plot."""
    measured, calculated = read(RESULTS / "cluster-cpu.jsonl"), read(RESULTS / "cluster-340b.jsonl")
    first, cost = measured[0], calculated[0]
    if any(first[key] != cost[key] for key in ("commit", "processor", "ray")):
        raise SystemExit("the calculation is of another measurement: run benchmarks.simulation.simulate")
    points = [r for r in calculated if r["what"] == "nodes"]
    size = points[0]
    parts = [
        f"Costs, fitted to the measured runs with one worker: {cost['fixed']:.2f} s for a run without its shards,"
        f" {cost['shard'] * 1000:.0f} ms for a shard of any size, {cost['byte'] * 1e9:.2f} s of one core for a GB of"
        f" input, {cost['amax']:.0%} of it for the amax; the driver computes {cost['driver'] * 1000:.0f} ms per shard;"
        f" {cost['parallel']:.0%} of the work of a shard is divided among the threads of a task.",
        checks_table([r for r in calculated if r["what"] == "check"], measured),
        f"Nemotron-4-340B: {size['shards']} shards, {size['read'] / 1e9:,.0f} GB in,"
        f" {size['written'] / 1e9:,.0f} GB out; nodes of {size['tasks'] * size['threads']} such cores,"
        f" {size['tasks']} tasks of {size['threads']} threads each, a network of"
        f" {size['network'] * 8 / 1e9:.0f} Gbit/s per node and direction.",
        f"![Calculated seconds by nodes and storage]({PLOT})",
        nodes_table(points),
    ]
    return "\n\n".join(parts), nodes_plot(points)


def files() -> dict[Path, str]:
    """Return the generated files by path."""
    body, plot = figures()
    return {DOCUMENT: filled(DOCUMENT, BEGIN, END, body), DOCUMENT.parent / PLOT: plot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    put(files(), check=options.check)


if __name__ == "__main__":
    main()
