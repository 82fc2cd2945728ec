"""Selection of the tensors to quantize: by their role in the model, from names, dtypes, shapes and config.json.

The default takes every linear weight of the decoder. Roles come from the family's record
(`nemotron_fp8.planning.families`); what it does not state follows from general rules:

* A name that ends in ``_proj.weight`` is a linear weight, as in the original script.
* So is any other 2-D ``.weight`` of a repeated layer that has a norm, in a model with a lookup table.
* Lookup tables, output layers, routers, encoders, convolutions, the layers for multi-token prediction and the
  projections that engines build unquantized stay, whatever ``--select`` names, unless ``--force-select`` is given.
* A matrix stored ``[in, out]`` stays in any case: engines would scale its inputs in place of its outputs.

A quantized source keeps its own choice: its quantized weights are quantized in the result unless ``--ignore`` names
them, and of the others, ``--select`` and ``--also-select`` take some.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from difflib import get_close_matches
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._utils import listed
from nemotron_fp8.checkpoint.dtypes import QUANTIZABLE
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.carried_codes import has_same_blocks
from nemotron_fp8.planning.engine_support import stored_parts
from nemotron_fp8.planning.evidence import LAYER, Evidence
from nemotron_fp8.planning.families import DEFAULT_FAMILY, Rule
from nemotron_fp8.planning.families.base import (
    ENCODER,
    ENCODERS,
    EVERYWHERE,
    HEAD,
    MAYBE_LINEAR,
    MTP,
    PROJECTIONS,
    ROUTER,
    SSM,
    STATE_SPACE,
    TREES,
    VISION,
)
from nemotron_fp8.planning.module_lists import NUMBER, Modules
from nemotron_fp8.planning.stacked_experts import experts_of, is_stack, why_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.planning.tensor_plan import Role


LINEAR_WEIGHT: Role = "linear"
MODULE: Role = "module"
OTHER: Role = "other"
LINEAR = "a linear weight"
UNKNOWN = "not known as a linear weight"
BESIDE = "not a layer of the decoder: it has no lookup table beside it"
NO_MATCH = "matches no --select pattern"
TRANSPOSED = "stored [in, out] (Conv1D): engines load it unquantized"
FUSED_WITH = "fused with"
STORED_FP8, STORED_MXFP4 = "FP8 in the source", "MXFP4 in the source"
NOT_STORED = "not quantized in the source"
OTHER_STACK = "another stack of experts of its layer is unquantized"
NAMES_SHOWN = 3
"""Most names that an error suggests for a pattern."""


class Decision(NamedTuple):
    """Decision about a tensor: quantized or not, with the reason.

    Attributes:
        quantize: True if the tensor is quantized.
        reason: reason for the decision.
        role: a linear weight of the decoder, which counts for the share that becomes FP8; a linear module outside it
            (encoder, output layer); or any other tensor.
        forced: True if ``force_select`` quantizes a tensor that engines are not known to load in FP8.
    """

    quantize: bool
    reason: str
    role: Role = "linear"
    forced: bool = False


def decide(
    views: Sequence[TensorView],
    recipe: Recipe,
    family: Family = DEFAULT_FAMILY,
    config: Mapping[str, Any] | None = None,
    whole: Mapping[str, str] | None = None,
) -> tuple[dict[str, Decision], tuple[str, ...]]:
    """Decide which tensors are quantized.

    If a rule leaves one tensor of a fused module unquantized, the whole module is left unquantized: engines reject a
    fused module of which only a part is FP8.

    Args:
        views: all tensors of a source.
        recipe: settings of the quantization.
        family: model family of the source.
        config: config.json of the source; None without one.
        whole: reasons why stacks of experts are not split, by name, beside those that the stacks themselves give.

    Returns:
        The decision for every tensor, by name, and notices for the user.
    """
    evidence = Evidence(views, family, config)
    unsplit = {**(whole or {}), **why_whole(views, family, evidence.hidden_size)}
    judge = _Selector(recipe, family, evidence, unsplit, any(view.encoding is not None for view in views))
    decisions = {view.name: judge(view) for view in views}
    notices: list[str] = []
    for fused_module, members in _fused_modules(views, family).items():
        chosen = [name for name in members if decisions[name].quantize]
        left = [name for name in members if not decisions[name].quantize]
        if not chosen or not left:
            continue
        why = decisions[left[0]].reason
        # Without the name of the layer, so that one line tells of all layers.
        inside = left[0].removeprefix(f"{fused_module.removesuffix('.weight').rpartition('.')[0]}.")
        cause = NUMBER.sub("N", inside.removesuffix(".weight"))
        for name in chosen:
            decisions[name] = Decision(False, f"{FUSED_WITH} {cause}, which is unquantized: {why}")
        notices.append(
            f"{fused_module}: engines fuse {listed(members)}; unquantized: {listed(left)} ({why}); therefore also"
            f" unquantized: {listed(chosen)}"
        )
    return decisions, (*notices, *_futile_patterns(views, recipe, decisions, judge))


def _futile_patterns(
    views: Sequence[TensorView], recipe: Recipe, decisions: Mapping[str, Decision], judge: _Selector
) -> Iterator[str]:
    """Yield a notice for every pattern whose tensors all stay unquantized, with the way to change that."""
    for option, patterns in (("--select", recipe.select), ("--also-select", recipe.also_select)):
        for text in patterns:
            named = [view for view in views if re.search(text, view.name)]
            if not named or any(decisions[view.name].quantize for view in named):
                continue
            forced = any(judge.with_force(view).quantize for view in named)
            reasons = list(dict.fromkeys(decisions[view.name].reason for view in named))
            yield (
                f"{option} {text!r}: none of the {len(named):,} tensors that it matches becomes FP8"
                f" ({'; '.join(reasons[:NAMES_SHOWN])})" + "; to take them: --force-select" * forced
            )


MOST_EMPTY_SCALES = 1 << 20
"""Most scales of a weight without elements: a header of a few bytes must not take gigabytes of scales."""


class _Selector:
    """Decides about one tensor, from its name, dtype and shape."""

    def __init__(
        self, recipe: Recipe, family: Family, evidence: Evidence, whole: Mapping[str, str], own_choice: bool
    ) -> None:
        self._select = [re.compile(pattern) for pattern in recipe.select]
        self._also = [re.compile(pattern) for pattern in recipe.also_select]
        self._ignore = [re.compile(pattern) for pattern in recipe.ignore]
        self._family, self._evidence, self._whole, self._force = family, evidence, whole, recipe.force_select
        self._original = recipe.numerics == "original"
        self._linears = PROJECTIONS if self._original else family.linears
        # The original rule left alone what its author's models had: nothing else, so that it gives the same bytes.
        self._unquantized = (*EVERYWHERE, *VISION) if self._original else family.unquantized
        self._nvidia = _nvidia_rule(evidence) if recipe.selection == "nvidia" else None
        self._coverage = recipe.weight_format.numbers.coverage
        self._own_choice = own_choice

    def __call__(self, view: TensorView) -> Decision:
        if self._own_choice:
            return self._by_source(view)
        named = self._named(view.name)
        decision = self._by_role(view, named is not None)
        if named is None and (self._select or decision.reason == UNKNOWN):
            # A reason that an option changes is stated only where the option leads to FP8.
            if decision.reason not in (UNKNOWN, LINEAR) and not self._by_role(view, named=True).quantize:
                return decision
            reason = self._obstacle(view) or (NO_MATCH if self._select else UNKNOWN)
            return Decision(False, reason, decision.role)
        if not decision.quantize:
            return decision
        if obstacle := self._obstacle(view):
            return Decision(False, obstacle, decision.role)
        # The original rule takes some weights that engines build unquantized.
        forced = decision.forced or (self._original and self._unread(view.name))
        return Decision(True, named or decision.reason, decision.role, forced)

    def _by_source(self, view: TensorView) -> Decision:
        """Decide about a tensor of a quantized source, which keeps its own choice."""
        named = self._named(view.name)
        decision = self._by_role(view, named=True)
        if view.encoding is None:
            if named is None:
                return Decision(False, NOT_STORED if decision.quantize else decision.reason, decision.role)
            if not decision.quantize:
                return decision
            reason = named
        elif len(view.shape) != 2 or not view.name.endswith(".weight"):
            return decision
        else:
            reason = STORED_MXFP4 if view.encoding.packed else STORED_FP8
        if view.encoding is not None and self._nvidia is not None and self._nvidia.matches(view.name):
            return Decision(False, self._nvidia.reason, decision.role)
        if obstacle := self._obstacle(view):
            return Decision(False, obstacle, decision.role)
        return Decision(True, reason, decision.role, decision.forced and view.encoding is None)

    def _unread(self, name: str) -> bool:
        """Return True for the projections of a state-space mixer that engines build unquantized."""
        return self._evidence.is_state_space(name) or any(rule.matches(name) for rule in STATE_SPACE)

    def with_force(self, view: TensorView) -> Decision:
        """Return the decision about a tensor with ``force_select``."""
        before, self._force = self._force, True
        try:
            return self(view)
        finally:
            self._force = before

    def _obstacle(self, view: TensorView) -> str | None:
        """Return why a selected weight is not quantized; None if it is."""
        if ignored := self._ignored(view.name):
            return ignored
        if not view.numel and prod(self._coverage.scale_shape(view.shape)) > MOST_EMPTY_SCALES:
            return "it has no elements, but would have millions of scales"
        if view.dtype not in QUANTIZABLE:
            return f"{view.dtype} is not one of {', '.join(sorted(QUANTIZABLE))}"
        if has_same_blocks(view, self._coverage):
            return None
        if not self._coverage.divides(view.shape):
            size, block = ("x".join(map(str, sides)) for sides in (view.shape, self._coverage.block))
            return f"{size} does not divide into blocks of {block}"
        if self._coverage.granularity == "block":
            parts = stored_parts(view.name, view.shape[0], self._evidence.heads)
            if uneven := next((part for part in parts if part % self._coverage.block[0]), None):
                return f"a part of {uneven} rows, which engines load by itself, does not divide into blocks"
        return None

    def _ignored(self, name: str) -> str | None:
        """Return which pattern leaves a tensor unquantized; None if none does."""
        pattern = next((pattern for pattern in self._ignore if pattern.search(name)), None)
        return None if pattern is None else f"matches --ignore {pattern.pattern}"

    def _named(self, name: str) -> str | None:
        """Return which option names a tensor; None if none does."""
        for option, patterns in (("--select", self._select), ("--also-select", self._also)):
            for pattern in patterns:
                if pattern.search(name):
                    return f"matches {option} {pattern.pattern}"
        return None

    def _by_role(self, view: TensorView, named: bool) -> Decision:
        """Decide by the role of a tensor; ``named`` makes any other matrix a linear weight."""
        name, family, evidence = view.name, self._family, self._evidence
        if len(view.shape) != 2 or not name.endswith(".weight"):
            return self._no_matrix(view)
        for rules, role in ((family.heads, MODULE), (family.embeddings, OTHER)):
            for rule in rules:
                if rule.matches(name):
                    return Decision(False, rule.reason, role)
        protected = self._protected(view)
        forced = protected is not None and self._force and named
        if protected is not None and not forced:
            return protected
        if not self._original and evidence.is_transposed(view):
            return Decision(False, TRANSPOSED)
        if named:
            return Decision(True, LINEAR, protected.role if protected else LINEAR_WEIGHT, forced)
        if self._nvidia is not None and self._nvidia.matches(name):
            return Decision(False, self._nvidia.reason)
        role = LINEAR_WEIGHT if evidence.is_repeated(name) else MODULE
        if self._linears:
            known = name.endswith(self._linears)
            return Decision(known, LINEAR if known else "not a linear projection", LINEAR_WEIGHT if known else role)
        if name.endswith(PROJECTIONS) or evidence.is_in_layer(name):
            return Decision(True, LINEAR)
        return Decision(False, UNKNOWN, role)

    def _protected(self, view: TensorView) -> Decision | None:
        """Return why a linear weight stays whatever ``--select`` names; None for any other."""
        name, evidence = view.name, self._evidence
        for rule in self._unquantized:
            if rule.matches(name):
                return Decision(False, rule.reason, LINEAR_WEIGHT if rule.linear else MODULE)
        if self._original:
            return None
        if evidence.is_beyond_the_layers(name):
            return Decision(False, MTP)
        if evidence.is_state_space(name):
            return Decision(False, SSM)
        if evidence.is_beside_the_decoder(name):
            return Decision(False, BESIDE, MODULE)
        if self._linears or name.endswith(PROJECTIONS):
            return None
        if evidence.is_in_layer(name):
            return Decision(False, ROUTER) if evidence.is_router(view) else None
        if evidence.is_vocabulary(view):
            return Decision(False, HEAD, MODULE)
        return None

    def _no_matrix(self, view: TensorView) -> Decision:
        """Return why a tensor that is no 2-D weight stays."""
        if is_stack(view, self._family):
            return Decision(False, self._why_whole(view.name))
        if len(view.shape) != 2:
            return Decision(False, f"not a matrix: {len(view.shape)} dimension{'s' * (len(view.shape) != 1)}", OTHER)
        return Decision(False, "not a weight: its name does not end in .weight", OTHER)

    def _why_whole(self, stack: str) -> str:
        """Return why a stack of experts stays."""
        if ignored := self._ignored(stack):
            return ignored
        if stack in self._whole:
            return self._whole[stack]
        return NO_MATCH if self._select and self._named(stack) is None else OTHER_STACK


def _nvidia_rule(evidence: Evidence) -> Rule:
    """Return the rule for what NVIDIA leaves unquantized in Nemotron 3, beside what stays in every recipe.

    Attention stays in every size. In Nano, which has no latent projections, the Mamba mixer directly before each
    attention layer stays too.

    Source: quantization recipes of NVIDIA-Nemotron-3-Nano-30B-A3B-FP8 (its technical report, section 4) and
    Nemotron-3-Super-FP8 (its documentation).

    Raises:
        RecipeError: the source is no hybrid of Mamba and attention as in Nemotron-H.
    """
    attention, state_space = evidence.attention_and_state_space
    if not attention or not state_space:
        raise RecipeError(
            "selection 'nvidia' is NVIDIA's choice for Nemotron 3 (model_type 'nemotron_h'); the source has no layers"
            " named mixer.q_proj and mixer.in_proj; use selection 'default'",
            ("selection",),
        )
    kept = set(attention)
    if not any("_latent_proj." in name for name in evidence.shapes):
        kept |= {layer - 1 for layer in attention if layer - 1 in state_space}
    numbers = "|".join(map(str, sorted(kept)))
    return Rule(
        re.compile(rf"(^|\.)layers\.({numbers})\.mixer\."), "NVIDIA keeps attention, and Nano's Mamba before it"
    )


def check_patterns(names: Sequence[str], recipe: Recipe) -> None:
    """Raise RecipeError for a pattern that matches no tensor: a misspelled one would go unnoticed.

    Args:
        names: names of all tensors, of the source and as split for engines.
        recipe: settings of the quantization.
    """
    for field in ("select", "also_select", "ignore"):
        for text in getattr(recipe, field):
            pattern = re.compile(text)
            if not any(map(pattern.search, names)):
                option = "--" + field.replace("_", "-")
                raise RecipeError(f"{option} {text!r} matches no tensor{_near(text, names)}", (field,))


def _near(text: str, names: Sequence[str]) -> str:
    """Return a hint with parts of names that are like a pattern."""
    parts = {part: None for name in names for part in name.split(".") if not part.isdigit()}
    words = re.findall(r"[A-Za-z_]\w*", text)
    found = dict.fromkeys(near for word in words for near in get_close_matches(word, parts, NAMES_SHOWN, 0.6))
    if found:
        return f"; did you mean {listed(list(found), NAMES_SHOWN)}?"
    return f"; names look like {listed(list(names), NAMES_SHOWN)}"


def _fused_modules(views: Iterable[TensorView], family: Family) -> dict[str, list[str]]:
    """Return the names of matrices by the module that an engine fuses them into; only modules of several matrices."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for view in views:
        if len(view.shape) == 2 and view.name.endswith(".weight"):
            found[family.fused_module_of(view.name)].append(view.name)
    return {fused_module: names for fused_module, names in found.items() if len(names) > 1}


