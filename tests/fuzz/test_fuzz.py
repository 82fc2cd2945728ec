"""No input of any outside format makes the command crash, hang, take much memory, or leave a half-made result."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.fuzz import sweep

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fuzz.seeds import Seeds


ENOUGH = 300
"""Inputs of a format of which some are always accepted, and some refused."""


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", sweep.FORMATS)
def test_no_input_breaks_a_bound(kind: str, seeds: Seeds, base: Path, request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    count = sweep.share_of(kind, option("inputs"))
    tally = sweep.sweep(kind, option("seed"), range(count), seeds, base)
    if counts := option("counts"):
        with counts.open("a") as file:
            file.write(json.dumps(tally.record()) + "\n")
    shown = "\n\n".join(tally.violations[: sweep.SHOWN])
    assert not tally.violations, f"{len(tally.violations)} of {count} inputs:\n\n{shown}"
    if count >= ENOUGH:
        assert tally.accepted, "every input was refused: none reached what lies behind the checks"
        assert tally.refused, "no input was refused: the mutations change nothing"
