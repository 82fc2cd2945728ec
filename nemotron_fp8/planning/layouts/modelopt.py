"""The ``modelopt`` layout: ``quant_method: modelopt`` of NVIDIA's Model Optimizer, for vLLM and TensorRT-LLM.

===========  =============================  ================  ===========================
granularity  ``quant_algo``                 name of the scale shape of the scale
===========  =============================  ================  ===========================
tensor       ``FP8``                        ``weight_scale``  ``[]``
channel      ``FP8_PER_CHANNEL_PER_TOKEN``  ``weight_scale``  ``[N]``
block        ``fp8_pb_wo``                  ``weight_scale``  ``[N/128, 1, K/128, 1]``
===========  =============================  ================  ===========================

config.json states the quantization, and so does ``hf_quant_config.json`` in an older form, which TensorRT-LLM reads
first. Engines recognize both by the producer's name. The algorithm of blocks is in lower case, as Model Optimizer
writes it: TensorRT-LLM knows no other spelling.

The algorithm ``FP8``, with one scale for a tensor, has a stored scale of activations too, ``input_scale`` ``[]``.
Scales of an FP8 cache of keys and values are ``k_scale`` and ``v_scale`` of the projections, ``[]``.

Sources: ``ModelOptFp8Config``, ``KFp8StaticChannel`` and ``KFp8Block128`` of vLLM; ``modelopt_config`` of TensorRT-LLM;
``convert_hf_quant_config_format`` of Model Optimizer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8.planning.layouts.base import Choice, Layout, ListReader, Readers, Scheme, StaticScales, WeightFormat
from nemotron_fp8.planning.module_lists import matches_anywhere, wildcards
from nemotron_fp8.planning.number_format import Coverage, Granularity, NumberFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.planning.module_lists import Modules


NAME = "modelopt"
FILE = "hf_quant_config.json"
PRODUCER = {"name": NAME}
FLOATS = {"dynamic": False, "num_bits": 8, "type": "float"}
"""Statement of FP8 with stored scales."""
ALGORITHMS: Mapping[Granularity, str] = {"tensor": "FP8", "channel": "FP8_PER_CHANNEL_PER_TOKEN", "block": "fp8_pb_wo"}


def _render_config(scheme: Scheme, modules: Modules) -> dict[str, Any]:
    found: dict[str, Any] = {
        "quant_method": NAME,
        "quant_algo": ALGORITHMS[scheme.granularity],
        "ignore": wildcards(modules),
        "producer": dict(PRODUCER),
    }
    if scheme.activations == "static":
        group = {"input_activations": dict(FLOATS), "weights": dict(FLOATS), "targets": ["Linear"]}
        found["config_groups"] = {"group_0": group}
    return found


def _read_config(config: Mapping[str, Any]) -> tuple[object, object] | None:
    algorithm = config.get("quant_algo")
    if config.get("quant_method") != NAME or not isinstance(algorithm, str):
        return None
    found = next((g for g, name in ALGORITHMS.items() if name.upper() == algorithm.upper()), None)
    return None if found is None else (found, "static" if found == "tensor" else "dynamic")


def _beside(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same statement in the form of ``hf_quant_config.json``."""
    quantization = {
        "quant_algo": config.get("quant_algo"),
        "kv_cache_quant_algo": "FP8" if "kv_cache_scheme" in config else None,
        "exclude_modules": config.get("ignore"),
    }
    return {FILE: {"producer": dict(PRODUCER), "quantization": quantization}}


_NOTICE = "format 'modelopt' is for {}: transformers takes the codes for weights and computes nonsense without an error"
_DYNAMIC = Readers(
    vllm=True,
    sglang=False,
    transformers=False,
    transformers_note="ignores this layout: it would take the codes for weights, without their scales and an error",
    unread={"SGLang": "reads only the static FP8 of this format; use format 'compressed-tensors'"},
    notice=_NOTICE.format("vLLM and TensorRT-LLM"),
    # Source: `ModelOptFp8MoEMethod` of vLLM, which has parameters for one scale of a tensor only.
    no_routed_experts=(
        "format 'modelopt' does not load in vLLM for routed experts; use format 'compressed-tensors', or leave the"
        " experts out (--ignore experts)"
    ),
)


_STATIC = replace(
    _DYNAMIC, sglang=True, unread={}, notice=_NOTICE.format("vLLM, SGLang and TensorRT-LLM"), no_routed_experts=""
)


MODELOPT = Layout(
    name=NAME,
    weights={
        "tensor": WeightFormat(NumberFormat(Coverage("tensor")), "_scale", ()),
        "channel": WeightFormat(NumberFormat(Coverage("channel")), "_scale", scale_axes=(0,)),
        "block": WeightFormat(
            NumberFormat(Coverage("block"), scale_rounding="power-of-two"), "_scale", scale_axes=(0, None, 1, None)
        ),
    },
    readers={
        Scheme("channel", "dynamic"): _DYNAMIC,
        Scheme("block", "dynamic"): _DYNAMIC,
        Scheme("tensor", "static"): _STATIC,
    },
    render_config=_render_config,
    read_config=_read_config,
    unquantized_keys=("ignore",),
    list_readers=(ListReader(("vLLM",), ("ignore",), matches_anywhere),),
    default_granularity="channel",
    refusals={
        "tensor": (
            "format 'modelopt' with granularity 'tensor' needs stored scales of activations; use activations 'static'"
            " with the amaxes of a calibration, or format 'compressed-tensors'"
        ),
        "static": (
            "format 'modelopt' has stored scales of activations with granularity 'tensor' only; use granularity"
            " 'tensor'"
        ),
        "mx": (
            "vLLM reads MXFP8 in format 'compressed-tensors' as in format 'modelopt', SGLang in neither;"
            " use format 'mxfp8' for SGLang, or format 'compressed-tensors' with granularity 'mx'"
        ),
        "none": (
            "format 'modelopt' always scales activations; for weights only use format 'compressed-tensors'"
            " with activations 'none'"
        ),
    },
    tags=("modelopt",),
    static=StaticScales((), of_projections=True, in_bfloat16=True),
    execution_scales=frozenset({"input_scale", "q_scale", "k_scale", "v_scale", "output_scale"}),
    choices=(Choice("kv_cache", "fp8", {"kv_cache_scheme": FLOATS}),),
    beside=_beside,
)
