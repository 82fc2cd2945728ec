"""Inventory, recipe and byte budget to a plan: every decision of a conversion, and not one byte of a tensor.

A plan says which tensors become FP8, what every output file is called and where every tensor begins in it,
the slices each tensor is worked in, and the bytes of all buffers. Everything after it only carries it out.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.config import kept_modules, quantization_config, render_config, render_index
from nemotron_fp8.dtypes import nbytes
from nemotron_fp8.errors import AlreadyQuantizedError, BudgetError, NothingSelectedError
from nemotron_fp8.layouts import outputs
from nemotron_fp8.rules import bundle_of, decide
from nemotron_fp8.source import CONFIG, INDEX
from nemotron_fp8.unit import ScaleGroup, Slicing, Unit, Work, layout_of, least

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.recipe import Recipe
    from nemotron_fp8.rules import Decision
    from nemotron_fp8.source import Inventory, Shard
    from nemotron_fp8.unit import Receipt
    from nemotron_fp8.view import TensorView

SCRATCH_BYTES = 1 << 20
"""Bytes of float32 scratch that a cast takes beside its slice, for each worker."""
BUDGET_SHARE = 4
"""Slices take one part in so many of the budget: what is resident beside them has the rest."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
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
    """

    inventory: Inventory
    recipe: Recipe
    units: tuple[Unit, ...]
    tensors: tuple[TensorPlan, ...]
    notices: tuple[str, ...]
    buffer_bytes: int

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
            modules = kept_modules(self.inventory.views, self.quantised(kept))
            files[CONFIG] = render_config(self.inventory.config, quantization_config(self.recipe, modules))
        return files

    def quantised(self, kept: frozenset[str] = frozenset()) -> frozenset[str]:
        """Names of the tensors that become FP8 when the bundles in ``kept`` stay as they are."""
        return frozenset(
            member.name
            for unit in self.units
            for group in unit.groups
            if group.bundle not in kept
            for member in group.members
        )


def make_plan(inventory: Inventory, recipe: Recipe, budget: int, threads: int) -> Plan:
    """Decide everything about a conversion.

    Args:
        inventory: what the source holds.
        recipe: what to quantise and how.
        budget: bytes that all working buffers together may take.
        threads: workers wanted; fewer are planned where the budget has no room for more.

    Raises:
        AlreadyQuantizedError: the source holds FP8 weights or says so in its config.
        NothingSelectedError: no tensor would be quantised.
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    refuse_quantised(inventory)
    decisions, notices = decide(inventory.views, recipe)
    if not any(decision.quantise for decision in decisions.values()):
        raise NothingSelectedError(inventory.source, len(decisions), _why_nothing(recipe, decisions))
    slicing = _slicing(inventory.views, decisions, budget, threads)
    home = _groups(inventory.views, decisions)
    bundles: defaultdict[str, list[ScaleGroup]] = defaultdict(list)
    for group in home.values():
        bundles[group.bundle].append(group)
    units = tuple(_unit(shard, home, bundles, recipe, slicing) for shard in inventory.shards)
    tensors = tuple(
        _tensor(v, shard.name, decisions[v.name], recipe) for shard in inventory.shards for v in shard.views
    )
    notices = (*inventory.notices, *notices)
    if inventory.config is None:
        notices = (*notices, f"no {CONFIG} in the source: none is written, and engines need one")
    worst = max(slicing.cost(v, decisions[v.name].quantise) for v in inventory.views)
    buffer_bytes = slicing.workers * (SCRATCH_BYTES + worst)
    return Plan(inventory, recipe, units, tensors, notices, buffer_bytes)


def refuse_quantised(inventory: Inventory) -> None:
    """Raise AlreadyQuantizedError where the config or the tensors show that a source is quantised."""
    quantization = (inventory.config or {}).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise AlreadyQuantizedError(
            inventory.source, f"{CONFIG} has a quantization_config, quant_method {method!r}"
        )
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


def _groups(views: Iterable[TensorView], decisions: Mapping[str, Decision]) -> dict[str, ScaleGroup]:
    """The scale group of every tensor to be quantised; every tensor is a group of its own."""
    return {v.name: ScaleGroup(v.name, (v,), bundle_of(v.name)) for v in views if decisions[v.name].quantise}


def _slicing(
    views: Iterable[TensorView], decisions: Mapping[str, Decision], budget: int, threads: int
) -> Slicing:
    """Divide the budget among workers, as many of those wanted as it has room for."""
    worst, needed = "", 0
    for v in views:
        need = SCRATCH_BYTES + least(v, decisions[v.name].quantise)
        if need > needed:
            worst, needed = v.name, need
    if needed > budget:
        raise BudgetError(worst, needed, budget)
    workers = max(1, min(threads, budget // needed))
    return Slicing(workers, max(budget // workers // BUDGET_SHARE, needed) - SCRATCH_BYTES)


def _unit(
    shard: Shard,
    home: Mapping[str, ScaleGroup],
    bundles: Mapping[str, list[ScaleGroup]],
    recipe: Recipe,
    slicing: Slicing,
) -> Unit:
    groups = {group.id: group for v in shard.views if (group := home.get(v.name))}
    if recipe.nonfinite == "keep":
        # The fate of a tensor then hangs on its whole bundle, wherever the rest of it lies.
        for bundle in {group.bundle for group in groups.values()}:
            groups.update((group.id, group) for group in bundles[bundle])
    works = tuple(Work(v, group.id if (group := home.get(v.name)) else None) for v in shard.views)
    layout = layout_of([(w.view, w.group is not None) for w in works], shard.metadata, recipe)
    return Unit(shard.name, shard.metadata, works, tuple(groups.values()), layout, recipe, slicing)


def _tensor(v: TensorView, shard: str, decision: Decision, recipe: Recipe) -> TensorPlan:
    out = sum(nbytes(o.dtype, o.shape) for o in outputs(v, decision.quantise, recipe))
    return TensorPlan(v.name, shard, v.dtype, v.shape, decision.quantise, decision.reason, v.nbytes, out)
