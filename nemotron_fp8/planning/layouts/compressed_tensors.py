"""The ``compressed-tensors`` layout, in its ``float-quantized`` format.

========================  ====================  ==============================
granularity               name of the scale     shape of the scale
========================  ====================  ==============================
tensor                    ``weight_scale``      ``[1]``
channel                   ``weight_scale``      ``[N, 1]``
block                     ``weight_scale``      ``[ceil(N/128), ceil(K/128)]``
========================  ====================  ==============================

Sources: ``QuantizationConfig`` and ``QuantizationArgs`` of compressed-tensors, which forbid extra keys;
``CompressedTensorsConfig`` of vLLM.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nemotron_fp8.planning.layouts.base import ENGINES, Activations, Layout, ListReader, Readers, Scheme, WeightFormat
from nemotron_fp8.planning.module_lists import matches_pattern, patterns
from nemotron_fp8.planning.number_format import Coverage, Granularity, NumberFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.planning.module_lists import Modules


NAME = "compressed-tensors"
BLOCKS = Coverage("block")
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "block")
ACTIVATIONS: tuple[Activations, ...] = ("dynamic", "none")
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "None")
"""Projections of an expert, as vLLM names them; ``None`` is its name for what an expert without a gate lacks."""
_REWARD, _NAMELESS = re.compile(r"(^|\.)score\.\d+$"), ["re:^$"]
"""Output layers of reward models, which vLLM looks up under an empty name, and the entry for it."""
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.[^.]+$")


def _render_config(scheme: Scheme, modules: Modules) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": 8,
        "type": "float",
        "strategy": scheme.granularity,
        "symmetric": True,
        "dynamic": False,
    }
    activations: dict[str, Any] | None = None
    if scheme.granularity == "block":
        weights["block_structure"] = list(BLOCKS.block)
    if scheme.activations == "dynamic":
        activations = {
            "num_bits": 8,
            "type": "float",
            "strategy": "token",
            "symmetric": True,
            "dynamic": True,
        }
        if scheme.granularity == "block":
            activations |= {"strategy": "group", "group_size": BLOCKS.block[1]}
    group = {
        "targets": ["Linear"],
        "format": "float-quantized",
        "weights": weights,
        "input_activations": activations,
    }
    return {
        "quant_method": NAME,
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": [*patterns(_with_first_experts(modules)), *_NAMELESS * any(map(_REWARD.search, modules.unquantized))],
        "config_groups": {"group_0": group},
    }


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
        return group["weights"]["strategy"], "none" if group["input_activations"] is None else "dynamic"
    except (KeyError, TypeError):
        return None


def _readers(scheme: Scheme) -> Readers:
    """Return the engines that load a scheme, from their loaders and from runs of vLLM 0.32 and transformers."""
    weight_only_blocks = scheme == ("block", "none")
    return Readers(
        vllm=not weight_only_blocks,
        sglang=not weight_only_blocks,
        transformers=True,
        transformers_note="from 5.0 loads it, and dequantizes it where there is no GPU for FP8",
        notice=(
            "vLLM 0.32 rejects granularity 'block' with activations 'none', transformers loads it;"
            " for vLLM use granularity 'channel'"
        )
        * weight_only_blocks,
        no_routed_experts=(
            "format 'compressed-tensors' with granularity 'tensor' does not load in vLLM for routed experts;"
            " use granularity 'channel', or format 'fp8'"
        )
        * (scheme == ("tensor", "dynamic")),
        # Source: CompressedTensorsDequantize of transformers.
        unread_experts={
            "transformers": "multiplies experts by scales of rows only; use granularity 'channel', or format 'fp8'"
        }
        if scheme.granularity == "block"
        else {},
    )


COMPRESSED_TENSORS = Layout(
    name=NAME,
    weights={
        "tensor": WeightFormat(NumberFormat(Coverage("tensor")), "_scale", (1,)),
        "channel": WeightFormat(NumberFormat(Coverage("channel")), "_scale", (1,)),
        "block": WeightFormat(NumberFormat(BLOCKS, scale_rounding="power-of-two"), "_scale", (1,)),
    },
    readers={
        Scheme(granularity, activations): _readers(Scheme(granularity, activations))
        for granularity in GRANULARITIES
        for activations in ACTIVATIONS
    },
    render_config=_render_config,
    read_config=_read_config,
    unquantized_keys=("ignore",),
    list_readers=(ListReader(ENGINES, ("ignore",), matches_pattern),),
    default_granularity="channel",
    tags=("compressed-tensors",),
    block_path=("config_groups", "group_0", "weights", "block_structure"),
    execution_scales=frozenset({"input_scale", "input_global_scale", "q_scale", "k_scale", "v_scale", "output_scale"}),
)
