"""Scales of amaxes on the CPU path, with every library and without one: those of the reference, by bits."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from nemotron_fp8_kernels import cpu, native, reference
from nemotron_fp8_kernels.errors import RoundingError, UnsupportedDtypeError
from nemotron_fp8_kernels.formats import ScaleRounding
from tests.kernels.cpu_paths import CPU_PATHS, compiled


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("rounding", get_args(ScaleRounding))
def test_scales_are_those_of_the_reference(path: str, rounding: ScaleRounding, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bf16 amaxes, with NaN of both signs and Inf, and float32 amaxes around them."""
    library = compiled(path)
    monkeypatch.setattr(native, "load", lambda: library)
    bits = torch.arange(1 << 16, dtype=torch.int32) << 16
    bits = torch.cat([bits, bits + 1, bits + 0xFFFF])
    bits = bits[(bits >= 0) | ((bits & 0x7FFF_FFFF) > 0x7F80_0000)]  # an amax has no sign, but a NaN may
    grid = bits[: len(bits) // 6 * 6].view(-1, 6)[:, ::2]  # not contiguous
    for amax in (bits, grid, bits.view(torch.float32)):
        wanted = reference.scale_from_amax(amax, rounding=rounding)[1]
        assert torch.equal(cpu.scales(amax, rounding).view(torch.int32), wanted.view(torch.int32))
    assert cpu.scales(bits[:0], rounding).shape == (0,)
    assert cpu.scales(bits[3], rounding).shape == ()


@pytest.mark.parametrize("path", CPU_PATHS)
def test_bad_arguments_are_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled(path)
    monkeypatch.setattr(native, "load", lambda: library)
    with pytest.raises(RoundingError):
        cpu.scales(torch.zeros(1), "up")  # type: ignore[arg-type]  # the point
    with pytest.raises(UnsupportedDtypeError):
        cpu.scales(torch.zeros(1, dtype=torch.int64), "mx")
