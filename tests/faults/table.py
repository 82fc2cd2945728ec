"""Make the table of docs/faults.md from recorded results: ``python -m tests.faults.table [--check]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

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
    """The table, and where the figures come from."""
    lines = ["| row | what is done | target | cases reached | wrong | what was counted |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['row']} | {r['name']} | {r['target']} | {r['cases']:,} | {r['wrong']} | {r['note']} |"
        for r in sorted(results, key=lambda r: int(r["row"]))
    ]
    systems = sorted({f"Linux {r['kernel']}, Python {r['python']}, share: {r['share']}" for r in results})
    return "\n".join([*lines, "", f"Measured on {'; '.join(systems)}.", ""])


if __name__ == "__main__":
    sys.exit(main())
