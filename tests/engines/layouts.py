"""The layouts a checkpoint can be written in, and what an FP8 folder says when it is read by hand.

``dequantised_state`` uses the safetensors library and nothing of this project, so that it can stand as the
other side of a comparison.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.recipe import Activations, Format, Granularity

BLOCK = 128


@dataclass(frozen=True)
class Layout:
    """One combination of the recipe's ``format``, ``granularity`` and ``activations``."""

    format: Format
    granularity: Granularity
    activations: Activations

    @property
    def name(self) -> str:
        """The layout in one word, as tests and tables print it."""
        return "-".join((self.format, self.granularity, self.activations))

    @property
    def scale_suffix(self) -> str:
        """What the scale of ``X.weight`` is called behind ``X.``."""
        return "weight_scale_inv" if (self.format, self.granularity) == ("fp8", "block") else "weight_scale"


LAYOUTS = (
    Layout("fp8", "tensor", "dynamic"),
    Layout("fp8", "block", "dynamic"),
    Layout("compressed-tensors", "tensor", "dynamic"),
    Layout("compressed-tensors", "tensor", "none"),
    Layout("compressed-tensors", "channel", "dynamic"),
    Layout("compressed-tensors", "channel", "none"),
    Layout("compressed-tensors", "block", "dynamic"),
    Layout("compressed-tensors", "block", "none"),
)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every shard of ``folder`` by its name, on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
                assert name not in tensors, f"{name} stands in two shards"
                tensors[name] = opened.get_tensor(name)
    return tensors


def expand_scale(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Spread a scale over a weight of ``shape`` [N, K]: one value, [N, 1], or one value per 128x128 block."""
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, columns)
    if scale.shape == (rows, 1):
        return scale.expand(rows, columns)
    assert scale.shape == (-(-rows // BLOCK), -(-columns // BLOCK)), f"scale {scale.shape} for {shape}"
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def dequantised_state(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's tensors with ``(code.float() * scale).bfloat16()`` in place of every FP8 weight.

    Raises:
        AssertionError: an FP8 weight has not exactly one scale, or a scale belongs to no FP8 weight.
    """
    tensors = read_folder(folder)
    state: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float8_e4m3fn:
            continue
        scales = [s for s in (f"{name}_scale", f"{name}_scale_inv") if s in tensors]
        assert len(scales) == 1, f"{name} has the scales {scales}"
        scale = tensors[scales[0]]
        assert scale.dtype == torch.float32, f"{scales[0]} is {scale.dtype}"
        state[name] = (tensor.float() * expand_scale(scale, tensor.shape)).bfloat16()
        used.add(scales[0])
    stray = {name for name in tensors if "_scale" in name} - used
    assert not stray, f"scales of nothing: {sorted(stray)}"
    return {name: t for name, t in tensors.items() if name not in used and name not in state} | state


def quantised_names(folder: Path) -> set[str]:
    """The names of the FP8 weights of ``folder``."""
    return {name for name, tensor in read_folder(folder).items() if tensor.dtype == torch.float8_e4m3fn}


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
