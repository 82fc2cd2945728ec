"""Engines with DeepGEMM round the scales of block weights to powers of two on loading: a second rounding of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import read_tensors, write_checkpoint
from tests.support.engine_rules import THROUGH, changed, requantized

if TYPE_CHECKING:
    from pathlib import Path

ENGINES = sorted(THROUGH)
NAME = "model.layers.0.mlp.down_proj.weight"


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Matrices whose blocks differ by many orders of magnitude, with zeros, subnormals and ragged edges."""
    rows, columns = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(rows, columns, generator=generator)
    exponents = draw(st.lists(st.integers(-149, 124), min_size=9, max_size=9))
    for place, exponent in enumerate(exponents):
        top, left = place // 3 * 128, place % 3 * 128
        values[top : top + 128, left : left + 128] *= 2.0 ** max(exponent, -126) * 2.0 ** min(exponent + 126, 0)
    spread = draw(st.sampled_from((0, 20, 60)))
    values *= torch.pow(2.0, -torch.randint(0, spread + 1, values.shape, generator=generator).float())
    values[torch.rand(values.shape, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))] = 0
    return values.to(draw(st.sampled_from((torch.bfloat16, torch.float32))))


@given(weights(), st.sampled_from(ENGINES))
def test_powers_of_two_before_the_cast_leave_nothing_to_change(w: torch.Tensor, engine: str) -> None:
    codes, scales = reference.quantize(w, "block", rounding="power-of-two")
    assert not bool(changed(codes, scales, engine).any())


@pytest.mark.parametrize("engine", ENGINES)
def test_every_code_at_every_exponent_survives(engine: str) -> None:
    """All finite codes in one block, at every exponent that a scale can have."""
    finite = torch.arange(256, dtype=torch.uint8)
    finite = finite[(finite & 0x7F) != 0x7F]
    for largest in (0x76, 0x77, 0x7E):  # 224, 240 and 448: an amax from 224 to 448 times the scale becomes such a code
        codes = finite[(finite & 0x7F) <= largest].repeat(80)[: 128 * 128].view(128, 128).view(torch.float8_e4m3fn)
        for exponent in range(-22, 119):
            assert not bool(changed(codes, torch.full((1, 1), 2.0**exponent), engine).any()), (largest, exponent)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", ["fp8", "compressed-tensors"])
def test_the_default_for_blocks_is_what_engines_keep(tmp_path: Path, layout: str, engine: str) -> None:
    """Results of the default recipe, and as a contrast of unrounded scales, of which most values change."""
    w = torch.randn(384, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    w[:128, :128] *= 1e-7  # smaller than the least amax of engines
    write_checkpoint(tmp_path / "source", {"model.safetensors": {NAME: w}}, config={"model_type": "llama"})
    suffix = "_scale_inv" if layout == "fp8" else "_scale"
    shares = {}
    for rounding in ("power-of-two", "none"):
        recipe = Recipe(format=layout, granularity="block", scale_rounding=rounding)  # type: ignore[arg-type]  # a choice
        assert (recipe == Recipe(format=layout, granularity="block")) == (rounding == "power-of-two")
        quantize_repo(tmp_path / "source", tmp_path / rounding, recipe, device="cpu")
        found = read_tensors(tmp_path / rounding / "model.safetensors")
        codes, scales = found[NAME], found[NAME + suffix]
        assert scales.dtype == torch.float32
        shares[rounding] = float(changed(codes, scales, engine).float().mean())
        kept, rounded = requantized(codes, scales, engine)
        if rounding == "power-of-two":
            assert bool(torch.isin(rounded / scales, torch.tensor([0.5, 1.0])).all())
            assert kept.shape == codes.shape
    assert shares["power-of-two"] == 0
    assert shares["none"] > 0.5
