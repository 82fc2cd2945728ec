"""Errors that engines accept silently; these tests and `verify_repo` must detect them.

Each damage is one that a writer could do by mistake. The bounds of the other tests mean something only if a
damaged folder falls outside of them.
"""

from __future__ import annotations

import functools
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemotron_fp8 import plan_repo, verify_repo
from tests.inference import in_transformers
from tests.inference.in_vllm import EngineRefusedError
from tests.inference.layouts import (
    KV_CACHE,
    MODELOPT,
    MODELOPT_BLOCK,
    MX,
    MX_WEIGHTS,
    MXFP8,
    STATIC,
    Layout,
    block_layout,
)
from tests.inference.test_vllm import bound_for, compare, kernels
from tests.support.checkpoints import edit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.inference.in_vllm import Host

pytestmark = pytest.mark.engines

WEIGHT = "model.layers.1.mlp.down_proj.weight"
LAYOUTS = (
    Layout("fp8", "tensor", "dynamic"),
    block_layout("fp8"),
    Layout("compressed-tensors", "channel", "dynamic"),
    Layout("compressed-tensors", "channel", "none"),
    MX_WEIGHTS,
    MODELOPT,
    MODELOPT_BLOCK,
)
OF_TRANSFORMERS = (*LAYOUTS[:-2], MXFP8)


def damage(folder: Path, copy: Path, layout: Layout, how: str) -> Path:
    """Copy ``folder`` with the scale of one weight lost or doubled."""
    shutil.copytree(folder, copy)
    name = WEIGHT.removesuffix("weight") + layout.scale_suffix
    (shard,) = [path for path in copy.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(shard)
    scale = tensors.pop(name)
    if how == "doubled":
        tensors[name] = scale + 1 if scale.dtype == torch.uint8 else scale * 2  # a byte is an exponent
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


STORED = {
    "model.layers.1.mlp.down_proj.input_scale": "nonsense",
    "model.layers.1.self_attn.o_proj.input_scale": "nonsense",
    "model.layers.1.self_attn.q_proj.input_scale": "the same",  # that of k and v counts
    "k_scale": "of its own",
    "v_scale": "of its own",
}
"""Stored scales that are lost, and what vLLM computes without one."""


@functools.cache
def logprobs(vllm: Host, folder: Path, asks: bool) -> torch.Tensor:
    """Log-probabilities in vLLM, which is asked for an FP8 cache where the format does not state one."""
    asked = {"kv_cache_dtype": "fp8"} if asks else {}
    prompts, output = [list(range(1, 40))], folder.with_name(f"{folder.name}.logprobs")
    return vllm.run(folder, prompts, vocabulary=512, output=output, **asked).logprobs[0]


@pytest.mark.parametrize("layout", [each for each in STATIC if each.kv_cache == "fp8"], ids=lambda layout: layout.name)
@pytest.mark.parametrize("lost", STORED)
def test_vllm_computes_without_a_stored_scale_and_verify_demands_it(
    lost: str,
    layout: Layout,
    vllm: Host,
    nemotron: Path,
    quantized: Callable[[Path, Layout], Path],
    record: Callable[..., None],
    tmp_path: Path,
) -> None:
    """An engine that rejects it is as well: vLLM does for values alone, in some formats."""
    whole, broken = quantized(nemotron, layout), tmp_path / "broken"
    shutil.copytree(whole, broken)
    for shard in broken.glob("*.safetensors"):
        names = [name for name in load_file(shard) if name.endswith(lost)]
        edit(shard, dict.fromkeys(names[:1] if lost in ("k_scale", "v_scale") else names))
    problems = [problem for problem in verify_repo(nemotron, broken).problems if problem.tensor.endswith(lost)]
    assert problems
    expected = logprobs(vllm, whole, layout.format == "fp8")
    try:
        found = logprobs(vllm, broken, layout.format == "fp8")
    except EngineRefusedError:
        record("vllm", vllm.version, nemotron, layout.name, damage=f"lost {lost}", refused="at load")
        assert STORED[lost] == "of its own"
        return
    off = float((found - expected).norm() / expected.norm())
    record("vllm", vllm.version, nemotron, layout.name, damage=f"lost {lost}", relative_l2=off)
    assert (off == 0) == (STORED[lost] == "the same")
    assert not off < 0.1 or STORED[lost] != "nonsense"  # or NaN


@pytest.mark.parametrize("layout", OF_TRANSFORMERS, ids=lambda layout: layout.name)
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


MISREAD = {MODELOPT: "unexpected_keys", MODELOPT_BLOCK: "unexpected_keys", KV_CACHE: "missing_keys"}
"""Layouts that transformers loads without an error and computes nonsense with, and the keys that it names."""


@pytest.mark.parametrize("layout", MISREAD, ids=lambda layout: layout.name)
def test_transformers_misreads_what_the_plan_says_it_misreads(
    layout: Layout, nemotron: Path, quantized: Callable[[Path, Layout], Path], record: Callable[..., None]
) -> None:
    """Scales of modelopt are ignored; those of an FP8 cache come from memory that nothing has set.

    When this fails, the engine has learned it, and the layout's record must say so.
    """
    folder = quantized(nemotron, layout)
    (support,) = [each for each in plan_repo(nemotron, layout.recipe).engines if each.engine == "transformers"]
    assert not support.reads
    assert "transformers" in (folder / "README.md").read_text().partition("## Serving")[2].partition("##")[0]
    tokens = [[1, 2, 3, 4, 5, 6, 7, 8]]
    expected = in_transformers.logits(in_transformers.load_by_hand(nemotron, folder), tokens)
    model, lost = in_transformers.load(folder)
    assert set(lost) == {MISREAD[layout]}
    off = float((in_transformers.logits(model, tokens).float() - expected.float()).norm() / expected.float().norm())
    record("transformers", transformers.__version__, nemotron, layout.name, damage="none", named=True, relative_l2=off)
    assert not off < 0.5  # nor NaN


def test_transformers_rounds_activations_in_groups_of_32(
    nemotron: Path, quantized: Callable[[Path, Layout], Path]
) -> None:
    """As its note says: the weights are exact, the activations are cast to FP8 in software."""
    folder = quantized(nemotron, MX)
    tokens = [[1, 2, 3, 4, 5, 6, 7, 8]]
    expected = in_transformers.logits(in_transformers.load_by_hand(nemotron, folder), tokens)
    model, lost = in_transformers.load(folder)
    assert not lost
    off = float((in_transformers.logits(model, tokens).float() - expected.float()).norm() / expected.float().norm())
    assert 0.01 < off < 0.2
