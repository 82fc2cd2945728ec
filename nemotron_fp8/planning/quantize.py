"""Plan a conversion to FP8."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from nemotron_fp8._utils import collection_paused
from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.errors import NothingSelectedError, RecipeError
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.plan import Plan, assemble_plan, refuse_quantized
from nemotron_fp8.planning.selection import ROUTED, decide, fused_matrix_of, fused_module_of
from nemotron_fp8.planning.stacked_experts import split_stacks
from nemotron_fp8.planning.tasks import ScaleGroup, TensorTask

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.planning.selection import Decision


WEIGHT_ONLY_BLOCKS = (
    "vLLM 0.32 refuses granularity 'block' with activations 'none', transformers reads it;"
    " for vLLM use granularity 'channel'"
)
"""What a run of both showed."""


@collection_paused()
def make_plan(inventory: Inventory, recipe: Recipe, budget: int, threads: int) -> Plan:
    """Decide everything about a conversion to FP8.

    Args:
        inventory: what the source holds.
        recipe: what to quantize and how.
        budget: bytes that all working buffers together may take.
        threads: workers wanted; fewer are planned where the budget has no room for more.

    Raises:
        AlreadyQuantizedError: the source holds FP8 weights or says so in its config.
        NothingSelectedError: no tensor would be quantized.
        RecipeError: no engine loads this layout for this kind of model.
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    refuse_quantized(inventory)
    inventory = split_stacks(inventory, lambda name: _stays_stacked(name, recipe))
    family = family_of(inventory.config)
    decisions, notices = decide(inventory.views, recipe, family)
    if not any(decision.quantize for decision in decisions.values()):
        raise NothingSelectedError(inventory.source, len(decisions), _why_nothing(recipe, decisions))
    refuse_unloadable(recipe, decisions)
    if inventory.config is None:
        notices = (*notices, f"no {CONFIG} in the source: none is written, and engines need one")
    elif family is None and not recipe.select:
        kind = inventory.config.get("model_type")
        notices = (*notices, f"model_type {kind!r} is not in the table of families: the default rule applies")
    if recipe.granularity == "block" and recipe.activations == "none":
        notices = (*notices, WEIGHT_ONLY_BLOCKS)
    home = _groups(inventory.views, decisions, recipe)
    tensor_tasks = {v.name: TensorTask(v, group.id if (group := home.get(v.name)) else None) for v in inventory.views}
    reasons = {name: decision.reason for name, decision in decisions.items()}
    return assemble_plan(inventory, recipe, tensor_tasks, home, reasons, notices, budget, threads)


def _why_nothing(recipe: Recipe, decisions: Mapping[str, Decision]) -> str:
    """The most telling reasons, and the way out."""
    reasons = sorted({d.reason for d in decisions.values() if d.reason != "not a linear projection"})[:3]
    because = f" ({'; '.join(reasons)})" if reasons else ""
    if recipe.select:
        return f"check the --select patterns{because}"
    return f"the default rule takes 2-D weights named *_proj.weight; name others with --select{because}"


def _stays_stacked(name: str, recipe: Recipe) -> bool:
    """Whether a stack of experts is left alone, by what was asked for: then it keeps its name and its one piece."""
    if any(re.search(pattern, name) for pattern in recipe.ignore):
        return True
    return bool(recipe.select) and not any(re.search(pattern, name) for pattern in recipe.select)


def refuse_unloadable(recipe: Recipe, decisions: Mapping[str, Decision]) -> None:
    """Raise RecipeError where no engine loads a layout for this kind of model, and name the nearest that one does."""
    routed = any(decision.quantize and ROUTED.search(name) for name, decision in decisions.items())
    tensor = recipe.format == "compressed-tensors" and recipe.granularity == "tensor"
    if routed and tensor and recipe.activations == "dynamic":
        raise RecipeError(
            "format 'compressed-tensors' with granularity 'tensor' does not load in vLLM for routed experts;"
            " use granularity 'channel', or format 'fp8'"
        )


def _groups(views: Iterable[TensorView], decisions: Mapping[str, Decision], recipe: Recipe) -> dict[str, ScaleGroup]:
    """The scale group of every tensor to be quantized: what an engine merges where scales are shared, else itself."""
    members: defaultdict[str, list[TensorView]] = defaultdict(list)
    for v in views:
        if decisions[v.name].quantize:
            members[fused_matrix_of(v.name) if recipe.share_scales else v.name].append(v)
    home: dict[str, ScaleGroup] = {}
    for name, group in members.items():
        value = ScaleGroup(name, tuple(group), fused_module_of(group[0].name))
        home.update((v.name, value) for v in group)
    return home
