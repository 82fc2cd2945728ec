"""The ``mxfp8`` layout: ``quant_method: mxfp8`` of SGLang, TensorRT-LLM and transformers.

========================  ====================  ==============================
granularity               name of the scale     shape of the scale
========================  ====================  ==============================
mx                        ``weight_scale_inv``  ``[N, K/32]``, bytes
========================  ====================  ==============================

A byte ``b`` is the scale ``2^(b - 127)``, which multiplies its elements, despite the name ``weight_scale_inv``. vLLM
looks for the same scales under ``weight_scale``; for vLLM, ``compressed-tensors`` has blocks of 32 too.

Sources: ``Fp8Config`` and ``Fp8LinearMethod`` of SGLang, ``FineGrainedFP8Config`` of transformers, OCP Microscaling
Formats 1.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemotron_fp8.planning.layouts.base import Layout, ListReader, Readers, Scheme, WeightFormat
from nemotron_fp8.planning.module_lists import exact_names, matches_part, matches_suffix, suffixes
from nemotron_fp8.planning.number_format import E8M0_BYTES, MX_BLOCK, Coverage, NumberFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.planning.module_lists import Modules


NAME = "mxfp8"
GROUPS = Coverage("block", MX_BLOCK)
_ONE_GRANULARITY = "format 'mxfp8' stores granularity 'mx' only; use format 'compressed-tensors' with granularity '{}'"


def _render_config(scheme: Scheme, modules: Modules) -> dict[str, Any]:
    """Return the config, with a list for each way of matching.

    SGLang and TensorRT-LLM read ``ignored_layers`` first; transformers reads ``modules_to_not_convert`` alone, which
    replaces its own default of lm_head.
    """
    return {
        "quant_method": NAME,
        "activation_scheme": scheme.activations,
        "fmt": "e4m3",
        "weight_block_size": list(GROUPS.block),
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": suffixes(modules),
        "ignored_layers": exact_names(modules),
    }


def _read_config(config: Mapping[str, Any]) -> tuple[object, object] | None:
    return ("mx", config.get("activation_scheme")) if config.get("quant_method") == NAME else None


MXFP8 = Layout(
    name=NAME,
    weights={"mx": WeightFormat(NumberFormat(GROUPS, scale=E8M0_BYTES, scale_rounding="mx"), "_scale_inv")},
    readers={
        Scheme("mx", "dynamic"): Readers(
            vllm=False,
            sglang=True,
            transformers=True,
            transformers_note="from 5.0 loads it, and dequantizes it where there is no GPU for MXFP8",
            unread={
                "vLLM": "reads format 'mxfp8' only of models whose code renames the scales (MiniMax M3); use format"
                " 'compressed-tensors' with granularity 'mx'"
            },
            notice=(
                "format 'mxfp8' is computed by GPUs from Blackwell on (compute capability 10.0) and gfx95 in SGLang;"
                " for vLLM use format 'compressed-tensors' with granularity 'mx'"
            ),
        ),
    },
    render_config=_render_config,
    read_config=_read_config,
    unquantized_keys=("ignored_layers", "modules_to_not_convert"),
    list_readers=(
        ListReader(("SGLang",), ("ignored_layers", "modules_to_not_convert"), matches_part),
        ListReader(("transformers",), ("modules_to_not_convert",), matches_suffix),
    ),
    default_granularity="mx",
    refusals={
        **{granularity: _ONE_GRANULARITY.format(granularity) for granularity in ("tensor", "channel", "block")},
        "static": (
            "format 'mxfp8' has no stored scales of activations; use format 'compressed-tensors' with granularity"
            " 'tensor'"
        ),
        "none": (
            "format 'mxfp8' always scales activations; for weights only use format 'compressed-tensors' with"
            " granularity 'mx' and activations 'none'"
        ),
    },
    tags=("mxfp8",),
    execution_scales=frozenset({"input_scale", "activation_scale", "q_scale", "k_scale", "v_scale", "output_scale"}),
    block_path=("weight_block_size",),
)
