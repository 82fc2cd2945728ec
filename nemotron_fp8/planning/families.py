"""Model families: what the names of their tensors mean to an engine. A table to read and to extend.

A family only takes away from the default rule (every 2-D ``*_proj.weight``). It is recognized from config.json;
no code of a checkpoint is ever imported. An unknown family gets the default rule and a notice.

Sources: the model files of vLLM and transformers, and the published FP8 checkpoints of each family.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


Rule = tuple[re.Pattern[str], str]
"""A pattern, searched in the full tensor name, and why what matches stays."""


def _rule(pattern: str, reason: str) -> Rule:
    return re.compile(pattern), reason


EVERYWHERE: tuple[Rule, ...] = (
    _rule(r"(^|\.)mtp\.", "multi-token-prediction layers stay in their own precision"),
    _rule(r"(^|\.)eh_proj\.weight$", "engines load the multi-token-prediction input projection unquantized"),
    _rule(r"(^|\.)fc[12]_latent_proj\.weight$", "latent projections stay in their own precision"),
)
"""Names that end in ``_proj.weight`` and stay in every family."""

VISION: tuple[Rule, ...] = (
    _rule(
        r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|mm_projector)\.",
        "encoders of images and sound stay in their own precision",
    ),
)


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    Attributes:
        name: for people.
        model_types: ``model_type`` of config.json.
        architectures: names in ``architectures`` of config.json.
        keep: what stays although the default rule would take it.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...] = ()
    keep: tuple[Rule, ...] = ()


FAMILIES: tuple[Family, ...] = (
    # Squared ReLU without a gate: self_attn.{q,k,v,o}_proj and mlp.{up,down}_proj.
    Family("Nemotron-4, Minitron", ("nemotron",), ("NemotronForCausalLM",)),
    # mixer.{in,out,q,k,v,o,up,down}_proj, experts.E.{up,down}_proj, shared_experts.*_proj. conv1d is 3-D, A_log, D,
    # dt_bias and gate are not called *_proj.
    Family("Nemotron-H, Nano v2, Nemotron 3", ("nemotron_h",), ("NemotronHForCausalLM",)),
    # Some layers lack whole sublayers; what is there is named as in Llama.
    Family("Llama-Nemotron NAS", ("nemotron-nas", "deci"), ("DeciLMForCausalLM",)),
    Family("Llama", ("llama",), ("LlamaForCausalLM",)),
    Family("Mistral, Mixtral", ("mistral", "mixtral", "ministral")),
    Family("Qwen", ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")),
    Family("Gemma", ("gemma", "gemma2", "gemma3_text")),
    Family("Phi", ("phi3",)),
    Family("DeepSeek, GLM", ("deepseek_v2", "deepseek_v3", "glm4", "glm4_moe")),
    Family("Granite", ("granite", "granitemoe")),
    Family("Llama 4", ("llama4", "llama4_text"), (), VISION),
    Family("vision-language", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3", "llava"), (), VISION),
)


def family_of(config: Mapping[str, Any] | None) -> Family | None:
    """Return the family that a config.json belongs to; None for one that is not in the table."""
    if config is None:
        return None
    model_type, architectures = config.get("model_type"), config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for family in FAMILIES:
        if model_type in family.model_types or any(name in family.architectures for name in names):
            return family
    return None
