"""Write the table of docs/scales.md from benchmarks/results: ``python -m benchmarks.tables.requantization [--check]``.

With ``--check`` nothing is written, and a page that differs from the results is an error.
"""

from __future__ import annotations

from typing import Any

from benchmarks import drawing
from benchmarks.common import RESULTS, ROOT, read
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "scales.md"
BEGIN, END = "<!-- figures: benchmarks/tables/requantization.py -->", "<!-- end of figures -->"
TITLES = {
    "none": "blocks of 128x128, scales as computed",
    "power-of-two": "blocks of 128x128, powers of two (default)",
    "mx": "MX: 32 inputs, powers of two",
}


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each kind of weights and scales: the error as stored and as served, and the changed values."""
    head = ["weights", "scales", "error as stored", "error in vLLM", "error in SGLang", "values that engines change"]
    found = {(r["weights"], r["scales"], r["engine"]): r for r in records}
    rows = [head]
    for weights, scales in dict.fromkeys((r["weights"], r["scales"]) for r in records):
        stored = found[weights, scales, ""]
        served = [found.get((weights, scales, engine)) for engine in ("vLLM", "SGLang")]
        changed = [f"{r['changed'] / r['values']:.1%}" if r["changed"] else "none" for r in served if r]
        rows.append(
            [
                weights,
                TITLES[scales],
                f"{stored['error']:.4f}",
                *(f"{r['error']:.4f}" if r else "as stored" for r in served),
                changed[0] if len(set(changed)) == 1 else ", ".join(changed) or "none",
            ]
        )
    return drawing.table(rows, left=2)


def figures() -> str:
    """Return the generated part of the page."""
    records = read(RESULTS / "requantization.jsonl")
    return f"torch {records[0]['torch']}, commit {records[0]['commit']}.\n\n{table(records)}"


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
