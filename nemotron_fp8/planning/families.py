"""The family record and its registry: the meaning of tensor names to engines, by model family.

A family is recognized from config.json; code of a checkpoint is never imported. `register_family` adds a record.
`DEFAULT_FAMILY` serves models that no record recognizes.

Sources: the model files of vLLM (weight loaders, ``packed_modules_mapping``, ``stacked_params_mapping``, expert
mappings) and of transformers (``Experts`` modules), and the published FP8 checkpoints of each family.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Rule(NamedTuple):
    """Names of tensors that are left unquantized, and why.

    Attributes:
        pattern: searched in the full name of a tensor.
        reason: reason for the user.
        word: text in every name that matches; a name without it is not searched. For speed only.
    """

    pattern: re.Pattern[str]
    reason: str
    word: str = ""

    def matches(self, name: str) -> bool:
        """Return True if the rule applies to a tensor of this name."""
        return self.word in name and self.pattern.search(name) is not None


def _rule(pattern: str, reason: str, word: str = "") -> Rule:
    return Rule(re.compile(pattern), reason, word)


PROJECTIONS = ("_proj.weight",)
"""Endings of linear weights, as in the original script: decoders name every projection this way."""

EVERYWHERE: tuple[Rule, ...] = (
    _rule(r"(^|\.)mtp\.", "multi-token-prediction layers keep their dtype", "mtp."),
    _rule(r"(^|\.)eh_proj\.weight$", "engines load the multi-token-prediction input projection unquantized", "eh_proj"),
    _rule(r"(^|\.)fc[12]_latent_proj\.weight$", "latent projections keep their dtype", "latent"),
)
"""Names that end in ``_proj.weight`` and are left unquantized in every family."""

VISION: tuple[Rule, ...] = (
    _rule(
        r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|mm_projector)\.",
        "image and audio encoders keep their dtype",
    ),
)

FUSED: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w1", "w3"), "w13"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
}
"""Names of modules that engines fuse into one matrix with one scale, each with the name of the fused module."""


_TABLE = "an embedding: a lookup table, not a matrix to multiply with"
EMBEDDINGS: tuple[Rule, ...] = (
    _rule(r"(^|\.)\w*embed\w*\.weight$", _TABLE, "embed"),
    _rule(r"(^|\.)(wte|wpe)\.weight$", _TABLE, "e.weight"),
)
"""Lookup tables of every family."""

HEADS: tuple[Rule, ...] = (_rule(r"(^|\.)lm_head\.weight$", "engines load lm_head unquantized", "lm_head"),)
"""Output layers of every family."""


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """Layout of a stack: one 3-D tensor that holds the matrices of all routed experts of a layer.

    Attributes:
        transposed: True if an expert's matrix is stored ``[in, out]`` instead of ``[out, in]`` as in a Linear.
        parts: for the last name of a stack, its projections in order along the output dimension.
    """

    transposed: bool
    parts: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("gate_up_proj", ("gate_proj", "up_proj")),
        ("down_proj", ("down_proj",)),
    )


@dataclass(frozen=True, eq=False)
class Family:
    """A model family.

    Attributes:
        name: display name.
        model_types: ``model_type`` of config.json.
        architectures: names in ``architectures`` of config.json.
        linears: endings of the names of linear weights, which the default rule quantizes.
        embeddings: lookup tables, which are never quantized and are no linear modules.
        heads: output layers, which are never quantized.
        unquantized: linear weights that are left unquantized, with the reason.
        fused: names of modules that engines fuse, each with the name of the fused module.
        experts: name of the module that holds the routed experts of a layer, numbered.
        stacked: layout of stacked experts; None if the engines' names for single experts are unknown.
    """

    name: str
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    linears: tuple[str, ...] = PROJECTIONS
    embeddings: tuple[Rule, ...] = EMBEDDINGS
    heads: tuple[Rule, ...] = HEADS
    unquantized: tuple[Rule, ...] = EVERYWHERE
    fused: Mapping[str, str] = field(default_factory=lambda: FUSED)
    experts: str = "experts"
    stacked: StackedExperts | None = None

    @cached_property
    def routed(self) -> re.Pattern[str]:
        """Pattern of the part of a name that leads to one routed expert."""
        return re.compile(rf"(^|\.){re.escape(self.experts)}\.\d+\.")

    @cached_property
    def stack(self) -> re.Pattern[str]:
        """Pattern of the name of a stack; the group ``part`` is its last name."""
        return re.compile(rf"(^|\.){re.escape(self.experts)}\.(?P<part>[^.]+?)(\.weight)?$")

    def is_routed(self, name: str) -> bool:
        """Return True for a tensor of a routed expert."""
        return f"{self.experts}." in name and bool(self.routed.search(name))

    def fused_module_of(self, name: str) -> str:
        """Return the module whose weights are quantized together or not at all; the name of the weight if it is alone.

        Engines quantize all routed experts of a layer or none, and a fused matrix as a whole.
        """
        if f"{self.experts}." in name and name.endswith(".weight"):
            found = self.routed.search(name)
            if found:
                return name[: found.start()] + found.group(1) + self.experts
        return self.fused_matrix_of(name)

    def fused_matrix_of(self, name: str) -> str:
        """Return the matrix that an engine fuses a weight into; the name of the weight if it is not fused."""
        stem, _, last = name.rpartition(".")
        above, dot, module = stem.rpartition(".")
        whole = self.fused.get(module) if last == "weight" else None
        return name if whole is None else above + dot + whole


DEFAULT_FAMILY = Family("unknown")
"""Family of models that no record recognizes: the default rule, and the fused modules of common decoders."""

_ENCODERS = (*EVERYWHERE, *VISION)

_families: list[Family] = [
    # Squared ReLU without a gate: self_attn.{q,k,v,o}_proj and mlp.{up,down}_proj.
    Family("Nemotron-4, Minitron", ("nemotron",), ("NemotronForCausalLM",)),
    # mixer.{in,out,q,k,v,o,up,down}_proj, experts.E.{up,down}_proj, shared_experts.*_proj. conv1d is 3-D, A_log, D,
    # dt_bias and gate are not called *_proj.
    Family("Nemotron-H, Nano v2, Nemotron 3", ("nemotron_h",), ("NemotronHForCausalLM",)),
    # Some layers lack whole sublayers; the other layers have the names of Llama.
    Family("Llama-Nemotron NAS", ("nemotron-nas", "deci"), ("DeciLMForCausalLM",)),
    Family("Llama", ("llama",), ("LlamaForCausalLM",)),
    Family("Mistral, Mixtral", ("mistral", "mixtral", "ministral")),
    Family("Qwen", ("qwen2", "qwen3")),
    Family("Qwen MoE", ("qwen2_moe", "qwen3_moe"), stacked=StackedExperts(transposed=False)),
    Family("Gemma", ("gemma", "gemma2", "gemma3_text")),
    Family("Phi", ("phi3",)),
    Family("GLM", ("glm4",)),
    Family("DeepSeek, GLM MoE", ("deepseek_v2", "deepseek_v3", "glm4_moe"), stacked=StackedExperts(transposed=False)),
    Family("Granite", ("granite", "granitemoe")),
    Family("Llama 4", ("llama4", "llama4_text"), unquantized=_ENCODERS, stacked=StackedExperts(transposed=True)),
    Family(
        "vision-language",
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3", "llava"),
        unquantized=_ENCODERS,
    ),
]


def families() -> tuple[Family, ...]:
    """Return all registered families, in the order of registration."""
    return tuple(_families)


def register_family(family: Family) -> None:
    """Register a family for planners and verification.

    Raises:
        ValueError: another family already has one of its model types or architectures, or the record has neither.
        TypeError: the linear weights are no tuple of names' endings, or a rule is no `Rule`.
    """
    if not family.model_types and not family.architectures:
        raise ValueError(f"family {family.name!r} has neither a model_type nor an architecture to recognize it by")
    if not isinstance(family.linears, tuple):
        raise TypeError(f"family {family.name!r}: linears is {family.linears!r}, not a tuple of endings")
    for rule in (*family.unquantized, *family.heads, *family.embeddings):
        if not isinstance(rule, Rule):
            raise TypeError(f"family {family.name!r}: {rule!r} is not a Rule")
    for other in _families:
        for kind, taken in (
            ("model_type", set(family.model_types) & set(other.model_types)),
            ("architecture", set(family.architectures) & set(other.architectures)),
        ):
            if taken:
                raise ValueError(f"{kind} {min(taken)!r} already belongs to the family {other.name!r}")
    _families.append(family)


def unregister_family(family: Family) -> None:
    """Remove a registered family."""
    _families.remove(family)


def family_of(config: Mapping[str, Any] | None) -> Family:
    """Return the family of a model, by the ``model_type`` of its config.json, then by its ``architectures``."""
    model_type, architectures = (config or {}).get("model_type"), (config or {}).get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for family in _families:
        if model_type in family.model_types:
            return family
    for family in _families:
        if any(name in family.architectures for name in names):
            return family
    return DEFAULT_FAMILY
