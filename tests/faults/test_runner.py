"""What the fault tests say of themselves: what was skipped is named, and the table claims no more than was run."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.faults.__main__ import can_do_nothing, left_out, replaced
from tests.faults.row import Share
from tests.faults.rows import ROWS
from tests.faults.table import table
from tests.faults.tools import STRACE, TMPFS

BY_NUMBER = {row.number: row for row in ROWS}
WHY = {STRACE: "strace is missing", TMPFS: "a tmpfs cannot be mounted here"}


def test_a_row_without_its_tool_is_skipped_by_name() -> None:
    assert left_out(BY_NUMBER["1"], WHY) == ["row 1: skipped: strace is missing"]
    assert can_do_nothing(BY_NUMBER["1"], WHY)
    assert not left_out(BY_NUMBER["1"], {TMPFS: WHY[TMPFS]})


def test_a_row_that_lacks_a_tool_in_part_runs_the_rest_and_says_so() -> None:
    row, missing = BY_NUMBER["5"], {STRACE: WHY[STRACE]}
    assert left_out(row, missing) == ["row 5: the errors at every call are skipped: strace is missing"]
    assert not can_do_nothing(row, missing)
    assert {case[0] for case in row.cases(Share(full=True, missing=missing))} == {"full", "fills"}
    assert can_do_nothing(row, WHY)


def test_what_needs_no_tool_is_never_skipped() -> None:
    free = {row.number for row in ROWS if not row.needs and not row.partly}
    assert free == {"8", "9", "10", "11", "12", "14", "15", "16"}
    assert not any(left_out(BY_NUMBER[number], WHY) for number in free)


def result(part: str, *, done: int = 10, points: int = 10, wrong: int = 0, row: str = "9") -> dict[str, Any]:
    about = {"kernel": "6", "python": "3", "share": "full"}
    counted = {"cases": done, "wrong": wrong, "seconds": 1.0, "of": [done, points], "counts": {"neither accepts": done}}
    return {"row": row, "part": part, **counted, **about}


def line(results: list[dict[str, Any]], row: str) -> list[str]:
    (found,) = (text for text in table(results).splitlines() if text.startswith(f"| {row} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found)[1:-1]]


def test_the_table_says_how_much_of_a_row_was_run() -> None:
    whole = [result("1/2", done=5), result("2/2", done=5, wrong=1)]
    assert line(whole, "9")[3:6] == ["10", "1", "2"]
    assert line(whole[:1], "9")[3] == "5 (50% of the row: 1 of its 2 parts, drawn at random)"
    assert line(whole, "1")[3] == "not run yet"


def test_parts_of_different_divisions_are_not_added_up() -> None:
    with pytest.raises(SystemExit, match="divided in several ways"):
        table([result("1/2"), result("1/3")])


def test_a_result_takes_the_place_of_the_same_part_and_of_other_divisions() -> None:
    assert replaced(result("1/2"), [result("1/2")])
    assert replaced(result("1/3"), [result("1/2")])
    assert not replaced(result("2/2"), [result("1/2")])
    assert not replaced(result("1/2", row="8"), [result("1/2")])
