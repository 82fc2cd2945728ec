"""Bring a tiny checkpoint to the names and the layout that published checkpoints of its family have.

transformers saves some models that were never loaded under its own names for their modules, which no published
checkpoint has and which other engines do not read.

Use: ``python -m tests.families.published SOURCE DESTINATION``
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    import torch

TOWER = (
    r"^((?:model\.)?(?:vision_tower|vision_model))\.(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.",
    r"\1.vision_model.\2.",
)
"""The towers of CLIP and SigLIP, whose inner module transformers does without since version 5."""

WITH_TOWER = (
    "cohere2_vision",
    "gemma3",
    "lfm2_vl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "paligemma",
    "vipllava",
)
RENAMED: dict[str, list[tuple[str, str]]] = {name: [TOWER] for name in WITH_TOWER}
# The first layer's feed-forward part is dense.
RENAMED["kimi_linear"] = [(r"\.block_sparse_moe\.(gate_proj|up_proj|down_proj)\.", r".mlp.\1.")]
TRANSPOSED = {"qwen3_vl_moe": r"\.experts\.(gate_up_proj|down_proj)$"}
"""Stacks of experts that are published as [experts, in, out]."""
POOLING_HEAD = r"\.vision_model\.head\."
DROPPED = {
    "cohere2_vision": POOLING_HEAD,
    "gemma3": POOLING_HEAD,
    "lfm2_vl": POOLING_HEAD,
    "longcat_flash": r"\.experts\.[4-9]\.",
}
"""Weights that nothing computes with: a tower's own head, and experts that stand for doing nothing."""


def published(source: Path, destination: Path) -> bool:
    """Write ``source`` as it would be published; False, and nothing written, if it already stands like that."""
    config = json.loads((source / "config.json").read_text())
    kind = config["model_type"]
    if kind not in {*RENAMED, *TRANSPOSED, *DROPPED}:
        return False
    shutil.rmtree(destination, ignore_errors=True)
    shutil.copytree(source, destination)
    for shard in destination.glob("*.safetensors"):
        kept: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(shard).items():
            renamed = name
            for pattern, replacement in RENAMED.get(kind, []):
                renamed = re.sub(pattern, replacement, renamed)
            if kind in DROPPED and re.search(DROPPED[kind], renamed):
                continue
            turned = kind in TRANSPOSED and re.search(TRANSPOSED[kind], renamed)
            kept[renamed] = tensor.transpose(1, 2).contiguous() if turned else tensor
        save_file(kept, shard, metadata={"format": "pt"})
    for index in destination.glob("*.index.json"):
        index.unlink()  # the specimens have one shard
    return True


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    given = parser.parse_args()
    print("written" if published(given.source, given.destination) else "nothing to do")


if __name__ == "__main__":
    main()
