"""The ``fp8`` layout: ``quant_method: fp8`` of vLLM, SGLang and DeepSeek.

========================  ====================  ==============================
granularity               name of the scale     shape of the scale
========================  ====================  ==============================
tensor                    ``weight_scale``      ``[]``
block                     ``weight_scale_inv``  ``[ceil(N/128), ceil(K/128)]``
static activations        ``input_scale``       ``[]``
========================  ====================  ==============================

No entry of the config states an FP8 cache of keys and values that all engines follow: its scales, ``k_scale`` and
``v_scale`` of the projections, are read where the user asks the engine for the cache.

A scale multiplies its elements, despite the name ``weight_scale_inv``. Blocks of a result are whole; DeepSeek's
checkpoints have ragged blocks at the edges, which can be dequantized.

Sources: ``Fp8Config`` of vLLM, ``FineGrainedFP8Config`` of transformers, the published DeepSeek-V3 and
Nemotron-4-340B-Instruct-FP8 checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemotron_fp8.planning.layouts.base import Choice, Layout, ListReader, Readers, Scheme, StaticScales, WeightFormat
from nemotron_fp8.planning.module_lists import exact_names, matches_in_vllm, matches_part, matches_suffix, suffixes
from nemotron_fp8.planning.number_format import Coverage, NumberFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.planning.module_lists import Modules


NAME = "fp8"
BLOCKS = Coverage("block")


def _render_config(scheme: Scheme, modules: Modules) -> dict[str, Any]:
    """Return the config, with a list for each way of matching.

    vLLM and SGLang read ``ignored_layers`` first and compare whole names; transformers reads ``modules_to_not_convert``
    alone, which replaces its own default of lm_head.
    """
    config: dict[str, Any] = {"quant_method": NAME, "activation_scheme": scheme.activations}
    if scheme.granularity == "block":
        config |= {"weight_block_size": list(BLOCKS.block), "modules_to_not_convert": suffixes(modules)}
    return config | {"ignored_layers": exact_names(modules)}


def _read_config(config: Mapping[str, Any]) -> tuple[object, object] | None:
    if config.get("quant_method") != NAME:
        return None
    return "tensor" if config.get("weight_block_size") is None else "block", config.get("activation_scheme")


_TENSORS = Readers(
    vllm=True,
    sglang=True,
    transformers=False,
    transformers_note="does not support this layout: it would load the weights without their scales",
)


FP8 = Layout(
    name=NAME,
    weights={
        "tensor": WeightFormat(NumberFormat(Coverage("tensor")), "_scale", ()),
        "block": WeightFormat(NumberFormat(BLOCKS, scale_rounding="power-of-two"), "_scale_inv", ()),
    },
    readers={
        Scheme("tensor", "dynamic"): _TENSORS,
        Scheme("tensor", "static"): _TENSORS,
        Scheme("block", "dynamic"): Readers(
            vllm=True,
            sglang=True,
            transformers=True,
            transformers_note="from 5.0 loads it, and dequantizes it where there is no GPU for FP8",
        ),
    },
    render_config=_render_config,
    read_config=_read_config,
    unquantized_keys=("ignored_layers", "modules_to_not_convert"),
    list_readers=(
        ListReader(("vLLM",), ("ignored_layers", "modules_to_not_convert"), matches_in_vllm),
        ListReader(("SGLang",), ("ignored_layers", "modules_to_not_convert"), matches_part),
        ListReader(("transformers",), ("modules_to_not_convert",), matches_suffix),
    ),
    default_granularity="block",
    refusals={
        "channel": (
            "no engine loads format 'fp8' with granularity 'channel';"
            " use format 'compressed-tensors' with granularity 'channel'"
        ),
        "mx": (
            "format 'fp8' has blocks of 128x128, not of 32; for SGLang use format 'mxfp8', for vLLM use format"
            " 'compressed-tensors' with granularity 'mx'"
        ),
        "static": (
            "format 'fp8' has stored scales of activations with granularity 'tensor' only; use granularity 'tensor'"
        ),
        "none": (
            "format 'fp8' always scales activations; for weights only use format 'compressed-tensors'"
            " with activations 'none'"
        ),
    },
    static=StaticScales((), of_projections=True, in_bfloat16=True),
    execution_scales=frozenset({"input_scale", "activation_scale", "q_scale", "k_scale", "v_scale", "output_scale"}),
    block_path=("weight_block_size",),
    choices=(
        Choice("scale_dtype", "e8m0", {"scale_fmt": "ue8m0"}, ("block",)),
        Choice("kv_cache", "fp8", {}, calibrated=True),
    ),
)
