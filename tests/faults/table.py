"""Make the table of docs/faults.md from recorded results: ``python -m tests.faults.table [--check]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.rows import ROWS

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
PAGE = HERE.parent.parent / "docs" / "faults.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> int:
    """Write the table, or compare it with what stands there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; 1 if the table is not that of the results"
    )
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    made = f"{before}{BEGIN}\n{table([json.loads(line) for line in RESULTS.read_text().splitlines()])}{END}{after}"
    if options.check:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


def table(results: list[dict[str, Any]]) -> str:
    """The table, and where the figures come from; what of a row was not run is said."""
    lines = [
        "| row | fault | target | cases reached | wrong | seconds | counts |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        parts = [result for result in results if result["row"] == row.name]
        if not parts:
            lines.append(f"| {row.name} | {row.title} | {row.target} | not run yet | | | |")
            continue
        cases, wrong, seconds = (sum(part[key] for part in parts) for key in ("cases", "wrong", "seconds"))
        note = row.note(sum((Counter(part["counts"]) for part in parts), Counter()))
        reached = f"{cases:,}{extent(parts)}"
        lines.append(f"| {row.name} | {row.title} | {row.target} | {reached} | {wrong} | {seconds:,.0f} | {note} |")
    systems = sorted({f"Linux {r['kernel']}, Python {r['python']}, share: {r['share']}" for r in results})
    return "\n".join([*lines, "", f"Measured on {'; '.join(systems)}; two cases at a time on two cores.", ""])


def extent(parts: list[dict[str, Any]]) -> str:
    """Nothing if these parts are all that there are of a row, or else how much of it they are.

    Raises:
        SystemExit: parts of different divisions, which may overlap.
    """
    if len(divisions := {part["part"].split("/")[1] for part in parts}) > 1:
        raise SystemExit(f"error: row {parts[0]['row']} was divided in several ways: {sorted(divisions)}; run it again")
    points = max(part["of"][1] for part in parts)
    done = sum(part["of"][0] for part in parts)
    if done == points:
        return ""
    return f" ({100 * done // points}% of the row: {len(parts)} of its {divisions.pop()} parts, drawn at random)"


if __name__ == "__main__":
    sys.exit(main())
