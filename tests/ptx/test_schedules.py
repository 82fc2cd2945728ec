"""The grouped kernel under thousands of schedules: the bytes of the reference, no race, no deadlock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ptx.schedules import RESIDENT, draw, run

if TYPE_CHECKING:
    from tests.ptx.compiled import Compiled

pytestmark = pytest.mark.ptx

PER_PART = {1: 12, 2: 12, 7: 10, 132: 3}
PARTS = 30


@pytest.mark.ptx(ci=4)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("resident", RESIDENT)
def test_any_schedule(compiled: Compiled, resident: int, part: int) -> None:
    """Lists, groups, ends, orders, policies, late atomics and stale reads, by CTA and by warp."""
    for seed in range(part * PER_PART[resident], (part + 1) * PER_PART[resident]):
        try:
            run(compiled, draw(resident, seed))
        except Exception as error:
            text = f"python -m tests.ptx.schedules {resident} {seed}: {type(error).__name__}: {error}"
            raise AssertionError(text) from error


def test_a_case_is_fixed_by_its_number() -> None:
    assert draw(7, 3) == draw(7, 3)
    assert draw(7, 3) != draw(7, 4)
    assert draw(7, 3) != draw(2, 3)


def test_cases_have_everything() -> None:
    """The drawn cases cover the production configuration, shared groups, single chunks, casts from the end, ..."""
    cases = [draw(resident, seed) for resident in RESIDENT for seed in range(PARTS * PER_PART[resident])]
    assert len(cases) >= 1000
    for case_has in (
        lambda case: case.config is None,
        lambda case: case.settings.per_warp,
        lambda case: not case.settings.weak,
        lambda case: case.two_launches,
        lambda case: case.rounding == "power-of-two",
        lambda case: case.rounding == "mx",
        lambda case: case.runs > 1,
        lambda case: max(map(len, case.groups)) > 2,
        lambda case: case.l2_bytes < 10_000,
        lambda case: len(case.sizes) < 4,
        lambda case: any(size <= 128 for size in case.sizes),
        lambda case: any(size % 16 for size in case.sizes),
    ):
        assert sum(map(case_has, cases)) >= 3, case_has
