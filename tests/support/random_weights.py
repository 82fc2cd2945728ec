"""Checkpoints of random values with every kind of tensor that an engine treats in a way of its own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.checkpoint import header
from nemotron_fp8.planning.recipe import Recipe
from tests.support.recipes import PUBLISHED, SHARED

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
KEEP = [recipe.model_copy(update={"nonfinite": "keep"}) for recipe in (PUBLISHED, SHARED)]
RECIPES = [
    PUBLISHED,
    SHARED,
    Recipe(numerics="original"),
    *KEEP,
    Recipe(format="compressed-tensors", granularity="channel"),
    Recipe(scales="best"),
    Recipe(scales="best", nonfinite="keep", stats=True),
    Recipe(format="fp8", granularity="block"),
    Recipe(format="compressed-tensors", granularity="block", nonfinite="keep"),
    Recipe(format="fp8", granularity="block", scale_rounding="none"),
    Recipe(format="fp8", granularity="block", scale_dtype="e8m0"),
    Recipe(format="mxfp8"),
    Recipe(format="compressed-tensors", granularity="mx", nonfinite="keep", stats=True),
]
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def write(folder: Path, shards: list[Tensors], seed: int = 0, bad: str | None = None) -> None:
    """Write a checkpoint of random values with these tensors; ``bad`` gets an Inf."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        layout = header.build_header([(t, dtype, shape) for t, (dtype, shape) in tensors.items()], None)
        with (folder / name).open("wb") as file:
            file.write(header.serialize(layout))
            for entry in layout.entries:
                values = torch.randn(entry.shape, generator=generator) * 10.0 ** (entry.nbytes % 5 - 2)
                if seed % 2 == 0 and values.numel():  # an amax that only the last slice knows
                    values.view(-1)[-1] = -2 * values.abs().max()
                if entry.name == bad:
                    values.view(-1)[values.numel() // 2] = float("inf")
                flat = values.to(DTYPES[entry.dtype]).contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy())
                weight_map[entry.name] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


BIG: list[Tensors] = [
    {
        "model.embed_tokens.weight": ("BF16", (3000, 320)),
        "model.layers.0.self_attn.q_proj.weight": ("BF16", (1600, 640)),
        "model.layers.0.self_attn.k_proj.weight": ("BF16", (64, 640)),
        "model.layers.0.self_attn.v_proj.weight": ("BF16", (64, 640)),
        "model.layers.0.mlp.down_proj.weight": ("BF16", (640, 6400)),
        "model.layers.0.input_layernorm.weight": ("BF16", (640,)),
    },
    {"model.layers.1.mlp.up_proj.weight": ("F32", (1024, 640))}
    | {f"model.layers.1.experts.{i}.up_proj.weight": ("BF16", (128, 128)) for i in range(40)},
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
