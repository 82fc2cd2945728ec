"""Error sums of rows: the compiled kernels equal the specification to the last bit, which equals a plain formula."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemotron_fp8_kernels import cpu, native, reference
from nemotron_fp8_kernels.error_sums import ErrorSums, error_sums
from tests.kernels.cpu_paths import CPU_PATHS, compiled, same_bits
from tests.kernels.strategies import blocks, granularities, weights

if TYPE_CHECKING:
    from collections.abc import Callable


def plain(w: torch.Tensor, q: torch.Tensor, mult: torch.Tensor, scale: torch.Tensor) -> ErrorSums:
    """Return the sums by formulas of whole rows; ``mult`` and ``scale`` broadcast against ``w``."""
    product = w * mult if mult.dtype == w.dtype else w.float() * mult
    value, codes = w.double(), q.float()
    error = (codes * scale).double() - value
    return ErrorSums(
        value.square().sum(1),
        error.square().sum(1),
        error.abs().amax(1) if w.shape[1] else torch.zeros(len(w), dtype=torch.float64),
        (product.abs() > 448).sum(1),
        ((codes == 0) & (w != 0)).sum(1),
    )


def assert_equal(found: ErrorSums, expected: ErrorSums, compare: Callable[[torch.Tensor, torch.Tensor], bool]) -> None:
    for got, wanted, name in zip(found, expected, ErrorSums._fields, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
        assert compare(got, wanted), (name, got, wanted)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-12, atol=0, equal_nan=True)


@given(
    w=weights(max_rows=20, max_columns=1100),
    granularity=granularities,
    block=blocks,
    amax=st.sampled_from([None, 0.0, 1e-6, 1.0, 3e38, float("inf"), float("nan")]),
)
@example(w=torch.randn(3, 2049).half(), granularity="block", block=(2, 1000), amax=None)
@example(w=torch.randn(5, 2080).bfloat16(), granularity="block", block=(2, 96), amax=None)
@example(w=torch.randn(5, 2080).bfloat16(), granularity="channel", block=(1, 1), amax=None)
@example(w=torch.randn(5, 2080).bfloat16(), granularity="block", block=(3, 100), amax=None)
@example(w=torch.full((2, 1030), 65504.0).half(), granularity="channel", block=(1, 1), amax=1.0)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_compiled_sums_are_the_specified_ones(
    w: torch.Tensor, granularity: Any, block: tuple[int, int], amax: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, scales and sums of every row, for any dtype, stride and amax; NaN and Inf among the elements."""
    w = w if w.ndim == 2 else w.reshape(1, -1)
    bits = reference.amax_bits(w, granularity, block)
    if amax is not None:
        bits = torch.full_like(bits, int(torch.tensor(amax).view(torch.int32)))
    q, scale = reference.quantize_with_amax(w, bits, granularity, block)
    mult = reference.scale_from_amax(bits)[0]
    expected = error_sums(w, q, mult, scale, granularity, block)
    wide = (reference.expand(x, w.shape, granularity, block) for x in (mult, scale))
    assert_equal(expected, plain(w, q, *wide), close)
    for path in CPU_PATHS:
        kernels = compiled(path)
        monkeypatch.setattr(native, "load", lambda kernels=kernels: kernels)
        found_q, found = cpu.cast_and_measure(w, bits, granularity, block)
        assert torch.equal(found_q.view(torch.uint8), q.view(torch.uint8))
        assert_equal(found, expected, same_bits)
        if amax is None:
            found_q, found_bits, in_one_step = cpu.quantize_finding_amax(w, granularity, block, measure=True)
            assert torch.equal(found_q.view(torch.uint8), q.view(torch.uint8))
            assert torch.equal(found_bits, bits)
            assert in_one_step is not None
            assert_equal(in_one_step, expected, same_bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_original_numerics(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are rounded to the dtype of the weight, and counted as such."""
    w = torch.randn(4, 700, generator=torch.Generator().manual_seed(2)).to(dtype)
    amax = torch.tensor(2.0)
    q, scale = reference.quantize_with_amax(w, amax, numerics="original")
    mult = reference.scale_from_amax(amax, "original", dtype)[0]
    for path in CPU_PATHS:
        kernels = compiled(path)
        monkeypatch.setattr(native, "load", lambda kernels=kernels: kernels)
        found_q, found = cpu.cast_and_measure(w, amax, numerics="original")
        assert torch.equal(found_q.view(torch.uint8), q.view(torch.uint8))
        assert_equal(found, plain(w, q, mult, scale), close)
        assert int(found.clamped.sum()) > 0


def test_wide_rows_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of more elements than the specification measures at a time, under one scale and under several."""
    w = torch.randn(2, (1 << 18) + 1500, generator=torch.Generator().manual_seed(4)).bfloat16()
    for granularity in ("tensor", "channel", "block"):
        bits = reference.amax_bits(w, granularity)
        for path in CPU_PATHS:
            kernels = compiled(path)
            monkeypatch.setattr(native, "load", lambda kernels=kernels: kernels)
            q, found = cpu.cast_and_measure(w, bits, granularity)
            mult, scale = reference.scale_from_amax(bits)
            assert_equal(found, error_sums(w, q, mult, scale, granularity), same_bits)
            wide = (reference.expand(x, w.shape, granularity, (128, 128)) for x in (mult, scale))
            assert_equal(found, plain(w, q, *wide), close)
