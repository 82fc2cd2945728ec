"""The layouts a checkpoint can be written in, and what an FP8 folder says when it is read by hand.

``dequantized_state`` uses the safetensors library and nothing of this project, so that it can stand as the
other side of a comparison.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.planning.recipe import Activations, Granularity

BLOCK = 128


@dataclass(frozen=True)
class Layout:
    """One combination of the recipe's ``format``, ``granularity``, ``activations`` and ``share_scales``."""

    format: str
    granularity: Granularity
    activations: Activations
    share_scales: bool = False

    @property
    def name(self) -> str:
        """The layout in one word, as tests and tables print it."""
        shared = ("shared",) if self.share_scales else ()
        return "-".join((self.format, self.granularity, self.activations, *shared))

    @property
    def scale_suffix(self) -> str:
        """The name of the scale of ``X.weight`` behind ``X.``."""
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
SHARED = Layout("fp8", "tensor", "dynamic", share_scales=True)
"""One scale for q, k and v: what vLLM would otherwise make of their three by casting again."""


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


def dequantized_state(folder: Path) -> dict[str, torch.Tensor]:
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


EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)\.weight")


def stack_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with the experts of each layer stacked as transformers' modules hold them.

    ``gate_up_proj`` [experts, 2 * intermediate, hidden], the gate's rows first; ``down_proj`` [experts, hidden,
    intermediate]. Source: ``Qwen3MoeExperts`` of transformers 5.
    """
    stacked = {name: tensor for name, tensor in state.items() if not EXPERT.fullmatch(name)}
    numbers: dict[str, int] = {}
    for name in state:
        if found := EXPERT.fullmatch(name):
            numbers[found["experts"]] = max(numbers.get(found["experts"], 0), int(found["number"]) + 1)
    for experts, count in numbers.items():
        for whole, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            stacked[f"{experts}.{whole}"] = torch.stack(
                [torch.cat([state[f"{experts}.{i}.{part}.weight"] for part in parts]) for i in range(count)]
            )
    return stacked


def quantized_names(folder: Path) -> set[str]:
    """The names of the FP8 weights of ``folder``."""
    return {name for name, tensor in read_folder(folder).items() if tensor.dtype == torch.float8_e4m3fn}


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
