"""The table of docs/memory.md from the JSON lines: ``python -m benchmarks.draw_memory [--check]``.

With ``--check`` nothing is written, and a document that is not what the results give is an error.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.bench_memory import MIB
from benchmarks.common import RESULTS, ROOT, read
from nemotron_fp8.api import DEFAULT_MEMORY
from tools.pages import filled, put

DOCUMENT = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- figures: benchmarks/draw_memory.py -->", "<!-- end of figures -->"


def table(records: list[dict[str, Any]]) -> str:
    """One row a checkpoint and budget, with the target where there is one, and whether the bytes are the same."""
    defaults = {r["case"]: r["peak_resident_bytes"] for r in records if r["budget"] == DEFAULT_MEMORY}
    small = next(iter(defaults.values()))
    digests = {case: {r["sha256"] for r in records if r["case"] == case} for case in defaults}
    rows = [["checkpoint", "`--max-memory`", "peak resident", "of it beyond an idle process", "target", "output"]]
    for record in records:
        target = ""
        if record["budget"] == DEFAULT_MEMORY:
            first = record["case"] == records[0]["case"]
            target = "under 480 MiB" if first else f"at most {(1.05 * small + 16 * MIB) / MIB:.0f} MiB"
        peak, idle = record["peak_resident_bytes"], record["idle_bytes"]
        same = "the same for each budget" if len(digests[record["case"]]) == 1 else "differs"
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
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def figures() -> str:
    """The generated part of the document."""
    records = read(RESULTS / "memory-cpu.jsonl")
    first = records[0]
    return (
        f"{first['processor']}, {first['cores']} cores, Python {first['python']}, torch {first['torch']}, commit"
        f" {first['commit']}. A process that has loaded everything and converts nothing takes"
        f" {first['idle_bytes'] / MIB:.0f} MiB.\n\n{table(records)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    put({DOCUMENT: filled(DOCUMENT, BEGIN, END, figures())}, check=options.check)


if __name__ == "__main__":
    main()
