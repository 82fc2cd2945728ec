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
from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask, Slicing, TensorTask, layout_of, least, outputs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory, Shard
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.recipe import Recipe


SCRATCH_BYTES = 1 << 20
"""Bytes of float32 scratch that a cast takes beside its slice, for each worker."""
STATS_BYTES = 48 << 18
"""Bytes for measuring the errors of one cell of `engines.error_stats.GRID` elements, for each worker."""
BUDGET_SHARE = 4
"""Slices take one part in so many of the budget: what is resident beside them has the rest."""


class TensorPlan(NamedTuple):
    """What becomes of one tensor.

    Attributes:
        name, shard, dtype, shape: of the input.
        quantize: whether it becomes FP8.
        reason: why, or why not.
        bytes_in: its bytes in the source.
        bytes_out: its bytes in the result, its scale included.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    quantize: bool
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
        task: what is done where it is not quantizing, as the manifest names it.
        disk_bytes: bytes of all files of the result; `nemotron_fp8.plan_repo` fills it in.
    """

    inventory: Inventory
    recipe: Recipe
    shard_tasks: tuple[ShardTask, ...]
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

    def quantized(self, unquantized: frozenset[str] = frozenset()) -> frozenset[str]:
        """Names of the tensors that become FP8 when the bundles in ``unquantized`` stay as they are."""
        return frozenset(
            tensor_task.view.name
            for shard_task in self.shard_tasks
            for tensor_task in shard_task.tensor_tasks_without(unquantized)
            if tensor_task.group is not None
        )


def assemble_plan(
    inventory: Inventory,
    recipe: Recipe,
    tensor_tasks: Mapping[str, TensorTask],
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
        recipe: what to quantize and how, where anything is.
        works: what is done, by tensor name; a tensor without an entry is dropped.
        home: the scale group of every tensor to be quantized.
        reasons: why, by tensor name.
        notices: what a person should know; those of the inventory come first.
        budget: bytes that all working buffers together may take.
        threads: workers wanted.
        task: what is done where it is not quantizing.

    Raises:
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    kinds = {_kind(tensor_task): tensor_task for tensor_task in tensor_tasks.values()}
    slicing = _slicing(kinds.values(), recipe, budget, inventory.opener_bytes, threads)
    fused_modules: defaultdict[str, dict[str, ScaleGroup]] = defaultdict(dict)
    for group in home.values():
        fused_modules[group.fused_module][group.id] = group
    shard_tasks = tuple(_unit(shard, tensor_tasks, home, fused_modules, recipe, slicing) for shard in inventory.shards)
    sizes = {kind: _bytes_out(tensor_task, recipe) for kind, tensor_task in kinds.items()}
    tensors = tuple(
        _tensor(shard.name, tensor_tasks.get(v.name), v, reasons[v.name], sizes)
        for shard in inventory.shards
        for v in shard.views
    )
    worst = max((slicing.cost(tensor_task) for tensor_task in kinds.values()), default=0)
    buffer_bytes = inventory.opener_bytes + slicing.workers * (scratch_bytes(recipe) + worst)
    return Plan(inventory, recipe, shard_tasks, tensors, (*inventory.notices, *notices), buffer_bytes, task)


def refuse_quantized(inventory: Inventory) -> None:
    """Raise AlreadyQuantizedError where the config or the tensors show that a source is quantized."""
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


def _slicing(tensor_tasks: Iterable[TensorTask], recipe: Recipe, budget: int, held: int, threads: int) -> Slicing:
    """Divide the budget, less what the opener holds, among workers, as many of those wanted as it has room for."""
    worst, needed = "", 0
    for tensor_task in tensor_tasks:
        need = scratch_bytes(recipe) + least(tensor_task, recipe.granularity)
        if need > needed:
            worst, needed = tensor_task.view.name, need
    if held + needed > budget:
        raise BudgetError(worst, held + needed, budget)
    budget -= held
    workers = max(1, min(threads, budget // max(needed, 1)))
    share = max(budget // workers // BUDGET_SHARE, needed) - scratch_bytes(recipe)
    return Slicing(workers, max(share, 1), recipe.granularity)


def _unit(
    shard: Shard,
    tensor_tasks: Mapping[str, TensorTask],
    home: Mapping[str, ScaleGroup],
    fused_modules: Mapping[str, Mapping[str, ScaleGroup]],
    recipe: Recipe,
    slicing: Slicing,
) -> ShardTask:
    groups = {group.id: group for v in shard.views if (group := home.get(v.name))}
    if recipe.nonfinite == "keep":
        # The fate of a tensor then hangs on its whole bundle, wherever the rest of it lies.
        for fused_module in dict.fromkeys(group.fused_module for group in groups.values()):
            groups.update(fused_modules[fused_module])
    mine = tuple(tensor_tasks[v.name] for v in shard.views if v.name in tensor_tasks)
    layout = layout_of(mine, shard.metadata, recipe)
    return ShardTask(shard.name, shard.metadata, mine, tuple(groups.values()), layout, recipe, slicing)


def _kind(tensor_task: TensorTask) -> tuple[object, ...]:
    """What the figures of a tensor follow from: a checkpoint of 100,000 tensors has a few dozen kinds."""
    return (
        tensor_task.view.dtype,
        tensor_task.view.shape,
        tensor_task.group is None,
        tensor_task.decode and (tensor_task.decode.granularity, tensor_task.decode.dtype),
    )


def _bytes_out(tensor_task: TensorTask, recipe: Recipe) -> int:
    return sum(nbytes(o.dtype, o.shape) for o in outputs_of(tensor_task, recipe))


def _tensor(
    shard: str, tensor_task: TensorTask | None, v: TensorView, reason: str, sizes: Mapping[tuple[object, ...], int]
) -> TensorPlan:
    out = sizes[_kind(tensor_task)] if tensor_task else 0
    quantize = tensor_task is not None and tensor_task.group is not None
    return TensorPlan(v.name, shard, v.dtype, v.shape, quantize, reason, v.nbytes, out)
