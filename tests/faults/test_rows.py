"""The rows of the fault table: real kills, full disks, power loss, races, untrusted files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.rows import ROWS
from tests.faults.runner import cannot_run, left_out

if TYPE_CHECKING:
    from tests.faults.row import Row
    from tests.faults.runner import Runner


@pytest.mark.faults
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_no_case_ends_wrong(row: Row, runner: Runner) -> None:
    """Run every case of the row that the share asks for.

    A whole run must not pass with a part left out; the share of CI may.
    """
    lines = left_out(row, runner.share.missing)
    runner.skipped += lines
    if lines and runner.share.full:
        pytest.fail("; ".join(lines))
    if cannot_run(row, runner.share.missing):
        pytest.skip("; ".join(lines))
    wrong = runner.run(row)
    assert not wrong, "\n".join(wrong)
