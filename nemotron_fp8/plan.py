"""Inventory, recipe and byte budget to a plan: every decision of a conversion, and not one byte of a tensor.

A plan says which tensors become FP8, what every output file is called and where every tensor begins in it,
the slices each tensor is worked in, and the bytes of all buffers. Everything after it only carries it out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._utils import collection_paused
from nemotron_fp8.card import figures_of, render_card
from nemotron_fp8.config import kept_modules, render_config, render_index
from nemotron_fp8.dtypes import nbytes
from nemotron_fp8.errors import AlreadyQuantizedError, BudgetError, NothingSelectedError, RecipeError
from nemotron_fp8.experts import split_stacks
from nemotron_fp8.families import family_of
from nemotron_fp8.figures import TensorStats, render_figures
from nemotron_fp8.layouts import quantization_config
from nemotron_fp8.rules import ROUTED, bundle_of, decide, merged_into
from nemotron_fp8.source import CARD, CONFIG, INDEX, STATS
from nemotron_fp8.unit import ScaleGroup, Slicing, Unit, Work, layout_of, least, outputs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.recipe import Recipe
    from nemotron_fp8.rules import Decision
    from nemotron_fp8.source import Inventory, Shard
    from nemotron_fp8.unit import Receipt
    from nemotron_fp8.view import TensorView


SCRATCH_BYTES = 1 << 20
"""Bytes of float32 scratch that a cast takes beside its slice, for each worker."""
STATS_BYTES = 48 << 18
"""Bytes that measuring the errors of one cell of `nemotron_fp8.stats.GRID` elements takes, for each worker."""
BUDGET_SHARE = 4
"""Slices take one part in so many of the budget: what is resident beside them has the rest."""

WEIGHT_ONLY_BLOCKS = (
    "vLLM 0.32 refuses granularity 'block' with activations 'none', transformers reads it;"
    " for vLLM use granularity 'channel'"
)
"""What a run of both showed."""


class TensorPlan(NamedTuple):
    """What becomes of one tensor.

    Attributes:
        name, shard, dtype, shape: of the input.
        quantise: whether it becomes FP8.
        reason: why, or why not.
        bytes_in: its bytes in the source.
        bytes_out: its bytes in the result, its scale included.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    quantise: bool
    reason: str
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision of a conversion.

    Attributes:
        inventory: what the source holds.
        recipe: what was asked for.
        units: one for each output shard.
        tensors: what becomes of every tensor.
        notices: what a person should know.
        buffer_bytes: bytes of all working buffers together, at most the budget.
        task: what is done where it is not quantising, as the manifest names it.
    """

    inventory: Inventory
    recipe: Recipe
    units: tuple[Unit, ...]
    tensors: tuple[TensorPlan, ...]
    notices: tuple[str, ...]
    buffer_bytes: int
    task: tuple[tuple[str, str], ...] = ()

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for, as journal and manifest hold it: the fields of the recipe, or the task."""
        return dict(self.task) or self.recipe.model_dump(mode="json")

    @property
    def bytes_in(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(t.bytes_in for t in self.tensors)

    @property
    def bytes_out(self) -> int:
        """Bytes of all tensors of the result, scales included."""
        return sum(t.bytes_out for t in self.tensors)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files of the result."""
        from nemotron_fp8.manifest import planned_sizes

        return sum(planned_sizes(self).values())

    def documents(self, receipts: Mapping[str, Receipt]) -> dict[str, bytes]:
        """Return the files that are written anew beside the shards, by name.

        A shard without a receipt is taken to be as planned.
        """
        kept = frozenset().union(*(receipt.kept for receipt in receipts.values()))
        headers = {unit.name: unit.relayout(kept) for unit in self.units}
        files = dict(self.inventory.made)
        if self.inventory.index_metadata is not None:
            files[INDEX] = render_index(headers, self.inventory.index_metadata)
        if self.inventory.config is not None:
            quantised = self.quantised(kept)
            modules = kept_modules(self.inventory.views, quantised, self.recipe)
            quantization = quantization_config(self.recipe, modules) if quantised else None
            files[CONFIG] = render_config(self.inventory.config, quantization)
        if self.recipe.stats and not self.task:
            figures = figures_of(receipts)
            files[STATS] = render_figures(figures.tensors or self._no_figures(), figures.nonfinite)
        files[CARD] = render_card(self, receipts, sum(header.data_size for header in headers.values()))
        return files

    def _no_figures(self) -> list[TensorStats]:
        """What stands for figures that are not taken yet, and takes about as many bytes."""
        quantised = self.quantised()
        return [TensorStats(t.name, 1 / 3 + 32, 1e-3 / 3, 0, 0) for t in self.tensors if t.name in quantised]

    def quantised(self, kept: frozenset[str] = frozenset()) -> frozenset[str]:
        """Names of the tensors that become FP8 when the bundles in ``kept`` stay as they are."""
        return frozenset(work.view.name for unit in self.units for work in unit.keeping(kept) if work.group is not None)


@collection_paused()
def make_plan(inventory: Inventory, recipe: Recipe, budget: int, threads: int) -> Plan:
    """Decide everything about a conversion to FP8.

    Args:
        inventory: what the source holds.
        recipe: what to quantise and how.
        budget: bytes that all working buffers together may take.
        threads: workers wanted; fewer are planned where the budget has no room for more.

    Raises:
        AlreadyQuantizedError: the source holds FP8 weights or says so in its config.
        NothingSelectedError: no tensor would be quantised.
        RecipeError: no engine loads this layout for this kind of model.
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    refuse_quantised(inventory)
    inventory = split_stacks(inventory, lambda name: _stays_stacked(name, recipe))
    family = family_of(inventory.config)
    decisions, notices = decide(inventory.views, recipe, family)
    if not any(decision.quantise for decision in decisions.values()):
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
    works = {v.name: Work(v, group.id if (group := home.get(v.name)) else None) for v in inventory.views}
    reasons = {name: decision.reason for name, decision in decisions.items()}
    return assemble_plan(inventory, recipe, works, home, reasons, notices, budget, threads)


def assemble_plan(
    inventory: Inventory,
    recipe: Recipe,
    works: Mapping[str, Work],
    home: Mapping[str, ScaleGroup],
    reasons: Mapping[str, str],
    notices: tuple[str, ...],
    budget: int,
    threads: int,
    task: tuple[tuple[str, str], ...] = (),
) -> Plan:
    """Put a plan together: what is done to every tensor is decided, the rest follows.

    Args:
        inventory: what the source holds.
        recipe: what to quantise and how, where anything is.
        works: what is done, by tensor name; a tensor without an entry is dropped.
        home: the scale group of every tensor to be quantised.
        reasons: why, by tensor name.
        notices: what a person should know; those of the inventory come first.
        budget: bytes that all working buffers together may take.
        threads: workers wanted.
        task: what is done where it is not quantising.

    Raises:
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    kinds = {_kind(work): work for work in works.values()}
    slicing = _slicing(kinds.values(), recipe, budget, inventory.opener_bytes, threads)
    bundles: defaultdict[str, dict[str, ScaleGroup]] = defaultdict(dict)
    for group in home.values():
        bundles[group.bundle][group.id] = group
    units = tuple(_unit(shard, works, home, bundles, recipe, slicing) for shard in inventory.shards)
    sizes = {kind: _bytes_out(work, recipe) for kind, work in kinds.items()}
    tensors = tuple(
        _tensor(shard.name, works.get(v.name), v, reasons[v.name], sizes)
        for shard in inventory.shards
        for v in shard.views
    )
    worst = max((slicing.cost(work) for work in kinds.values()), default=0)
    buffer_bytes = inventory.opener_bytes + slicing.workers * (scratch_bytes(recipe) + worst)
    return Plan(inventory, recipe, units, tensors, (*inventory.notices, *notices), buffer_bytes, task)


def refuse_quantised(inventory: Inventory) -> None:
    """Raise AlreadyQuantizedError where the config or the tensors show that a source is quantised."""
    quantization = (inventory.config or {}).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise AlreadyQuantizedError(inventory.source, f"{CONFIG} has a quantization_config, quant_method {method!r}")
    names = {v.name for v in inventory.views}
    for v in inventory.views:
        if v.dtype.startswith("F8_E") and v.name.endswith(".weight") and v.dtype != "F8_E8M0":
            raise AlreadyQuantizedError(inventory.source, f"tensor {v.name} is {v.dtype}")
        for suffix in ("_scale", "_scale_inv"):
            if v.name.endswith(f".weight{suffix}") and v.name.removesuffix(suffix) in names:
                raise AlreadyQuantizedError(inventory.source, f"tensor {v.name} is a scale")


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
    routed = any(decision.quantise and ROUTED.search(name) for name, decision in decisions.items())
    tensor = recipe.format == "compressed-tensors" and recipe.granularity == "tensor"
    if routed and tensor and recipe.activations == "dynamic":
        raise RecipeError(
            "format 'compressed-tensors' with granularity 'tensor' does not load in vLLM for routed experts;"
            " use granularity 'channel', or format 'fp8'"
        )


def _groups(views: Iterable[TensorView], decisions: Mapping[str, Decision], recipe: Recipe) -> dict[str, ScaleGroup]:
    """The scale group of every tensor to be quantised: what an engine merges where scales are shared, else itself."""
    members: defaultdict[str, list[TensorView]] = defaultdict(list)
    for v in views:
        if decisions[v.name].quantise:
            members[merged_into(v.name) if recipe.share_scales else v.name].append(v)
    home: dict[str, ScaleGroup] = {}
    for name, group in members.items():
        value = ScaleGroup(name, tuple(group), bundle_of(group[0].name))
        home.update((v.name, value) for v in group)
    return home


def scratch_bytes(recipe: Recipe) -> int:
    """Bytes that a worker takes beside its slice; errors are not measured while a slice is cast."""
    return max(SCRATCH_BYTES, STATS_BYTES if recipe.stats else 0)


def _slicing(works: Iterable[Work], recipe: Recipe, budget: int, held: int, threads: int) -> Slicing:
    """Divide the budget, less what the opener holds, among workers, as many of those wanted as it has room for."""
    worst, needed = "", 0
    for work in works:
        need = scratch_bytes(recipe) + least(work, recipe.granularity)
        if need > needed:
            worst, needed = work.view.name, need
    if held + needed > budget:
        raise BudgetError(worst, held + needed, budget)
    budget -= held
    workers = max(1, min(threads, budget // max(needed, 1)))
    share = max(budget // workers // BUDGET_SHARE, needed) - scratch_bytes(recipe)
    return Slicing(workers, max(share, 1), recipe.granularity)


def _unit(
    shard: Shard,
    works: Mapping[str, Work],
    home: Mapping[str, ScaleGroup],
    bundles: Mapping[str, Mapping[str, ScaleGroup]],
    recipe: Recipe,
    slicing: Slicing,
) -> Unit:
    groups = {group.id: group for v in shard.views if (group := home.get(v.name))}
    if recipe.nonfinite == "keep":
        # The fate of a tensor then hangs on its whole bundle, wherever the rest of it lies.
        for bundle in dict.fromkeys(group.bundle for group in groups.values()):
            groups.update(bundles[bundle])
    mine = tuple(works[v.name] for v in shard.views if v.name in works)
    layout = layout_of(mine, shard.metadata, recipe)
    return Unit(shard.name, shard.metadata, mine, tuple(groups.values()), layout, recipe, slicing)


def _kind(work: Work) -> tuple[object, ...]:
    """What the figures of a tensor follow from: a checkpoint of 100,000 tensors has a few dozen kinds."""
    return (
        work.view.dtype,
        work.view.shape,
        work.group is None,
        work.decode and (work.decode.granularity, work.decode.dtype),
    )


def _bytes_out(work: Work, recipe: Recipe) -> int:
    return sum(nbytes(o.dtype, o.shape) for o in outputs_of(work, recipe))


def _tensor(
    shard: str, work: Work | None, v: TensorView, reason: str, sizes: Mapping[tuple[object, ...], int]
) -> TensorPlan:
    out = sizes[_kind(work)] if work else 0
    quantise = work is not None and work.group is not None
    return TensorPlan(v.name, shard, v.dtype, v.shape, quantise, reason, v.nbytes, out)
