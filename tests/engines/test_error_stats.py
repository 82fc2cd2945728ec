"""Sums over a tensor: by element, by bit pattern or by both, in any order, they are those of a plain formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.checkpoint.tensor_view import TensorView
from nemotron_fp8.engines.base import INF_BITS
from nemotron_fp8.engines.error_stats import PATTERNS, Cell, TensorSums, measure, measure_patterns, pattern_counts
from nemotron_fp8_kernels import reference

if TYPE_CHECKING:
    import random

    from nemotron_fp8.planning.receipt import TensorStats
    from nemotron_fp8.planning.recipe import Numerics

SIXTEEN = (torch.bfloat16, torch.float16)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a 16-bit dtype, of either sign."""
    values = torch.arange(PATTERNS, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def plainly(values: torch.Tensor, codes: torch.Tensor, mult: torch.Tensor, scale: torch.Tensor) -> Cell:
    """The sums by a formula of whole tensors, without any scratch."""
    product = values * mult if mult.dtype == values.dtype else values.float() * mult
    w = values.double()
    error = (codes.float() * scale).double() - w
    return Cell(
        float(w.square().sum()),
        float(error.square().sum()),
        float(error.abs().max()),
        int((product.abs() > 448).sum()),
        int(((codes.float() == 0) & (values != 0)).sum()),
    )


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [0, 1, 0x3F80_0000, 0x4000_1000, INF_BITS - 1], ids=hex)
def test_measure_is_the_plain_formula(dtype: torch.dtype, bits: int) -> None:
    """To the last bit, also of columns of a matrix, and not disturbed by what was measured before."""
    values = all_patterns(torch.bfloat16).to(dtype)
    values = values[values.isfinite()]
    values = values[: len(values) // 8 * 8].view(8, -1)
    amax = torch.tensor(bits, dtype=torch.int32)
    mult, scale = reference.scale_from_amax(amax)
    for part in (values, values[:, 3:77], values[2:3]):
        codes, _ = reference.quantize_with_amax(part.contiguous(), amax)
        assert measure(part, codes, mult, scale) == plainly(part, codes, mult, scale)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("numerics", ["float32", "original"])
@pytest.mark.parametrize("bits", [0x3F80_0000, 0x4380_0000, 0x3C80_0000], ids=hex)
def test_counts_say_what_the_elements_say(dtype: torch.dtype, numerics: Numerics, bits: int) -> None:
    """Every finite value of a dtype, each another number of times."""
    values = all_patterns(dtype)
    often = torch.randint(0, 5, values.shape, generator=torch.Generator().manual_seed(3))
    values = values.repeat_interleave(often)
    amax = torch.tensor(bits, dtype=torch.int32)
    codes, _ = reference.quantize_with_amax(values, amax, numerics=numerics)
    counts = pattern_counts(values)
    assert (int(counts.sum()), len(counts)) == (len(values), PATTERNS)
    wanted = plainly(values, codes, *reference.scale_from_amax(amax, numerics, dtype))
    found = measure_patterns(counts, dtype, amax, numerics)
    assert found.signal == pytest.approx(wanted.signal, rel=1e-12)
    assert found.noise == pytest.approx(wanted.noise, rel=1e-12)
    assert found.max_abs_error == wanted.max_abs_error
    assert (found.clamped, found.flushed_to_zero) == (wanted.clamped, wanted.flushed_to_zero)


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from(["cells", 0, 1])), min_size=1, max_size=12), st.randoms())
def test_the_order_of_the_parts_does_not_show(parts: list[tuple[int, str | int]], shuffle: random.Random) -> None:
    generator = torch.Generator().manual_seed(len(parts))
    pieces = [(torch.randn(count, generator=generator).bfloat16(), way) for count, way in parts]
    amax = torch.tensor(0x4000_0000, dtype=torch.int32)

    def stats(order: list[int]) -> TensorStats:
        total = sum(count for count, _ in parts)
        sums = TensorSums(TensorView("x", "BF16", (total,), ()), [(amax, "float32")] * 2)
        for i in order:
            values, way = pieces[i]
            if way == "cells":
                codes, scale = reference.quantize_with_amax(values, amax)
                mult, _ = reference.scale_from_amax(amax)
                sums.add(len(values), {(i, 0): measure(values, codes, mult, scale)})
            else:
                sums.add(len(values), {}, pattern_counts(values), int(way))
        return sums.stats()

    order = list(range(len(parts)))
    straight = stats(order)
    shuffle.shuffle(order)
    assert stats(order) == straight
    values = torch.cat([values for values, _ in pieces])
    codes, scale = reference.quantize_with_amax(values, amax)
    whole = plainly(values, codes, reference.scale_from_amax(amax)[0], scale)
    assert straight.flushed_to_zero == whole.flushed_to_zero
    assert straight.max_abs_error == whole.max_abs_error
    assert straight.sqnr_db == pytest.approx(10 * torch.tensor(whole.signal / whole.noise).log10().item(), abs=1e-4)
