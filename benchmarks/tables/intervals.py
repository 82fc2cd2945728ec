"""Write the intervals in docs/evaluate.md from benchmarks/results: ``python -m benchmarks.tables.intervals [--check]``.

With ``--check`` nothing is written, and a page that differs from the results is an error.
"""

from __future__ import annotations

from typing import Any

from benchmarks import drawing
from benchmarks.common import RESULTS, ROOT, read
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "evaluate.md"
BEGIN, END = "<!-- figures: benchmarks/tables/intervals.py -->", "<!-- end of the intervals -->"


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each length, layout and figure, with the rates of both widths."""
    rows = [["sequences", "layout", "figure", "skewness", "±1 error, one division", "rate", "t", "±2", "rate", "t"]]
    for record in records:
        if record["width"] != 1:
            continue
        same = ("length", "layout", "what")
        wide = next(r for r in records if r["width"] == 2 and all(r[key] == record[key] for key in same))
        row = [f"{record['sequences']} x {record['length']}", record["layout"], record["what"]]
        row.append(f"{record['skewness']:.1f}")
        for found in (record, wide):
            row += [f"{found['held']} of {found['samples']}", f"{found['rate']:.1%}", f"{found['expected']:.1%}"]
        rows.append(row)
    return drawing.table(rows, left=3)


def figures() -> str:
    """Return the generated part of the page."""
    records = read(RESULTS / "intervals.jsonl")
    first = records[0]
    return (
        f"SmolLM2-135M on the default text, samples of {first['size']} sequences, {first['divisions']:,} divisions;"
        f" {first['processor']}, torch {first['torch']}, transformers {first['transformers']}, commit"
        f" {first['commit']}.\n\n{table(records)}"
    )


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
