"""Copy the results of a run into benchmarks/results: ``python -m benchmarks.gpu.publish DIR``.

`benchmarks.tables.gpu` then writes them into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.lines import kind, problems, read, with_shares, wrong_results

if TYPE_CHECKING:
    from benchmarks.gpu.lines import Line

DEVICES = ("H100", "H200")
"""GPUs whose results are published, each in files of its own."""
RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Write both files; return 1 without writing if the run has problems.

    A part of a run that was cut off can be published, but no run with wrong bytes or failed tests.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.publish", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="folder of the results of a run")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the published results")
    parser.add_argument("--append", action="store_true", help="keep the results of earlier runs")
    parser.add_argument("--partial", action="store_true", help="accept errors and stages without a report")
    options = parser.parse_args(arguments)
    lines = read(options.folder / "results.jsonl")
    stages = sorted({line["stage"] for line in lines})
    wrong = wrong_results(lines) if options.partial else problems(lines, stages)
    device = next((name for name in DEVICES if any(name in str(line.get("device")) for line in lines)), None)
    if wrong or device is None:
        known = f"not the results of {' or '.join(DEVICES)}"
        print("\n".join(["error: not published", *(wrong or [known])]), file=sys.stderr)
        return 1
    for kind_of_lines, chosen in (("kernels", kernels(lines)), ("convert", conversion(lines))):
        name = f"{kind_of_lines}-{device.lower()}.jsonl"
        if not chosen:
            continue
        with (options.into / name).open("a" if options.append else "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, sort_keys=True) + "\n" for line in chosen)
    return 0


def kernels(lines: list[Line]) -> list[Line]:
    """Return figures with their shares of the roof, host times, and one line for each check."""
    chosen = [line for line in with_shares(lines) if kind(line) in ("figure", "host", "tests")]
    totals: dict[str, Line] = {}
    for line in lines:
        if kind(line) == "compared":
            total = totals.setdefault(line["check"], line | {"compared": 0, "different": 0})
            total["compared"] += line["compared"]
            total["different"] += line["different"]
    return chosen + list(totals.values())


def conversion(lines: list[Line]) -> list[Line]:
    """Return the lines of the stage that converts a checkpoint, if it was finished."""
    own = [line for line in lines if line["stage"] == "conversion" and kind(line) == "event"]
    found = [line for line in own if line["case"] not in ("exit", "skipped")]
    return found if any(line["case"] == "tmpfs pwrite" and line["files"] == 4 for line in found) else []


if __name__ == "__main__":
    sys.exit(main())
