"""config.json and the index of the result: what is said beside the shards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nemotron_fp8.experts import experts_of, is_stack
from nemotron_fp8.rules import is_embedding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.header import Header
    from nemotron_fp8.recipe import Recipe
    from nemotron_fp8.view import TensorView


def kept_modules(views: Iterable[TensorView], quantised: frozenset[str], recipe: Recipe) -> list[str]:
    """Return exact names of the modules that an engine treats as linear and that stay, in the source's order.

    Those are the 2-D ``.weight`` tensors outside ``quantised`` that are no embedding, and the ``experts`` module of
    each stack of experts: vLLM and transformers look for the module, not for the stacks in it. Where transformers
    reads the list, lm_head is in it even if it has no tensor of its own (tied to the embedding): the list replaces a
    default that has it.
    """
    modules = (_module(view) for view in views if view.name not in quantised)
    kept = list(dict.fromkeys(module for module in modules if module is not None))
    tied = not any(name == "lm_head" or name.endswith(".lm_head") for name in kept)
    plain = recipe.format == "fp8" and recipe.granularity == "tensor"
    return kept if plain or not tied else [*kept, "lm_head"]


def _module(view: TensorView) -> str | None:
    """The module that multiplies with this tensor; None for a tensor of any other use."""
    if is_stack(view):
        return experts_of(view.name)
    if len(view.shape) == 2 and view.name.endswith(".weight") and not is_embedding(view.name):
        return view.name.removesuffix(".weight")
    return None


def render_config(config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> bytes:
    """Return config.json as transformers writes it, keys and order kept, ``quantization_config`` last or none."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return _render(plain if quantization is None else {**plain, "quantization_config": quantization})


def render_index(headers: Mapping[str, Header], metadata: Mapping[str, Any]) -> bytes:
    """Return the index over shards with these headers.

    ``total_size`` is the sum of the tensors' bytes; other metadata is kept. ``weight_map`` is sorted by
    tensor name.
    """
    weight_map = {entry.name: shard for shard, header in headers.items() for entry in header.entries}
    total = sum(header.data_size for header in headers.values())
    return _render({"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _render(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
