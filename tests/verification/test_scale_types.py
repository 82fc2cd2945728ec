"""verify knows every type of scale: a changed code, a changed scale, another rounding, with a manifest and without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import MANIFEST, ONE, edit, read_tensors, weight, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.layers.0.mlp.down_proj.weight"
RECIPES: dict[str, dict[str, Any]] = {
    "blocks": {"format": "fp8"},
    "blocks, unrounded": {"format": "fp8", "scale_rounding": "none"},
    "blocks, exponents": {"format": "fp8", "scale_dtype": "e8m0"},
    "blocks of compressed-tensors": {"granularity": "block"},
    "mxfp8": {"format": "mxfp8"},
    "mx of compressed-tensors": {"granularity": "mx", "activations": "none"},
    "blocks of modelopt": {"format": "modelopt", "granularity": "block"},
    "channels of modelopt": {"format": "modelopt"},
    "best channels": {"scales": "best"},
    "best channels of modelopt": {"format": "modelopt", "scales": "best"},
}


def suffix_of(found: dict[str, torch.Tensor]) -> str:
    """The end of the name of a scale."""
    return next(name.removeprefix(NAME) for name in found if name.startswith(f"{NAME}_"))


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return Recipe(**RECIPES[request.param])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A matrix of four blocks, one of them of zeros and one tiny, and a matrix that stays."""
    values = weight(256, 256).clone()
    values[:128, :128] = 0
    values[128:, 128:] *= 2.0**-100
    tensors = {NAME: values, "model.embed_tokens.weight": weight(64, 64)}
    return write_checkpoint(tmp_path / "source", {ONE: tensors}, config={"model_type": "llama"})


def test_what_was_made_is_found_right(tmp_path: Path, source: Path, recipe: Recipe) -> None:
    """With the source and alone; without the manifest, the arithmetic is found."""
    result = tmp_path / "result"
    quantize_repo(source, result, recipe, device="cpu")
    for _ in range(2):
        found = verify_repo(source, result)
        assert found.ok, found.problems
        assert found.quantized == 1
        alone = verify_repo(None, result)
        assert [p.tensor for p in alone.problems] == ([] if (result / MANIFEST).exists() else [MANIFEST])
        (result / MANIFEST).unlink(missing_ok=True)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_flipped_bit_is_found(tmp_path: Path, source: Path, recipe: Recipe, place: str) -> None:
    result = tmp_path / "result"
    quantize_repo(source, result, recipe, device="cpu")
    (result / MANIFEST).unlink()
    good = read_tensors(result / ONE)
    for name in (NAME, NAME + suffix_of(good)):
        bad = good[name].clone()
        bad.view(-1).view(torch.uint8)[0 if place == "first" else -1] ^= 1
        edit(result / ONE, {name: bad})
        assert [p.tensor for p in verify_repo(source, result).problems] == [name]
        edit(result / ONE, {name: good[name]})
    assert verify_repo(source, result).ok


def test_another_rounding_than_recorded_is_found(tmp_path: Path, source: Path) -> None:
    """Right codes and scales of another recipe are no result of the recorded one; without a record they are right."""
    quantize_repo(source, tmp_path / "result", Recipe(format="fp8"), device="cpu", digests=False)
    codes, scale = reference.quantize(read_tensors(source / ONE)[NAME], "block")
    edit(tmp_path / "result" / ONE, {NAME: codes, f"{NAME}_scale_inv": scale})
    assert [p.tensor for p in verify_repo(source, tmp_path / "result").problems] == [f"{NAME}_scale_inv"]
    (tmp_path / "result" / MANIFEST).unlink()
    assert verify_repo(source, tmp_path / "result").ok


@pytest.mark.parametrize("name", ["blocks, exponents", "mxfp8", "mx of compressed-tensors"])
def test_an_exponent_that_is_no_number_is_found_without_the_source(tmp_path: Path, source: Path, name: str) -> None:
    quantize_repo(source, tmp_path / "result", Recipe(**RECIPES[name]), device="cpu")
    (tmp_path / "result" / MANIFEST).unlink()
    found = read_tensors(tmp_path / "result" / ONE)
    scale = NAME + suffix_of(found)
    bad = found[scale].clone()
    bad.view(torch.uint8)[1, 1] = 0xFF
    edit(tmp_path / "result" / ONE, {scale: bad})
    problems = {p.tensor: p.problem for p in verify_repo(None, tmp_path / "result").problems}
    assert problems[scale] == "holds nan, must be positive and finite"


def test_values_that_became_nan_in_the_source_are_found(tmp_path: Path, source: Path) -> None:
    quantize_repo(source, tmp_path / "result", Recipe(format="mxfp8"), device="cpu", digests=False)
    values = read_tensors(source / ONE)[NAME].clone()
    values[200, 17] = torch.nan
    edit(source / ONE, {NAME: values})
    problems = {p.tensor: p.problem for p in verify_repo(source, tmp_path / "result").problems}
    assert problems[NAME] == "is FP8, although the source holds NaN or Inf"
