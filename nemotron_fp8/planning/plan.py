"""The plan: every decision of a conversion, made from inventory, recipe and byte budget without reading a tensor.

A plan contains the decision for every tensor, name and layout of every output file, the slices of each tensor, and the
bytes of all buffers. Later stages execute the plan and make no decisions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._display import Part, counted, display, one_line
from nemotron_fp8._utils import format_bytes
from nemotron_fp8.checkpoint.dtypes import FLOAT8, nbytes
from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.checkpoint.stated_quantization import (
    is_quantized_name,
    method_of,
    packed_tensor,
    packed_weight,
    stated,
)
from nemotron_fp8.errors import AlreadyQuantizedError, BudgetError
from nemotron_fp8.planning.engine_support import SupportedModel, engine_support, support_text
from nemotron_fp8.planning.evidence import Evidence
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.layouts import scale_suffixes
from nemotron_fp8.planning.linear_share import kind_of, linear_share, percent
from nemotron_fp8.planning.selection import NO_MATCH, NOT_STORED, UNKNOWN
from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask, Slicing, TensorTask, layout_of, least, outputs_of
from nemotron_fp8.planning.tensor_plan import TensorPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory, Shard
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.engine_support import EngineSupport
    from nemotron_fp8.planning.layouts import WeightFormat
    from nemotron_fp8.planning.linear_share import LinearShare
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.planning.tensor_plan import Role


SCRATCH_BYTES = 1 << 20
"""Bytes of float32 scratch that a cast needs beside its slice, for each worker."""
STATS_BYTES = 48 << 18
"""Scratch bytes to measure errors without the compiled kernels, for each worker; a search of best scales measures."""
BUDGET_SHARE = 4
"""Number of parts of the budget: slices get one part, all other resident memory gets the rest."""


NONFINITE = "NaN or Inf in it, or in a weight that engines fuse with it"
MODULES = "modules.json"
_MODULE_FOLDER = re.compile(r"\d+_\w+")
"""A folder of a module of Sentence Transformers, such as ``1_Pooling``."""
OPTIONS = {UNKNOWN: "--also-select", NO_MATCH: "--also-select", NOT_STORED: "--also-select"}
"""Options that take weights which stay for a reason."""


class Recoding(NamedTuple):
    """Weights of a quantized source, by what a plan does with them.

    Attributes:
        kept: weights that keep their codes if the result can have their scales; with scales that are powers of two
            only, the values of the scales decide.
        again: weights that are quantized again.
        dequantized: weights that are dequantized.
    """

    kept: int
    again: int
    dequantized: int


class ReasonCount(NamedTuple):
    """Tensors of a plan that are quantized, or left unquantized, for one reason.

    Attributes:
        quantize: True if they are quantized.
        reason: the reason.
        tensors: number of tensors.
        bytes_in: their bytes in the source.
        bytes_out: their bytes in the result, including scales.
    """

    quantize: bool
    reason: str
    tensors: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Every decision of a conversion.

    Attributes:
        inventory: contents of the source.
        recipe: settings of the quantization.
        shard_tasks: one task for each output shard.
        tensors: decision for every tensor.
        notices: caveats for the user.
        buffer_bytes: bytes of all working buffers together, at most the budget.
        task: name and options of a task other than quantizing, as the manifest records them.
        disk_bytes: bytes of all files of the result; `nemotron_fp8.plan_repo` fills them in.
        amaxes: amaxes of the calibration whose scales the result stores; None without one.
    """

    inventory: Inventory
    recipe: Recipe
    shard_tasks: tuple[ShardTask, ...]
    tensors: tuple[TensorPlan, ...]
    notices: tuple[str, ...]
    buffer_bytes: int
    task: tuple[tuple[str, str], ...] = ()
    disk_bytes: int = 0
    amaxes: Amaxes | None = None

    def __repr__(self) -> str:
        quantized = sum(t.quantize for t in self.tensors)
        facts = [f"{counted(quantized, 'tensor')} to FP8", f"{len(self.tensors) - quantized:,} unquantized"]
        if self.task:
            facts = [", ".join(f"{key} {value}" for key, value in self.task), counted(len(self.tensors), "tensor")]
        sizes = f"{format_bytes(self.bytes_in)} -> {format_bytes(self.bytes_out)}"
        return one_line("Plan", self.inventory.source, [*facts, sizes])

    def _repr_html_(self) -> str:
        recipe, quantized = self.recipe, sum(t.quantize for t in self.tensors)
        share = self.share.share
        made = f"{counted(quantized, 'tensor')} ({recipe.format}, {recipe.granularity}, activations"
        facts = [
            ("task", ", ".join(f"{key} {value}" for key, value in self.task)),
            ("become FP8", "" if self.task else f"{made} {recipe.activations})"),
            ("left unquantized", counted(len(self.tensors) - quantized, "tensor")),
            ("linear weights", "" if share is None or self.task else f"{percent(share)} of their bytes become FP8"),
            ("tensors", f"{format_bytes(self.bytes_in)} to {format_bytes(self.bytes_out)}"),
            ("files", f"{counted(len(self.shard_tasks), 'shard')}, {format_bytes(self.disk_bytes)} with small files"),
            ("buffers", format_bytes(self.buffer_bytes)),
            ("engines", support_text(self.engines) if self.engines else ""),
        ]
        rows = [
            (
                "FP8" if each.quantize else "left",
                f"{each.tensors:,}",
                format_bytes(each.bytes_in),
                format_bytes(each.bytes_out),
                each.reason,
            )
            for each in self.reasons
        ]
        header = ("", "tensors", "before", "after", "why")
        parts = [
            Part("Decisions by reason", rows, header, (1, 2, 3)),
            Part("Notices", [(notice,) for notice in self.notices]),
            Part("Files that would not be copied", self.inventory.left_out, ("file", "why")),
        ]
        return display("Plan", self.inventory.source, facts, parts)

    @property
    def reasons(self) -> tuple[ReasonCount, ...]:
        """Tensors by reason: those that are quantized first, then the largest first."""
        found: dict[tuple[bool, str], ReasonCount] = {}
        for t in self.tensors:
            key = t.quantize, t.reason
            _, _, count, before, after = found.get(key, ReasonCount(*key, 0, 0, 0))
            found[key] = ReasonCount(*key, count + 1, before + t.bytes_in, after + t.bytes_out)
        return tuple(sorted(found.values(), key=lambda each: (not each.quantize, -each.bytes_in)))

    @property
    def recoding(self) -> Recoding:
        """Weights of a quantized source, by what happens to them; zeros for an unquantized source."""
        tasks = [task for shard in self.shard_tasks for task in shard.tensor_tasks if task.view.encoding is not None]
        kept = sum(task.carry for task in tasks)
        dequantized = sum(task.decode is not None for task in tasks)
        return Recoding(kept, len(tasks) - kept - dequantized, dequantized)

    @property
    def share(self) -> LinearShare:
        """Share of the linear weights that becomes FP8, and what is left."""
        return self.share_without(frozenset())

    def share_without(self, fused_modules: frozenset[str]) -> LinearShare:
        """Return the share of linear weights that becomes FP8 if ``fused_modules`` hold NaN or Inf and are copied."""
        if not fused_modules:
            return linear_share(self.tensors, OPTIONS)
        groups = [group for shard_task in self.shard_tasks for group in shard_task.groups]
        copied = {view.name for group in groups if group.fused_module in fused_modules for view in group.members}
        tensors = [
            t._replace(quantize=False, reason=NONFINITE) if t.quantize and t.name in copied else t for t in self.tensors
        ]
        return linear_share(tensors, OPTIONS)

    @property
    def engines(self) -> tuple[EngineSupport, ...]:
        """Engines, and whether they read the result; empty for a result without FP8."""
        if self.task:
            return ()
        shapes = {t.name: t.shape for t in self.tensors if t.quantize}
        config = self.inventory.config
        family = family_of(config)
        forced = tuple(dict.fromkeys(kind_of(t.name) for t in self.tensors if t.forced))
        heads, has_config = Evidence((), family, config).heads, config is not None
        kept = tuple(t.name for t in self.tensors if not t.quantize) + self.stored_scales
        return engine_support(
            self.recipe, SupportedModel(family, shapes, heads, has_config, forced, kept, self._missing_folders)
        )

    @property
    def stored_scales(self) -> tuple[str, ...]:
        """Names of the scales from a calibration that the result stores."""
        tasks = (task for shard in self.shard_tasks for task in shard.tensor_tasks)
        return tuple(scale.name for task in tasks for scale in task.stored_scales)

    @property
    def _missing_folders(self) -> tuple[str, ...]:
        """Folders of a Sentence Transformers model that are not copied: pooling, and layers behind the decoder."""
        if not any(side.name == MODULES for side in self.inventory.side_files):
            return ()
        folders = (found for name, _ in self.inventory.left_out if (found := _MODULE_FOLDER.match(name)))
        return tuple(dict.fromkeys(found.group() for found in folders))

    @property
    def asked(self) -> dict[str, Any]:
        """Request as journal and manifest record it: the fields of the recipe, or the task."""
        return dict(self.task) or self.recipe.model_dump(mode="json")

    @property
    def bytes_in(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(t.bytes_in for t in self.tensors)

    @property
    def bytes_out(self) -> int:
        """Bytes of all tensors of the result, including scales."""
        return sum(t.bytes_out for t in self.tensors)

    def quantized(self, unquantized: frozenset[str] = frozenset()) -> frozenset[str]:
        """Return the names of the quantized tensors if the fused modules in ``unquantized`` are copied."""
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
    roles: Mapping[str, Role] | None = None,
    forced: frozenset[str] = frozenset(),
    amaxes: Amaxes | None = None,
) -> Plan:
    """Derive a plan from the task of every tensor.

    Args:
        inventory: contents of the source.
        recipe: settings of the quantization.
        tensor_tasks: tasks by tensor name; a tensor without a task is dropped.
        home: scale group of every tensor to quantize, by tensor name.
        reasons: reason for the decision about every tensor, by name.
        notices: caveats for the user; the notices of the inventory precede them.
        budget: bytes that all working buffers together may take.
        threads: requested number of workers.
        task: name and options of a task other than quantizing.
        roles: role of every tensor, by name; None where nothing is quantized.
        forced: names of the tensors that are quantized although engines are not known to load them in FP8.
        amaxes: amaxes of the calibration whose scales the result stores.

    Raises:
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    listed = frozenset(view.name for shard in inventory.shards for view in shard.views)
    kinds = {_kind(tensor_task): tensor_task for tensor_task in tensor_tasks.values()}
    slicing = _slicing(kinds.values(), recipe, budget, inventory.opener_bytes, threads)
    fused_modules: defaultdict[str, dict[str, ScaleGroup]] = defaultdict(dict)
    if recipe.nonfinite == "keep":
        for group in home.values():
            fused_modules[group.fused_module][group.id] = group
    weight_format = recipe.weight_format
    shard_tasks = tuple(
        _shard_task(shard, tensor_tasks, home, fused_modules, recipe, slicing, weight_format)
        for shard in inventory.shards
    )
    sizes = {kind: _bytes_out(tensor_task, weight_format) for kind, tensor_task in kinds.items()}
    tensors = tuple(
        _tensor(shard.name, tensor_tasks.get(v.name), v, reasons[v.name], sizes, listed)._replace(
            role=(roles or {}).get(v.name, "other"), forced=v.name in forced
        )
        for shard in inventory.shards
        for v in shard.views
    )
    worst = max((slicing.cost(tensor_task) for tensor_task in kinds.values()), default=0)
    buffer_bytes = inventory.opener_bytes + slicing.workers * (scratch_bytes(recipe) + worst)
    return Plan(
        inventory,
        recipe,
        shard_tasks,
        tensors,
        (*inventory.notices, *notices),
        buffer_bytes,
        task,
        amaxes=amaxes,
    )


def refuse_quantized(inventory: Inventory) -> None:
    """Raise AlreadyQuantizedError if the config or the tensors show that a source is quantized."""
    evidence = evidence_of_quantization(inventory)
    if evidence is not None:
        fp8 = any(v.dtype in FLOAT8 and not is_quantized_name(v.name) for v in inventory.views)
        fp8 = fp8 and packed_weight(inventory.views, inventory.config) is None
        raise AlreadyQuantizedError(inventory.source, evidence, fp8)


def evidence_of_quantization(inventory: Inventory) -> str | None:
    """Return the setting or the tensor that shows that a source is quantized; None for an unquantized source."""
    for place, statement in stated(inventory.config):
        return f"{CONFIG} has a {place}, quant_method {method_of(statement)!r}"
    suffixes = scale_suffixes()
    for v in inventory.views:
        if v.dtype in FLOAT8 and (v.name.endswith(".weight") or (len(v.shape) == 3 and "expert" in v.name)):
            return f"tensor {v.name} is {v.dtype}"
        for suffix in suffixes:
            if v.name.endswith(f".weight{suffix}"):
                return f"tensor {v.name} is a scale"
    if (packed := packed_tensor(inventory.views)) is not None:
        return f"tensor {packed} belongs to packed weights"
    found = packed_weight(inventory.views, inventory.config)
    return None if found is None else f"tensor {found[0]} {found[1]}"


def scratch_bytes(recipe: Recipe) -> int:
    """Return the bytes that a worker needs beside its slice."""
    return SCRATCH_BYTES + (STATS_BYTES if recipe.stats or recipe.scales == "best" else 0)


def _slicing(tensor_tasks: Iterable[TensorTask], recipe: Recipe, budget: int, held: int, threads: int) -> Slicing:
    """Divide the budget, without the opener's bytes, among as many of the requested workers as fit."""
    worst, needed, numbers = "", 0, recipe.weight_format.numbers
    for tensor_task in tensor_tasks:
        need = scratch_bytes(recipe) + least(tensor_task, numbers)
        if need > needed:
            worst, needed = tensor_task.view.name, need
    if held + needed > budget:
        raise BudgetError(worst, held + needed, budget)
    budget -= held
    workers = max(1, min(threads, budget // max(needed, 1)))
    share = max(budget // workers // BUDGET_SHARE, needed) - scratch_bytes(recipe)
    return Slicing(workers, max(share, 1), numbers)


def _shard_task(
    shard: Shard,
    tensor_tasks: Mapping[str, TensorTask],
    home: Mapping[str, ScaleGroup],
    fused_modules: Mapping[str, Mapping[str, ScaleGroup]],
    recipe: Recipe,
    slicing: Slicing,
    weight_format: WeightFormat,
) -> ShardTask:
    groups = {group.id: group for v in shard.views if (group := home.get(v.name))}
    if recipe.nonfinite == "keep":
        # The decision for a tensor then depends on all members of its fused module, in any shard.
        for fused_module in dict.fromkeys(group.fused_module for group in groups.values()):
            groups.update(fused_modules[fused_module])
    mine = tuple(tensor_tasks[v.name] for v in shard.views if v.name in tensor_tasks)
    layout = layout_of(mine, shard.metadata, weight_format)
    return ShardTask(shard.name, shard.metadata, mine, tuple(groups.values()), layout, recipe, slicing, weight_format)


def _kind(tensor_task: TensorTask) -> tuple[object, ...]:
    """Return the properties that decide a tensor's sizes: a checkpoint of 100,000 tensors has a few dozen kinds."""
    return (
        tensor_task.view.dtype,
        tensor_task.view.shape,
        tensor_task.group is None,
        tensor_task.decode,
        tensor_task.view.held_itemsize,
        tensor_task.view.encoding and tensor_task.view.encoding.cell,
        tuple(scale.shape for scale in tensor_task.stored_scales),
    )


def _bytes_out(tensor_task: TensorTask, weight_format: WeightFormat) -> int:
    return sum(nbytes(o.dtype, o.shape) for o in outputs_of(tensor_task, weight_format))


def _tensor(
    shard: str,
    tensor_task: TensorTask | None,
    v: TensorView,
    reason: str,
    sizes: Mapping[tuple[object, ...], int],
    listed: frozenset[str],
) -> TensorPlan:
    """Return the decision for a tensor, with the bytes of its scales unless they are tensors of the plan themselves."""
    out = sizes[_kind(tensor_task)] if tensor_task else 0
    quantize = tensor_task is not None and tensor_task.group is not None
    stored = v.stored[0]
    size = stored.nbytes + sum(scales.nbytes for scales in v.stored[1:] if scales.name not in listed)
    return TensorPlan(v.name, shard, stored.dtype, v.shape, quantize, reason, size, out)
