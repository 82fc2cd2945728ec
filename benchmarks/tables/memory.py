"""Write the table of docs/memory.md from benchmarks/results: ``python -m benchmarks.tables.memory [--check]``.

With ``--check`` nothing is written, and a page that differs from the results is an error.
"""

from __future__ import annotations

from typing import Any

from benchmarks import drawing
from benchmarks.common import RESULTS, ROOT, read
from benchmarks.measure.memory import MIB
from nemotron_fp8.api import DEFAULT_MEMORY
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- figures: benchmarks/tables/memory.py -->", "<!-- end of figures -->"


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each checkpoint and budget, with its target, if any, and the digest of the result."""
    defaults = {r["case"]: r["peak_resident_bytes"] for r in records if r["budget"] == DEFAULT_MEMORY}
    small = next(iter(defaults.values()))
    digests = {case: {r["sha256"] for r in records if r["case"] == case} for case in defaults}
    rows = [
        ["checkpoint", "`--max-memory`", "peak resident", "above an idle process", "target", "digest of the result"]
    ]
    for record in records:
        target = ""
        if record["budget"] == DEFAULT_MEMORY:
            first = record["case"] == records[0]["case"]
            target = "under 480 MiB" if first else f"at most {(1.05 * small + 16 * MIB) / MIB:.0f} MiB"
        peak, idle = record["peak_resident_bytes"], record["idle_bytes"]
        same = "equal for every budget" if len(digests[record["case"]]) == 1 else "differs"
        rows.append(
            [
                record["case"],
                record["budget"],
                f"{peak / MIB:.0f} MiB",
                f"{(peak - idle) / MIB:.0f} MiB",
                target,
                f"`{record['sha256'][:8]}`, {same}",
            ]
        )
    return drawing.table(rows, left=len(rows[0]))


def figures() -> str:
    """Return the generated part of the page."""
    records = read(RESULTS / "memory-cpu.jsonl")
    first = records[0]
    return (
        f"{first['processor']}, {first['cores']} cores, Python {first['python']}, torch {first['torch']}, commit"
        f" {first['commit']}. A process that has loaded all modules and converts nothing takes"
        f" {first['idle_bytes'] / MIB:.0f} MiB.\n\n{table(records)}"
    )


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
