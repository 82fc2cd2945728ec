"""Plan a conversion to FP8."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.errors import NothingSelectedError, RecipeError
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.plan import Plan, assemble_plan, refuse_quantized
from nemotron_fp8.planning.selection import check_patterns, decide
from nemotron_fp8.planning.stacked_experts import split_stacks
from nemotron_fp8.planning.tasks import ScaleGroup, TensorTask

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.planning.selection import Decision


def make_plan(inventory: Inventory, recipe: Recipe, budget: int, threads: int) -> Plan:
    """Plan a conversion to FP8.

    Args:
        inventory: contents of the source.
        recipe: settings of the quantization.
        budget: bytes that all working buffers together may take.
        threads: requested number of workers; the plan has fewer if the budget is too small for all.

    Raises:
        AlreadyQuantizedError: the source holds FP8 weights, or its config has a ``quantization_config``.
        NothingSelectedError: no tensor would be quantized.
        RecipeError: no engine loads this layout for this kind of model.
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    refuse_quantized(inventory)
    names = [view.name for view in inventory.views]
    inventory = with_split_stacks(inventory, recipe)
    check_patterns(list(dict.fromkeys([*names, *(view.name for view in inventory.views)])), recipe)
    family = family_of(inventory.config)
    if refusal := family.refusals.get(recipe.format):
        raise RecipeError(refusal, ("format",))
    decisions, notices = decide(inventory.views, recipe, family, inventory.config)
    if not any(decision.quantize for decision in decisions.values()):
        raise NothingSelectedError(inventory.source, len(decisions), _why_nothing(recipe, family, decisions))
    refuse_unloadable(recipe, family, decisions)
    if inventory.config is None:
        notices = (*notices, f"the source has no {CONFIG}, so none is written; engines need one")
    if notice := recipe.layout.readers[recipe.scheme].notice:
        notices = (*notices, notice)
    home = _groups(inventory.views, decisions, recipe, family)
    tensor_tasks = {v.name: TensorTask(v, group.id if (group := home.get(v.name)) else None) for v in inventory.views}
    reasons = {name: decision.reason for name, decision in decisions.items()}
    roles = {name: decision.role for name, decision in decisions.items()}
    return assemble_plan(inventory, recipe, tensor_tasks, home, reasons, notices, budget, threads, roles=roles)


def _why_nothing(recipe: Recipe, family: Family, decisions: Mapping[str, Decision]) -> str:
    """Return the most specific reasons, and the option to change."""
    reasons = sorted({d.reason for d in decisions.values() if d.reason != "not a linear projection"})[:3]
    because = f" ({'; '.join(reasons)})" if reasons else ""
    if recipe.select:
        return f"check the --select patterns{because}"
    return f"name weights with --select, and add --force-select for those that engines load unquantized{because}"


def with_split_stacks(inventory: Inventory, recipe: Recipe) -> Inventory:
    """Return an inventory whose stacks of experts are split, except those that a recipe leaves unquantized."""
    return split_stacks(inventory, lambda name: keep_stack(name, recipe), lambda name: _is_named(name, recipe))


def keep_stack(name: str, recipe: Recipe) -> bool:
    """Return True if the recipe leaves a stack of experts unquantized: it is then copied as one tensor."""
    if any(re.search(pattern, name) for pattern in recipe.ignore):
        return True
    return bool(recipe.select) and not _is_named(name, recipe)


def _is_named(name: str, recipe: Recipe) -> bool:
    """Return True if an option names a tensor to quantize."""
    return any(re.search(pattern, name) for pattern in (*recipe.select, *recipe.also_select))


def refuse_unloadable(recipe: Recipe, family: Family, decisions: Mapping[str, Decision]) -> None:
    """Raise RecipeError if no engine loads the layout for routed experts and some of them would be quantized."""
    refusal = recipe.layout.readers[recipe.scheme].no_routed_experts
    if refusal and any(decision.quantize and family.is_routed(name) for name, decision in decisions.items()):
        raise RecipeError(refusal)


def _groups(
    views: Iterable[TensorView], decisions: Mapping[str, Decision], recipe: Recipe, family: Family
) -> dict[str, ScaleGroup]:
    """Return the scale group of every tensor to quantize: the tensors that engines fuse, or the tensor alone."""
    chosen = [v for v in views if decisions[v.name].quantize]
    if not recipe.share_scales:
        return {v.name: ScaleGroup(v.name, (v,), family.fused_module_of(v.name)) for v in chosen}
    members: defaultdict[str, list[TensorView]] = defaultdict(list)
    for v in chosen:
        members[family.fused_matrix_of(v.name)].append(v)
    home: dict[str, ScaleGroup] = {}
    for name, group in members.items():
        value = ScaleGroup(name, tuple(group), family.fused_module_of(group[0].name))
        for v in group:
            home[v.name] = value
    return home
