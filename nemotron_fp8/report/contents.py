"""Tensors of a result, the reasons why some are unquantized, and the engines that read it.

A manifest records neither, because both follow from names, shapes and config: they are decided again as if the weights
of the result were unquantized. Patterns in a manifest are untrusted text, and a regular expression can run for years:
none is run, and a weight that the default takes and the result has not is attributed to the recipe as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._display import counted, one_line
from nemotron_fp8.checkpoint.inventory import Shard
from nemotron_fp8.documents.model_card import PATTERN_FIELDS
from nemotron_fp8.documents.serving import Serving, serving_of
from nemotron_fp8.errors import NemotronFp8Error, RecipeError
from nemotron_fp8.planning.engine_support import SupportedModel, engine_support
from nemotron_fp8.planning.evidence import Evidence
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.kv_cache import has_cache_scales
from nemotron_fp8.planning.linear_share import kind_of, linear_share
from nemotron_fp8.planning.quantize import decide_all, recipe_notices
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.planning.tensor_plan import TensorPlan

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.engine_support import EngineSupport
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.linear_share import LinearShare
    from nemotron_fp8.planning.selection import Decision
    from nemotron_fp8.planning.tensor_plan import Role

NONFINITE = "NaN or Inf in it"
BY_PATTERN = "left by a pattern of the recipe"
FUSED_NONFINITE = "NaN or Inf in it, or in a weight fused with it"
BY_DEFAULT = "a linear weight that is not FP8 in this result"
EVERY = ".*"
"""Pattern of this module, which matches every name."""
WIDE = "BF16"
"""Dtype that weights of the result are taken to have had."""


class ResultTensor(NamedTuple):
    """A tensor of a result, or an FP8 tensor with its scale.

    Attributes:
        name: name of the tensor.
        dtype: safetensors name of its dtype.
        shape: dimensions; ``()`` for a scalar.
        bytes: bytes of the tensor, and of the scale of an FP8 tensor.
        reason: reason why it is unquantized; empty for an FP8 tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


class Unquantized(NamedTuple):
    """Tensors that are unquantized for one reason.

    Attributes:
        reason: the reason.
        tensors: number of tensors.
        bytes: their bytes.
        names: their names without layers, ``N`` for a number, each once.
    """

    reason: str
    tensors: int
    bytes: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Contents:
    """Tensors of a result, and what follows from them.

    Attributes:
        tensors: every tensor except scales, in the order of the files.
        share: share of the linear weights that is FP8, counted as if they had 16 bits, and what is left.
        engines: engines, and whether they read the result; empty if its layout is unknown.
        serving: how they serve it; None if its layout is unknown.
    """

    tensors: tuple[ResultTensor, ...]
    share: LinearShare
    engines: tuple[EngineSupport, ...] = ()
    serving: Serving | None = None

    def __repr__(self) -> str:
        readers = ", ".join(self.readers) or "no engine"
        return one_line("Contents", "", [counted(len(self.tensors), "tensor"), f"read by {readers}"])

    @property
    def readers(self) -> tuple[str, ...]:
        """Engines that read the result."""
        return tuple(each.engine for each in self.engines if each.reads)

    @property
    def unquantized(self) -> tuple[Unquantized, ...]:
        """Unquantized tensors by reason, the most bytes first."""
        groups: defaultdict[str, list[ResultTensor]] = defaultdict(list)
        for tensor in self.tensors:
            if tensor.reason:
                groups[tensor.reason].append(tensor)
        found = [
            Unquantized(
                reason,
                len(tensors),
                sum(tensor.bytes for tensor in tensors),
                tuple(dict.fromkeys(kind_of(tensor.name) for tensor in tensors)),
            )
            for reason, tensors in groups.items()
        ]
        return tuple(sorted(found, key=lambda each: (-each.bytes, each.reason)))


