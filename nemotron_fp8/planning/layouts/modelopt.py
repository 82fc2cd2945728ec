"""The ``modelopt`` layout: ``quant_method: modelopt`` of NVIDIA's Model Optimizer, for vLLM and TensorRT-LLM.

===========  =============================  ================  ===========================
granularity  ``quant_algo``                 name of the scale shape of the scale
===========  =============================  ================  ===========================
channel      ``FP8_PER_CHANNEL_PER_TOKEN``  ``weight_scale``  ``[N]``
block        ``fp8_pb_wo``                  ``weight_scale``  ``[N/128, 1, K/128, 1]``
===========  =============================  ================  ===========================

config.json states the quantization, and so does ``hf_quant_config.json`` in an older form, which TensorRT-LLM reads
first. Engines recognize both by the producer's name. The algorithm of blocks is in lower case, as Model Optimizer
writes it: TensorRT-LLM knows no other spelling.

The algorithm ``FP8``, with one scale for a tensor, is not written: it needs scales of activations from a calibration.

Sources: ``ModelOptFp8Config``, ``KFp8StaticChannel`` and ``KFp8Block128`` of vLLM; ``modelopt_config`` of TensorRT-LLM;
``convert_hf_quant_config_format`` of Model Optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemotron_fp8.planning.layouts.base import Choice, Layout, ListReader, Readers, Scheme, WeightFormat
from nemotron_fp8.planning.module_lists import matches_anywhere, wildcards
from nemotron_fp8.planning.number_format import Coverage, Granularity, NumberFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.planning.module_lists import Modules


NAME = "modelopt"
FILE = "hf_quant_config.json"
PRODUCER = {"name": NAME}
ALGORITHMS: Mapping[Granularity, str] = {"channel": "FP8_PER_CHANNEL_PER_TOKEN", "block": "fp8_pb_wo"}


def _render_config(scheme: Scheme, modules: Modules) -> dict[str, Any]:
    return {
        "quant_method": NAME,
        "quant_algo": ALGORITHMS[scheme.granularity],
        "ignore": wildcards(modules),
        "producer": dict(PRODUCER),
    }


def _read_config(config: Mapping[str, Any]) -> tuple[object, object] | None:
    algorithm = config.get("quant_algo")
    if config.get("quant_method") != NAME or not isinstance(algorithm, str):
        return None
    return next(((g, "dynamic") for g, name in ALGORITHMS.items() if name.upper() == algorithm.upper()), None)


def _beside(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same statement in the form of ``hf_quant_config.json``."""
    quantization = {
        "quant_algo": config.get("quant_algo"),
        "kv_cache_quant_algo": "FP8" if "kv_cache_scheme" in config else None,
        "exclude_modules": config.get("ignore"),
    }
    return {FILE: {"producer": dict(PRODUCER), "quantization": quantization}}


_READERS = Readers(
    vllm=True,
    sglang=False,
    transformers=False,
    transformers_note="ignores this layout: it would take the codes for weights, without their scales and an error",
    unread={"SGLang": "reads only the static FP8 of this format; use format 'compressed-tensors'"},
    notice=(
        "format 'modelopt' is for vLLM and TensorRT-LLM: transformers takes the codes for weights and computes nonsense"
        " without an error"
    ),
    # Source: `ModelOptFp8MoEMethod` of vLLM, which has parameters for one scale of a tensor only.
    no_routed_experts=(
        "format 'modelopt' does not load in vLLM for routed experts; use format 'compressed-tensors', or leave the"
        " experts out (--ignore experts)"
    ),
)


MODELOPT = Layout(
    name=NAME,
    weights={
        "channel": WeightFormat(NumberFormat(Coverage("channel")), "_scale", scale_axes=(0,)),
        "block": WeightFormat(
            NumberFormat(Coverage("block"), scale_rounding="power-of-two"), "_scale", scale_axes=(0, None, 1, None)
        ),
    },
    readers={Scheme("channel", "dynamic"): _READERS, Scheme("block", "dynamic"): _READERS},
    render_config=_render_config,
    read_config=_read_config,
    unquantized_keys=("ignore",),
    list_readers=(ListReader(("vLLM",), ("ignore",), matches_anywhere),),
    default_granularity="channel",
    refusals={
        "tensor": (
            "format 'modelopt' with granularity 'tensor' needs scales of activations from a calibration;"
            " use format 'compressed-tensors' with granularity 'tensor'"
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
    execution_scales=frozenset({"input_scale", "q_scale", "k_scale", "v_scale", "output_scale"}),
    choices=(Choice("kv_cache", "fp8", {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}),),
    beside=_beside,
)
