"""Compiled kernels of the CPU: exhaustive where a domain is small, and chosen by the processor and the environment."""

from __future__ import annotations

import pytest
import torch

from nemotron_fp8_kernels import cpu, native, reference
from nemotron_fp8_kernels.error_sums import error_sums
from nemotron_fp8_kernels.native import libraries
from tests.kernels.cpu_paths import CPU_PATHS, compiled, same_bits
from tests.kernels.strategies import DTYPES


@pytest.fixture(params=CPU_PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kernels = compiled(request.param)
    monkeypatch.setattr(native, "load", lambda: kernels)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("amax", [448.0, 1.0, 3e-39])
@pytest.mark.usefixtures("path")
def test_every_upper_half_of_a_float32(amax: float) -> None:
    """Every sign, exponent and upper mantissa, at ties and beside them; the low bits only break ties."""
    high = torch.arange(1 << 16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    w = (high[:, None] + low).to(torch.int32).view(torch.float32).view(-1)
    bits = torch.tensor(amax).view(torch.int32)
    expected = reference.quantize_with_amax(w, bits)[0]
    assert torch.equal(cpu.quantize_with_amax(w, bits)[0].view(torch.uint8), expected.view(torch.uint8))
    measured = cpu.cast_and_measure(w.view(1, -1), bits)[0]
    assert torch.equal(measured.view(-1).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.usefixtures("path")
def test_every_bf16_value_at_many_scales() -> None:
    """Sorted values, so that most vectors have no NaN and need no clamp; amaxes at and beside powers of two."""
    w = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(6)
    amaxes = torch.exp2(torch.rand(40, generator=generator, dtype=torch.float64) * 250 - 125).float()
    near = torch.tensor([448.0, 464.0, 3e38, 1e-12, 1e-30, 0.0])
    for bits in torch.cat((amaxes, near, near.nextafter(torch.tensor(0.0)), 2.0 ** torch.arange(-3, 4))).view(
        torch.int32
    ):
        q, scale = reference.quantize_with_amax(w, bits)
        assert torch.equal(cpu.cast(w, bits).view(torch.uint8), q.view(torch.uint8))
        found, sums = cpu.cast_and_measure(w.view(64, 1024), bits)
        assert torch.equal(found.view(-1).view(torch.uint8), q.view(torch.uint8))
        mult = reference.scale_from_amax(bits)[0]
        expected = error_sums(w.view(64, 1024), q.view(64, 1024), mult, scale)
        assert all(same_bits(a, b) for a, b in zip(sums, expected, strict=True))


@pytest.mark.usefixtures("path")
def test_bf16_values_at_the_clamp() -> None:
    """Vectors of one value, from below the amax to beyond the largest that rounds to 448."""
    for amax in torch.tensor([1.0, 1.1, 1.3, 1.99, 3e-5, 7e20]):
        bits = amax.view(torch.int32)
        values = torch.linspace(0.99 * float(amax), 1.1 * float(amax), 400).bfloat16()[:, None].repeat(1, 64)
        q, scale = reference.quantize_with_amax(values, bits)
        expected = error_sums(values, q, reference.scale_from_amax(bits)[0], scale)
        found, sums = cpu.cast_and_measure(values, bits)
        for codes in (cpu.cast(values, bits), found):
            assert torch.equal(codes.view(torch.uint8), q.view(torch.uint8))
        assert all(same_bits(a, b) for a, b in zip(sums, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("path")
def test_every_code_at_many_scales(dtype: torch.dtype) -> None:
    """Dequantization of all 256 codes, with results from zero over subnormals to Inf and NaN."""
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(1500, 1)
    exponents = torch.linspace(-149, 127, 1500, dtype=torch.float64)
    scale = torch.exp2(exponents).float()[:, None]
    found = cpu.dequantize(q, scale, "channel", dtype=dtype)
    assert torch.equal(
        found.nan_to_num(nan=0.5), reference.dequantize(q, scale, "channel", dtype=dtype).nan_to_num(nan=0.5)
    )
    assert torch.equal(found.isnan(), q.float().isnan() | found.isnan())
    assert bool(found[:, 0x7F].isnan().all())


def test_the_environment_chooses_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """``0`` and ``any`` of NEMOTRON_FP8_NATIVE; by default the best library for the processor."""
    default = compiled(CPU_PATHS[0])
    assert default is not None
    for value, path in {"": default.path, "any": libraries.library("any"), "0": None}.items():
        monkeypatch.setenv(native.SWITCH, value)
        found = native.load.__wrapped__()
        assert (found and found.path) == path


def test_a_processor_without_avx2_gets_the_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled("any")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.delenv(native.SWITCH, raising=False)
    found = native.load.__wrapped__()
    assert found is not None
    assert found.path == libraries.library("any")


def test_without_a_library_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "library", lambda level: libraries.HERE / f"missing-{level}.so")
    assert native.load.__wrapped__() is None
