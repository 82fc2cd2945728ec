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
    """The table, and where the figures come from. A row that was run in parts must be there with all of them."""
    lines = [
        "| row | what is done | target | cases reached | wrong | seconds | what was counted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        parts = [result for result in results if result["row"] == row.number]
        count = int(parts[0]["part"].split("/")[1])
        if {part["part"] for part in parts} != {f"{i}/{count}" for i in range(1, count + 1)}:
            raise SystemExit(f"error: row {row.number} is not complete: {[part['part'] for part in parts]}")
        cases, wrong, seconds = (sum(part[key] for part in parts) for key in ("cases", "wrong", "seconds"))
        note = row.note(sum((Counter(part["counts"]) for part in parts), Counter()))
        lines.append(f"| {row.number} | {row.name} | {row.target} | {cases:,} | {wrong} | {seconds:,.0f} | {note} |")
    systems = sorted({f"Linux {r['kernel']}, Python {r['python']}, share: {r['share']}" for r in results})
    return "\n".join([*lines, "", f"Measured on {'; '.join(systems)}; two cases at a time on two cores.", ""])


if __name__ == "__main__":
    sys.exit(main())
