"""Run the fault tests: ``python -m tests.faults [--ci] [--rows 1,2] [--part 1/3] [--jobs 2] [--record FILE]``.

Prints a line for every row with the cases it reached; exits 1 if one of them found anything wrong, and 2 if one had to
be skipped for want of a tool, which ``--ci`` lets pass.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults import tools, world
from tests.faults.row import Outcome, Share, total
from tests.faults.rows import ROWS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.faults.row import Row

SHOWN = 5
NUMBERED = {row.number: row for row in ROWS}


def main() -> int:
    """Run the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ci", action="store_true", help="a share that takes under six minutes on two cores")
    parser.add_argument("--rows", default="", help="numbers, with commas in between; all by default")
    parser.add_argument("--part", default="1/1", help="1/3: the first of three parts of the cases of every row")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--record", type=Path, help="put the results into this file, a JSON object a line")
    options = parser.parse_args()
    chosen = [row for row in ROWS if not options.rows or row.number in options.rows.split(",")]
    if command := tools.own_name_space():  # small file systems are mounted; in a name space of its own anyone may
        os.execvp(command[0], [*command, sys.executable, "-m", "tests.faults", *sys.argv[1:]])
    missing = tools.missing()
    skipped = [line for row in chosen for line in left_out(row, missing)]
    print("".join(f"{line}\n" for line in skipped), end="", flush=True)
    if skipped and options.record:
        parser.error("what was skipped must not be recorded as if it had been run")
    chosen = [row for row in chosen if not can_do_nothing(row, missing)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so cleans up
    warm_up()
    results: list[dict[str, Any]] = []
    found: list[str] = []
    try:
        world.reference()
        world.reference("large")
        share = Share(full=not options.ci, missing=missing)
        results += [run(row, share, options.jobs, options.part, found) for row in chosen]
    finally:
        world.clean_up()
    if options.record:
        kept = options.record.read_text(encoding="utf-8").splitlines() if options.record.exists() else []
        lines = [line for line in kept if not replaced(json.loads(line), results)]
        about = {
            "kernel": platform.release(),
            "python": platform.python_version(),
            "share": "ci" if options.ci else "full",
        }
        lines += [json.dumps({**result, **about}) for result in results]
        lines.sort(key=lambda line: (int(json.loads(line)["row"]), json.loads(line)["part"]))
        options.record.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print()
    for result in results:
        verdict = "ok" if not result["wrong"] else f"{result['wrong']} WRONG"
        print(
            f"row {result['row']:>2}  {result['cases']:>10,} cases  {result['seconds']:>6.0f} s  {verdict:<8}"
            f"  {result['name']}: {NUMBERED[result['row']].note(Counter(result['counts']))}"
        )
    print("".join(f"{line}\n" for line in skipped), end="")
    if found:  # again, where whoever sees the end of a long log sees it
        print("\n".join(["", "what is wrong:", *found]))
        return 1
    return 2 if skipped and not options.ci else 0


def left_out(row: Row, missing: Mapping[str, str]) -> list[str]:
    """What of a row is not run for want of a tool, a line each."""
    lines = [f"row {row.number}: skipped: {missing[tool]}" for tool in row.needs if tool in missing]
    return lines + [
        f"row {row.number}: {what} are skipped: {missing[tool]}" for tool, what in row.partly.items() if tool in missing
    ]


def can_do_nothing(row: Row, missing: Mapping[str, str]) -> bool:
    """Whether no case of a row can run."""
    return any(tool in missing for tool in row.needs) or bool(row.partly and set(row.partly) <= set(missing))


def replaced(line: dict[str, Any], results: list[dict[str, Any]]) -> bool:
    """Whether a recorded result was taken again: the same part, or its row divided into other parts."""
    again = [result["part"] for result in results if result["row"] == line["row"]]
    return any(part == line["part"] or part.split("/")[1] != line["part"].split("/")[1] for part in again)


def warm_up() -> None:
    """Load what every process needs, once, before any is forked."""
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import nemotron_fp8.compare
    import nemotron_fp8.folder
    import nemotron_fp8.inplace
    import nemotron_fp8.selfcheck
    import nemotron_fp8.show
    import nemotron_fp8.verify  # noqa: F401  (loaded, not used)


def run(row: Row, share: Share, jobs: int, part: str, found: list[str]) -> dict[str, Any]:
    """Run a row or a part of it; print what is wrong as it is found, and add it to ``found``."""
    started = time.monotonic()
    first, parts = map(int, part.split("/"))
    every = list(row.cases(share))
    random.Random(0).shuffle(every)  # so that a part of a row has some of each kind
    cases = every[first - 1 :: parts]
    outcomes: list[Outcome] = []
    shown = 0
    # A worker is told to end by SIGTERM, and must simply do so.
    default = (signal.SIGTERM, signal.SIG_DFL)
    with multiprocessing.get_context("fork").Pool(1 if row.alone else jobs, signal.signal, default) as pool:
        for case, outcome in zip(cases, pool.imap(row.run, cases), strict=True):
            outcomes.append(outcome)
            if outcome.wrong and shown < SHOWN:
                shown += 1
                found.append(f"row {row.number}: {str(case)[:200]}: {'; '.join(outcome.wrong)[:1500]}")
                print(found[-1], flush=True)
    number, wrong, counts = total(outcomes)
    seconds = time.monotonic() - started
    number = counts.pop("cases", number)
    print(f"row {row.number}: {number:,} cases, {len(wrong)} wrong, {seconds:.0f} s", flush=True)
    return {
        "row": row.number,
        "name": row.name,
        "target": row.target,
        "cases": number,
        "wrong": len(wrong),
        "seconds": round(seconds, 1),
        "part": part,
        "of": [len(cases), len(every)],
        "counts": dict(counts),
    }


if __name__ == "__main__":
    sys.exit(main())
