"""Checkpoints of quantized weights, and a recipe for every layout, for the tests of quantized sources."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nemotron_fp8 import Recipe, verify_repo
from tests.support.checkpoints import ONE, Tensors, read_tensors, weight, write_checkpoint
from tests.support.quantized import KINDS, Cell, Weight, checkpoint_of

if TYPE_CHECKING:
    from pathlib import Path

MODULE = "model.layers.0.self_attn.o_proj"
NAME = f"{MODULE}.weight"
EMBEDDING = "model.embed_tokens.weight"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
TARGETS: dict[str, tuple[Recipe, Cell]] = {
    "fp8 tensor": (Recipe(format="fp8", granularity="tensor"), (None, None)),
    "fp8 block": (Recipe(format="fp8", granularity="block"), (128, 128)),
    "fp8 block e8m0": (Recipe(format="fp8", granularity="block", scale_dtype="e8m0"), (128, 128)),
    "fp8 block unrounded": (Recipe(format="fp8", granularity="block", scale_rounding="none"), (128, 128)),
    "tensor": (Recipe(granularity="tensor"), (None, None)),
    "channel": (Recipe(granularity="channel"), (1, None)),
    "block": (Recipe(granularity="block"), (128, 128)),
    "mx": (Recipe(granularity="mx"), (1, 32)),
    "mxfp8": (Recipe(format="mxfp8"), (1, 32)),
    "modelopt channel": (Recipe(format="modelopt", granularity="channel"), (1, None)),
    "modelopt block": (Recipe(format="modelopt", granularity="block"), (128, 128)),
}
"""Recipes of every layout, with rows and columns under one scale."""


def every_tensor(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_tensors(path)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def source_of(folder: Path, weights: dict[str, Weight], config: dict[str, Any] | None = None, **more: Any) -> Path:
    tensors = {**checkpoint_of(weights), EMBEDDING: weight(8, 16)}
    return write_checkpoint(folder, {ONE: tensors}, config={"model_type": "llama", **(config or {})}, **more)


def check(source: Path, result: Path) -> None:
    """Both verifications find nothing."""
    assert verify_repo(source, result).problems == ()
    assert verify_repo(None, result).problems == ()


def mixed(folder: Path) -> tuple[Path, dict[str, Weight]]:
    """FP8 of two granularities beside bf16, in two shards, with scales apart from their weights."""
    made = {
        "model.layers.0.self_attn.o_proj": KINDS["tensor"].make(128, 128, 1),
        "model.layers.0.mlp.down_proj": KINDS["channel"].make(128, 256, 2),
        "model.layers.1.mlp.down_proj": KINDS["channel"].make(128, 256, 3),
    }
    shards: dict[str, Tensors] = {FIRST: {EMBEDDING: weight(8, 128)}, SECOND: {}}
    shards[SECOND]["model.layers.1.self_attn.o_proj.weight"] = weight(128, 128, seed=5)
    for name, tensor in checkpoint_of(made).items():
        shards[SECOND if name.endswith("scale") else FIRST][name] = tensor
    return write_checkpoint(folder, shards, config={"model_type": "llama"}), made
