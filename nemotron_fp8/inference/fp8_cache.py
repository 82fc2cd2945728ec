"""An FP8 cache of keys and values as engines serve it: which checkpoints have one, and with which scales.

A checkpoint has one if its config states it, or if it stores scales of one; in format ``fp8`` no entry of the config
does. Keys and values of every token go through the cache before attention reads them, those of a prompt too.

A scale is 1.0 without a tensor. Engines hold scales in bfloat16, except those of compressed-tensors. Latent attention
caches the normalized latents, before the projection ``kv_b_proj``, and the rotated part of the keys, both with 1.0: no
stored scale reaches it.

Sources: ``BaseKVCacheMethod``, ``CompressedTensorsKVCacheMethod``, ``get_cache_scale_mapper`` and ``MLAAttention`` of
vLLM 0.32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nemotron_fp8.checkpoint.stated_quantization import method_of, stated
from nemotron_fp8.inference.activations import WITHOUT_SCALE, cast, read_scale
from nemotron_fp8.planning.kv_cache import has_cache_scales
from nemotron_fp8.planning.quantized_source import CACHE_STATEMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.sources.reader import Reader


HOLDERS = ("", ".attn", ".{}_proj", ".qkv_proj")
"""Modules below an attention module, by ``k`` or ``v``, whose scales of the cache engines read."""
KEYS, VALUES, CACHED_LATENTS = " (keys)", " (values)", " (latents)"
"""Endings of the names under which values in a cache are counted, after the name of the attention module."""
LATENTS = "kv_b_proj"
"""Projection of latent attention whose inputs are cached instead of keys and values."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Cache of the keys and values of an attention module.

    Attributes:
        module: name of the module in the checkpoint.
        k: scale of the keys.
        v: scale of the values.
    """

    module: str
    k: float = WITHOUT_SCALE
    v: float = WITHOUT_SCALE

    def apply(
        self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, count: Callable[[str, int, Any], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as attention reads them from the cache.

        Args:
            module: the attention.
            key, value: ``[sequences, heads, length, head size]``, any floating dtype.
            count: called with what was cast, the number of its values, and that of clipped ones.
        """
        if is_latent(module):
            plain = key.shape[-1] - int(module.qk_rope_head_dim)  # type: ignore[arg-type]  # an attribute of its class
            rotated = cast(key[..., plain:], WITHOUT_SCALE)
            count(f"{self.module}{KEYS}", rotated.values.numel(), rotated.clipped)
            return torch.cat((key[..., :plain], rotated.values), -1), value
        keys, values = cast(key, self.k), cast(value, self.v)
        count(f"{self.module}{KEYS}", key.numel(), keys.clipped)
        count(f"{self.module}{VALUES}", value.numel(), values.clipped)
        return keys.values, values.values

    def apply_to_latents(self, latents: torch.Tensor, count: Callable[[str, int, Any], None]) -> torch.Tensor:
        """Return normalized latents as latent attention reads them from the cache: the inputs of `LATENTS`."""
        found = cast(latents, WITHOUT_SCALE)
        count(f"{self.module}{CACHED_LATENTS}", latents.numel(), found.clipped)
        return found.values


def is_latent(module: torch.nn.Module) -> bool:
    """Return True for an attention module that caches latents."""
    return hasattr(module, LATENTS) and hasattr(module, "qk_rope_head_dim")


def has_cache(names: Iterable[str], config: Mapping[str, Any] | None) -> bool:
    """Return True if a checkpoint is served with an FP8 cache.

    Args:
        names: names of all tensors.
        config: config.json; None without one.
    """
    return states_cache(config) or has_cache_scales(names)


def states_cache(config: Mapping[str, Any] | None) -> bool:
    """Return True if a config states an FP8 cache."""
    for _, statement in stated(config):
        if isinstance(statement, dict):
            inner = statement.get("quantization")
            for each in (statement, inner if isinstance(inner, dict) else {}):
                if any(_is_fp8(each.get(key)) for key in CACHE_STATEMENTS):
                    return True
    return False


def _is_fp8(value: object) -> bool:
    if isinstance(value, dict):
        return value.get("num_bits") == 8 and value.get("type") == "float"
    return isinstance(value, str) and value.lower() in ("fp8", "fp8_e4m3")


def cache_of(module: str, views: Mapping[str, TensorView], config: Mapping[str, Any] | None, reader: Reader) -> Cache:
    """Return the cache of an attention module with its stored scales.

    Args:
        module: name of the module in the checkpoint.
        views: all tensors of the checkpoint, by name.
        config: config.json; None without one.
        reader: reads the scales.

    Raises:
        ScaleError: a scale has several elements, or is not a positive finite number.
    """
    is_exact = any(method_of(statement) == "compressed-tensors" for _, statement in stated(config))
    found: dict[str, float] = {}
    for letter in ("k", "v"):
        for holder in HOLDERS:
            view = views.get(f"{module}{holder.format(letter)}.{letter}_scale")
            if view is not None:
                scale = read_scale(view, reader)
                found[letter] = scale if is_exact else float(torch.tensor(scale).bfloat16())
                break
    k = found.get("k", WITHOUT_SCALE)
    return Cache(module, k, found.get("v", WITHOUT_SCALE if is_exact else k))
