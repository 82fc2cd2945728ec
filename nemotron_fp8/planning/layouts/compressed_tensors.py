"""The ``compressed-tensors`` layout, in its formats ``float-quantized`` and, for blocks of 32, ``mxfp8-quantized``.

========================  ====================  ==============================
granularity               name of the scale     shape of the scale
========================  ====================  ==============================
tensor                    ``weight_scale``      ``[1]``
channel                   ``weight_scale``      ``[N, 1]``
block                     ``weight_scale``      ``[ceil(N/128), ceil(K/128)]``
mx                        ``weight_scale``      ``[N, K/32]``, bytes
static activations        ``input_scale``       ``[1]``
FP8 cache                 ``k_scale``           ``[1]``, of an attention module
                          ``v_scale``
========================  ====================  ==============================

Sources: ``QuantizationConfig`` and ``QuantizationArgs`` of compressed-tensors, which forbid extra keys;
``CompressedTensorsConfig``, ``CompressedTensorsW8A8Mxfp8`` and ``resolve_kv_cache_dtype_string`` of vLLM.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nemotron_fp8.planning.layouts.base import (
    ENGINES,
    Activations,
    Choice,
    Layout,
    ListReader,
    Readers,
    Scheme,
    StaticScales,
    WeightFormat,
)
from nemotron_fp8.planning.module_lists import matches_pattern, patterns
from nemotron_fp8.planning.number_format import E8M0_BYTES, MX_BLOCK, Coverage, Granularity, NumberFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.planning.module_lists import Modules


NAME = "compressed-tensors"
BLOCKS, GROUPS = Coverage("block"), Coverage("block", MX_BLOCK)
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "block", "mx")
FORMATS = {"mx": "mxfp8-quantized"}
"""Formats of compressed-tensors by granularity, beside `float-quantized`."""
_GROUP = {"strategy": "group", "group_size": GROUPS.block[1]}
_BYTES = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
ONE_SCALE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
"""Scheme of one stored scale: of the activations of a module, or of the keys or values of an FP8 cache in a layer. A
scale of the cache is 1.0 without a tensor."""
STATIC: tuple[Granularity, ...] = ("tensor", "channel")
"""Granularities of weights with which engines read a stored scale of activations."""
ACTIVATIONS: tuple[Activations, ...] = ("dynamic", "none")
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "None")
"""Projections of an expert, as vLLM names them; ``None`` is its name for what an expert without a gate lacks."""
_REWARD, _NAMELESS = re.compile(r"(^|\.)score\.\d+$"), ["re:^$"]
"""Output layers of reward models, which vLLM looks up under an empty name, and the entry for it."""
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.[^.]+$")


def _render_config(scheme: Scheme, modules: Modules) -> dict[str, Any]:
    form = FORMATS.get(scheme.granularity, "float-quantized")
    group = {
        "targets": ["Linear"],
        "format": form,
        "weights": _weights(scheme.granularity),
        "input_activations": _activations(scheme),
    }
    return {
        "quant_method": NAME,
        "format": form,
        "quantization_status": "compressed",
        "ignore": [*patterns(_with_first_experts(modules)), *_NAMELESS * any(map(_REWARD.search, modules.unquantized))],
        "config_groups": {"group_0": group},
    }


def _weights(granularity: Granularity) -> dict[str, Any]:
    """Return the ``QuantizationArgs`` of weights."""
    found: dict[str, Any] = {
        "num_bits": 8,
        "type": "float",
        "strategy": granularity,
        "symmetric": True,
        "dynamic": False,
    }
    if granularity == "block":
        found["block_structure"] = list(BLOCKS.block)
    return found | {**_GROUP, **_BYTES} if granularity == "mx" else found


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    """Return the ``QuantizationArgs`` of activations; None where they stay in 16 bits."""
    granularity = scheme.granularity
    if scheme.activations == "none":
        return None
    if scheme.activations == "static":
        return {**ONE_SCALE}
    found = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    if granularity == "block":
        found |= {"strategy": "group", "group_size": BLOCKS.block[1]}
    return found | {**_GROUP, **_BYTES} if granularity == "mx" else found


def _with_first_experts(modules: Modules) -> Modules:
    """Return modules with every projection that a first expert may have, beside each module of experts.

    vLLM looks for ``experts.0.gate_proj``, ``up_proj`` and ``down_proj`` to know the scheme of all experts, also where
    the experts are stacked or have no gate, and compares names of merged matrices as they are.

    Source: ``CompressedTensorsMoEMethod.get_moe_method`` of vLLM.
    """
    holders = {name: None for name in modules.unquantized if name.endswith("experts")}
    holders |= {found.group(1): None for name in modules.unquantized if (found := _EXPERT.match(name))}
    fp8 = [name for name in modules.quantized if name.endswith("experts")]
    return modules._replace(
        unquantized=tuple(dict.fromkeys((*modules.unquantized, *modules.merged, *_first_experts(holders)))),
        quantized=modules.quantized.union(modules.merged_quantized, _first_experts(fp8)),
    )


def _first_experts(holders: Iterable[str]) -> list[str]:
    return [f"{name}.0.{part}" for name in holders for part in EXPERT_PARTS]


def _read_config(config: Mapping[str, Any]) -> tuple[object, object] | None:
    if config.get("quant_method") != NAME:
        return None
    try:
        group = config["config_groups"]["group_0"]
        weights, activations = group["weights"], _activations_in(group["input_activations"])
        granularity: object = weights["strategy"]
    except (KeyError, TypeError):
        return None
    if config.get("format") == FORMATS["mx"]:
        granularity = "mx" if granularity == "group" else None
    return granularity, activations


def _activations_in(stated: Any) -> Activations:
    """Return the treatment of activations that their ``QuantizationArgs`` state."""
    if stated is None:
        return "none"
    return "static" if stated["dynamic"] is False else "dynamic"


def _readers(scheme: Scheme) -> Readers:
    """Return the engines that load a scheme, from their loaders and from runs of vLLM 0.32 and transformers."""
    if scheme.granularity == "mx":
        return _mx_readers(scheme)
    weight_only_blocks = scheme == ("block", "none")
    # Source: a run of vLLM 0.32 for the kernel of torch; the one of CUTLASS was read.
    static_rows = scheme == ("channel", "static")
    return Readers(
        vllm=not weight_only_blocks,
        sglang=not weight_only_blocks,
        transformers=True,
        transformers_note="from 5.0 loads it, and dequantizes it where there is no GPU for FP8",
        notice=(
            "vLLM 0.32 rejects granularity 'block' with activations 'none', transformers loads it;"
            " for vLLM use granularity 'channel'"
        )
        * weight_only_blocks
        + (
            "vLLM 0.32 multiplies granularity 'channel' with activations 'static' by its CUTLASS kernels only (CUDA,"
            " from Ada on): the kernel of torch that it takes elsewhere fails; for others use granularity 'tensor'"
        )
        * static_rows,
        no_routed_experts=_NO_EXPERTS.get(scheme, ""),
        unread_experts=_ROWS_ONLY if scheme.granularity == "block" else {},
    )


# Source: `CompressedTensorsW8A8Fp8MoEMethod` of vLLM, and runs.
_NO_EXPERTS = {
    Scheme("tensor", "dynamic"): (
        "format 'compressed-tensors' with granularity 'tensor' does not load in vLLM for routed experts;"
        " use granularity 'channel', or format 'fp8'"
    ),
    Scheme("channel", "static"): (
        "format 'compressed-tensors' with granularity 'channel' and activations 'static' does not load in vLLM for"
        " routed experts; use granularity 'tensor'"
    ),
}


_ROWS_ONLY = {"transformers": "multiplies experts by scales of rows only; use granularity 'channel', or format 'fp8'"}
"""Source: ``CompressedTensorsDequantize`` of transformers."""


_UNSET_SCALES = {
    "transformers": "rounds keys and values with scales that it expects in the checkpoint, and takes from memory that"
    " nothing has set: load the result with CompressedTensorsConfig(dequantize=True), or quantize it without an FP8 KV"
    " cache"
}
"""Source: ``initialize_module_for_quantization`` of compressed-tensors, and a run."""


def _mx_readers(scheme: Scheme) -> Readers:
    """Return the engines that load blocks of 32.

    vLLM takes the treatment of activations from its kernel, whatever the config states. Sources:
    ``_get_scheme_from_parts`` and ``_POSSIBLE_MXFP8_KERNELS`` of vLLM.
    """
    dynamic = scheme.activations == "dynamic"
    return Readers(
        vllm=True,
        sglang=False,
        transformers=True,
        transformers_note="from 5.0 loads it, and dequantizes its weights"
        + ", but rounds activations to FP8 in software; use activations 'none' for exact ones" * dynamic,
        unread={"SGLang": "has no MXFP8 in format 'compressed-tensors'; use format 'mxfp8'"},
        notice=(
            "granularity 'mx' is computed by GPUs from Blackwell on (compute capability 10.0); from 8.0 on, vLLM"
            " multiplies 16-bit activations, and on CPUs it has no kernel for it"
        )
        + "; vLLM ignores activations 'none' where its kernel scales them" * (not dynamic),
        unread_experts={
            "transformers": "does not put experts together whose scales belong to groups of 32; use format 'mxfp8', or"
            " granularity 'channel'"
        },
    )


COMPRESSED_TENSORS = Layout(
    name=NAME,
    weights={
        "tensor": WeightFormat(NumberFormat(Coverage("tensor")), "_scale", (1,)),
        "channel": WeightFormat(NumberFormat(Coverage("channel")), "_scale", (1,)),
        "block": WeightFormat(NumberFormat(BLOCKS, scale_rounding="power-of-two"), "_scale", (1,)),
        "mx": WeightFormat(NumberFormat(GROUPS, scale=E8M0_BYTES, scale_rounding="mx"), "_scale", (1,)),
    },
    readers={
        Scheme(granularity, activations): _readers(Scheme(granularity, activations))
        for granularity in GRANULARITIES
        for activations in ACTIVATIONS
    }
    | {Scheme(granularity, "static"): _readers(Scheme(granularity, "static")) for granularity in STATIC},
    render_config=_render_config,
    read_config=_read_config,
    unquantized_keys=("ignore",),
    list_readers=(ListReader(ENGINES, ("ignore",), matches_pattern),),
    default_granularity="channel",
    tags=("compressed-tensors",),
    block_path=("config_groups", "group_0", "weights", "block_structure"),
    static=StaticScales((1,), of_projections=False, in_bfloat16=False),
    refusals={
        "static": (
            "format 'compressed-tensors' has stored scales of activations with granularity 'tensor' or 'channel'"
            " only; use granularity 'tensor'"
        ),
    },
    execution_scales=frozenset({"input_scale", "input_global_scale", "q_scale", "k_scale", "v_scale", "output_scale"}),
    choices=(
        Choice("kv_cache", "fp8", {"kv_cache_scheme": ONE_SCALE}, unread=_UNSET_SCALES, read_with=("attn.k_scale",)),
    ),
)
