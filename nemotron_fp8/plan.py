"""Inventory, recipe and byte budget to a plan: every decision of a conversion, and not one byte of a tensor.

A plan says which tensors become FP8, what every output file is called and where every tensor begins in it, the
slices each tensor is worked in, and the bytes of all buffers. Everything after it only carries it out.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.config import kept_modules, quantization_config, render_config, render_index
from nemotron_fp8.errors import AlreadyQuantizedError, BudgetError, NothingSelectedError
from nemotron_fp8.layouts import outputs
from nemotron_fp8.rules import bundle_of, decide
from nemotron_fp8.source import CONFIG, INDEX
from nemotron_fp8.unit import ScaleGroup, Unit, Work, layout_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.header import Header
    from nemotron_fp8.recipe import Recipe
    from nemotron_fp8.rules import Decision
    from nemotron_fp8.source import Inventory
    from nemotron_fp8.unit import Receipt
    from nemotron_fp8.view import TensorView

MIN_SLICE_ELEMENTS = 1 << 16
"""Smaller slices cost more in calls than in work."""
MAX_SLICE_BYTES = 32 << 20
"""Larger slices gain nothing."""
SCRATCH_BYTES = 1 << 20
"""Bytes of float32 scratch that a cast takes beside its slice, for each worker."""
BUDGET_SHARE = 4
"""Slices take at most this part of the budget: what is resident beside them (headers, the allocator) has the rest."""
COPY_BYTES = 1 << 22
"""Bytes of a slice of a tensor that is copied as it is."""


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
        shards = sum(unit.layout.file_size for unit in self.units)
        side = sum(file.size for file in self.inventory.side_files)
        return shards + side + sum(map(len, self.documents({}).values()))

    def documents(self, receipts: Mapping[str, Receipt]) -> dict[str, bytes]:
        """Return the files that are written anew beside the shards, by name.

        A shard without a receipt is taken to be as planned.
        """
        kept = frozenset().union(*(receipt.kept for receipt in receipts.values()))
        headers = {unit.name: unit.relayout(kept) for unit in self.units}
        files: dict[str, bytes] = {}
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
    workers, share = _share(inventory.views, decisions, budget, threads)
    groups = _groups(inventory.views, decisions)
    units = tuple(
        _unit(shard.name, shard.metadata, shard.views, groups, recipe, workers, share) for shard in inventory.shards
    )
    tensors = tuple(
        _tensor(v, shard.name, decisions[v.name], recipe) for shard in inventory.shards for v in shard.views
    )
    if inventory.config is None:
        notices = (*notices, f"no {CONFIG} in the source: none is written, and engines need one")
    buffer_bytes = workers * (SCRATCH_BYTES + max(_slice_cost(w) for u in units for w in u.works))
    return Plan(inventory, recipe, units, tensors, notices, buffer_bytes)


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


def _groups(views: Iterable[TensorView], decisions: Mapping[str, Decision]) -> dict[str, list[ScaleGroup]]:
    """Scale groups by bundle; every tensor is a group of its own."""
    bundles: defaultdict[str, list[ScaleGroup]] = defaultdict(list)
    for v in views:
        if decisions[v.name].quantise:
            bundle = bundle_of(v.name)
            bundles[bundle].append(ScaleGroup(v.name, (v,), bundle))
    return bundles


def _share(
    views: Iterable[TensorView], decisions: Mapping[str, Decision], budget: int, threads: int
) -> tuple[int, int]:
    """Return the number of workers and the bytes that each has for a slice, input and output together."""
    worst, needed = "", 0
    for v in views:
        need = SCRATCH_BYTES + _least(v, decisions[v.name].quantise)
        if need > needed:
            worst, needed = v.name, need
    if needed > budget:
        raise BudgetError(worst, needed, budget)
    workers = max(1, min(threads, budget // needed))
    return workers, max(budget // workers // BUDGET_SHARE, needed) - SCRATCH_BYTES


def _least(v: TensorView, quantise: bool) -> int:
    """Bytes of the smallest slice of a tensor, input and output together."""
    if not quantise:
        return min(v.nbytes, MIN_SLICE_ELEMENTS)
    return min(v.numel, MIN_SLICE_ELEMENTS) * (v.itemsize + 1)


def _slice_cost(work: Work) -> int:
    """Bytes of one slice of a tensor as planned, input and output together."""
    size = min(work.slice_bytes, work.view.nbytes)
    return size + size // work.view.itemsize if work.group is not None else size


def _unit(
    name: str,
    metadata: tuple[tuple[str, str], ...] | None,
    views: tuple[TensorView, ...],
    bundles: Mapping[str, list[ScaleGroup]],
    recipe: Recipe,
    workers: int,
    share: int,
) -> Unit:
    own = {v.name for v in views}
    groups: dict[str, ScaleGroup] = {}
    home: dict[str, str] = {}
    for v in views:
        bundle = bundles.get(bundle_of(v.name), ())
        for group in bundle:
            mine = any(member.name in own for member in group.members)
            # With nonfinite="keep" the fate of a tensor hangs on its whole bundle, wherever the rest of it lies.
            if mine or recipe.nonfinite == "keep":
                groups[group.id] = group
            home.update((member.name, group.id) for member in group.members)
    works = tuple(Work(v, home.get(v.name), _slice_bytes(v, v.name in home, share)) for v in views)
    layout: Header = layout_of([(w.view, w.group is not None) for w in works], metadata, recipe)
    return Unit(name, metadata, works, tuple(groups.values()), layout, recipe, workers)


def _slice_bytes(v: TensorView, quantise: bool, share: int) -> int:
    """Bytes of input in one slice, within a worker's share."""
    if not quantise:
        return max(1, min(share, COPY_BYTES))
    elements = min(share // (v.itemsize + 1), MAX_SLICE_BYTES // v.itemsize)
    return max(elements // 64 * 64, 1) * v.itemsize


def _tensor(v: TensorView, shard: str, decision: Decision, recipe: Recipe) -> TensorPlan:
    from nemotron_fp8.dtypes import nbytes

    out = sum(nbytes(o.dtype, o.shape) for o in outputs(v, decision.quantise, recipe))
    return TensorPlan(v.name, shard, v.dtype, v.shape, decision.quantise, decision.reason, v.nbytes, out)
