"""Statistics of a tensor from the sums of its rows: the same for all slices, orders and paths, equal to a formula."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8.checkpoint.tensor_view import TensorView
from nemotron_fp8.engines.base import scale_rows
from nemotron_fp8.engines.error_stats import FLAT, TensorSums, measured, measured_cast, strips
from nemotron_fp8.planning.number_format import Coverage, NumberFormat
from nemotron_fp8.planning.tasks import Slicing, TensorTask
from nemotron_fp8_kernels import reference

if TYPE_CHECKING:
    import random

    from nemotron_fp8.planning.receipt import TensorStats

COVERAGES = [Coverage("tensor"), Coverage("channel"), Coverage("block"), Coverage("block", (3, 40))]


def plain(w: torch.Tensor, coverage: Coverage) -> tuple[float, float, int, int]:
    """Return SQNR, largest error, clamped and flushed values by formulas of the whole tensor."""
    covers = (coverage.granularity, coverage.block)
    q, scale = reference.quantize(w, *covers)
    mult = reference.scale_from_amax(reference.amax_bits(w, *covers))[0]
    product, wide = (reference.expand(x, w.shape, *covers) for x in (mult, scale))
    error = (q.float() * wide).double() - w.double()
    clamped = (w.float() * product).abs() > 448
    flushed = (q.float() == 0) & (w != 0)
    signal, noise = float(w.double().square().sum()), float(error.square().sum())
    sqnr = 10 * math.log10(signal / noise) if noise else math.inf if signal else math.nan
    return sqnr, float(error.abs().max()), int(clamped.sum()), int(flushed.sum())


def statistics(
    w: torch.Tensor, coverage: Coverage, slices: list[tuple[int, int]], codes: torch.Tensor | None = None
) -> TensorStats:
    """Return the statistics of a bf16 tensor, measured by slices of elements."""
    view = TensorView("x", "BF16", tuple(w.shape), ())
    amax = reference.amax_bits(w, coverage.granularity, coverage.block)
    mult, scale = reference.scale_from_amax(amax)
    sums = TensorSums(view)
    for begin, end in slices:
        values = w.reshape(-1)[begin:end]
        here = [scale_rows(x, view, coverage, 2 * begin, 2 * end) for x in (amax, mult, scale)]
        if codes is None:
            out = torch.empty(end - begin, dtype=torch.float8_e4m3fn)
            found = measured_cast(values, view, coverage, here[0], "float32", out)
        else:
            found = measured(values, codes.view(-1)[begin:end], view, coverage, *here[1:])
        sums.add(end - begin, found)
    return sums.stats()


@pytest.mark.parametrize("coverage", COVERAGES, ids=str)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), shuffle=st.randoms(), share=st.integers(1, 60_000))
@settings(max_examples=15, deadline=None)
def test_slices_and_their_order_do_not_show(
    coverage: Coverage, rows: int, columns: int, shuffle: random.Random, share: int
) -> None:
    """To the last bit, for slices as a conversion makes them and strips as verification reads them."""
    w = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02).bfloat16()
    view = TensorView("x", "BF16", tuple(w.shape), ())
    whole = statistics(w, coverage, [(0, w.numel())])
    sqnr, largest, *counts = plain(w, coverage)
    assert whole.sqnr_db == pytest.approx(sqnr, abs=1e-9, nan_ok=True)
    assert (whole.max_abs_error, whole.clamped, whole.flushed_to_zero) == (largest, *counts)
    slicing = Slicing(1, share, NumberFormat(coverage))
    sliced = [(begin // 2, end // 2) for begin, end in slicing.slices(TensorTask(view, "x"))]
    for parts in (sliced, list(strips(view, coverage))):
        assert statistics(w, coverage, parts) == whole
        shuffle.shuffle(parts)
        assert statistics(w, coverage, parts) == whole
    assert statistics(w, coverage, sliced, reference.quantize(w, coverage.granularity, coverage.block)[0]) == whole


def test_a_tensor_with_one_scale_is_divided_into_rows_of_a_fixed_size() -> None:
    """Slices of any budget begin at multiples of these rows, so that no slice divides one."""
    w = torch.randn(5 * FLAT // 2, generator=torch.Generator().manual_seed(1)).bfloat16()
    view = TensorView("x", "BF16", (w.numel(),), ())
    whole = statistics(w, Coverage("tensor"), [(0, w.numel())])
    for share in (1, FLAT, 3 * FLAT, 7 * FLAT + 5, 100 * FLAT):
        slices = [(begin // 2, end // 2) for begin, end in Slicing(1, share).slices(TensorTask(view, "x"))]
        assert all(begin % FLAT == 0 for begin, _ in slices)
        assert statistics(w, Coverage("tensor"), slices) == whole


def test_a_tensor_without_elements_has_no_error() -> None:
    stats = TensorSums(TensorView("x", "BF16", (0, 4), ())).stats()
    assert math.isnan(stats.sqnr_db)
    assert (stats.max_abs_error, stats.clamped, stats.flushed_to_zero) == (0.0, 0, 0)


def test_the_sums_of_a_tensor_are_freed_when_it_is_complete() -> None:
    """A shard has many tensors; only those in progress keep the sums of their rows."""
    w = torch.randn(64, 32).bfloat16()
    sums = TensorSums(TensorView("x", "BF16", (64, 32), ()))
    out = torch.empty(w.numel(), dtype=torch.float8_e4m3fn)
    view = TensorView("x", "BF16", (64, 32), ())
    amax = reference.amax_bits(w, "channel")
    sums.add(w.numel(), measured_cast(w.view(-1), view, Coverage("channel"), amax, "float32", out))
    assert sums._parts == []
    assert sums.stats().sqnr_db > 20
