"""Write the measured table of docs/evaluate.md: ``python -m benchmarks.tables.evaluate [--check]``.

With ``--check`` nothing is written, and a page that differs from the results is an error.
"""

from __future__ import annotations

from typing import Any

from benchmarks import drawing
from benchmarks.common import RESULTS, ROOT, read
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "evaluate.md"
BEGIN, END = "<!-- figures: benchmarks/tables/evaluate.py -->", "<!-- end of figures -->"
MB = 1e6


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each number of layers."""
    rows = [["layers", "checkpoint", "anonymous", "resident", "whole model in transformers: anonymous", "resident"]]
    whole = {record["layers"]: record for record in records if record["case"] == "whole model"}
    for record in records:
        if record["case"] != "evaluate":
            continue
        other = whole.get(record["layers"], {})
        sizes = [record, *([other] if other else [])]
        peaks = [f"{each[key] / MB:.0f} MB" for each in sizes for key in ("anonymous_bytes", "resident_bytes")]
        rows.append([str(record["layers"]), f"{record['source_bytes'] / 1e9:.2f} GB", *peaks, *[""] * (4 - len(peaks))])
    return drawing.table(rows)


def figures() -> str:
    """Return the generated part of the page."""
    records = read(RESULTS / "evaluate-cpu.jsonl")
    first = records[0]
    sizes = {record["layers"]: record["source_bytes"] for record in records}
    layer = (sizes[max(sizes)] - sizes[min(sizes)]) / (max(sizes) - min(sizes))
    return (
        f"A random Nemotron of {layer / MB:.0f} MB a layer and one result with a scale for each row,"
        f" {first['sequences']} x {first['length']} tokens, peaks of the whole process seen from outside. Python, torch"
        f" and transformers alone take {first['idle_anonymous_bytes'] / MB:.0f} MB. {first['processor']},"
        f" {first['cores']} cores, torch {first['torch']}, transformers {first['transformers']}, commit"
        f" {first['commit']}; `python -m benchmarks.measure.evaluate --whole`.\n\n{table(records)}"
    )


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