def linear_modules(
    views: Iterable[TensorView], quantized: frozenset[str], family: Family, aliases: bool = True
) -> Modules:
    """Return the modules that an engine treats as linear, under every name by which engines look them up.

    Unquantized are the modules of the 2-D ``.weight`` tensors outside ``quantized`` except embeddings, and the module
    of each stack of experts: engines look for the module instead of its stacks. Where experts are quantized, the module
    that holds them is, too. A head without a tensor (tied to the embedding) is unquantized too.

    Args:
        views: tensors of a source, or of a result without its scales.
        quantized: names of the quantized tensors.
        family: model family.
        aliases: True for every name of a module in engines; False for its name in the checkpoint alone.
    """
    plain: dict[str, None] = {}
    for view in views:
        if view.name not in quantized:
            plain |= dict.fromkeys(_modules(view, family))
            if aliases and _is_named_as_projection(view):
                plain[view.name] = None
    known_heads = aliases and family is not DEFAULT_FAMILY
    if known_heads or not any(rule.matches(f"{name}.weight") for rule in family.heads for name in plain):
        # An entry for a head must match no module whose name ends alike.
        ends = tuple(name.removesuffix(".weight") for name in quantized)
        plain |= {head: None for head in family.tied_heads if not any(name.endswith(head) for name in ends)}
    elif "lm_head" in family.tied_heads and not any(name.endswith("lm_head") for name in plain):
        plain["lm_head"] = None  # the head has another name here, or belongs to another part
    modules = dict.fromkeys(name.removesuffix(".weight") for name in quantized)
    modules |= dict.fromkeys(family.fused_module_of(name) for name in quantized if family.is_routed(name))
    if aliases:
        modules = dict.fromkeys(alias for name in modules for alias in family.names_in_engines(name))
        plain = dict.fromkeys(alias for name in plain for alias in family.names_in_engines(name))
    fp8, unquantized = frozenset(modules), plain
    has_encoder = any(rule.reason == ENCODER and rule.matches(f"{name}.weight") for rule in ENCODERS for name in plain)
    parts = Counter(_merged(name, family) for name in unquantized if not family.is_routed(f"{name}."))
    quantized_parts = {_merged(name, family) for name in fp8}
    merged = [name for name, count in parts.items() if count > 1 and name not in quantized_parts]
    return Modules(
        tuple(name for name in unquantized if name not in fp8),
        fp8,
        TREES if has_encoder else (),
        tuple(name for name in merged if name not in unquantized),
        frozenset(name for name in quantized_parts if name not in fp8),
    )


def _merged(module: str, family: Family) -> str:
    """Return the name of the module that engines merge a module into; its own name if it is not merged."""
    return family.fused_matrix_of(f"{module}.weight").removesuffix(".weight")


def _modules(view: TensorView, family: Family) -> tuple[str, ...]:
    """Return the linear modules of a tensor; empty for any other tensor."""
    if is_stack(view, family):
        return experts_of(view.name, family)
    if len(view.shape) == 2 and view.name.endswith(".weight"):
        if any(rule.matches(view.name) for rule in family.embeddings if rule is not MAYBE_LINEAR):
            return ()
        return (view.name.removesuffix(".weight"),)
    return ()


def _is_named_as_projection(view: TensorView) -> bool:
    """Return True for a matrix in a layer that engines may load into a linear module of its own name.

    An example is ``attn.k_sconv.weight_proj`` of Inkling.
    """
    return len(view.shape) == 2 and view.name.endswith("_proj") and LAYER.match(view.name) is not None
