"""Scales that are powers of two: the rules in exact arithmetic, and every path against the reference as bytes."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemotron_fp8_kernels import cpu, native, reference
from nemotron_fp8_kernels.error_sums import error_sums
from nemotron_fp8_kernels.formats import MX_BLOCK
from tests.kernels.cpu_paths import CPU_PATHS, compiled, same_bits
from tests.kernels.strategies import DTYPES, granularities, weights
from tests.kernels.test_paths import assert_same, path, where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

__all__ = ["path"]  # a fixture

RULES = ("power-of-two", "mx")
FLOOR = Fraction(float(torch.tensor(1e-4)))
FIXTURES = [HealthCheck.function_scoped_fixture]

GIVEN_BLOCKS = st.sampled_from((MX_BLOCK, (128, 128), (1, 48), (3, 32), (1, 256)))


def exponents(rule: str) -> range:
    """Return every exponent that the amaxes of a rule can have."""
    return range(-22 if rule == "power-of-two" else -127, 121)


def bits_of(exponent: int) -> torch.Tensor:
    """Return the bits of the largest amax whose scale is a power of two: 448 of its units, or the largest float."""
    return torch.tensor(min(448.0 * 2.0**exponent, torch.finfo(torch.float32).max)).view(torch.int32)


def check_rule(rule: str, amax: float, mult: float, scale: float) -> None:
    """Require the least allowed power of two under which a finite amax does not exceed 448, in exact arithmetic."""
    exponent = math.frexp(scale)[1] - 1
    assert Fraction(scale) == Fraction(2) ** exponent
    assert Fraction(mult) == Fraction(2) ** -exponent
    if rule == "mx" and amax == 0:
        assert exponent == 0
        return
    value = max(Fraction(amax), FLOOR) if rule == "power-of-two" else Fraction(amax)
    assert value <= 448 * Fraction(scale)
    assert value > 224 * Fraction(scale) or (rule == "mx" and exponent == -127)


@pytest.mark.parametrize("rule", RULES)
def test_scales_of_every_bf16_amax(rule: Any) -> None:
    """All 32,640 finite bf16 amaxes, subnormals and zero among them; Inf and NaN have the scales without rounding."""
    bits = torch.arange(1 << 15, dtype=torch.int32) << 16
    mult, scale = reference.scale_from_amax(bits, rounding=rule)
    finite = 0x7F80
    for amax, m, s in zip(bits.view(torch.float32)[:finite].tolist(), mult.tolist(), scale.tolist(), strict=False):
        check_rule(rule, amax, m, s)
    expected = reference.scale_from_amax(bits[finite:])
    assert torch.equal(mult[finite:].isnan(), expected[0].isnan())
    assert float(mult[finite]) == 0.0
    assert torch.equal(scale[finite:].view(torch.int32), expected[1].view(torch.int32))


@given(rule=st.sampled_from(RULES), bits=st.integers(0, 0x7F7F_FFFF))
@example(rule="mx", bits=0x60_0000)
@example(rule="mx", bits=1)
@example(rule="power-of-two", bits=0x38D1_B716)
@example(rule="power-of-two", bits=0x38D1_B718)
@settings(max_examples=500)
def test_scales_of_any_float32_amax(rule: Any, bits: int) -> None:
    for near in (bits, bits & 0x7F80_0000 | 0x60_0000, bits & 0x7F80_0000 | 0x60_0001):
        amax = torch.tensor(min(near, 0x7F7F_FFFF), dtype=torch.int32)
        mult, scale = reference.scale_from_amax(amax, rounding=rule)
        check_rule(rule, float(amax.view(torch.float32)), float(mult), float(scale))


@pytest.mark.parametrize("rule", RULES)
def test_amaxes_that_are_no_magnitudes(rule: Any) -> None:
    """A negative amax counts as zero, and a NaN of any sign and payload as NaN, as without rounding."""
    bits = torch.tensor([-(1 << 31), 0x3F80_0000 - (1 << 31), 0x7F80_0000 - (1 << 31), -1, 0x7F80_0001]).int()
    mult, scale = reference.scale_from_amax(bits, rounding=rule)
    zero = 1.0 if rule == "mx" else 2.0**-22
    assert scale[:3].tolist() == [zero] * 3
    assert bool(mult[3:].isnan().all())
    assert scale[3:].view(torch.int32).tolist() == [0x7FC0_0000] * 2


def test_codes_are_the_nearest_multiples_of_the_scale() -> None:
    """By exact arithmetic: no E4M3 value times the scale is nearer to a weight than that of its code."""
    values = [Fraction(v) for v in torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()]
    generator = torch.Generator().manual_seed(1)
    spread = torch.exp2(torch.randint(-140, 120, (40, 1), generator=generator).double())
    w = (torch.randn(40, 32, generator=generator) * spread).bfloat16()
    for rule in RULES:
        q, scale = reference.quantize(w, "block", MX_BLOCK, rounding=rule)  # type: ignore[arg-type]  # a literal
        codes = q.view(torch.uint8)
        assert torch.equal(codes > 0x7F, w.signbit())
        for row, unit, found in zip(w.abs().tolist(), scale.flatten().tolist(), codes.tolist(), strict=True):
            for value, code in zip(row, found, strict=True):
                place = code & 0x7F
                distance = abs(values[place] * Fraction(unit) - Fraction(value))
                for beside in (place - 1, place + 1):
                    if 0 <= beside < len(values):
                        other = abs(values[beside] * Fraction(unit) - Fraction(value))
                        assert distance < other or (distance == other and place % 2 == 0)


def cpu_ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Choose each way of the CPU path in turn."""
    for name in CPU_PATHS:
        monkeypatch.setattr(native, "load", lambda kernels=compiled(name): kernels)  # noqa: B008  (a different one each time)
        yield name


