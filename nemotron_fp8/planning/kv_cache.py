"""Caveats of an FP8 cache of keys and values that no calibration has scaled, from config.json.

Engines use a scale of 1.0 where a checkpoint has none. That costs most models nothing measurable; the models that were
seen to lose accuracy have latent attention in FlashMLA, heads of 256, or windows of attention. Source: the blog of
vLLM, April 2026.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemotron_fp8._utils import listed
from nemotron_fp8.checkpoint.stated_quantization import last_name
from nemotron_fp8.planning.evidence import decoder_configs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.planning.recipe import Recipe


LARGE_HEAD = 256
"""Size of a head at which accuracy without a calibration was lost."""


CACHE_SCALES = frozenset({"k_scale", "v_scale"})
"""Last names of the scales of an FP8 cache: of an attention module, or of its projections of keys and values."""


UNSCALED = frozenset({"jamba", "lfm2", "lfm2_moe", "longcat_flash", "zamba", "zamba2"})
"""Values of ``model_type`` whose attention has no scales in vLLM, which rejects a checkpoint that has some.

Source: runs of vLLM 0.32, which builds these attentions without a quantization config.
"""


def why_unscaled(config: Mapping[str, Any] | None) -> str:
    """Return why engines read no scales of the cache of a model; empty if they do.

    Args:
        config: config.json; None without one.
    """
    stated = list(decoder_configs(config or {}))
    kinds = [str(each.get("model_type")) for each in stated]
    if found := next((kind for kind in kinds if kind in UNSCALED), ""):
        return f"engines build the attention of {found!r} without scales"
    if any(_positive(each.get("kv_lora_rank")) for each in stated):
        # Sources: `MLAAttention` of vLLM and its weight loaders, which drop scales under every name.
        return "engines cache latent vectors, and read no scales for them"
    return ""


def has_cache_scales(names: Iterable[str]) -> bool:
    """Return True if a tensor is a scale of an FP8 cache."""
    return any(last_name(name) in CACHE_SCALES for name in names)


def kv_cache_notice(recipe: Recipe, config: Mapping[str, Any] | None) -> str:
    """Return what to know of the FP8 cache that a recipe declares; empty if it declares none.

    Args:
        recipe: settings of the quantization.
        config: config.json; None without one.
    """
    if recipe.kv_cache == "none":
        return ""
    risks = uncalibrated_risks(config or {})
    text = (
        "the FP8 KV cache has scales of 1.0, since nothing was calibrated: keys and values beyond 448 are clamped."
        " Most models keep their accuracy; compare it on your tasks with --kv-cache-dtype bfloat16, which overrides the"
        " config"
    )
    return f"{text}. This model has {listed(risks)}, with which a loss was seen" if risks else text


def uncalibrated_risks(config: Mapping[str, Any]) -> list[str]:
    """Return the properties of a decoder with which scales of 1.0 were seen to cost accuracy.

    Args:
        config: config.json.
    """
    decoders = list(decoder_configs(config))
    found = []
    if ranks := [each["kv_lora_rank"] for each in decoders if _positive(each.get("kv_lora_rank"))]:
        found.append(f"latent attention (kv_lora_rank {ranks[-1]})")
    if LARGE_HEAD in map(_head, decoders):
        found.append(f"attention heads of {LARGE_HEAD}")
    if windows := [each["sliding_window"] for each in decoders if _has_window(each)]:
        found.append(f"sliding windows of {windows[-1]:,} tokens")
    return found


def _head(config: Mapping[str, Any]) -> int | None:
    """Return the size of a head of attention; None if a config does not state it."""
    stated, hidden, heads = (config.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if type(stated) is int:
        return stated
    if type(hidden) is int and type(heads) is int and heads > 0:
        return hidden // heads
    return None


def _has_window(config: Mapping[str, Any]) -> bool:
    """Return True if some layers attend to a window of the last tokens."""
    if not _positive(config.get("sliding_window")) or config.get("use_sliding_window") is False:
        return False
    kinds = config.get("layer_types")
    return not isinstance(kinds, list) or "sliding_attention" in kinds


def _positive(value: object) -> bool:
    return type(value) is int and value > 0
