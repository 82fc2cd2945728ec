"""The runner of the fault rows: it names what it skips, and the table claims no more than was run."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.row import Outcome, Row, Share
from tests.faults.rows import ROWS
from tests.faults.runner import Runner, cannot_run, left_out, replaced
from tests.faults.table import table
from tests.faults.tools import STRACE, TMPFS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BY_NAME = {row.name: row for row in ROWS}
WHY = {STRACE: "strace is missing", TMPFS: "a tmpfs cannot be mounted here"}


def test_a_row_without_its_tool_is_skipped_by_name() -> None:
    assert left_out(BY_NAME["sigkill"], WHY) == ["sigkill: skipped: strace is missing"]
    assert cannot_run(BY_NAME["sigkill"], WHY)
    assert not left_out(BY_NAME["sigkill"], {TMPFS: WHY[TMPFS]})


def test_a_row_that_lacks_a_tool_in_part_runs_the_rest_and_says_so() -> None:
    row, missing = BY_NAME["refused-writes"], {STRACE: WHY[STRACE]}
    assert left_out(row, missing) == ["refused-writes: the errors at every call are skipped: strace is missing"]
    assert not cannot_run(row, missing)
    assert {case[0] for case in row.cases(Share(full=True, missing=missing))} == {"full", "fills"}
    assert cannot_run(row, WHY)


def test_what_needs_no_tool_is_never_skipped() -> None:
    free = {row.name for row in ROWS if not row.needs and not row.partly}
    assert free == {
        "malformed-files",
        "header-fuzz",
        "bit-flips",
        "damaged-journal",
        "concurrent-runs",
        "polling-reader",
        "random-sequences",
        "hostile-names",
    }
    assert not any(left_out(BY_NAME[name], WHY) for name in free)


def result(part: str, *, done: int = 10, points: int = 10, wrong: int = 0, row: str = "header-fuzz") -> dict[str, Any]:
    about = {"kernel": "6", "python": "3", "share": "full"}
    counted = {"cases": done, "wrong": wrong, "seconds": 1.0, "of": [done, points], "counts": {"neither accepts": done}}
    return {"row": row, "part": part, **counted, **about}


def line(results: list[dict[str, Any]], row: str) -> list[str]:
    (found,) = (text for text in table(results).splitlines() if text.startswith(f"| {row} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found)[1:-1]]


def test_the_table_says_how_much_of_a_row_was_run() -> None:
    whole = [result("1/2", done=5), result("2/2", done=5, wrong=1)]
    assert line(whole, "header-fuzz")[3:6] == ["10", "1", "2"]
    assert line(whole[:1], "header-fuzz")[3] == "5 (50% of the row: 1 of its 2 parts, drawn at random)"
    assert line(whole, "sigkill")[3] == "not run yet"


def test_parts_of_different_divisions_are_not_added_up() -> None:
    with pytest.raises(SystemExit, match="divided in several ways"):
        table([result("1/2"), result("1/3")])


def test_a_result_takes_the_place_of_the_same_part_and_of_other_divisions() -> None:
    assert replaced(result("1/2"), [result("1/2")])
    assert replaced(result("1/3"), [result("1/2")])
    assert not replaced(result("2/2"), [result("1/2")])
    assert not replaced(result("1/2", row="malformed-files"), [result("1/2")])


class Odd(Row):
    """A row of four cases, of which the odd ones end wrong."""

    name, title, target = "odd", "odd numbers", "none"

    def cases(self, share: Share) -> Iterator[int]:
        yield from range(share.of(4, ci=2))

    def run(self, case: int) -> Outcome:
        return Outcome([f"{case} is odd"] if case % 2 else [], {"even": 1 - case % 2})


def test_a_wrong_case_is_returned_counted_and_recorded(tmp_path: Path) -> None:
    lines: list[str] = []
    runner = Runner(Share(full=True), "1/1", 2, lines.append)
    assert sorted(runner.run(Odd())) == ["odd: 1: 1 is odd", "odd: 3: 3 is odd"]
    assert lines[-1].startswith("odd: 4 cases, ")
    assert "2 WRONG: 2 even" in lines[-1]
    runner.record(tmp_path / "results.jsonl")
    (recorded,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (recorded["cases"], recorded["wrong"], recorded["counts"], recorded["share"]) == (4, 2, {"even": 2}, "full")


def test_a_part_takes_its_share_of_the_cases() -> None:
    halves = [Runner(Share(full=True), f"{part}/2", 1, lambda _: None) for part in (1, 2)]
    for runner in halves:
        runner.run(Odd())
    assert [runner.results[0]["of"] for runner in halves] == [[2, 4], [2, 4]]
    assert sum(runner.results[0]["wrong"] for runner in halves) == 2
