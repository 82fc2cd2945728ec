"""Scales that are powers of two, and scales of short groups, compiled: bytes, bounds, alignment and races."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8_kernels import reference
from tests.kernels.strategies import DTYPES, granularities, weights
from tests.ptx.compiled import Compiled, placed
from tests.ptx.test_operations import GRANULARITIES, all_codes, random
from tests.support.ptxemu.schedule import Settings

pytestmark = pytest.mark.ptx

RULES = ("power-of-two", "mx")


@pytest.mark.ptx(ci=6)
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (70, 1792), (1, 8192), (33, 8448), (2, 16_128), (520, 1024)])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_every_length(compiled: Compiled, dtype: torch.dtype, group: int, shape: tuple[int, int]) -> None:
    """Whole and ragged programs, of large and of small tensors; weights are read once."""
    w = random(shape, dtype)
    block = (1, group)
    for rule in ("mx", "none") if group == 32 else ("mx",):
        expected = reference.quantize(w, "block", block, rounding=rule)  # type: ignore[arg-type]  # a literal
        compiled.quantize(w, expected, "block", block, rounding=rule)
        assert compiled.loaded == w.nbytes
        bits = reference.amax_bits(w, "block", block)
        compiled.quantize_with_amax(w, bits, expected, "block", block, rounding=rule)
    compiled.amax_bits(w, bits, "block", block)
    assert compiled.loaded == w.nbytes


@pytest.mark.ptx(ci=2)
@pytest.mark.parametrize("shape", [(3, 64), (5, 96), (2, 100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_elsewhere(compiled: Compiled, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Ragged rows, odd addresses of weights or codes, and rows with a stride take the kernel of blocks."""
    w = random(shape, dtype)
    expected = reference.quantize(w, "block", (1, 32), rounding="mx")
    bits = reference.amax_bits(w, "block", (1, 32))
    for (offset, padding), (out_offset, out_padding) in (
        ((0, 0), (0, 0)),
        ((1, 0), (0, 0)),
        ((0, 0), (5, 0)),
        ((0, 16), (0, 0)),
        ((3, 5), (0, 16)),
    ):
        moved = placed(w, offset, padding)
        out = placed(torch.zeros(shape, dtype=torch.uint8), out_offset, out_padding).view(torch.float8_e4m3fn)
        compiled.amax_bits(moved, bits, "block", (1, 32))
        compiled.quantize_with_amax(moved, bits, expected, "block", (1, 32), out=out, rounding="mx")


@pytest.mark.ptx(ci=2)
@pytest.mark.parametrize("rule", RULES)
def test_every_amax(compiled: Compiled, rule: Any) -> None:
    """Each of 65,536 bf16 inputs is the amax of a group: subnormals, Inf, NaN of both signs."""
    inputs = all_codes(torch.bfloat16)
    for start in range(0, 1 << 16, 1 << 12):
        w = torch.zeros(256, 256, dtype=torch.bfloat16)
        groups = w.view(1 << 12, 16)
        groups[:, 5] = inputs[start : start + (1 << 12)]
        groups[:, 9] = groups[:, 5] * 0.0171
        groups[:, 15] = groups[:, 5] * -0.73
        expected = reference.quantize(w, "block", (1, 16), rounding=rule)
        compiled.quantize(w, expected, "block", (1, 16), rounding=rule)


@pytest.mark.ptx(ci=4)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rule", RULES)
def test_given_amaxes(compiled: Compiled, rule: Any, granularity: Any) -> None:
    """Elements above the amax saturate; amaxes of the whole range of float32, NaN, Inf, and negative ones."""
    w = random((40, 300), torch.bfloat16)
    shape = reference.amax(w, granularity, (16, 64)).shape
    for amax in (448.0, 449.0, 1e-4, 9.9e-5, 1e-45, 2.0**-118, 3.4e38, 0.0, -1.0, torch.inf, torch.nan, -torch.nan):
        bits = torch.full(shape, amax)
        expected = reference.quantize_with_amax(w, bits, granularity, (16, 64), rounding=rule)
        compiled.quantize_with_amax(w, bits, expected, granularity, (16, 64), rounding=rule)


@given(
    w=weights(max_rows=40, max_columns=600),
    granularity=granularities,
    block=st.sampled_from(((128, 128), (1, 32), (1, 128), (16, 32), (5, 48))),
    rule=st.sampled_from(RULES),
    offset=st.integers(0, 17),
    padding=st.sampled_from((0, 1, 16)),
)
def test_any_weight_anywhere(
    compiled: Compiled,
    w: torch.Tensor,
    granularity: Any,
    block: tuple[int, int],
    rule: Any,
    offset: int,
    padding: int,
) -> None:
    """Any shape, stride, dtype and range, at any offset in its allocation."""
    expected = reference.quantize(w, granularity, block, rounding=rule)
    compiled.quantize(placed(w, offset, padding), expected, granularity, block, rounding=rule)


@pytest.mark.ptx(ci=2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_lists(compiled: Compiled, rule: Any, dtype: torch.dtype) -> None:
    """The grouped kernel, with shared scales, an empty member and one at an odd address."""
    shapes = ((70, 1000), (1, 40_001), (0, 5), (300, 7), (3, 64))
    tensors = [random(shape, dtype, i) * 2.0**-i for i, shape in enumerate(shapes)]
    tensors[3] = placed(tensors[3], 1)
    for shared in (None, [[0, 2], [1, 3]]):
        expected = reference.quantize_many(tensors, shared=shared, rounding=rule)
        compiled.quantize_many(tensors, expected, shared=shared, rounding=rule)


@pytest.mark.ptx(ci=3)
@pytest.mark.parametrize("per_warp", [False, True])
@pytest.mark.parametrize("resident", [1, 7, 132])
def test_groups_in_any_order(compiled: Compiled, resident: int, per_warp: bool) -> None:
    """Programs and warps in any order: they share nothing."""
    for seed in range(3):
        w = random((9, 2048), DTYPES[seed], seed)
        compiled.restart(Settings(resident=resident, policy="random", seed=seed, per_warp=per_warp))
        expected = reference.quantize(w, "block", (1, 32), rounding="mx")
        compiled.quantize(w, expected, "block", (1, 32), rounding="mx")
        compiled.counts["schedules"] += 1
