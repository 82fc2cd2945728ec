"""Plan a conversion to FP8."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8._utils import listed
from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.checkpoint.stated_quantization import last_name
from nemotron_fp8.errors import LayoutError, NothingSelectedError, RecipeError
from nemotron_fp8.planning.carried_codes import may_keep_codes
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.kv_cache import CACHE_SCALES, has_cache_scales, kv_cache_notice
from nemotron_fp8.planning.linear_share import option_for
from nemotron_fp8.planning.plan import Plan, assemble_plan, refuse_quantized
from nemotron_fp8.planning.quantized_source import check_recipe, quantized_source
from nemotron_fp8.planning.selection import FUSED_WITH, TRANSPOSED, UNKNOWN, check_patterns, decide
from nemotron_fp8.planning.stacked_experts import experts_of, single_experts, split_stacks
from nemotron_fp8.planning.stored_scales import stored_scales
from nemotron_fp8.planning.tasks import ScaleGroup, TensorTask

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.quantized_source import QuantizedSource
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.planning.selection import Decision
    from nemotron_fp8.planning.stored_scales import StoredScales


REASONS_SHOWN = 3
"""Most reasons in the error of a plan without FP8."""


def make_plan(
    inventory: Inventory,
    recipe: Recipe,
    budget: int,
    threads: int,
    requantize: bool = True,
    amaxes: Amaxes | None = None,
) -> Plan:
    """Plan a conversion to FP8.

    Args:
        inventory: contents of the source.
        recipe: settings of the quantization.
        budget: bytes that all working buffers together may take.
        threads: requested number of workers; the plan has fewer if the budget is too small for all.
        requantize: False to refuse a source of FP8 or MXFP4 weights.
        amaxes: amaxes of a calibration, for static scales of activations and scales of an FP8 cache.

    Raises:
        MissingAmaxError, OtherAmaxesError: the amaxes do not fit the source.
        AlreadyQuantizedError: the source is quantized to a format that is not read, or its config states a
            quantization that its tensors do not show.
        NothingSelectedError: no tensor would be quantized.
        LayoutError: an FP8 tensor of the source has no scale, or one whose shape fits no known layout; or a stack of
            packed experts cannot be quantized.
        RecipeError: no engine loads this layout for this kind of model, or the recipe needs an unquantized source.
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    source = quantized_source(inventory) if requantize else None
    if source is None:
        refuse_quantized(inventory)
    else:
        check_recipe(recipe)
        inventory, recipe = source.inventory, source.recipe_for(recipe, amaxes)
    family = family_of(inventory.config)
    if refusal := family.refusals.get(recipe.format):
        raise RecipeError(refusal, ("format",))
    _check_patterns(inventory, recipe)
    experts = single_experts(inventory) if amaxes is not None else []
    inventory, decisions, notices = decide_all(inventory, recipe, family)
    _refuse_packed_stacks(inventory, decisions)
    chosen = [name for name, decision in decisions.items() if decision.quantize]
    if not chosen:
        raise NothingSelectedError(inventory.source, len(decisions), _why_nothing(inventory, recipe, decisions))
    refuse_unloadable(recipe, family, decisions)
    _check_amaxes(recipe, amaxes)
    if source is not None:
        inventory = replace(inventory, config=source.config_for(chosen))
        notices = (*notices, *source.notices(recipe))
    if inventory.config is None:
        notices = (*notices, f"the source has no {CONFIG}, so none is written; engines need one")
    calibrated = amaxes is not None or has_cache_scales(decisions)
    notices = (*notices, *recipe_notices(recipe, inventory.config, calibrated))
    stored = stored_scales(recipe, amaxes, inventory.views, chosen, inventory.config, inventory.source, experts)
    notices = (*notices, *stored.notices)
    home = _groups(inventory.views, decisions, recipe, family)
    reasons = {name: decision.reason for name, decision in decisions.items()}
    tensor_tasks = {
        v.name: replace(_task(v, home.get(v.name), recipe, source), stored_scales=stored.beside.get(v.name, ()))
        for v in inventory.views
    }
    for name in source.dropped if source is not None else ():
        del tensor_tasks[name]
        reasons[name] = "a scale of activations"
    for name in replaced_scales(tensor_tasks, stored):
        del tensor_tasks[name]
        reasons[name] = "a scale of the KV cache, in place of which that of the calibration is stored"
    assert stored.beside.keys() <= tensor_tasks.keys()  # a scale beside a dropped tensor would be lost
    roles = {name: decision.role for name, decision in decisions.items()}
    forced = frozenset(name for name, decision in decisions.items() if decision.quantize and decision.forced)
    return assemble_plan(
        inventory,
        recipe,
        tensor_tasks,
        home,
        reasons,
        notices,
        budget,
        threads,
        roles=roles,
        forced=forced,
        amaxes=amaxes,
    )


