"""Amaxes and percentiles of values in parts: exact, and independent of order and division."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.calibration import magnitudes
from nemotron_fp8.calibration.magnitudes import BINS, Magnitudes, magnitudes_of

DTYPES = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}
PERCENTILES = st.sampled_from([50.0, 66.7, 90.0, 99.0, 99.9, 99.99, 100.0]) | st.floats(50, 100)


def amax_of(parts: list[torch.Tensor], percentile: float | None) -> float:
    found = Magnitudes(percentile is not None)
    for part in parts:
        found.add(magnitudes_of(part, percentile is not None))
    return found.amax(percentile)


def brute_force(values: torch.Tensor, percentile: float) -> float:
    """The smallest magnitude that is at least as large as a percentage of the values, one by one."""
    found = sorted(abs(float(value)) for value in values)
    share = next(n for n in range(1, len(found) + 1) if Fraction(n, len(found)) * 100 >= Fraction(repr(percentile)))
    return found[share - 1]


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype]) -> torch.Tensor:
    dtype = draw(st.sampled_from(dtypes))
    largest = float(torch.finfo(dtype).max)
    numbers = st.floats(-largest, largest, width=32) | st.floats(-4, 4, width=32)
    return torch.tensor(draw(st.lists(numbers, min_size=1, max_size=40))).clamp(-largest, largest).to(dtype)


@given(tensors(list(DTYPES)))
def test_the_largest_magnitude(values: torch.Tensor) -> None:
    assert amax_of([values], None) == max(abs(float(value)) for value in values)
    assert math.copysign(1, amax_of([values], None)) == 1  # also of -0.0


@given(tensors([torch.bfloat16]), PERCENTILES)
def test_a_percentile_of_bfloat16_is_that_of_all_values(values: torch.Tensor, percentile: float) -> None:
    assert amax_of([values], percentile) == brute_force(values, percentile)


@given(tensors([torch.float16, torch.float32]), PERCENTILES)
def test_a_percentile_of_other_dtypes_is_rounded_up_to_bfloat16(values: torch.Tensor, percentile: float) -> None:
    """By less than one step of bfloat16, and never above the largest value."""
    exact = brute_force(values, percentile)
    found = amax_of([values], percentile)
    assert exact <= found <= float(values.abs().max())
    below = torch.tensor(exact).bfloat16()
    steps = {float(below), float(torch.nextafter(below.float(), torch.tensor(math.inf)).bfloat16())}
    up = torch.nextafter(below, torch.tensor(math.inf, dtype=torch.bfloat16))
    assert found in {*steps, float(up), float(values.float().abs().max())}


@given(tensors([torch.bfloat16]), PERCENTILES | st.none(), st.data())
def test_parts_and_order_do_not_count(values: torch.Tensor, percentile: float | None, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(values))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    parts = list(torch.tensor_split(values[torch.tensor(order)], cuts))
    assert amax_of(parts, percentile) == amax_of([values], percentile)


def test_all_bfloat16_have_a_bin_of_their_own() -> None:
    codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = codes.view(torch.bfloat16)
    finite = values[values.isfinite()]
    found = magnitudes_of(finite, True)
    assert found.counts is not None
    assert found.counts[:0x7F80].tolist() == [2] * 0x7F80  # both signs
    assert not found.counts[0x7F80:].any()
    assert magnitudes_of(finite.float(), True).counts.tolist() == found.counts.tolist()  # type: ignore[union-attr]
    for value in (0.0, 1.0, 1.0078125, 3.0e-39, 3.3895313892515355e38):
        exact = torch.tensor([value], dtype=torch.bfloat16)
        assert amax_of([exact], 50) == float(exact)


def test_more_values_than_are_counted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16().view(10, 10, 10)
    whole = magnitudes_of(values, True)
    monkeypatch.setattr(magnitudes, "PIECE", 7)
    parts = magnitudes_of(values, True)
    assert whole.counts is not None
    assert parts.counts is not None
    assert torch.equal(whole.counts, parts.counts)
    assert int(whole.counts.sum()) == 1000
    assert whole.counts.shape == (BINS,)


def test_values_that_are_not_contiguous() -> None:
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    for view in (values.T, values[:, ::2], values.expand(3, 6, 8)):
        assert amax_of([view], 90.0) == brute_force(view.flatten(), 90.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("percentile", [None, 50.0])
def test_nan_and_infinity_are_not_hidden(bad: float, percentile: float | None) -> None:
    """Whatever follows them."""
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([bad, 3.0]), torch.tensor([1e30])]
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        assert not math.isfinite(amax_of([parts[number] for number in order], percentile))


def test_a_share_of_decimals_is_exact() -> None:
    """99.9 percent of 1,000 values are 999, although the binary number next to 99.9 is larger."""
    values = torch.cat([torch.ones(999), torch.tensor([2.0])]).bfloat16()
    assert amax_of([values], 99.9) == 1
    assert amax_of([values], 99.91) == 2


def test_nothing_is_no_amax() -> None:
    found: Any = magnitudes_of(torch.empty(0, 5), True)
    assert found.largest is None
    other = Magnitudes(True)
    other.add(found)
    assert other.largest is None
