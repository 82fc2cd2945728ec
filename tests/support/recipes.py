"""Recipes that several tests use, and what their configs list."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from nemotron_fp8 import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PUBLISHED = Recipe(format="fp8", granularity="tensor")
"""The layout of Nemotron-4-340B-Instruct-FP8: one scale for each tensor."""
SHARED = Recipe(format="fp8", granularity="tensor", share_scales=True)
"""The same, with one scale for the tensors that engines fuse."""


def listed(folder: Path) -> list[str]:
    """The unquantized modules that the config of a result names, as it spells them."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config["quantization_config"]
    found: list[str] = quantization["ignore" if "ignore" in quantization else "ignored_layers"]
    return found


MERGED = {"self_attn.qkv_proj": {f"self_attn.{part}_proj" for part in "qkv"}} | {
    "mlp.gate_up_proj": {"mlp.gate_proj", "mlp.up_proj"}
}
"""Modules that vLLM merges, each with its parts."""


def spelled(recipe: Recipe, modules: Iterable[str]) -> list[str]:
    """The entries for modules of which other layers hold quantized namesakes, or none.

    The merged module stands beside its parts.
    """
    modules = set(modules)
    stems = {name.rsplit(".", 2)[0] for name in modules if name.startswith("model.layers.")}
    modules |= {
        f"{stem}.{name}"
        for stem in stems
        for name, parts in MERGED.items()
        if {f"{stem}.{part}" for part in parts} <= modules
    }
    if recipe.format == "fp8":
        return sorted(modules)
    return sorted(f"re:.*{re.escape(name.removeprefix('model.'))}$" for name in modules)
