"""Best scales of rows: every path equals the specification, which equals a search in exact arithmetic."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from nemotron_fp8_kernels import cpu, native, reference
from nemotron_fp8_kernels.error_sums import PIECE, error_sums
from nemotron_fp8_kernels.errors import LayoutError, ShapeError, UnsupportedDtypeError
from nemotron_fp8_kernels.formats import AMAX_FLOOR, CANDIDATES
from tests.kernels.cpu_paths import CPU_PATHS, compiled
from tests.kernels.strategies import weights

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRID = torch.tensor([(m / 8 * 2**-6) if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])
"""Values of the E4M3 codes from 0 to 126 by the definition of the format; the last one is NaN's place."""


def bits_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(torch.int32)[:, None]


def random_rows(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def all_candidates(w: torch.Tensor) -> torch.Tensor:
    """Amaxes of all candidates ``[N, 8]`` by rounding of float64 products, which are exact."""
    amax = w.double().abs().amax(1, keepdim=True)
    return (amax * torch.tensor(CANDIDATES, dtype=torch.float64)).float()


def exact_noise(row: torch.Tensor, amax: float) -> float:
    """Noise of a row under an amax: float64 holds every step exactly before its rounding to float32."""
    mult = (torch.tensor(448.0).double() / max(amax, float(torch.tensor(AMAX_FLOOR)))).float().double()
    scale = (1.0 / mult).float().double()
    values = row.double()
    product = (values * mult).float().abs().double()
    grid = GRID[:-1].double()
    above = torch.searchsorted(grid, product).clamp(1, len(grid) - 1)
    low, high = product - grid[above - 1], grid[above] - product
    code = torch.where((high < low) | ((high == low) & (above % 2 == 0)), above, above - 1)
    decoded = (grid[code] * scale).float().double().copysign(values)
    return math.fsum((decoded - values).square().tolist())


def on_every_path(w: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The result of the reference, of each compiled library, and of torch in parts of a few rows."""
    found = [reference.best_amax_bits(w)]
    for path in CPU_PATHS:
        kernels = compiled(path)
        monkeypatch.setattr(native, "load", lambda kernels=kernels: kernels)
        found.append(cpu.best_amax_bits(w))
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(cpu, "AT_A_TIME", 700)
    return [*found, cpu.best_amax_bits(w)]


def test_the_factors_are_powers_of_two_rounded_to_float32() -> None:
    """In C too: the eighth power of the true value lies between those of the neighbors' midpoints."""
    assert CANDIDATES[0] == 1
    for k, factor in enumerate(CANDIDATES):
        low, high = (Fraction(factor) + Fraction(side, 1 << 24) for side in (-1, 1))
        assert low**8 < 2**k < high**8
    source = native.libraries.SOURCE.read_text()
    written = re.findall(r"0x([0-9A-F]{8})u", source[source.index("FACTORS[CANDIDATES] = ") :])[:8]
    assert bits_of(*CANDIDATES).flatten().tolist() == [int(text, 16) for text in written]


@given(w=weights(max_rows=12, max_columns=1300))
@example(w=random_rows(3, 2 * PIECE + 17, torch.float16))
@example(w=random_rows(3, 2 * PIECE + 33, torch.float32))
@example(w=random_rows(200, 5))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_path_chooses_as_the_reference(w: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every dtype, stride, width and range of values."""
    expected, *others = on_every_path(w, monkeypatch)
    assert expected.dtype == torch.int32
    assert expected.shape == (w.shape[0], 1)
    for found in others:
        assert torch.equal(found, expected)


@given(w=weights(max_rows=4, max_columns=200))
@settings(max_examples=50, deadline=None)
def test_the_choice_is_the_least_of_all_candidates(w: torch.Tensor) -> None:
    """By a search in other arithmetic; sums of another order decide between candidates that are not equal to 1e-12."""
    if not w.numel():
        return
    candidates, chosen = all_candidates(w), cpu.best_amax_bits(w).view(torch.float32)
    for row, amaxes, found in zip(w, candidates.tolist(), chosen[:, 0].tolist(), strict=True):
        noises = [exact_noise(row, amax) if math.isfinite(amax) else math.inf for amax in amaxes]
        k = amaxes.index(found)
        if not math.isfinite(noises[0]):
            continue
        assert noises[k] <= min(noises) * (1 + 1e-12)
        smaller = [noise for noise in noises[:k] if noise <= noises[k] * (1 - 1e-12)]
        assert not smaller
        if k:
            assert noises[k] <= noises[0]


@given(w=weights(max_rows=8, max_columns=300))
@settings(max_examples=50, deadline=None)
def test_no_row_gets_worse_and_no_value_is_out_of_range(w: torch.Tensor) -> None:
    """Products are at most 448, or the float32 number above it: the rounding of the multiplier."""
    best = cpu.best_amax_bits(w)
    noises = []
    for bits in (best, cpu.amax_bits(w, "channel")):
        q, scale = reference.quantize_with_amax(w, bits, "channel")
        mult = reference.scale_from_amax(bits)[0]
        noises.append(error_sums(w, q, mult, scale, "channel").noise)
        product = (w.float() * mult).abs()
        assert bool((product <= torch.nextafter(torch.tensor(448.0), torch.tensor(500.0))).all())
    assert bool(((noises[0] <= noises[1]) | noises[1].isnan()).all())


def test_normal_weights_gain() -> None:
    """Several percent of the error over all rows, less for longer rows; every candidate is the best of some row."""
    w = random_rows(512, 600)
    noise = []
    for bits in (cpu.amax_bits(w, "channel"), cpu.best_amax_bits(w)):
        q, scale = reference.quantize_with_amax(w, bits, "channel")
        noise.append(float(((q.float() * scale).double() - w.double()).square().sum()))
    assert 0.9 < math.sqrt(noise[1] / noise[0]) < 0.96
    places = (all_candidates(w) == cpu.best_amax_bits(w).view(torch.float32)).sum(0)
    assert int(places.min()) > 0
    assert int(places.sum()) == len(w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_choice_keep_their_amax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, NaN, Inf, values below the floor, one value that is exact, and rows next to them."""
    rows = [
        [0.0, -0.0, 0.0],
        [1.0, math.nan, 2.0],
        [1.0, -math.inf, 2.0],
        [math.inf, math.nan, 1.0],
        [1e-45, 1e-30, 0.0],
        [448.0, -448.0, 7.0],
    ]
    w = torch.tensor(rows, dtype=torch.float64).to(dtype)
    expected = reference.amax_bits(w, "channel")
    for found in on_every_path(w, monkeypatch):
        assert torch.equal(found, expected)


def test_candidates_beyond_float32_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite row stays finite: rows close to the largest number have fewer candidates, the last has one."""
    top = torch.finfo(torch.float32).max
    parts = torch.tensor([0.9, 0.7, 0.3, 0.11])
    w = torch.cat([(torch.tensor([[top / 2], [top / 1.2], [top]]) * part) for part in (torch.ones(1), parts)], dim=1)
    for found in on_every_path(w, monkeypatch):
        values = found.view(torch.float32)
        assert bool(values.isfinite().all())
        assert float(values[-1]) == top
    assert float(cpu.best_amax_bits(w).view(torch.float32)[0]) >= top / 2


def test_a_candidate_may_exceed_the_floor_that_the_amax_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Amaxes up to 1e-12 have one multiplier; the candidates above it have others."""
    w = (random_rows(40, 64, torch.float32) / 0.02).clamp(-3, 3) * 3e-13
    first, *others = on_every_path(w, monkeypatch)
    amax = reference.amax_bits(w, "channel").view(torch.float32)
    chosen = first.view(torch.float32)
    assert bool((amax < AMAX_FLOOR).all())
    assert bool(((chosen == amax) | (chosen > AMAX_FLOOR)).all())
    assert bool((chosen > AMAX_FLOOR).any())
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0)])
def test_without_elements(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.empty(shape, dtype=torch.bfloat16)
    for found in on_every_path(w, monkeypatch):
        assert torch.equal(found, bits_of(*[16.0] * shape[0]))


def test_wide_rows_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of more elements than the specification measures at a time."""
    w = random_rows(2, (1 << 18) + 1500)
    first, *others = on_every_path(w, monkeypatch)
    assert all(torch.equal(first, other) for other in others)


def test_wrong_arguments() -> None:
    with pytest.raises(ShapeError):
        cpu.best_amax_bits(torch.zeros(3))
    with pytest.raises(UnsupportedDtypeError):
        cpu.best_amax_bits(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(LayoutError):
        cpu.best_amax_bits(torch.zeros(3, 4).T)
