"""Write the figures of best scales in docs/scales.md: ``python -m benchmarks.tables.best_scales [--check]``.

With ``--check`` nothing is written, and a page that differs from the results is an error.
"""

from __future__ import annotations

from typing import Any

from benchmarks import drawing
from benchmarks.common import RESULTS, ROOT, read
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "scales.md"
BEGIN, END = "<!-- figures: benchmarks/tables/best_scales.py -->", "<!-- end of best scales -->"
WAYS = {
    "no digests": "conversion without digests",
    "digests": "conversion",
    "no digests, statistics": "conversion without digests, with statistics",
    "verification": "verification with the source",
}


def error_table(records: list[dict[str, Any]]) -> str:
    """Return a row for each kind of weights and length of rows: the error under both choices."""
    rows = [["weights", "columns", "error, amax", "error, best", "less by"]]
    rows += [
        [r["weights"], f"{r['columns']:,}", f"{r['amax']:.4f}", f"{r['best']:.4f}", f"{1 - r['best'] / r['amax']:.1%}"]
        for r in records
        if r["what"] == "error"
    ]
    return drawing.table(rows)


def speed_table(records: list[dict[str, Any]]) -> str:
    """Return a row for each way: seconds of processors under both choices, and their ratio."""
    rows = [["seconds of processors", "amax", "best", "times", "range"]]
    for way, title in WAYS.items():
        found = next(r for r in records if (r["what"], r.get("way")) == ("processor_seconds", way))
        span = f"{found['ratio_low']:.2f}-{found['ratio_high']:.2f}"
        rows.append([title, *(f"{found[key]:.2f}" for key in ("amax", "best", "ratio")), span])
    return drawing.table(rows)


def figures() -> str:
    """Return the generated part of the page."""
    records = read(RESULTS / "best-scales-cpu.jsonl")
    first = records[0]
    return (
        f"{first['processor']}, {first['cores']} cores, torch {first['torch']}, commit {first['commit']};"
        f" {first['gigabytes']:.2f} GB in the page cache, medians of {first['rounds']} rounds."
        f"\n\n{error_table(records)}\n\n{speed_table(records)}"
    )


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
