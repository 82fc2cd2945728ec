"""Figures and plot of docs/cluster.md from the JSON lines: ``python -m benchmarks.draw_cluster [--check]``.

With ``--check`` nothing is written, and a document or a plot that is not what the results give is an error.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS, ROOT, read
from benchmarks.draw_convert import BLUE, GRAY, INK, ORANGE, SOFT, line, svg, table, text
from tools.pages import filled, put

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENT = ROOT / "docs" / "cluster.md"
PLOT = "cluster-340b.svg"
BEGIN, END = "<!-- figures: benchmarks/draw_cluster.py -->", "<!-- end of figures -->"
COLORS = (GRAY, ORANGE, "#4c9a6a", BLUE)


def workers_table(measured: list[dict[str, Any]], checks: list[dict[str, Any]]) -> str:
    """A row a case and contestant: seconds, how many times as fast as one worker, and what the model says."""
    rows = [["", "workers", "threads of each", "seconds", "times one worker", "calculated"]]
    said = {(c["case"], c["workers"], c["threads"]): c for c in checks}
    for run in measured:
        if run["what"] not in ("run", "computed"):
            continue
        check = said.get((run["case"], run["workers"], run["threads"]))
        rows.append(
            [
                f"{run['case']}: {run['shards']} of {run['bytes'] / run['shards'] / 1e6:.0f} MB",
                str(run["workers"]),
                str(run["threads"]),
                "{seconds:.2f} ({seconds_low:.2f}-{seconds_high:.2f})".format(**run),
                _times_one(run, measured),
                _calculated(check) if check else "",
            ]
        )
    return table(rows)


def _times_one(run: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    """How many times as fast as one worker with one core a run is."""
    if run["workers"] == run["threads"] == 1:
        return "1"
    if run["threads"] == 1:
        return "**{times_one:.2f}** ({times_one_low:.2f}-{times_one_high:.2f})".format(**run)
    # Of another cluster, so by the medians; the ratio that was recorded is to one thread that may use all cores.
    one = next(r for r in measured if r.get("case") == run["case"] and r["workers"] == r["threads"] == 1)
    return f"{one['seconds'] / run['seconds']:.2f}"


def _calculated(check: dict[str, Any]) -> str:
    """What the model says of a run, and by how much it is off."""
    off = check["calculated"] / check["measured"] - 1
    return f"{check['calculated']:.2f}, " + ("fitted" if check["fitted"] else f"{off:+.0%}")


def threads_text(measured: list[dict[str, Any]]) -> str:
    """What more threads give to a worker that has all cores."""
    run = next(r for r in measured if r["what"] == "run" and r["threads"] > 1)
    ratio = "{times_one:.2f} ({times_one_low:.2f}-{times_one_high:.2f})".format(**run)
    return (
        f"A worker that may use all cores is with {run['threads']} threads {ratio} times as fast as with one: reading,"
        " digests and writing have threads of their own beside those that cast."
    )


def by_storage(points: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The calculated runs of each storage, in the order of nodes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        found.setdefault(point["storage"], []).append(point)
    return found


def nodes_table(points: list[dict[str, Any]]) -> str:
    """Minutes by nodes and storage."""
    groups = by_storage(points)
    rows = [["nodes", *(f"storage of {name}" for name in groups)]]
    columns = zip(*groups.values(), strict=True)
    rows += [[str(column[0]["nodes"]), *(clock(point["seconds"]) for point in column)] for column in columns]
    bounds = (clock(group[0]["storage_seconds"]) for group in groups.values())
    rows.append(["reading alone", *bounds])
    return table(rows).replace("|---|", "|---:|", 1)


def clock(seconds: float) -> str:
    """Minutes and seconds, like ``12:04``; seconds alone under a minute."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d} min" if whole >= 60 else f"{seconds:.0f} s"


def nodes_plot(points: list[dict[str, Any]]) -> str:
    """Seconds by nodes on logarithmic axes, a line a storage; dashed, what twice the nodes would give at best."""
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
    """The generated part of the document, and the plot."""
    measured, calculated = read(RESULTS / "cluster-cpu.jsonl"), read(RESULTS / "cluster-340b.jsonl")
    first, cost = measured[0], calculated[0]
    if any(first[key] != cost[key] for key in ("commit", "processor", "ray")):
        raise SystemExit("the calculation is of another measurement: run benchmarks.simulate_cluster")
    points = [r for r in calculated if r["what"] == "nodes"]
    size = points[0]
    place = "in memory (tmpfs)" if first["destination"] == "memory" else "on disk"
    parts = [
        "### Measured: workers on one machine",
        f"{first['processor']}, {first['cores']} cores, {first['vector']}, Python {first['python']}, torch"
        f" {first['torch']}, Ray {first['ray']}, commit {first['commit']}. {first['rounds']} rounds, medians with the"
        f" least and the most; source in the page cache, result {place}; load average at the start"
        f" {first['load_average']:.1f}.",
        workers_table(measured, [r for r in calculated if r["what"] == "check"]),
        threads_text(measured),
        f"What the runs with one worker come to: {cost['fixed']:.2f} s for a run beside its shards,"
        f" {cost['shard'] * 1000:.0f} ms for a shard of whatever size, {cost['byte'] * 1e9:.2f} s of one core for a GB"
        f" of input, {cost['amax']:.0%} of it for the amax; the driver computes {cost['driver'] * 1000:.0f} ms for a"
        f" shard; {cost['parallel']:.0%} of a shard's work is divided among the threads of a task.",
        "### Calculated: Nemotron-4-340B",
        f"{size['shards']} shards, {size['read'] / 1e9:,.0f} GB in, {size['written'] / 1e9:,.0f} GB out; nodes of"
        f" {size['tasks'] * size['threads']} such cores, {size['tasks']} tasks of {size['threads']} threads each, a"
        f" network of {size['network'] * 8 / 1e9:.0f} Gbit/s to each node in either direction.",
        f"![Calculated seconds by nodes and storage]({PLOT})",
        nodes_table(points),
    ]
    return "\n\n".join(parts), nodes_plot(points)


def files() -> dict[Path, str]:
    """The files that the results give, by path."""
    body, plot = figures()
    return {DOCUMENT: filled(DOCUMENT, BEGIN, END, body), DOCUMENT.parent / PLOT: plot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    put(files(), check=options.check)


if __name__ == "__main__":
    main()
