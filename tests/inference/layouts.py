"""The layouts a checkpoint can be written in, and what an FP8 folder says when it is read by hand.

``dequantized_state`` uses the safetensors library and nothing of this project's, so that it can stand as the
other side of a comparison.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open

from nemotron_fp8 import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.planning.recipe import Activations, Granularity

BLOCK, GROUP = 128, 32


@dataclass(frozen=True)
class Layout:
    """One combination of the recipe's fields that a layout on disk depends on."""

    format: str
    granularity: Granularity
    activations: Activations
    share_scales: bool = False
    scale_dtype: Literal["float32", "e8m0"] = "float32"
    scale_rounding: Literal["none", "power-of-two"] = "none"
    kv_cache: Literal["none", "fp8"] = "none"

    @property
    def name(self) -> str:
        """The layout in one word, as tests and tables print it."""
        marks = {
            "shared": self.share_scales,
            "e8m0": self.scale_dtype == "e8m0" and self.granularity != "mx",
            "unrounded": self.granularity == "block" and self.scale_rounding == "none",
            "kv": self.kv_cache == "fp8",
        }
        shown = (mark for mark, there in marks.items() if there)
        return "-".join((self.format, self.granularity, self.activations, *shown))

    @property
    def recipe(self) -> Recipe:
        """The recipe that asks for it."""
        return Recipe(**asdict(self))

    @property
    def scale_suffix(self) -> str:
        """The name of the scale of ``X.weight`` behind ``X.``."""
        inverse = (self.format, self.granularity) in (("fp8", "block"), ("mxfp8", "mx"))
        return "weight_scale_inv" if inverse else "weight_scale"


def block_layout(format: str, activations: Activations = "dynamic") -> Layout:
    """Blocks of 128x128 with scales that are powers of two, as by default."""
    return Layout(format, "block", activations, scale_rounding="power-of-two")


def mx_layout(format: str, activations: Activations = "dynamic") -> Layout:
    """Blocks of 32 inputs of an output."""
    return Layout(format, "mx", activations, scale_dtype="e8m0", scale_rounding="power-of-two")


LAYOUTS = (
    Layout("fp8", "tensor", "dynamic"),
    block_layout("fp8"),
    Layout("compressed-tensors", "tensor", "dynamic"),
    Layout("compressed-tensors", "tensor", "none"),
    Layout("compressed-tensors", "channel", "dynamic"),
    Layout("compressed-tensors", "channel", "none"),
    block_layout("compressed-tensors"),
    block_layout("compressed-tensors", "none"),
)
"""Layouts with float32 scales that more than one engine reads."""
UNROUNDED = Layout("fp8", "block", "dynamic")
E8M0 = replace(block_layout("fp8"), scale_dtype="e8m0")
MXFP8, MX, MX_WEIGHTS = mx_layout("mxfp8"), mx_layout("compressed-tensors"), mx_layout("compressed-tensors", "none")
MODELOPT, MODELOPT_BLOCK = Layout("modelopt", "channel", "dynamic"), block_layout("modelopt")
KV_CACHE = replace(Layout("compressed-tensors", "channel", "none"), kv_cache="fp8")
MODELOPT_KV_CACHE = replace(MODELOPT, kv_cache="fp8")
STATIC = tuple(
    Layout(format, "tensor", "static", kv_cache=cache)
    for format in ("compressed-tensors", "fp8", "modelopt")
    for cache in ("none", "fp8")
)
"""Stored scales of activations, without and with those of an FP8 cache."""
STATIC_ROWS = Layout("compressed-tensors", "channel", "static")
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
    """Spread a scale over a weight of ``shape`` [N, K].

    One value, [N, 1], [N], one value per 128x128 block, also as [N/128, 1, K/128, 1], or [N, K/32].
    """
    rows, columns = shape
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.float()
    if scale.dim() == 4:
        scale = scale[:, 0, :, 0]
    elif scale.shape == (rows,):
        scale = scale.reshape(rows, 1)
    if columns > GROUP and scale.shape == (rows, columns // GROUP):
        return scale.repeat_interleave(GROUP, 1)
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
        assert scale.dtype in (torch.float32, torch.uint8, torch.float8_e8m0fnu), f"{scales[0]} is {scale.dtype}"
        state[name] = (tensor.float() * expand_scale(scale, tensor.shape)).bfloat16()
        used.add(scales[0])
    used |= {name for name in tensors if name.endswith(OF_ACTIVATIONS)}
    stray = {name for name in tensors if "_scale" in name} - used
    assert not stray, f"scales of nothing: {sorted(stray)}"
    return {name: t for name, t in tensors.items() if name not in used and name not in state} | state


OF_ACTIVATIONS = (".input_scale", ".k_scale", ".v_scale")
"""Ends of the names of scales of activations, keys and values."""


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
