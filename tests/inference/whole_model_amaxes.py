"""Activations of a whole model that transformers loads, by hooks: a second way, written without the library's own.

A module is named after the tensor of the checkpoint that has the values of its weight. Inputs are those of modules with
a matrix, before their forward; those of experts are computed from what reaches all experts of a layer. Keys and values
are those that reach ``scaled_dot_product_attention`` of torch, or the function for attention in the model's own file.
"""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from safetensors.torch import load_file

from tests.inference.layer_by_layer import whole_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""Single matrices of an expert, by the stack in the model."""


@dataclass
class Measured:
    """Magnitudes of activations: float32, in parts.

    Attributes:
        inputs: of the inputs, by module.
        k: of the keys, by layer.
        v: of the values, by layer.
    """

    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    k: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    v: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, table: str, key: Any, values: torch.Tensor) -> None:
        """Add values to an entry; nothing for no values."""
        if values.numel():
            getattr(self, table).setdefault(key, []).append(values.detach().float().abs().flatten())

    def amaxes(self, table: str) -> dict[Any, float]:
        """Return the largest magnitude of each entry of a table."""
        return {key: max(float(part.max()) for part in parts) for key, parts in getattr(self, table).items()}

    def percentiles(self, table: str, percentile: float) -> dict[Any, float]:
        """Return the smallest magnitude of each entry that a percentage of the values does not exceed."""
        found = {}
        for key, parts in getattr(self, table).items():
            values = torch.cat(parts).sort().values
            count = len(values)
            share = next(n for n in range(1, count + 1) if n * 100000 >= round(percentile * 1000) * count)
            found[key] = float(values[share - 1])
        return found


@torch.no_grad()
def measure(folder: Path, ids: torch.Tensor, dtype: torch.dtype | None = None) -> Measured:
    """Run a whole model on sequences, one at a time, and return what it multiplied and attended to."""
    model, layers_name = whole_model(folder, dtype)
    stored = {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}
    found = Measured()
    current = [-1]
    with ExitStack() as stack:
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and not isinstance(module, torch.nn.Embedding):
                names = [key for key, each in stored.items() if _equal(each, weight)]
                if "lm_head" in name and not any("embed" not in key and "wte" not in key for key in names):
                    continue  # tied: the checkpoint has no tensor of its own
                module.register_forward_pre_hook(_of_module(found, [key for key in names if "embed" not in key]))
            if any(each.dim() == 3 for part, each in module._parameters.items() if each is not None and part in PARTS):
                module.register_forward_pre_hook(
                    _of_experts(found, _expert_names(module, name, stored)), with_kwargs=True
                )
        for number, layer in enumerate(model.get_submodule(layers_name)):
            layer.register_forward_pre_hook(lambda *_, number=number: current.__setitem__(0, number))
        stack.enter_context(_attention(model, lambda table, values: found.add(table, current[0], values)))
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    return found


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def _of_module(found: Measured, names: list[str]) -> Callable[..., None]:
    modules = [name.removesuffix(".weight") for name in names]
    assert modules

    def hook(_: Any, given: tuple[Any, ...]) -> None:
        for module in modules:
            found.add("inputs", module, given[0])

    return hook


def _expert_names(module: Any, path: str, stored: dict[str, torch.Tensor]) -> dict[str, list[list[str]]]:
    """Return the modules of each expert of a stack, by the stack: stored one by one, or stacked."""
    found = {}
    for part, single in PARTS.items():
        stack = module._parameters.get(part)
        if stack is None:
            continue
        whole = [key for key, each in stored.items() if each.dim() == 3 and _equal(each, stack)]
        rows = stack.shape[1] // len(single)
        names: list[list[str]] = []
        for expert, matrix in enumerate(stack):
            if whole:
                (key,) = whole
                is_kept = hasattr(module, "alpha")  # gpt-oss in 16 bits: engines load no single experts of it
                stem = re.sub(rf"({part}|(in|out)put_linear\.weight)$", "", key)
                stem = stem if stem.endswith("experts.") else f"{stem}experts."  # as engines name those of Granite
                names.append([key] if is_kept else [f"{stem}{expert}.{each}" for each in single])
            else:
                parts = [matrix[at * rows : (at + 1) * rows] for at in range(len(single))]
                own = [key for key, each in stored.items() if any(_equal(each, values) for values in parts)]
                names.append([key.removesuffix(".weight") for key in own])
                assert len(own) == len(single), (path, part, own)
        found[part] = names
    return found


def _of_experts(found: Measured, names: dict[str, list[list[str]]]) -> Callable[..., None]:
    first = next(part for part in ("gate_up_proj", "up_proj") if part in names)

    def hook(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden, *chosen = (*given, *named.values())
        count = len(names[first])
        for expert in range(count):
            if chosen:
                tokens = (expert == chosen[0].T).nonzero()[:, 1]
                x = hidden.reshape(-1, hidden.shape[-1])[tokens]
            else:  # all tokens for each expert, zeros for those of other experts
                x = hidden.reshape(count, -1, hidden.shape[-1])[expert]
                x = x if x.any() else x[:0]
            if len(x):
                for key in names[first][expert]:
                    found.add("inputs", key, x)
                for key in names["down_proj"][expert]:
                    found.add("inputs", key, _inner(module, x, expert))

    return hook


def _inner(module: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    """Return the inputs of the second matrix of an expert."""
    if hasattr(module, "alpha"):  # gpt-oss
        both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[..., ::2].clamp(max=module.limit), both[..., 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * module.alpha))
    if "gate_up_proj" not in module._parameters:
        return module.act_fn(torch.nn.functional.linear(x, module.up_proj[expert]))
    weight = module.gate_up_proj[expert]
    both = torch.nn.functional.linear(x, weight if weight.shape[1] == x.shape[1] else weight.T)
    gate, up = both.chunk(2, -1)
    return module.act_fn(gate) * up


def _attention(model: Any, add: Callable[[str, torch.Tensor], None]) -> Any:
    """Return a context in which keys and values of attention are seen."""
    if model.config._attn_implementation == "sdpa":
        place: Any = torch.nn.functional
        name = "scaled_dot_product_attention"
        before = 1
    else:
        place = sys.modules[type(model).__module__]
        name = "eager_attention_forward"
        before = 2
    if not hasattr(place, name):  # a model with attention of its own
        return nullcontext()
    real = getattr(place, name)

    def attend(*given: Any, **named: Any) -> Any:
        add("k", given[before])
        add("v", given[before + 1])
        return real(*given, **named)

    return mock.patch.object(place, name, attend)
