"""The family record and its registry: the meaning of tensor names to engines, by model family.

A family is recognized from config.json; code of a checkpoint is never imported. `register_family` adds a record.
`DEFAULT_FAMILY` serves models that no record recognizes: the general rules, which need no record.

Sources: the model files of vLLM (weight loaders, ``packed_modules_mapping``, ``stacked_params_mapping``, expert
mappings) and of transformers (``Experts`` modules), the published FP8 checkpoints of each family, and the results of
``make test-families`` (docs/families.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Rule(NamedTuple):
    """Names of tensors that are left unquantized, and why.

    Attributes:
        pattern: searched in the full name of a tensor.
        reason: reason for the user.
        word: text in every name that matches; a name without it is not searched. For speed only.
        linear: True for linear weights of the decoder, which count for the share of them that becomes FP8.
    """

    pattern: re.Pattern[str]
    reason: str
    word: str = ""
    linear: bool = True

    def matches(self, name: str) -> bool:
        """Return True if the rule applies to a tensor of this name."""
        return self.word in name and self.pattern.search(name) is not None


def rule(pattern: str, reason: str, word: str = "", linear: bool = True) -> Rule:
    """Return a rule for the names in which a regular expression is found."""
    return Rule(re.compile(pattern), reason, word, linear)


class Unread(NamedTuple):
    """An engine that does not read results of a family.

    Attributes:
        engine: name of the engine, of `nemotron_fp8.planning.layouts.ENGINES`.
        reason: reason, and the way out; a text that follows the engine's name in a sentence.
        formats: names of the layouts; empty for all.
        granularities: granularities of these layouts; empty for all.
    """

    engine: str
    reason: str
    formats: tuple[str, ...] = ()
    granularities: tuple[str, ...] = ()

    def concerns(self, format: str, granularity: str) -> bool:
        """Return True if the engine does not read this layout."""
        return (not self.formats or format in self.formats) and (
            not self.granularities or granularity in self.granularities
        )


class Rename(NamedTuple):
    """Name under which an engine looks up a module that the checkpoint names otherwise.

    Prefixes that an engine adds or drops need no record (`nemotron_fp8.planning.module_lists`).

    Attributes:
        pattern: searched in the name of a module in the checkpoint.
        replacement: replaces what the pattern matches, as in ``re.sub``.
    """

    pattern: re.Pattern[str]
    replacement: str


def rename(pattern: str, replacement: str) -> Rename:
    """Return the renaming of what a regular expression matches."""
    return Rename(re.compile(pattern), replacement)


PROJECTIONS = ("_proj.weight",)
"""Endings of linear weights in the original script: decoders of its time name every projection this way."""

MTP = "multi-token-prediction layers keep their dtype"
EVERYWHERE: tuple[Rule, ...] = (
    rule(r"(^|\.)(mtp\w*|nextn\w*|eagle\w*)\.", MTP),
    rule(r"(^|\.)eh_proj\.weight$", "engines load the multi-token-prediction input projection unquantized", "eh_proj"),
    rule(r"(^|\.)fc[12]_latent_proj\.weight$", "latent projections keep their dtype", "latent"),
)
"""Weights that keep their dtype in every family, by the original rule too."""

ENCODER = "encoders and connectors keep their dtype"
VISION: tuple[Rule, ...] = (
    rule(
        r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|mm_projector)\.",
        ENCODER,
        linear=False,
    ),
)
"""Encoders beside a decoder that the original rule leaves alone in multi-modal families."""

ENCODERS: tuple[Rule, ...] = (
    rule(
        r"(^|\.)(visual\w*|vision\w*|vit\w*|vpm|\w*image\w*|img\w*|audio\w*|speech\w*|sound\w*|\w*_tower|\w*encoder(?!_attn)\w*"
        r"|multi_modal\w*|multimodal\w*|mm_\w*|\w*connector|\w*resampler\w*|perceiver\w*|qformer\w*|\w*merger\w*"
        r"|\w*aligner|\w*_adapter|embed_vision|embed_audio|vq\w*|codec\w*|depth_decoder|patch_\w*|\w*projector\w*)\.",
        ENCODER,
        linear=False,
    ),
    rule(
        r"(^|\.)(talker|code2wav|token2wav|code_predictor|generation_\w+)\.",
        "generators of speech and images keep their dtype",
        linear=False,
    ),
)
"""Encoders, connectors and generators beside a decoder, in any family."""

TREES = (
    *("vision_tower", "vision_model", "visual", "vit_merger", "audio_tower", "encoder", "codec_model"),
    *("multi_modal_projector", "mm_projector", "projector", "connector", "aligner", "merger"),
)
"""Names that engines give to encoders and connectors, whatever the checkpoint calls them and their parts."""

ROUTER = "engines load routers and gates of experts unquantized"
ROUTERS: tuple[Rule, ...] = (
    rule(r"(^|\.)(gate|router|wg|\w*_router|router_\w+|shared_expert_gate|shared_experts?_gate\w*)\.weight$", ROUTER),
    rule(r"(^|\.)(router|gate|moe_gate)\.\w+\.weight$", ROUTER),
)
"""Routers of a mixture of experts, and gates of its shared experts."""

SSM = "engines build these state-space projections unquantized"
STATE_SPACE: tuple[Rule, ...] = (rule(r"(^|\.)(x_proj|dt_proj)\.weight$", SSM, "_proj"),)
"""Projections of Mamba-1, which engines build without a quantization config; see `Evidence.is_state_space` too."""

INDEXER = "engines merge these parts of the indexer into one unquantized matrix"
OTHERS: tuple[Rule, ...] = (
    rule(r"(^|\.)indexer\.(wk|weights_proj)\.weight$", INDEXER, "indexer"),
    rule(r"(^|\.)\w*coefs?\.weight$", "a few coefficients of each layer, no projection", "coef", linear=False),
    rule(r"(^|\.)\w*conv\w*\.weight$", "convolutions keep their dtype", "conv", linear=False),
    rule(r"(^|\.)\w*(norm|ln_f|layernorm)\w*\.weight$", "norms keep their dtype", linear=False),
    rule(r"(^|\.)lora_\w+\.", "adapters keep their dtype", "lora_"),
)

FUSED: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w1", "w3"), "w13"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    **dict.fromkeys(("in_proj_b", "in_proj_a"), "in_proj_ba"),
    **dict.fromkeys(("c_fc_0", "c_fc_1"), "gate_up_proj"),
}
"""Names of modules that engines fuse into one matrix with one scale, each with the name of the fused module."""


_TABLE = "an embedding: a lookup table"
MAYBE_LINEAR = rule(r"(^|\.)\w*embed\w*\.weight$", "what makes or projects embeddings keeps its dtype", "embed")
"""Rule for modules named after embeddings that may be linear: engines look them up."""
EMBEDDINGS: tuple[Rule, ...] = (
    rule(
        r"(^|\.)(embed_tokens\w*|(?!relative_pos_)\w*embeddings|embed_in|embed_positions?|embedding|embed)\.weight$",
        _TABLE,
        "embed",
    ),
    rule(r"(^|\.)\w*(word|tok|token|position|pos|type)\w*_(embedding|embed|emb)\.weight$", _TABLE, "emb"),
    rule(r"(^|\.)(wte|wpe)\.weight$", _TABLE, "e.weight"),
    rule(r"(^|\.)\w*(relative_attention_bias|rel_pos\w*|position_bias)\.weight$", _TABLE),
    MAYBE_LINEAR,
)
"""Lookup tables of every family."""
ROW_PARALLEL = frozenset(
    ("o_proj", "out_proj", "down_proj", "w2", "fc2", "dense", "dense_4h_to_h", "c_proj", "wo", "output_linear")
)
REPLICATED = frozenset(("q_a_proj", "kv_a_proj_with_mqa", "wq_a", "wkv", "wk", "weights_proj", "compressor"))
HEAD = "engines load the output layer unquantized"
HEADS: tuple[Rule, ...] = (
    rule(r"(^|\.)lm_head(\.\w+)*\.weight$", HEAD, "lm_head"),
    rule(
        r"^(\w+\.)*(embed_out|proj_out|output_layer|output_projection|score(\.\d+)?|classifier|lm_heads?\.\d+)\.weight$",
        HEAD,
    ),
)
"""Output layers of every family."""

UNQUANTIZED: tuple[Rule, ...] = (*EVERYWHERE, *ENCODERS, *ROUTERS, *STATE_SPACE, *OTHERS)
"""Linear weights that stay in every family, whatever ``--select`` names."""


COMMON_NAMES = (
    rename(r"(^|\.)block_sparse_moe\.gate$", r"\1mlp.gate"),
    rename(r"(^|\.)block_sparse_moe\.gate$", r"\1mlp.router"),
    rename(r"(^|\.)attn\.qkv$", r"\1attn.qkv_proj"),
    rename(r"(^|\.)mamba\.(in_proj|out_proj)$", r"\1mixer.\2"),
)
"""Names of modules in transformers, which calls every mixture of experts ``mlp``, and in vLLM."""


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """Layout of a stack: one 3-D tensor that holds the matrices of all routed experts of a layer.

    Attributes:
        transposed: True if an expert's matrix is stored ``[in, out]`` instead of ``[out, in]`` as in a Linear; None if
            both occur, ``[in, out]`` in published checkpoints: then the side that equals ``hidden_size`` of config.json
            tells.
        parts: for the last name of a stack, its projections in order along the output dimension.
        always: True if transformers loads unquantized experts as stacks only; `dequantize` then stacks them again.
        singles_in: layouts with which transformers builds single experts all the same, and does not load stacks.
        aliases: other endings of the names of stacks, each with the ending under which ``parts`` describes it.
        interleaved: True if the outputs of the projections of a stack alternate.
        only_packed: True if stacks are split only where their elements are packed: engines load others whole.
        unread: reason why no engine loads single experts in FP8; a text that follows the engine's name. Empty if one
            does.
    """

    transposed: bool | None
    parts: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("gate_up_proj", ("gate_proj", "up_proj")),
        ("down_proj", ("down_proj",)),
    )
    always: bool = False
    singles_in: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False
    only_packed: bool = False
    unread: str = ""

    def canonical(self, name: str) -> str:
        """Return the name of a stack as ``parts`` describes it."""
        for ending, described in self.aliases:
            if name.endswith(ending):
                return name.removesuffix(ending) + described
        return name

    def published(self, name: str) -> str:
        """Return the name of a stack in published checkpoints, by its name as ``parts`` describes it."""
        for ending, described in self.aliases:
            if name.endswith(described):
                return name.removesuffix(described) + ending
        return name


@dataclass(frozen=True, eq=False)
class Family:
    """A model family.

    Attributes:
        name: display name.
        model_types: ``model_type`` of config.json.
        architectures: names in ``architectures`` of config.json.
        linears: endings of the names of linear weights, which the default rule quantizes; empty for the general rule
            (`nemotron_fp8.planning.selection`).
        embeddings: lookup tables, which are never quantized and are no linear modules.
        heads: output layers, which are never quantized.
        unquantized: linear weights that are left unquantized whatever ``--select`` names, with the reason.
        tied_heads: output layers that engines build although a checkpoint with tied embeddings holds no tensor of them
            (``_tied_weights_keys`` of transformers).
        fused: names of modules that engines fuse, each with the name of the fused module.
        experts: name of the module that holds the routed experts of a layer, numbered.
        stacked: layout of stacked experts; None if the engines' names for single experts are unknown.
        renames: further names under which engines look up modules.
        transposed: True if linear weights are stored ``[in, out]`` (``Conv1D`` of transformers): they are left
            unquantized, since engines scale the columns of ``[out, in]``.
        unread: engines that do not read results of this family, in some layouts or in all.
        row_parallel: modules that engines split by input columns over tensor-parallel devices; others are split by
            output rows.
        replicated: modules that every tensor-parallel device holds whole.
        refusals: reason why no list of unquantized modules makes engines right with a layout, by name of the layout;
            the text names a layout that works.
    """

    name: str
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    embeddings: tuple[Rule, ...] = EMBEDDINGS
    heads: tuple[Rule, ...] = HEADS
    unquantized: tuple[Rule, ...] = UNQUANTIZED
    tied_heads: tuple[str, ...] = ("lm_head",)
    fused: Mapping[str, str] = field(default_factory=lambda: FUSED)
    experts: str = "experts"
    stacked: StackedExperts | None = None
    renames: tuple[Rename, ...] = ()
    transposed: bool = False
    unread: tuple[Unread, ...] = ()
    row_parallel: frozenset[str] = ROW_PARALLEL
    replicated: frozenset[str] = REPLICATED
    refusals: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def routed(self) -> re.Pattern[str]:
        """Pattern of the part of a name that leads to one routed expert."""
        return re.compile(rf"(^|\.){re.escape(self.experts)}\.\d+\.")

    @cached_property
    def stack(self) -> re.Pattern[str]:
        """Pattern of the name of a stack; the group ``part`` is its last name."""
        return re.compile(rf"(^|\.){re.escape(self.experts)}\.(?P<part>[^.]+?)(\.weight)?$")

    def canonical_stack(self, name: str) -> str:
        """Return the name of a stack as the record describes it."""
        return name if self.stacked is None else self.stacked.canonical(name)

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

    def names_in_engines(self, module: str) -> Iterator[str]:
        """Yield the names under which engines look up a module: that in the checkpoint, then others."""
        yield module
        for renaming in (*COMMON_NAMES, *self.renames):
            renamed = renaming.pattern.sub(renaming.replacement, module)
            if renamed != module:
                yield renamed


DEFAULT_FAMILY = Family(
    "unknown",
    tied_heads=(
        *("lm_head", "proj_out", "output_projection", "lm_head.out_proj", "lm_head.decoder", "embed_out"),
        *("output", "output_layer"),
    ),
)
"""Family of models that no record recognizes: the general rules, and the fused modules of common decoders."""


def without_aliases(family: Family) -> Family:
    """Return a family as the first version listed its unquantized modules: under their names in checkpoints only.

    That version knew neither other heads than lm_head, nor linear modules named after embeddings.
    """
    every_embedding = rule(MAYBE_LINEAR.pattern.pattern, MAYBE_LINEAR.reason, MAYBE_LINEAR.word)
    return replace(family, renames=(), tied_heads=("lm_head",), embeddings=(*family.embeddings, every_embedding))


_families: list[Family] = []


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
    for each in (*family.unquantized, *family.heads, *family.embeddings):
        if not isinstance(each, Rule):
            raise TypeError(f"family {family.name!r}: {each!r} is not a Rule")
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
