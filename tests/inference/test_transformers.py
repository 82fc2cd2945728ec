"""transformers loads every layout, and what it computes with is `(code.float() * scale).bfloat16()` to the bit."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

from nemotron_fp8 import dequantize_repo
from tests.inference import in_transformers, models
from tests.inference.layouts import (
    E8M0,
    KV_CACHE,
    LAYOUTS,
    MX,
    MX_WEIGHTS,
    MXFP8,
    OF_ACTIVATIONS,
    SHARED,
    STATIC,
    STATIC_ROWS,
    UNROUNDED,
    Layout,
    config_of,
    quantized_names,
    read_folder,
)
from tests.support.checkpoints import edit, read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engines

# No weight of SmolLM2 divides by 128 in both dimensions (hidden 576), so there is no block layout of it.
CASES = [
    *(("nemotron", layout) for layout in (*LAYOUTS, SHARED, UNROUNDED, E8M0, MXFP8, MX, MX_WEIGHTS, KV_CACHE)),
    *(("nemotron", layout) for layout in (*STATIC, STATIC_ROWS) if layout.format != "modelopt"),
    *(("ragged_nemotron", layout) for layout in LAYOUTS if layout.granularity == "block"),
    *(("qwen3_moe", layout) for layout in LAYOUTS if layout.format == "fp8"),
    ("qwen3_moe", MXFP8),
    *(("smollm2", layout) for layout in (*LAYOUTS, MXFP8, MX_WEIGHTS) if layout.granularity != "block"),
]


@pytest.mark.parametrize(("model", "layout"), CASES, ids=lambda value: getattr(value, "name", value))
def test_logits_are_those_of_dequantizing_by_hand(
    model: str,
    layout: Layout,
    quantized: Callable[[Path, Layout], Path],
    record: Callable[..., None],
    request: pytest.FixtureRequest,
) -> None:
    """Bit-equal logits, no key lost, something quantized; and the trained model still answers."""
    source: Path = request.getfixturevalue(model)
    folder = quantized(source, layout)
    assert quantized_names(folder)
    loaded, lost = in_transformers.load(folder, **in_transformers.options_for(layout))
    assert {kind: set(keys) for kind, keys in lost.items()} == _unused(folder)
    by_hand = in_transformers.load_by_hand(source, folder)
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(config_of(source)["vocab_size"], (2, 24), generator=draw).tolist()
    expected = in_transformers.logits(by_hand, tokens)
    assert torch.equal(in_transformers.logits(loaded, tokens), expected)
    unquantized = in_transformers.logits(in_transformers.load(source)[0], tokens)
    assert not torch.equal(expected, unquantized), "the comparison would pass without any quantization"
    figures = {"logits": "bit-equal", "relative_l2": _relative(expected, unquantized)}
    if model == "smollm2":
        figures["answer"] = in_transformers.next_text(loaded, folder, models.PROMPT)
        assert figures["answer"] == models.ANSWER
    record("transformers", transformers.__version__, source, layout.name, **figures)


def test_weights_in_groups_of_32_need_no_option(nemotron: Path, quantized: Callable[[Path, Layout], Path]) -> None:
    """A plain load is bit-equal: the scales are powers of two, which bf16 holds."""
    folder = quantized(nemotron, MX_WEIGHTS)
    loaded, lost = in_transformers.load(folder)
    assert not lost
    tokens = [[1, 5, 9, 200, 17, 33, 64, 511]]
    by_hand = in_transformers.load_by_hand(nemotron, folder)
    assert torch.equal(in_transformers.logits(loaded, tokens), in_transformers.logits(by_hand, tokens))


@pytest.mark.parametrize(
    ("model", "layout"),
    [("nemotron", SHARED), ("nemotron", LAYOUTS[1]), ("qwen3_moe", LAYOUTS[0])],
    ids=lambda value: getattr(value, "name", value),
)
def test_dequantized_folders_are_the_models_by_hand(
    model: str,
    layout: Layout,
    quantized: Callable[[Path, Layout], Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """The result of `dequantize_repo` loads like any bf16 checkpoint, also with experts stored one by one."""
    source: Path = request.getfixturevalue(model)
    folder = quantized(source, layout)
    dequantize_repo(folder, tmp_path / "bf16")
    assert "quantization_config" not in config_of(tmp_path / "bf16")
    loaded, lost = in_transformers.load(tmp_path / "bf16")
    assert not lost
    tokens = [[1, 5, 9, 200, 17, 33, 64, 511]]
    by_hand = in_transformers.load_by_hand(source, folder)
    assert torch.equal(in_transformers.logits(loaded, tokens), in_transformers.logits(by_hand, tokens))


@pytest.mark.parametrize("layout", [STATIC[1], STATIC_ROWS], ids=lambda layout: layout.name)
def test_stored_scales_of_activations_are_read(
    layout: Layout, nemotron: Path, quantized: Callable[[Path, Layout], Path], tmp_path: Path
) -> None:
    """A plain load misses no key and rounds activations by the stored scales: a hundredth of them clips."""
    folder = quantized(nemotron, layout)
    loaded, lost = in_transformers.load(folder)
    assert not lost
    tokens = [[1, 5, 9, 200, 17, 33, 64, 511]]
    exact = in_transformers.logits(in_transformers.load_by_hand(nemotron, folder), tokens)
    error = _relative(in_transformers.logits(loaded, tokens), exact)
    assert 0 < error < 0.5
    shutil.copytree(folder, tmp_path / "clipped")
    shard = next((tmp_path / "clipped").glob("*.safetensors"))
    scales = {name: t / 100 for name, t in read_tensors(shard).items() if name.endswith("input_scale")}
    edit(shard, scales)
    clipped = in_transformers.logits(in_transformers.load(tmp_path / "clipped")[0], tokens)
    assert _relative(clipped, exact) > 2 * error


def _unused(folder: Path) -> dict[str, set[str]]:
    """The keys that transformers does not use where it dequantizes: scales of activations."""
    found = {name for name in read_folder(folder) if name.endswith(OF_ACTIVATIONS)}
    return {"unexpected_keys": found} if found else {}


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())
