"""Results of quantized sources: verification finds every wrong bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from tests.support.checkpoints import ONE, edit, read_tensors
from tests.support.fp8_sources import (
    EMBEDDING,
    FIRST,
    MODULE,
    NAME,
    TARGETS,
    every_tensor,
    mixed,
    source_of,
)
from tests.support.quantized import KINDS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("target", ["channel", "fp8 block", "fp8 block e8m0", "mx"])
@pytest.mark.parametrize("kind", ["tensor", "DeepSeek V4", "MXFP4 of DeepSeek V4"])
def test_verification_finds_one_wrong_bit_of_codes_and_of_scales(tmp_path: Path, kind: str, target: str) -> None:
    """Of tensors that keep their codes, and of those that are rounded, by the values alone."""
    source = source_of(tmp_path / "source", {MODULE: KINDS[kind].make(128, 128, 1)})
    result = tmp_path / "fp8"
    quantize_repo(source, result, TARGETS[target][0], device="cpu", digests=False)
    found = every_tensor(result)
    for name in sorted(found.keys() - {EMBEDDING}):
        wrong = found[name].clone()
        wrong.reshape(-1).view(torch.uint8)[-1] ^= 1
        edit(result / ONE, {name: wrong})
        problems = {problem.tensor for problem in verify_repo(source, result).problems}
        assert problems & {name, NAME}
        edit(result / ONE, {name: found[name]})
    check_values = verify_repo(source, result)
    assert not check_values.problems


def test_verification_finds_a_wrong_bit_of_a_dequantized_tensor(tmp_path: Path) -> None:
    source, _ = mixed(tmp_path / "source")
    result = tmp_path / "fp8"
    quantize_repo(source, result, Recipe(ignore=(r"layers\.1\.mlp",)), device="cpu", digests=False)
    name = "model.layers.1.mlp.down_proj.weight"
    wrong = read_tensors(result / FIRST)[name]
    wrong.view(torch.int16)[7, 7] ^= 1
    edit(result / FIRST, {name: wrong})
    assert [problem.tensor for problem in verify_repo(source, result).problems] == [name]


def test_figures_of_kept_tensors_say_that_nothing_changed(tmp_path: Path) -> None:
    source, _ = mixed(tmp_path / "source")
    quantize_repo(source, tmp_path / "fp8", Recipe(stats=True, also_select=(r"layers\.1\.self_attn",)), device="cpu")
    verified = verify_repo(source, tmp_path / "fp8")
    assert verified.ok
    errors = {each.name: each.max_abs_error for each in verified.tensors}
    assert sorted(error > 0 for error in errors.values()) == [False, False, False, True]


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("target", ["fp8 block", "fp8 block unrounded", "channel", "mx"])
@pytest.mark.parametrize("kind", ["tensor", "DeepSeek V3", "MXFP4 of DeepSeek V4"])
def test_nothing_need_record_how_a_result_was_made(tmp_path: Path, kind: str, target: str, powers: bool) -> None:
    """Without manifest and card, a tensor with the scales of its source has its codes, too; others were rounded."""
    source = source_of(tmp_path / "source", {MODULE: KINDS[kind].make(128, 128, 1, powers)})
    result = tmp_path / "fp8"
    quantize_repo(source, result, TARGETS[target][0], device="cpu")
    for name in ("nemotron_fp8.json", "README.md"):
        (result / name).unlink()
    assert verify_repo(source, result).problems == ()
    wrong = read_tensors(result / ONE)[NAME]
    wrong.view(torch.uint8)[0, 0] ^= 1
    edit(result / ONE, {NAME: wrong})
    assert [problem.tensor for problem in verify_repo(source, result).problems] == [NAME]