def contents_of(
    inventory: Inventory,
    layout: Recipe | None,
    asked: Mapping[str, Any],
    scales: Mapping[str, TensorView],
    stored: Sequence[TensorView],
    nonfinite: Collection[str] = (),
    missing: tuple[str, ...] = (),
) -> Contents:
    """Return the tensors of a result, and what follows from them.

    Args:
        inventory: contents of the result.
        layout: recipe that its config describes; None if it is not one of this library.
        asked: recipe in its manifest; empty without a manifest.
        scales: scale of every FP8 weight, by the name of the weight.
        stored: scales of activations and of the KV cache.
        nonfinite: names of tensors with NaN or Inf in the source, as far as they are known.
        missing: folders that a side file names and the result lacks.
    """
    beside = {view.name for view in (*scales.values(), *stored)}
    views = [view for view in inventory.views if view.name not in beside]
    recipe, family = recipe_without_patterns(layout, asked), family_of(inventory.config)
    decisions, forced = _decide(inventory, views, scales, recipe, family)
    left = [BY_PATTERN] * any(asked.get(name) for name in PATTERN_FIELDS)
    left += [FUSED_NONFINITE] * (asked.get("nonfinite") == "keep")
    otherwise = "; or ".join(left) or BY_DEFAULT
    tensors: list[ResultTensor] = []
    planned: list[TensorPlan] = []
    for view in views:
        scale, decision = scales.get(view.name), decisions.get(view.name)
        reason = "" if scale else _reason(view, decision, otherwise, nonfinite)
        size = view.nbytes + (scale.nbytes if scale else 0)
        tensors.append(ResultTensor(view.name, view.dtype, view.shape, size, reason))
        role: Role = decision.role if decision else "other"
        # As bytes of 16 bits, so that a weight counts the same before and after.
        wide = 2 * view.numel
        planned.append(TensorPlan(view.name, "", view.dtype, view.shape, scale is not None, reason, wide, 0, role))
    share = linear_share(planned, {})
    if layout is None and inventory.config is None:
        layout = recipe  # without a config, which engines need, its statement is missing too
    if layout is None or not scales:
        return Contents(tuple(tensors), share)
    kept = tuple(view.name for view in views if view.name not in scales)
    model = SupportedModel(
        family,
        {view.name: view.shape for view in views if view.name in scales},
        Evidence((), family, inventory.config).heads,
        inventory.config is not None,
        tuple(dict.fromkeys(map(kind_of, forced))),
        (*kept, *(view.name for view in stored)),
        missing,
    )
    engines = engine_support(layout, model)
    notices = recipe_notices(layout, inventory.config, has_cache_scales(view.name for view in stored))
    has_own_code = bool((inventory.config or {}).get("auto_map"))
    return Contents(tuple(tensors), share, engines, serving_of(engines, layout, notices, has_own_code))


def recipe_without_patterns(layout: Recipe | None, asked: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a result without patterns: as recorded, else as its config describes it."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in asked.items()
        if key in Recipe.model_fields and key not in PATTERN_FIELDS
    }
    with suppress(RecipeError):
        return Recipe(**fields) if fields else layout or Recipe()
    return layout or Recipe()


def _decide(
    inventory: Inventory,
    views: Sequence[TensorView],
    scales: Mapping[str, TensorView],
    recipe: Recipe,
    family: Family,
) -> tuple[Mapping[str, Decision], list[str]]:
    """Decide as if the weights were unquantized; return the decisions, and the FP8 weights that need force."""
    wide = tuple(view._replace(dtype=WIDE) if view.name in scales else view for view in views)
    bare = replace(inventory, shards=(Shard("", 0, None, wide),), stacks=())
    every = recipe.model_copy(update={"select": (EVERY,), "force_select": True, "selection": "default"})
    # A result may be damaged in any way: without decisions there are no reasons.
    with suppress(NemotronFp8Error):
        _, decisions, _ = decide_all(bare, recipe, family)
        if all(name in decisions and decisions[name].quantize for name in scales):
            return decisions, []
        _, all_taken, _ = decide_all(bare, every, family)
        return decisions, [name for name in scales if name in all_taken and all_taken[name].forced]
    return {}, []


def _reason(view: TensorView, decision: Decision | None, otherwise: str, nonfinite: Collection[str]) -> str:
    """Return why a tensor is unquantized: ``otherwise`` for one that the recipe takes without patterns."""
    if view.name in nonfinite:
        return NONFINITE
    if decision is not None and not decision.quantize:
        return decision.reason
    return otherwise
