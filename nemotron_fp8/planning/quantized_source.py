"""A quantized source of `quantize`: what is refused, what its config states, and the tensors beside its weights.

A quantized source is laid out again without an unquantized copy: codes are kept where the scales of the result can
repeat those of the source (`nemotron_fp8.planning.carried_codes`), and rounded once more elsewhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.stated_quantization import (
    EXPERT_DTYPE,
    is_few_bits,
    last_name,
    stated,
    without_statements,
)
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.encoded_source import check_all_read, encoded_source
from nemotron_fp8.planning.kv_cache import CACHE_SCALES, has_cache_scales
from nemotron_fp8.planning.layouts import execution_scales
from nemotron_fp8.planning.packed_formats import refuse_packed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.layouts.base import Activations
    from nemotron_fp8.planning.recipe import Recipe


CACHE_STATEMENTS = ("kv_cache_scheme", "kv_cache_quant_algo")
"""Keys of a ``quantization_config`` that state an FP8 KV cache, of compressed-tensors and of ModelOpt."""
FLOATS = ("BF16", "F16", "F32")
_INSTEAD: Mapping[Activations, str] = {
    "dynamic": "engines scale activations while they run",
    "static": "those of the calibration are stored in their place",
    "none": "engines leave activations in 16 bits",
}
"""Replacement of the scales of activations in a source, by treatment of activations; a text for a notice."""
EXPERTS_IN_FP8 = "fp8"
"""Value of `EXPERT_DTYPE` for experts in FP8. Source: the DeepSeek V4 models of vLLM."""


@dataclass(frozen=True, slots=True)
class QuantizedSource:
    """A source whose weights are FP8 or MXFP4.

    Attributes:
        inventory: contents of the source: weights as views of their values, without their scales, and a config that
            states no quantization.
        dropped: names of the scales of activations, which the result does not have.
        dtype: safetensors name of the dtype of weights that are dequantized.
        has_fp8_cache: True if the source states an FP8 KV cache, or holds its scales.
        packed_experts: True if the config stated that experts are packed.
    """

    inventory: Inventory
    dropped: frozenset[str]
    dtype: str
    has_fp8_cache: bool
    packed_experts: bool

    def notices(self, recipe: Recipe) -> tuple[str, ...]:
        """Return notices about scales that are dropped, and about an FP8 KV cache that the result cannot state."""
        found = []
        if self.dropped:
            found.append(f"{len(self.dropped):,} scales of activations are dropped: {_INSTEAD[recipe.activations]}")
        if self.has_fp8_cache and recipe.kv_cache == "none":
            found.append(
                f"the source has an FP8 KV cache, which format {recipe.format!r} cannot state; its scales are kept:"
                " pass the engine's own option (vLLM and SGLang: --kv-cache-dtype fp8_e4m3)"
            )
        return tuple(found)

    def recipe_for(self, recipe: Recipe, amaxes: Amaxes | None) -> Recipe:
        """Return a recipe that states the KV cache of the source, if its layout can.

        Args:
            recipe: recipe of the user.
            amaxes: amaxes of a calibration, whose scales replace those of the source.
        """
        choice = recipe.layout.choice("kv_cache", "fp8", recipe.granularity)
        has_amaxes = amaxes is not None and bool(amaxes.k)
        if not self.has_fp8_cache or choice is None or (choice.calibrated and not has_amaxes):
            return recipe
        return recipe.model_copy(update={"kv_cache": "fp8"})

    def config_for(self, quantized: Iterable[str]) -> Mapping[str, Any] | None:
        """Return the config, with the dtype of the experts in the result.

        Args:
            quantized: names of the tensors that are quantized.
        """
        config = self.inventory.config
        if not self.packed_experts or config is None:
            return config
        return _with_expert_dtype(config, EXPERTS_IN_FP8 if any(".experts." in name for name in quantized) else None)


def quantized_source(inventory: Inventory) -> QuantizedSource | None:
    """Return a source of FP8 or MXFP4 weights; None for any other source.

    Raises:
        PackedWeightsError: weights are packed in a format that is not read.
        LayoutError: an FP8 tensor has no scale, several, or one whose shape fits no known layout; or a scale belongs
            to no FP8 tensor.
    """
    source = encoded_source(inventory)
    left = [view for view in source.inventory.views if view.encoding is None and view.name not in source.scales]
    refuse_packed(inventory, left)
    if not source.weights:
        return None
    check_all_read(inventory, source)
    shards = tuple(
        replace(shard, views=tuple(view for view in shard.views if view.name not in source.scales))
        for shard in source.inventory.shards
    )
    config = inventory.config
    fp8_cache = any(
        isinstance(statement, dict) and any(statement.get(key) for key in CACHE_STATEMENTS)
        for _, statement in stated(config)
    )
    bare = replace(source.inventory, shards=shards, config=None if config is None else without_statements(config))
    execution = execution_scales() - CACHE_SCALES
    return QuantizedSource(
        bare,
        frozenset(view.name for view in bare.views if last_name(view.name) in execution),
        dtype_of_others(bare.views, config),
        fp8_cache or has_cache_scales(view.name for view in bare.views),
        config is not None and _states_few_bits(config),
    )


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError for choices that need an unquantized source."""
    if recipe.nonfinite == "keep":
        raise RecipeError(
            "nonfinite 'keep' leaves tensors as they are in an unquantized source, and this source is quantized; use"
            " nonfinite 'error' (--nonfinite error)",
            ("nonfinite",),
        )
    if recipe.numerics != "float32":
        raise RecipeError(
            f"numerics {recipe.numerics!r} is about unquantized weights, and this source is quantized; use numerics"
            " 'float32' (--numerics float32)",
            ("numerics",),
        )


def dtype_of_others(views: Iterable[TensorView], config: Mapping[str, Any] | None) -> str:
    """Return the dtype of most bytes of the unquantized matrices; that of the config where there are none."""
    found: Counter[str] = Counter()
    for view in views:
        if view.encoding is None and view.dtype in FLOATS and len(view.shape) == 2:
            found[view.dtype] += view.nbytes
    if found:
        return max(FLOATS, key=lambda dtype: found[dtype])
    names = {"float16": "F16", "float32": "F32"}
    described = config or {}
    return names.get(str(described.get("dtype", described.get("torch_dtype"))), "BF16")


def _states_few_bits(config: Mapping[str, Any]) -> bool:
    return any(
        is_few_bits(value) if key == EXPERT_DTYPE else isinstance(value, dict) and _states_few_bits(value)
        for key, value in config.items()
    )


def _with_expert_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return a config with another dtype of packed experts, at any depth; None drops the key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == EXPERT_DTYPE and is_few_bits(value):
            if dtype is not None:
                found[key] = dtype
        else:
            found[key] = _with_expert_dtype(value, dtype) if isinstance(value, dict) else value
    return found
