"""Write the speed in docs/scales.md from benchmarks/results: ``python -m benchmarks.tables.scales [--check]``.

With ``--check`` nothing is written, and a page that differs from the results is an error.
"""

from __future__ import annotations

from typing import Any

from benchmarks import drawing
from benchmarks.common import RESULTS, ROOT, read
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "scales.md"
BEGIN, END = "<!-- figures: benchmarks/tables/scales.py -->", "<!-- end of the speed -->"


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each layout: seconds, and their ratio to blocks whose scales are not rounded."""
    rows = [["layout", "seconds of processors", "times block", "range", "seconds", "times block", "range"]]
    for name in dict.fromkeys(record["layout"] for record in records):
        row = [name]
        for what in ("processor_seconds", "seconds"):
            found = next(r for r in records if (r["layout"], r["what"]) == (name, what))
            row += [
                f"{found['value']:.2f}",
                f"{found['ratio']:.2f}",
                f"{found['ratio_low']:.2f}-{found['ratio_high']:.2f}",
            ]
        rows.append(row)
    return drawing.table(rows)


def figures() -> str:
    """Return the generated part of the page."""
    records = read(RESULTS / "scales-cpu.jsonl")
    first = records[0]
    return (
        f"{first['processor']}, {first['cores']} cores, torch {first['torch']}, commit {first['commit']};"
        f" {first['gigabytes']:.2f} GB in the page cache, without digests, medians of {first['rounds']} rounds.\n\n"
        f"{table(records)}"
    )


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