@pytest.mark.parametrize("rule", RULES)
def test_all_inputs_at_every_exponent(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 65,536 bf16 inputs under given amaxes: those above saturate; one scale, and one for every 32 elements."""
    w = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(64, 1024)
    for exponent in exponents(rule):
        bits = bits_of(exponent)
        q, scale = reference.quantize_with_amax(w, bits, rounding=rule)
        assert float(scale) == 2.0**exponent
        blocks = bits.repeat(64, 32)
        for _ in cpu_ways(monkeypatch):
            assert_same(cpu.quantize_with_amax(w, bits, rounding=rule), (q, scale))
            assert torch.equal(
                cpu.cast(w, blocks, "block", MX_BLOCK, rounding=rule).view(torch.uint8), q.view(torch.uint8)
            )


@pytest.mark.parametrize("rule", RULES)
def test_all_inputs_below_their_amax_at_every_exponent(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 31 inputs and the amax that gives the exponent; amaxes, codes and error sums."""
    inputs = torch.arange(1 << 16, dtype=torch.int32)[: 65_536 // 31 * 31].to(torch.int16).view(torch.bfloat16)
    for exponent in exponents(rule):
        amax = bits_of(exponent).view(torch.float32).bfloat16().clamp(max=torch.finfo(torch.bfloat16).max)
        below = torch.where(inputs.abs() <= amax, inputs, 0.0).view(-1, 31)
        w = torch.cat((below, amax.expand(len(below), 1)), dim=1)[:2112].reshape(33, 2048)
        bits = reference.amax_bits(w, "block", MX_BLOCK)
        q, scale = reference.quantize_with_amax(w, bits, "block", MX_BLOCK, rounding=rule)
        for name in cpu_ways(monkeypatch):
            found, found_bits, _ = cpu.quantize_finding_amax(w, "block", MX_BLOCK, rounding=rule)
            assert torch.equal(found_bits, bits)
            assert torch.equal(found.view(torch.uint8), q.view(torch.uint8))
            if exponent % 9 == 0 and name != "torch":
                mult = reference.scale_from_amax(bits, rounding=rule)[0]
                expected = error_sums(w, q, mult, scale, "block", MX_BLOCK)
                found, _, sums = cpu.quantize_finding_amax(w, "block", MX_BLOCK, measure=True, rounding=rule)
                assert torch.equal(found.view(torch.uint8), q.view(torch.uint8))
                assert all(same_bits(a, b) for a, b in zip(sums or (), expected, strict=True))


@given(
    w=weights(max_rows=8, max_columns=140), granularity=granularities, block=GIVEN_BLOCKS, rule=st.sampled_from(RULES)
)
@example(w=torch.randn(3, 330).half(), granularity="block", block=MX_BLOCK, rule="mx")
@example(w=torch.zeros(2, 64), granularity="block", block=MX_BLOCK, rule="mx")
@example(w=torch.randn(3, 0), granularity="block", block=MX_BLOCK, rule="power-of-two")
@settings(max_examples=12, deadline=None, suppress_health_check=FIXTURES)
def test_quantize(path: ModuleType, w: torch.Tensor, granularity: Any, block: tuple[int, int], rule: Any) -> None:
    """Any shape, stride, dtype and range: quantize, and quantize_with_amax with the amaxes and with others."""
    expected = reference.quantize(w, granularity, block, rounding=rule)
    moved = where(path, w)
    assert_same(path.quantize(moved, granularity, block, rounding=rule), expected)
    bits = path.amax_bits(moved, granularity, block)
    assert_same(path.quantize_with_amax(moved, bits, granularity, block, rounding=rule), expected)
    other = bits.cpu().flip(0).contiguous() if bits.ndim else bits.cpu()
    expected = reference.quantize_with_amax(w, other, granularity, block, rounding=rule)
    assert_same(path.quantize_with_amax(moved, where(path, other), granularity, block, rounding=rule), expected)


@pytest.mark.parametrize("rule", ["none", *RULES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_runs(path: ModuleType, dtype: torch.dtype, rule: Any) -> None:
    """Blocks of 32 elements: sets of 8 blocks, fewer, and a ragged one; zeros, subnormals, Inf, NaN and saturation."""
    generator = torch.Generator().manual_seed(2)
    every = path is cpu or not path.INTERPRETED
    widths = (256, 288, 300, 32, 20, 544) if every else (288, 20)
    amaxes = (0.4, 0.0, 3e38, math.inf, math.nan, -1.0) if every else (0.4, math.nan)
    for columns in widths:
        for padding in (0, 5) if every else (columns % 32,):
            w = torch.randn(6, columns + padding, generator=generator)[:, :columns].to(dtype)
            w[1] = 0.0
            w[2] *= torch.finfo(dtype).tiny
            w[3, columns // 2], w[4, -1], w[5, 0] = math.inf, math.nan, -math.inf
            w.view(torch.int32 if dtype == torch.float32 else torch.int16)[4, 1] = -1  # another NaN
            moved = where(path, w)
            bits = reference.amax_bits(w, "block", MX_BLOCK)
            assert torch.equal(path.amax_bits(moved, "block", MX_BLOCK).cpu(), bits)
            expected = reference.quantize(w, "block", MX_BLOCK, rounding=rule)
            assert_same(path.quantize(moved, "block", MX_BLOCK, rounding=rule), expected)
            for amax in amaxes:
                all_amaxes = torch.full_like(expected[1], amax)
                wanted = reference.quantize_with_amax(w, all_amaxes, "block", MX_BLOCK, rounding=rule)
                found = path.quantize_with_amax(moved, where(path, all_amaxes), "block", MX_BLOCK, rounding=rule)
                assert_same(found, wanted)
            back = path.dequantize(where(path, expected[0]), where(path, expected[1]), "block", MX_BLOCK, dtype)
            plain = reference.dequantize(*expected, "block", MX_BLOCK, dtype)
            assert torch.equal(back.cpu().nan_to_num(nan=7.0), plain.nan_to_num(nan=7.0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_sums_of_short_runs(dtype: torch.dtype, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own amaxes, and given ones that clamp; the sums are those of the specification to the last bit."""
    w = (torch.randn(12, 1100, generator=torch.Generator().manual_seed(3)) * 1e-3).to(dtype)
    w[3] = 0.0
    for bits in (reference.amax_bits(w, "block", MX_BLOCK), torch.full((12, 35), 1e-3).view(torch.int32)):
        mult, scale = reference.scale_from_amax(bits, rounding=rule)
        q = reference.quantize_with_amax(w, bits, "block", MX_BLOCK, rounding=rule)[0]
        expected = error_sums(w, q, mult, scale, "block", MX_BLOCK)
        for _ in cpu_ways(monkeypatch):
            found, sums = cpu.cast_and_measure(w, bits, "block", MX_BLOCK, rounding=rule)
            assert torch.equal(found.view(torch.uint8), q.view(torch.uint8))
            assert all(same_bits(a, b) for a, b in zip(sums, expected, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_lists(path: ModuleType, rule: Any) -> None:
    """Lists with shared scales and without, with an empty member, at every granularity."""
    from nemotron_fp8_kernels.gpu import many

    quantize_many = cpu.quantize_many if path is cpu else many.quantize_many
    tensors = [torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (3, 0, 7, 2)]
    moved = [where(path, w) for w in tensors]
    for granularity, shared in (("tensor", None), ("tensor", [[0, 2], [1]]), ("channel", None), ("block", None)):
        expected = reference.quantize_many(tensors, granularity, MX_BLOCK, shared=shared, rounding=rule)  # type: ignore[arg-type]  # a literal
        found = quantize_many(moved, granularity, MX_BLOCK, shared=shared, rounding=rule)
        for one, wanted in zip(found, expected, strict=True):
            assert_same(one, wanted)
