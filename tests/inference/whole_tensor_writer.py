"""A writer that holds whole shards and knows nothing of the pipeline: the plainest reading of each layout.

It answers two questions that the pipeline cannot answer about itself: whether an engine's trouble lies in the
engine or in us, and whether the pipeline's tensors are what the layout's description says.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tests.inference.layouts import BLOCK, Layout, config_of, read_folder

if TYPE_CHECKING:
    from pathlib import Path

E4M3_MAX = 448.0
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)


def quantize_weight(weight: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes [N, K] and float32 scales of ``weight`` [N, K] in the shapes that ``layout`` wants."""
    wide = weight.float()
    if layout.granularity == "tensor":
        amax = wide.abs().amax().reshape(() if layout.format == "fp8" else (1,))
        spread = amax.reshape(1, 1)
    elif layout.granularity == "channel":
        amax = spread = wide.abs().amax(1, keepdim=True)
    else:
        amax = _blocks(wide).abs().amax((1, 3))
        spread = amax.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    limit = torch.full_like(amax, E4M3_MAX)
    # Tensor by tensor on purpose: `448.0 / tensor` is computed as reciprocal() * 448 and rounds twice.
    multiplier = torch.full_like(spread, E4M3_MAX) / spread.clamp(min=1e-12)
    codes = (wide * multiplier).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, torch.ones_like(limit) / (limit / amax.clamp(min=1e-12))


def _partners(name: str) -> list[str]:
    for group in FUSED:
        for member in group:
            if f".{member}." in name:
                return [name.replace(f".{member}.", f".{other}.") for other in group]
    return [name]


def select(shapes: dict[str, torch.Size], layout: Layout) -> list[str]:
    """The weights that ``layout`` quantizes: every 2-D ``*_proj.weight``, by block only where it divides."""

    def divides(name: str) -> bool:
        return all(side % BLOCK == 0 for side in shapes[name])

    names = [name for name, shape in shapes.items() if name.endswith("_proj.weight") and len(shape) == 2]
    if layout.granularity == "block":
        names = [name for name in names if all(divides(p) for p in _partners(name) if p in shapes)]
    return sorted(names)


def quantization_config(layout: Layout, kept: list[str]) -> dict[str, Any]:
    """Return the entry of config.json for ``layout`` with the modules ``kept`` left in bf16."""
    # vLLM looks up the modules that it merges, too.
    merged = dict.fromkeys(re.sub(r"\.[qkv]_proj$", ".qkv_proj", name) for name in kept)
    whole = [*kept, *(name for name in merged if name not in kept)]
    if layout.format == "fp8":
        scheme: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        # vLLM compares whole names; transformers compares ends of names.
        lists = {"ignored_layers": whole}
        if layout.granularity == "block":
            ends = [name.removeprefix("model.") for name in kept]
            return scheme | {"weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ends} | lists
        return scheme | lists
    value = {"num_bits": 8, "type": "float", "symmetric": True}
    weights: dict[str, Any] = value | {"strategy": layout.granularity, "dynamic": False}
    inputs: dict[str, Any] = value | {"strategy": "token", "dynamic": True}
    if layout.granularity == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
        inputs |= {"strategy": "group", "group_size": BLOCK}
    group = {
        "targets": ["Linear"],
        "format": "float-quantized",
        "weights": weights,
        "input_activations": inputs if layout.activations == "dynamic" else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": list(dict.fromkeys(map(_entry, whole))),
        "config_groups": {"group_0": group},
    }


def _entry(name: str) -> str:
    """Return the entry for a module of every layer, under any prefix."""
    return "re:.*" + re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name.removeprefix("model."))) + "$"


def write(source: Path, destination: Path, layout: Layout) -> None:
    """Quantize the folder ``source`` into the new folder ``destination``."""
    shapes = {name: tensor.shape for name, tensor in read_folder(source).items()}
    chosen = select(shapes, layout)
    kept = sorted(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and name not in chosen and "embed" not in name
    )
    if "lm_head" not in kept:  # tied: there is no tensor, but engines build the module all the same
        kept.append("lm_head")
    destination.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for file in sorted(source.iterdir()):
        if file.suffix != ".safetensors":
            if file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copy(file, destination)
            continue
        tensors = load_file(file)
        for name in [name for name in tensors if name in chosen]:
            codes, scales = quantize_weight(tensors[name], layout)
            tensors |= {name: codes, f"{name.removesuffix('weight')}{layout.scale_suffix}": scales}
        weight_map |= dict.fromkeys(tensors, file.name)
        save_file(tensors, destination / file.name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (destination / "model.safetensors.index.json").write_text(json.dumps(index))
    config = config_of(source) | {"quantization_config": quantization_config(layout, kept)}
    (destination / "config.json").write_text(json.dumps(config, indent=2))
