"""Write the measured figures of docs/cluster.md: ``python -m benchmarks.tables.cluster [--check]``.

The source is benchmarks/results. With ``--check`` nothing is written, and a page that differs from the results is an
error. `benchmarks.simulation` writes the calculated figures.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import RESULTS, ROOT, read
from benchmarks.drawing import table
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "cluster.md"
BEGIN, END = "<!-- figures: benchmarks/tables/cluster.py -->", "<!-- end of figures -->"


def workers_table(measured: list[dict[str, Any]]) -> str:
    """Return a row for each case and contestant: seconds, and speed relative to one worker."""
    rows = [["", "workers", "threads of each", "seconds", "times one worker"]]
    rows += [
        [
            label(run),
            str(run["workers"]),
            str(run["threads"]),
            "{seconds:.2f} ({seconds_low:.2f}-{seconds_high:.2f})".format(**run),
            _times_one(run, measured),
        ]
        for run in measured
        if run["what"] in ("run", "computed")
    ]
    return table(rows)


def label(run: dict[str, Any]) -> str:
    """Return the name of a case, with the number and the size of its shards."""
    return f"{run['case']}: {run['shards']} of {run['bytes'] / run['shards'] / 1e6:.0f} MB"


def _times_one(run: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    """Return the speed of a run relative to one worker with one core."""
    if run["workers"] == run["threads"] == 1:
        return "1"
    if run["threads"] == 1:
        return "**{times_one:.2f}** ({times_one_low:.2f}-{times_one_high:.2f})".format(**run)
    # The recorded ratio is relative to one thread on a cluster whose node has all cores; this one is of medians.
    one = next(r for r in measured if r.get("case") == run["case"] and r["workers"] == r["threads"] == 1)
    return f"{one['seconds'] / run['seconds']:.2f}"


def threads_text(measured: list[dict[str, Any]]) -> str:
    """Describe the gain of more threads for a worker that has all cores."""
    run = next(r for r in measured if r["what"] == "run" and r["threads"] > 1)
    ratio = "{times_one:.2f} ({times_one_low:.2f}-{times_one_high:.2f})".format(**run)
    return (
        f"With all cores, a worker of {run['threads']} threads is {ratio} times as fast as a worker of one: reading,"
        " digests and writing had their own threads then, apart from those that cast."
    )


def figures() -> str:
    """Return the generated part of the page."""
    measured = read(RESULTS / "cluster-cpu.jsonl")
    first = measured[0]
    place = "in memory (tmpfs)" if first["destination"] == "memory" else "on disk"
    parts = [
        f"{first['processor']}, {first['cores']} cores, {first['vector']}, Python {first['python']}, torch"
        f" {first['torch']}, Ray {first['ray']}, commit {first['commit']}. {first['rounds']} rounds: medians, with the"
        f" fastest and the slowest; source in the page cache, result {place}; load average at the start"
        f" {first['load_average']:.1f}.",
        workers_table(measured),
        threads_text(measured),
    ]
    return "\n\n".join(parts)


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
