"""What engines want on disk for a quantized weight: names, dtypes and shapes of scales, the config.

Sources: ``Fp8Config`` and ``CompressedTensorsConfig`` of vLLM, ``QuantizationConfig`` and ``QuantizationArgs`` of
compressed-tensors (which forbid extra keys), the published Nemotron-4-340B-Instruct-FP8 checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.recipe import Granularity, Recipe


BLOCK = (128, 128)
"""Rows and columns under one scale at granularity ``block``: what every engine that has it expects."""


class Output(NamedTuple):
    """One tensor of an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def scale_of(view: TensorView, recipe: Recipe) -> Output:
    """Return name, dtype and shape of the scale of a quantized weight ``[N, K]``.

    Always float32, always what a code is multiplied by, despite the name ``weight_scale_inv``:

    ========================  ===================  ==========================
    format, granularity       name                 shape
    ========================  ===================  ==========================
    fp8, tensor               ``weight_scale``     ``[]``
    fp8, block                ``weight_scale_inv`` ``[ceil(N/128), ceil(K/128)]``
    compressed-tensors:
    tensor                    ``weight_scale``     ``[1]``
    channel                   ``weight_scale``     ``[N, 1]``
    block                     ``weight_scale``     ``[ceil(N/128), ceil(K/128)]``
    ========================  ===================  ==========================
    """
    suffix = "_scale_inv" if (recipe.format, recipe.granularity) == ("fp8", "block") else "_scale"
    if recipe.granularity == "tensor":
        shape: tuple[int, ...] = () if recipe.format == "fp8" else (1,)
    elif recipe.granularity == "channel":
        shape = (view.shape[0], 1)
    else:
        shape = (-(-view.shape[0] // BLOCK[0]), -(-view.shape[1] // BLOCK[1]))
    return Output(view.name + suffix, "F32", shape)


def quantization_config(recipe: Recipe, unquantized: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` that tells an engine how to read the result.

    Args:
        recipe: what was done.
        kept: exact names of the linear modules that stayed. vLLM's ``fp8`` knows neither wildcards nor regular
            expressions.
    """
    if recipe.format == "compressed-tensors":
        return _compressed_tensors(recipe, unquantized)
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": recipe.activations}
    if recipe.granularity == "block":
        # transformers reads this key; vLLM reads either. Given, it replaces transformers' own default of lm_head.
        return config | {"weight_block_size": list(BLOCK), "modules_to_not_convert": unquantized}
    return config | {"ignored_layers": unquantized}


def _compressed_tensors(recipe: Recipe, unquantized: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": 8,
        "type": "float",
        "strategy": recipe.granularity,
        "symmetric": True,
        "dynamic": False,
    }
    activations: dict[str, Any] | None = None
    if recipe.granularity == "block":
        weights["block_structure"] = list(BLOCK)
    if recipe.activations == "dynamic":
        activations = {
            "num_bits": 8,
            "type": "float",
            "strategy": "token",
            "symmetric": True,
            "dynamic": True,
        }
        if recipe.granularity == "block":
            activations |= {"strategy": "group", "group_size": BLOCK[1]}
    group = {
        "targets": ["Linear"],
        "format": "float-quantized",
        "weights": weights,
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": [entry for name in unquantized for entry in _engine_side(name)],
        "config_groups": {"group_0": group},
    }


def _engine_side(name: str) -> list[str]:
    """A name as an engine may match it: vLLM calls Nemotron-H's ``backbone.`` ``model.``, so the prefix is left open.

    vLLM asks for a module of stacked experts by what its first expert would be called, ``experts.0.down_proj``.

    Source: ``re:`` names are matched with ``re.match`` on engine-side names in compressed-tensors;
    ``CompressedTensorsMoEMethod.get_moe_method`` of vLLM.
    """
    prefix = "backbone."
    pattern = re.escape(name.removeprefix(prefix))
    entries = [f"re:.*{pattern}$" if name.startswith(prefix) else name]
    return [*entries, rf"re:.*{pattern}\.\d+\..*"] if name.endswith(".experts") else entries


def recipe_of(config: object) -> Recipe | None:
    """Return the recipe whose layout a ``quantization_config`` describes; None where it is none of ours."""
    from pydantic import ValidationError

    from nemotron_fp8.planning.recipe import Recipe

    if not isinstance(config, dict):
        return None
    fields: dict[str, Any] = {"format": config.get("quant_method")}
    if fields["format"] == "compressed-tensors":
        try:
            group = config["config_groups"]["group_0"]
            fields["granularity"] = group["weights"]["strategy"]
            fields["activations"] = "none" if group["input_activations"] is None else "dynamic"
        except (KeyError, TypeError):
            return None
    else:
        fields["granularity"] = "tensor" if config.get("weight_block_size") is None else "block"
        fields["activations"] = config.get("activation_scheme")
    try:
        return Recipe(**fields)
    except ValidationError:
        return None


def unquantized_in(config: Mapping[str, Any]) -> list[str]:
    """Return the modules that a ``quantization_config`` names as not quantized, whatever its key for them."""
    unquantized = config.get("ignored_layers") or config.get("modules_to_not_convert") or config.get("ignore") or []
    return [str(name) for name in unquantized] if isinstance(unquantized, list) else []


def granularity_of(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] = BLOCK
) -> Granularity | None:
    """Return what one scale of this shape covers in a weight of that shape; None where they do not fit."""
    if scale in ((), (1,)):
        return "tensor"
    if len(weight) != 2:
        return None
    if scale == (-(-weight[0] // block[0]), -(-weight[1] // block[1])):
        # A weight of one block's width and single-row blocks is not a case that exists on disk.
        return "block" if scale != (weight[0], 1) or block[0] == 1 else "channel"
    return "channel" if scale in ((weight[0], 1), (weight[0],)) else None


@dataclass(frozen=True, slots=True)
class Readers:
    """What loads a layout.

    Attributes:
        vllm, sglang: whether these engines do.
        transformers: the same, in words.
    """

    vllm: bool
    sglang: bool
    transformers: str


UNSCALED = "does not read this layout: it would load the weights without their scales"
DEQUANTIZES = "from 5.0 loads it, and dequantizes it where there is no GPU for FP8"


def readers_of(recipe: Recipe) -> Readers:
    """Return what loads the layout of a recipe: by the engines' own loaders, and as vLLM 0.32 was seen to do."""
    if recipe.format == "fp8":
        return Readers(True, True, UNSCALED if recipe.granularity == "tensor" else DEQUANTIZES)
    engines = recipe.activations != "none" or recipe.granularity != "block"
    return Readers(engines, engines, DEQUANTIZES)
