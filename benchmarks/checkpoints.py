"""Nemotron-shaped checkpoints of a chosen size for benchmarks; fast to write, in little memory."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.checkpoint import header

if TYPE_CHECKING:
    from pathlib import Path

Shapes = list[list[tuple[str, tuple[int, ...]]]]
"""Names and shapes of the tensors of each shard."""

BLOCK = 1 << 22
"""Elements of the block of random values that every tensor repeats from another offset."""


def write_checkpoint(folder: Path, shards: Shapes, dtype: str = "BF16") -> int:
    """Write a checkpoint with these tensors unless it exists; return the bytes of its shards."""
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    if (folder / "config.json").exists():
        return sum((folder / name).stat().st_size for name in names)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    block = (torch.randn(BLOCK) * 0.02).bfloat16()
    pool = memoryview(torch.cat([block, block]).view(torch.uint8).numpy())
    weight_map, total = {}, 0
    for name, tensors in zip(names, shards, strict=True):
        layout = header.build_header([(t, dtype, shape) for t, shape in tensors], {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header.serialize(layout))
            for i, entry in enumerate(layout.entries):
                left, start = entry.nbytes, (i * 977) % BLOCK * 2
                while left:
                    piece = pool[start : start + min(left, 2 * BLOCK)]
                    file.write(piece)
                    left -= len(piece)
                weight_map[entry.name] = name
        total += layout.data_size
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron"}
    (folder / "config.json").write_text(json.dumps(config))
    return sum((folder / name).stat().st_size for name in names)


def nemotron(gigabytes: float, shards: int, hidden: int = 4096) -> Shapes:
    """Return the shapes of decoder layers like those of Minitron-8B, about ``gigabytes`` (1e9 bytes) in total."""
    inner, kv = 4 * hidden, hidden // 6 // 128 * 128
    layer_bytes = 2 * (2 * hidden * hidden + 2 * kv * hidden + 2 * inner * hidden)
    layers = max(shards, math.ceil(gigabytes * 1e9 / layer_bytes))
    groups: Shapes = [[] for _ in range(shards)]
    for layer in range(layers):
        group, stem = groups[layer * shards // layers], f"model.layers.{layer}."
        group += [
            (f"{stem}input_layernorm.weight", (hidden,)),
            (f"{stem}self_attn.q_proj.weight", (hidden, hidden)),
            (f"{stem}self_attn.k_proj.weight", (kv, hidden)),
            (f"{stem}self_attn.v_proj.weight", (kv, hidden)),
            (f"{stem}self_attn.o_proj.weight", (hidden, hidden)),
            (f"{stem}mlp.up_proj.weight", (inner, hidden)),
            (f"{stem}mlp.down_proj.weight", (hidden, inner)),
        ]
    return groups
