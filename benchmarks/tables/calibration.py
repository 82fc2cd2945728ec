"""Write the accuracy of stored scales in docs/calibration.md: ``python -m benchmarks.tables.calibration [--check]``.

With ``--check`` nothing is written, and a page that differs from the results is an error.
"""

from __future__ import annotations

from typing import Any

from benchmarks import drawing
from benchmarks.common import RESULTS, ROOT, read
from nemotron_fp8.evaluation.wording import SIGN, plain_number, with_error
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "calibration.md"
BEGIN, END = "<!-- figures: benchmarks/tables/calibration.py -->", "<!-- end of calibration -->"


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each result."""
    rows = [["activations and cache", "perplexity", "change", "KL (nats)", "same top token", "clipped values"]]
    for record in records:
        row = [record["recipe"], plain_number(record["perplexity"], 3)]
        if record["recipe"] == "source":
            rows.append([*row, "", "", "", ""])
            continue
        row += [
            with_error(100 * record["perplexity_change"], 100 * record["perplexity_error"], SIGN, "%", "+"),
            with_error(record["kl"], record["kl_error"], SIGN),
            with_error(100 * record["top1"], 100 * record["top1_error"], SIGN, "%"),
            f"{record['clipped_values']:,}" if record["static_values"] else "",
        ]
        rows.append(row)
    return drawing.table(rows)


def memory() -> str:
    """Return a sentence about the memory of calibrations of models of several depths."""
    records = read(RESULTS / "calibrate-cpu.jsonl")
    plain = {r["layers"]: r["anonymous_bytes"] / 1e6 for r in records if r["case"] == "calibrate"}
    counted = [r["anonymous_bytes"] / 1e6 for r in records if r["case"] != "calibrate"]
    depths = ", ".join(f"{size:.0f} MB with {layers} layers" for layers, size in sorted(plain.items()))
    first = records[0]
    return (
        f"A calibration takes one layer in memory, whatever the depth: {depths} of 92 MB (anonymous memory, seen from"
        f" outside; {first['idle_anonymous_bytes'] / 1e6:.0f} MB of it are Python, torch and transformers), and"
        f" {min(counted):.0f} to {max(counted):.0f} MB with a percentile."
    )


def figures() -> str:
    """Return the generated part of the page."""
    records = read(RESULTS / "calibration.jsonl")
    first, most = records[0], max(record["static_values"] for record in records)
    return (
        f"{first['model']}, calibrated on {first['calibration']} sequences of the default text and evaluated on"
        f" {first['sequences']} others, of {first['length']} tokens; weights with one scale for each tensor; {SIGN} one"
        f" standard error over sequences. Clipped values are beyond the range of their stored scale, of up to {most:,}."
        f" torch {first['torch']}, transformers {first['transformers']}, commit {first['commit']}."
        f"\n\n{table(records)}\n\n{memory()}"
    )


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
