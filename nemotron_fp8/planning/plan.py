"""Inventory, recipe and byte budget to a plan: every decision of a conversion, and not one byte of a tensor.

A plan says which tensors become FP8, what every output file is called and where every tensor begins in it,
the slices each tensor is worked in, and the bytes of all buffers. Everything after it only carries it out.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8.checkpoint.dtypes import nbytes
from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.errors import AlreadyQuantizedError, BudgetError
from nemotron_fp8.planning.tasks import ScaleGroup, Slicing, Unit, Work, layout_of, least, outputs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory, Shard
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.recipe import Recipe


SCRATCH_BYTES = 1 << 20
"""Bytes of float32 scratch that a cast takes beside its slice, for each worker."""
STATS_BYTES = 48 << 18
"""Bytes that measuring the errors of one cell of `nemotron_fp8.engines.error_stats.GRID` elements takes, for each worker."""
BUDGET_SHARE = 4
"""Slices take one part in so many of the budget: what is resident beside them has the rest."""


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
        disk_bytes: bytes of all files of the result; `nemotron_fp8.plan_repo` fills it in.
    """

    inventory: Inventory
    recipe: Recipe
    units: tuple[Unit, ...]
    tensors: tuple[TensorPlan, ...]
    notices: tuple[str, ...]
    buffer_bytes: int
    task: tuple[tuple[str, str], ...] = ()
    disk_bytes: int = 0

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

    def quantised(self, kept: frozenset[str] = frozenset()) -> frozenset[str]:
        """Names of the tensors that become FP8 when the bundles in ``kept`` stay as they are."""
        return frozenset(work.view.name for unit in self.units for work in unit.keeping(kept) if work.group is not None)


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
