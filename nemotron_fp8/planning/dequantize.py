"""Plan a dequantization: every FP8 weight is multiplied by its scale, and the scales are dropped.

All registered layouts are supported (`nemotron_fp8.planning.layouts`), and the ragged edge blocks of DeepSeek.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.errors import LayoutError, NotQuantizedError
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.layouts import execution_scales, one_scale_shapes, scale_suffixes, stored_formats
from nemotron_fp8.planning.number_format import coverage_of
from nemotron_fp8.planning.plan import Plan, assemble_plan
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.planning.restacked_experts import restack
from nemotron_fp8.planning.tasks import Dequantization, TensorTask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.layouts import WeightFormat


DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Target dtypes of FP8 weights, by torch's name."""
SCALE_DTYPES = frozenset({"F32", "BF16", "F16"})
"""Dtypes of scales that the engines read."""


def plan_dequantize(inventory: Inventory, dtype: str, budget: int, threads: int) -> Plan:
    """Plan a dequantization.

    Args:
        inventory: contents of the source.
        dtype: target dtype of FP8 weights: ``bfloat16``, ``float16`` or ``float32``.
        budget: bytes that all working buffers together may take.
        threads: requested number of workers.

    Raises:
        NotQuantizedError: the source holds no FP8 weight.
        LayoutError: an FP8 tensor has no scale, or one whose shape fits no layout.
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    views = {view.name: view for view in inventory.views}
    formats = stored_formats(inventory.quantization_config)
    quantized = {weight_format.numbers.element.dtype for weight_format in formats}
    scales, execution = _Scales(views, formats), execution_scales()
    decoded = {view.name: scales.of(view, DTYPES[dtype]) for view in views.values() if view.dtype in quantized}
    if not decoded:
        raise NotQuantizedError(inventory.source, len(views))
    used = {decode.scale.name for decode in decoded.values()}
    granularity = {name: decode.coverage.granularity for name, decode in decoded.items()}
    inventory, decoded = restack(inventory, decoded, family_of(inventory.config))
    views = {view.name: view for view in inventory.views}
    tensor_tasks = {name: TensorTask(views[name], decode=decode) for name, decode in decoded.items()}
    reasons = {
        name: f"FP8, {granularity[name]} scales" if name in granularity else "FP8, single experts stacked again"
        for name in decoded
    }
    dropped = 0
    for view in views.values():
        if view.name in used:
            reasons[view.name] = "a scale"
        elif view.name not in tensor_tasks and _last_name(view.name) in execution:
            reasons[view.name] = "a scale of activations or of the KV cache"
            dropped += 1
        elif view.name not in tensor_tasks:
            tensor_tasks[view.name] = TensorTask(view)
            reasons[view.name] = "not FP8"
    notices = (f"{dropped} scales of activations or of the KV cache are dropped",) if dropped else ()
    task = (("task", "dequantize"), ("dtype", dtype))
    return assemble_plan(inventory, Recipe(), tensor_tasks, {}, reasons, notices, budget, threads, task)


class _Scales:
    """The scale tensors of a checkpoint, by the layout of its config, or by all layouts without such a config."""

    def __init__(self, views: Mapping[str, TensorView], formats: Sequence[WeightFormat]) -> None:
        self._views, self._suffixes, self._whole = views, scale_suffixes(), one_scale_shapes()
        self._blocks = list(dict.fromkeys(weight_format.numbers.coverage.block for weight_format in formats))

    def of(self, view: TensorView, dtype: str) -> Dequantization:
        """Return the scale of an FP8 tensor, its coverage, and the target dtype."""
        names = (view.name + suffix for suffix in self._suffixes)
        scale = next((self._views[name] for name in names if name in self._views), None)
        if scale is None:
            wanted = " or ".join(f"weight{suffix}" for suffix in self._suffixes)
            raise LayoutError(view.name, f"an FP8 tensor without a scale: the checkpoint has no {wanted} for it")
        found = [c for block in self._blocks if (c := coverage_of(view.shape, scale.shape, block, self._whole))]
        blocks = [coverage.block for coverage in found if coverage.columns is not None]
        described = f"a scale {scale.dtype} {list(scale.shape)}"
        if not found or scale.dtype not in SCALE_DTYPES:
            raise LayoutError(scale.name, f"{described} fits no known layout of an FP8 weight {list(view.shape)}")
        if len(blocks) > 1:
            sizes = " and ".join("x".join(map(str, block)) for block in blocks)
            raise LayoutError(
                scale.name, f"{described} fits blocks of {sizes}; {CONFIG} must state which (quantization_config)"
            )
        return Dequantization(scale, found[0], dtype)


def _last_name(name: str) -> str:
    """Return the part of a name after its last dot; empty for a name without a dot."""
    _, dot, last = name.rpartition(".")
    return last if dot else ""
