"""Errors that engines accept silently; these tests and `verify_repo` must detect them.

Each damage is one that a writer could do by mistake. The bounds of the other tests mean something only if a
damaged folder falls outside of them.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemotron_fp8 import verify_repo
from tests.inference import in_transformers
from tests.inference.in_vllm import EngineRefusedError
from tests.inference.layouts import Layout
from tests.inference.test_vllm import bound_for, compare, kernels

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.inference.in_vllm import Host

pytestmark = pytest.mark.engines

WEIGHT = "model.layers.1.mlp.down_proj.weight"
LAYOUTS = (
    Layout("fp8", "tensor", "dynamic"),
    Layout("fp8", "block", "dynamic"),
    Layout("compressed-tensors", "channel", "dynamic"),
    Layout("compressed-tensors", "channel", "none"),
)


def damage(folder: Path, copy: Path, layout: Layout, how: str) -> Path:
    """Copy ``folder`` with the scale of one weight lost or doubled."""
    shutil.copytree(folder, copy)
    name = WEIGHT.removesuffix("weight") + layout.scale_suffix
    (shard,) = [path for path in copy.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(shard)
    scale = tensors.pop(name)
    if how == "doubled":
        tensors[name] = scale * 2
    save_file(tensors, shard, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("how", ["lost", "doubled"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_vllm_shows_a_wrong_scale(
    layout: Layout,
    how: str,
    vllm: Host,
    nemotron: Path,
    quantized: Callable[[Path, Layout], Path],
    record: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Either vLLM refuses the folder, or its log-probabilities leave the bound; `verify_repo` tells in any case."""
    whole = quantized(nemotron, layout)
    broken = damage(whole, tmp_path / "broken", layout, how)
    assert not verify_repo(nemotron, broken).ok
    reference = in_transformers.load_by_hand(nemotron, whole)
    try:
        answer, apart = compare(vllm, "nemotron", broken, reference, tmp_path / "logprobs.safetensors")
    except EngineRefusedError:
        record("vllm", vllm.version, nemotron, layout.name, damage=how, refused="at load")
        return
    figures = {"mean": apart.mean, "kl": apart.divergence, "kernel": kernels(answer)}
    record("vllm", vllm.version, nemotron, layout.name, damage=how, **figures)
    assert not apart.within(bound_for("nemotron", answer)), apart


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_transformers_shows_a_lost_scale(
    layout: Layout,
    nemotron: Path,
    quantized: Callable[[Path, Layout], Path],
    record: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Either transformers refuses or names the key, or its logits are others than those of the whole folder."""
    whole = quantized(nemotron, layout)
    broken = damage(whole, tmp_path / "broken", layout, "lost")
    assert not verify_repo(nemotron, broken).ok
    tokens = [[1, 2, 3, 4, 5, 6, 7, 8]]
    expected = in_transformers.logits(in_transformers.load_by_hand(nemotron, whole), tokens)
    version = transformers.__version__
    try:
        model, lost = in_transformers.load(broken, **in_transformers.options_for(layout))
        got = in_transformers.logits(model, tokens)
    except (KeyError, RuntimeError, ValueError) as refusal:
        refused = type(refusal).__name__
        record("transformers", version, nemotron, layout.name, damage="lost", refused=refused)
        return
    off = float((got.float() - expected.float()).norm() / expected.float().norm())
    record("transformers", version, nemotron, layout.name, damage="lost", named=bool(lost), relative_l2=off)
    assert lost or not torch.equal(got, expected)
