"""An FP8 folder read by hand, with safetensors and torch alone: the other side of every comparison."""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from tests.inference.layouts import BLOCK, GROUP, config_of, read_folder

if TYPE_CHECKING:
    from pathlib import Path

NOT_LINEAR = re.compile(r"embed|wte|wpe|lm_head|position|conv|norm|\bhead\b|proj_out|embd")
STATED = ("quantization_config", "compression_config")


def product(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply FP8 codes of any rank by their scale; in bf16.

    One value, one a row, one a 128x128 block, or one for 32 columns of a row, as a byte.
    """
    *_, rows, columns = codes.shape
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.float()
    if scale.dim() == 4 and codes.dim() == 2:
        scale = scale[:, 0, :, 0]
    if scale.numel() == 1:
        scale = scale.reshape(())
    elif columns > GROUP and scale.shape[-2:] == (rows, columns // GROUP):
        scale = scale.repeat_interleave(GROUP, -1)
    elif scale.shape[-2:] == (-(-rows // BLOCK), -(-columns // BLOCK)) and scale.shape[-2:] != (rows, 1):
        scale = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    elif scale.dim() == 1 and codes.dim() == 2 and len(scale) == rows:
        scale = scale[:, None]
    elif scale.dim() == 1 and codes.dim() == 3 and len(scale) == len(codes):
        scale = scale[:, None, None]
    assert scale.dim() == 0 or scale.expand_as(codes).shape == codes.shape
    return (codes.float() * scale).bfloat16()


def scale_name(name: str, tensors: dict[str, torch.Tensor]) -> str:
    """Find the scale of an FP8 weight."""
    found = [scale for scale in (f"{name}_scale", f"{name}_scale_inv") if scale in tensors]
    if len(found) != 1:
        raise ValueError(f"{name} has the scales {found}")
    return found[0]


def dequantized(folder: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return the tensors of a folder with products in place of codes and scales, and the names of the products."""
    tensors = read_folder(folder)
    scales = {name: scale_name(name, tensors) for name, each in tensors.items() if each.dtype == torch.float8_e4m3fn}
    products = {name: product(tensors[name], tensors[scale]) for name, scale in scales.items()}
    rest = {name: each for name, each in tensors.items() if name not in scales and name not in set(scales.values())}
    return rest | products, set(products)


def write_dequantized(folder: Path, target: Path) -> set[str]:
    """Write what ``folder`` means as an ordinary checkpoint, and return the names of the products."""
    target.mkdir()
    state, products = dequantized(folder)
    save_file({name: each.contiguous() for name, each in state.items()}, target / "model.safetensors", {"format": "pt"})
    for file in folder.glob("*.json"):
        if not file.name.endswith((".index.json", ".stats.json", "quant_config.json")):
            shutil.copy(file, target / file.name)
    config = {name: value for name, value in config_of(folder).items() if name not in STATED}
    (target / "config.json").write_text(json.dumps(config))
    return products


def fp8_share(folder: Path) -> float:
    """Compute the share of the weights of linear layers that ``folder`` holds in FP8, by names and ranks."""
    eight = rest = 0
    for name, tensor in read_folder(folder).items():
        if tensor.dtype == torch.float8_e4m3fn:
            eight += tensor.numel()
        elif tensor.dim() in {2, 3} and min(tensor.shape) > 1 and "_scale" not in name and not NOT_LINEAR.search(name):
            rest += tensor.numel()
    return round(eight / max(eight + rest, 1), 3)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Compute the size of the difference of two tensors, as a part of the size of ``other``."""
    if one.shape != other.shape:
        return math.inf
    size = float(other.float().norm())
    return float((one.float() - other.float()).norm()) / size if size else float(one.float().norm())
