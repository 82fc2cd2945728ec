"""Run the cases of fault rows in a pool of processes, and record what they counted."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.faults.row import Outcome, total

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.faults.row import Row, Share

SHOWN = 5
"""Wrong cases that a row reports in full."""


@dataclass
class Runner:
    """Runs rows with the same options, and collects their results.

    Attributes:
        share: how many cases of each row run.
        part: ``"1/3"`` for the first of three parts of the cases of every row.
        jobs: cases that run at a time.
        report: prints a line at once.
        results: one JSON object for each row that ran.
        skipped: a line for each row, or part of one, that could not run here.
    """

    share: Share
    part: str
    jobs: int
    report: Callable[[str], None]
    results: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def run(self, row: Row) -> list[str]:
        """Run a row, and return a line for each of the first wrong cases."""
        started = time.monotonic()
        first, parts = map(int, self.part.split("/"))
        every = list(row.cases(self.share))
        random.Random(0).shuffle(every)  # so that a part of a row has some of each kind
        cases = every[first - 1 :: parts]
        outcomes: list[Outcome] = []
        found: list[str] = []
        # pytest and the fixture handle SIGTERM; a worker of the pool must simply end.
        default = (signal.SIGTERM, signal.SIG_DFL)
        with multiprocessing.get_context("fork").Pool(1 if row.alone else self.jobs, signal.signal, default) as pool:
            for case, outcome in zip(cases, pool.imap(row.run, cases), strict=True):
                outcomes.append(outcome)
                if outcome.wrong and len(found) < SHOWN:
                    found.append(f"{row.name}: {str(case)[:200]}: {'; '.join(outcome.wrong)[:1500]}")
                    self.report(found[-1])
        number, wrong, counts = total(outcomes)
        seconds = time.monotonic() - started
        number = counts.pop("cases", number)
        verdict = f"{len(wrong)} WRONG" if wrong else "ok"
        self.report(f"{row.name}: {number:,} cases, {seconds:.0f} s, {verdict}: {row.note(counts)}")
        about = {"row": row.name, "title": row.title, "target": row.target}
        figures = {"cases": number, "wrong": len(wrong), "seconds": round(seconds, 1)}
        extent = {"part": self.part, "of": [len(cases), len(every)], "counts": dict(counts)}
        self.results.append({**about, **figures, **extent})
        return found

    def record(self, file: Path) -> None:
        """Put the results into a file of JSON lines, in place of earlier ones of the same parts."""
        kept = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        lines = [line for line in kept if not replaced(json.loads(line), self.results)]
        system = {"kernel": platform.release(), "python": platform.python_version()}
        about = {**system, "share": "full" if self.share.full else "ci"}
        lines += [json.dumps({**result, **about}) for result in self.results]
        lines.sort(key=lambda line: (json.loads(line)["row"], json.loads(line)["part"]))
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def left_out(row: Row, missing: Mapping[str, str]) -> list[str]:
    """Return a line for each part of a row that cannot run for want of a tool."""
    lines = [f"{row.name}: skipped: {missing[tool]}" for tool in row.needs if tool in missing]
    return lines + [
        f"{row.name}: {what} are skipped: {missing[tool]}" for tool, what in row.partly.items() if tool in missing
    ]


def cannot_run(row: Row, missing: Mapping[str, str]) -> bool:
    """Return True if no case of a row can run without the missing tools."""
    return any(tool in missing for tool in row.needs) or bool(row.partly and set(row.partly) <= set(missing))


def replaced(line: dict[str, Any], results: list[dict[str, Any]]) -> bool:
    """Return True if a recorded result ran again: the same part, or its row divided into other parts."""
    again = [result["part"] for result in results if result["row"] == line["row"]]
    return any(part == line["part"] or part.split("/")[1] != line["part"].split("/")[1] for part in again)


def warm_up() -> None:
    """Load every module that a case needs before any process is forked."""
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import nemotron_fp8.api
    import nemotron_fp8.cli.output
    import nemotron_fp8.conversion.in_place
    import nemotron_fp8.destinations.comparison
    import nemotron_fp8.destinations.folder
    import nemotron_fp8.verification.self_check
    import nemotron_fp8.verification.verify  # noqa: F401  # loaded, not used
