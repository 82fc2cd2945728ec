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

from tests.inference.layouts import BLOCK, GROUP, Layout, config_of, read_folder

if TYPE_CHECKING:
    from pathlib import Path

E4M3_MAX = 448.0
LEAST_OF_BLOCKS = 1e-4
"""Least amax of a block for its scale, as engines with DeepGEMM have it."""
BESIDE, PRODUCER = "hf_quant_config.json", {"name": "modelopt"}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)


def _exponents(amax: torch.Tensor, least: float) -> torch.Tensor:
    """Exponents of the smallest powers of two by which no value exceeds E4M3; of 0, that of 1.

    In double precision: the quotient of a float32 and 448 is a power of two if and only if it is one there.
    """
    exponents = torch.ceil(torch.log2(amax.double().clamp(min=least) / E4M3_MAX))
    return torch.where(amax > 0, exponents, 0.0) if least < LEAST_OF_BLOCKS else exponents


def quantize_weight(weight: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes [N, K] and float32 scales of ``weight`` [N, K] in the shapes that ``layout`` wants."""
    wide = weight.float()
    if layout.granularity == "tensor":
        amax = wide.abs().amax().reshape(() if layout.format == "fp8" else (1,))
        spread = amax.reshape(1, 1)
    elif layout.granularity == "channel":
        amax = spread = wide.abs().amax(1, keepdim=True)
        if layout.format == "modelopt":
            amax = amax.reshape(-1)
    elif layout.granularity == "mx":
        exponents = _exponents(wide.reshape(wide.shape[0], -1, GROUP).abs().amax(-1), torch.finfo().tiny)
        scaled = wide * torch.exp2(-exponents).float().repeat_interleave(GROUP, 1)
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), (exponents + 127).to(torch.uint8)
    else:
        amax = _blocks(wide).abs().amax((1, 3))
        spread = amax.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    if layout.granularity == "block" and layout.scale_rounding == "power-of-two":
        scale = torch.exp2(_exponents(amax, LEAST_OF_BLOCKS)).float()
        wanted = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        codes = (wide / wanted).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        if layout.format == "modelopt":
            scale = scale[:, None, :, None]
        return codes, scale.to(torch.float8_e8m0fnu) if layout.scale_dtype == "e8m0" else scale
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
        rows, columns = shapes[name]
        return columns % GROUP == 0 if layout.granularity == "mx" else rows % BLOCK == columns % BLOCK == 0

    names = [name for name, shape in shapes.items() if name.endswith("_proj.weight") and len(shape) == 2]
    if layout.granularity in ("block", "mx"):
        names = [name for name in names if all(divides(p) for p in _partners(name) if p in shapes)]
    return sorted(names)


def quantization_config(layout: Layout, kept: list[str]) -> dict[str, Any]:
    """Return the entry of config.json for ``layout`` with the modules ``kept`` left in bf16."""
    # vLLM looks up the modules that it merges, too.
    merged = dict.fromkeys(re.sub(r"\.[qkv]_proj$", ".qkv_proj", name) for name in kept)
    whole = [*kept, *(name for name in merged if name not in kept)]
    ends = [name.removeprefix("model.") for name in kept]
    scheme: dict[str, Any]
    if layout.format == "mxfp8":
        scheme = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0"}
        return scheme | {"weight_block_size": [1, GROUP], "ignored_layers": whole, "modules_to_not_convert": ends}
    if layout.format == "modelopt":
        algorithm = "fp8_pb_wo" if layout.granularity == "block" else "FP8_PER_CHANNEL_PER_TOKEN"
        cache = {"num_bits": 8, "type": "float", "dynamic": False}
        stated = {"kv_cache_scheme": cache} if layout.kv_cache == "fp8" else {}
        return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": whole, "producer": PRODUCER} | stated
    if layout.format == "fp8":
        scheme = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        # vLLM compares whole names; transformers compares ends of names.
        lists = {"ignored_layers": whole}
        if layout.granularity == "block":
            stated = {"scale_fmt": "ue8m0"} if layout.scale_dtype == "e8m0" else {}
            return scheme | {"weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ends} | lists | stated
        return scheme | lists
    value = {"num_bits": 8, "type": "float", "symmetric": True}
    weights: dict[str, Any] = value | {"strategy": layout.granularity, "dynamic": False}
    inputs: dict[str, Any] = value | {"strategy": "token", "dynamic": True}
    if layout.granularity == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
        inputs |= {"strategy": "group", "group_size": BLOCK}
    form = "float-quantized"
    if layout.granularity == "mx":
        form = "mxfp8-quantized"
        groups = {"strategy": "group", "group_size": GROUP, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        weights, inputs = weights | groups, inputs | groups
    group = {
        "targets": ["Linear"],
        "format": form,
        "weights": weights,
        "input_activations": inputs if layout.activations == "dynamic" else None,
    }
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    stated = {"kv_cache_scheme": cache} if layout.kv_cache == "fp8" else {}
    return stated | {
        "quant_method": "compressed-tensors",
        "format": form,
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
    stated = quantization_config(layout, kept)
    (destination / "config.json").write_text(json.dumps(config_of(source) | {"quantization_config": stated}, indent=2))
    if layout.format == "modelopt":
        cache = "FP8" if layout.kv_cache == "fp8" else None
        older = {"quant_algo": stated["quant_algo"], "kv_cache_quant_algo": cache, "exclude_modules": stated["ignore"]}
        (destination / BESIDE).write_text(json.dumps({"producer": PRODUCER, "quantization": older}))
