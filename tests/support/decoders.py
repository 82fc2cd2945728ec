"""Tiny checkpoints by the names and shapes of known families, and the ways in which engines read their lists."""

from __future__ import annotations

import fnmatch
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from tests.support.checkpoints import ONE, Tensors, weight, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Shapes = dict[str, tuple[int, ...]]
"""Shapes by tensor name."""
HIDDEN, INNER, VOCABULARY = 128, 256, 512


def attention(stem: str, hidden: int = HIDDEN, keys: int | None = None) -> Shapes:
    """Projections of an attention without biases."""
    return {
        f"{stem}q_proj.weight": (hidden, hidden),
        f"{stem}k_proj.weight": (keys or hidden, hidden),
        f"{stem}v_proj.weight": (keys or hidden, hidden),
        f"{stem}o_proj.weight": (hidden, hidden),
    }


def mlp(stem: str, hidden: int = HIDDEN, inner: int = INNER) -> Shapes:
    """Projections of a gated feed-forward part."""
    return {
        f"{stem}gate_proj.weight": (inner, hidden),
        f"{stem}up_proj.weight": (inner, hidden),
        f"{stem}down_proj.weight": (hidden, inner),
    }


def ends(stem: str = "model.", head: str | None = "lm_head", hidden: int = HIDDEN) -> Shapes:
    """Lookup table, last norm and output layer; None for a tied one."""
    return {
        f"{stem}embed_tokens.weight": (VOCABULARY, hidden),
        f"{stem}norm.weight": (hidden,),
        **({} if head is None else {f"{head}.weight": (VOCABULARY, hidden)}),
    }


def decoder(
    stem: str = "model.", layers: int = 2, dense: bool = True, head: str | None = "lm_head", hidden: int = HIDDEN
) -> Shapes:
    """A decoder with the names of Llama; without a feed-forward part if not ``dense``."""
    shapes = ends(stem, head, hidden)
    for i in range(layers):
        layer = f"{stem}layers.{i}."
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes |= attention(f"{layer}self_attn.", hidden)
        if dense:
            shapes |= mlp(f"{layer}mlp.", hidden)
    return shapes


def filled(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Tensors of these shapes."""
    return {name: weight(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def write(folder: Path, config: object, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors | None = None) -> Path:
    """Write a checkpoint of one shard, of tensors of these shapes and of others."""
    return write_checkpoint(folder, {ONE: {**filled(shapes), **(tensors or {})}}, config=config)


@cache
def _glob(entry: str) -> re.Pattern[str]:
    """Compile a pattern of a shell once: Python 3.10 remembers 256 of them, and a large list has thousands."""
    return re.compile(fnmatch.translate(entry))


def in_list(quantization: Mapping[str, Any], engine: str, module: str) -> bool:
    """Return True if an engine takes a module for unquantized, written from the engine's source.

    Sources: ``should_ignore_layer`` of compressed-tensors in vLLM; ``is_layer_skipped`` of vLLM and SGLang;
    ``is_layer_excluded`` of vLLM's modelopt; ``should_convert_module`` of transformers.
    """
    if quantization["quant_method"] == "modelopt":
        return any(entry in module or _glob(entry).match(module) for entry in quantization["ignore"]) or any(
            module in entry for entry in quantization["ignore"] if "experts" in module
        )
    if quantization["quant_method"] == "compressed-tensors":
        return any(
            re.match(entry[3:], module) if entry.startswith("re:") else entry == module
            for entry in quantization["ignore"]
        )
    if engine == "transformers":
        keys = quantization["modules_to_not_convert"]
        return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(key) for key in keys)
    skipped = quantization.get("ignored_layers") or quantization["modules_to_not_convert"]
    if engine == "SGLang":
        bare = [entry.removeprefix("model.") for entry in skipped]
        both = [*bare, *(f"model.{entry}" for entry in bare)]
        if any(f".{entry}." in f".{module}." for entry in both):
            return True
        return "experts" in module and any(module in entry for entry in both if "experts" in entry)
    if module.endswith("experts"):
        return any(module in entry for entry in skipped if "experts" in entry)
    return module in skipped
