"""The tables of docs/speed.md from the JSON lines: ``python -m benchmarks.draw_convert [--check]``.

With ``--check`` nothing is written, and a document that is not what the results give is an error.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from benchmarks.common import RESULTS, ROOT, read

DOCUMENT = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- figures: benchmarks/draw_convert.py -->", "<!-- end of figures -->"
MIB = 1 << 20


def grid(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def contestants(records: list[dict[str, Any]]) -> str:
    """Seconds and ratio to cp of each contestant, medians with the lowest and highest round."""
    rows = [["", "seconds", "over `cp`", "lowest, highest", "rounds", "peak resident"]]
    for r in records:
        if "contestant" in r:
            peak = r["peak_resident_bytes"]
            spread = f"{r['ratio_low']:.2f}, {r['ratio_high']:.2f}"
            memory = f"{peak / MIB:,.0f} MiB" if peak else ""
            rows.append(
                [r["contestant"], f"{r['seconds']:.2f}", f"{r['ratio_to_cp']:.2f}", spread, str(r["rounds"]), memory]
            )
    return grid(rows)


def phases(records: list[dict[str, Any]]) -> str:
    """What each phase costs on one thread, by itself."""
    rows = [["phase", "processor seconds", "seconds", "GB of input a second"]]
    for r in records:
        if "phase" in r:
            speed = f"{r['gigabytes'] / r['seconds']:.2f}"
            rows.append([r["phase"], f"{r['processor_seconds']:.2f}", f"{r['seconds']:.2f}", speed])
    return grid(rows)


def growth(records: list[dict[str, Any]]) -> str:
    """Plans and conversions by the number of tensors, shards and bytes."""
    rows = [["", "shards", "tensors", "size", "seconds", "peak resident", "open files"]]
    rows.extend(
        [
            r["what"],
            f"{r['shards']:,}",
            f"{r['tensors']:,}",
            f"{r['bytes'] / 1e6:,.0f} MB",
            f"{r['seconds']:.2f}",
            f"{r['peak_resident_bytes'] / MIB:,.0f} MiB",
            str(r.get("open_files", "")),
        ]
        for r in records
    )
    return grid(rows)


def figures() -> str:
    """The generated part of the document."""
    warm, cold = read(RESULTS / "convert-cpu.jsonl"), read(RESULTS / "convert-cpu-cold.jsonl")
    first = warm[0]
    machine = f"{first['processor']}, {first['cores']} cores, Python {first['python']}, torch {first['torch']}"
    return "\n\n".join(
        [
            f"{machine}, commit {first['commit']}. One shard of {first['gigabytes']:.2f} GB in bf16.",
            "### Source in the page cache",
            contestants(warm),
            "### Source on the disk",
            contestants(cold),
            "### Phases, one thread, source in the page cache",
            phases(warm),
            "### Growth",
            growth(read(RESULTS / "growth-cpu.jsonl")),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = DOCUMENT.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{DOCUMENT.name} lacks the marks {BEGIN} and {END}")
    wanted = pattern.sub(lambda _: f"{BEGIN}\n\n{figures()}\n\n{END}", text)
    if not options.check:
        DOCUMENT.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        raise SystemExit(f"{DOCUMENT.name} is not what benchmarks/results give: run without --check")


if __name__ == "__main__":
    main()