def _check_amaxes(recipe: Recipe, amaxes: Amaxes | None) -> None:
    """Raise RecipeError if a recipe needs amaxes and has none, or has amaxes and does not use them."""
    needs = recipe.needs_amaxes
    if needs and amaxes is None:
        value = getattr(recipe, needs)
        raise RecipeError(
            f"{needs} {value!r} in format {recipe.format!r} needs the amaxes of a calibration; pass the file that"
            " nemotron-fp8 calibrate writes as amaxes (--amaxes), or calibrate in the same run (--calibrate)",
            (needs,),
        )
    if amaxes is not None and recipe.activations != "static" and recipe.kv_cache == "none":
        raise RecipeError(
            "amaxes (--amaxes, --calibrate) are given, and nothing uses them; use activations 'static'"
            " (--activations static) or kv_cache 'fp8' (--kv-cache fp8)",
            ("amaxes",),
        )


def replaced_scales(names: Iterable[str], stored: StoredScales) -> list[str]:
    """Return the scales of the cache in a source, if the result stores scales of its own."""
    if all(scale.of_codes for scale in stored.all.values()):
        return []
    return [name for name in names if last_name(name) in CACHE_SCALES]


def _task(view: TensorView, group: ScaleGroup | None, recipe: Recipe, source: QuantizedSource | None) -> TensorTask:
    """Return the task of a tensor."""
    if group is not None:
        carry = len(group.members) == 1 and may_keep_codes(view, recipe.weight_format.numbers)
        return TensorTask(view, group.id, carry=carry)
    if view.encoding is None or source is None:
        return TensorTask(view)
    return TensorTask(view, decode=source.dtype)


def _refuse_packed_stacks(inventory: Inventory, decisions: Mapping[str, Decision]) -> None:
    """Raise LayoutError for a stack of packed experts that would have to be dequantized as a stack."""
    for view in inventory.views:
        if view.encoding is not None and view.encoding.packed and len(view.shape) != 2:
            problem = f"a stack of experts in MXFP4, which cannot stay packed: {decisions[view.name].reason}"
            raise LayoutError(view.name, f"{problem}; use a granularity that takes it (--granularity channel)")


def recipe_notices(recipe: Recipe, config: Mapping[str, Any] | None, calibrated: bool = False) -> tuple[str, ...]:
    """Return what to know of the layout of a recipe, of its scales, and of the cache that it declares.

    Args:
        recipe: settings of the quantization.
        config: config.json; None without one.
        calibrated: True if the result has scales of its cache.
    """
    cache = "" if calibrated else kv_cache_notice(recipe, config)
    found = (recipe.layout.readers[recipe.scheme].notice, _scale_notice(recipe), cache)
    return tuple(notice for notice in found if notice)


def _scale_notice(recipe: Recipe) -> str:
    """Return what to know of scales of blocks other than the default; empty for the default."""
    if recipe.granularity != "block":
        return ""
    if recipe.scale_rounding == "none":
        return (
            "scale_rounding 'none': with DeepGEMM, vLLM (Hopper, Blackwell) and SGLang (Blackwell) round the scales of"
            " blocks to powers of two and cast the weights a second time, with 1.4 times the error of 'power-of-two'"
        )
    if recipe.scale_dtype == "e8m0":
        return (
            "scales of 'e8m0': the kernels of transformers for GPUs without DeepGEMM read float32 scales only; other"
            " engines, and transformers on CPUs, convert the scales"
        )
    return ""


def decide_all(
    inventory: Inventory, recipe: Recipe, family: Family
) -> tuple[Inventory, dict[str, Decision], tuple[str, ...]]:
    """Decide which tensors are quantized, and split the stacks of the experts among them.

    A stack whose experts are left unquantized stays as it is: engines load it under its own name.

    Returns:
        The inventory with single experts, the decision for every tensor, by name, and notices for the user.

    Raises:
        StackedExpertsError: a pattern names a stack that cannot be split.
    """
    split = _with_split_stacks(inventory, recipe)
    decisions, notices = decide(split.views, recipe, family, inventory.config)
    homes = {stack.name: experts_of(stack.name, family)[0] for stack in split.stacks}
    taken: set[str] = set()
    why: dict[str, str] = {}
    for name, decision in decisions.items() if homes else ():
        if family.is_routed(name):
            home = family.fused_module_of(name)
            why.setdefault(home, decision.reason)
            if decision.quantize:
                taken.add(home)
    whole = {stack: why.get(home, "") for stack, home in homes.items() if home not in taken}
    if whole:
        split = _with_split_stacks(inventory, recipe, whole)
        decisions, more = decide(split.views, recipe, family, inventory.config, whole)
        notices = tuple(dict.fromkeys((*notices, *more)))
    return split, decisions, notices


def _with_split_stacks(inventory: Inventory, recipe: Recipe, whole: Container[str] = ()) -> Inventory:
    """Return an inventory whose stacks of experts are split, except those that a recipe leaves unquantized."""
    return split_stacks(
        inventory,
        lambda name: name in whole or keep_stack(name, recipe),
        lambda name: _is_named(name, recipe),
    )


def _check_patterns(inventory: Inventory, recipe: Recipe) -> None:
    """Raise RecipeError for a pattern that matches neither a tensor of the source nor an expert of a stack."""
    if recipe.select or recipe.also_select or recipe.ignore:
        names = [*(view.name for view in inventory.views), *single_experts(inventory)]
        check_patterns(names, recipe)


def _why_nothing(inventory: Inventory, recipe: Recipe, decisions: Mapping[str, Decision]) -> str:
    """Return the reasons why the largest weights stay, and the option to change."""
    largest: defaultdict[str, int] = defaultdict(int)
    matrices = any(decision.role != "other" for decision in decisions.values())
    for view in inventory.views:
        decision = decisions[view.name]
        if decision.role != "other" or not matrices:
            largest[decision.reason] += view.nbytes
    reasons = sorted(largest, key=lambda reason: -largest[reason])[:REASONS_SHOWN]
    because = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{_advice(inventory, recipe, decisions)}{because}"


def _advice(inventory: Inventory, recipe: Recipe, decisions: Mapping[str, Decision]) -> str:
    """Return the option that makes weights FP8."""
    found = {decision.reason for decision in decisions.values() if decision.role != "other"}
    unknown = [view.name for view in inventory.views if decisions[view.name].reason == UNKNOWN]
    if unknown:
        return f"to take weights with unknown names: --also-select {option_for(unknown)}"
    family = family_of(inventory.config)
    fused = next((name for name, decision in decisions.items() if decision.reason.startswith(FUSED_WITH)), None)
    if recipe.select and fused is not None:
        module = family.fused_module_of(fused)
        parts = {
            name.removesuffix(".weight").rpartition(".")[2]: None for name in decisions if _is_in(name, module, family)
        }
        return f"engines fuse {listed(list(parts))}: select all of them, or none"
    if recipe.select:
        return "check the --select patterns"
    if any("does not divide into blocks" in reason for reason in found):
        return "use format 'compressed-tensors' with granularity 'channel' (--granularity channel)"
    if found == {TRANSPOSED}:
        return "save the checkpoint with Linear layers"
    return "name weights with --select, and add --force-select for those that engines load unquantized"


def _is_in(name: str, module: str, family: Family) -> bool:
    return name.endswith(".weight") and family.fused_module_of(name) == module


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
