"""Plan a dequantization: every FP8 or MXFP4 weight is multiplied by its scale, and the scales are dropped.

`nemotron_fp8.planning.encoded_source` lists the formats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.stated_quantization import last_name, packed_weight
from nemotron_fp8.errors import LayoutError, NotQuantizedError
from nemotron_fp8.planning.encoded_source import check_all_read, encoded_source
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.layouts import execution_scales
from nemotron_fp8.planning.plan import Plan, assemble_plan, evidence_of_quantization
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.planning.restacked_experts import restack
from nemotron_fp8.planning.tasks import TensorTask

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView


DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Target dtypes of FP8 weights, by torch's name."""


def plan_dequantize(inventory: Inventory, dtype: str, budget: int, threads: int) -> Plan:
    """Plan a dequantization.

    Args:
        inventory: contents of the source.
        dtype: target dtype of FP8 weights: ``bfloat16``, ``float16`` or ``float32``.
        budget: bytes that all working buffers together may take.
        threads: requested number of workers.

    Raises:
        NotQuantizedError: the source holds no FP8 weight.
        LayoutError: an FP8 tensor has no scale, several, or one whose shape fits no layout; or a scale belongs to no
            FP8 tensor.
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    source = encoded_source(inventory)
    decoded = {name: view for name, view in source.weights.items() if _keeps_its_name(view)}
    if not decoded:
        raise NotQuantizedError(inventory.source, len(inventory.views), evidence_of_quantization(inventory))
    left = [view for view in source.inventory.views if view.name not in decoded.keys() | source.scales]
    for view in left:
        if view.encoding is not None:
            raise LayoutError(view.name, "a stack of MXFP4, which engines load in another order when it is not packed")
    if packed := packed_weight(left, inventory.config):
        name, what = packed
        raise LayoutError(name, f"{what}: no format that dequantize reads; start from the original checkpoint")
    check_all_read(inventory, source)
    inventory = source.inventory
    titles = {name: _title(view) for name, view in decoded.items()}
    inventory, decoded = restack(inventory, decoded, family_of(inventory.config))
    views = {view.name: view for view in inventory.views}
    tensor_tasks = {name: TensorTask(view, decode=DTYPES[dtype]) for name, view in decoded.items()}
    reasons = {name: titles.get(name, "FP8, single experts stacked again") for name in decoded}
    execution, dropped = execution_scales(), 0
    for view in views.values():
        if view.name in source.scales:
            reasons[view.name] = "a scale"
        elif view.name not in tensor_tasks and last_name(view.name) in execution:
            reasons[view.name] = "a scale of activations or of the KV cache"
            dropped += 1
        elif view.name not in tensor_tasks:
            tensor_tasks[view.name] = TensorTask(view)
            reasons[view.name] = "not FP8"
    notices = (f"{dropped} scales of activations or of the KV cache are dropped",) if dropped else ()
    task = (("task", "dequantize"), ("dtype", dtype))
    return assemble_plan(inventory, Recipe(), tensor_tasks, {}, reasons, notices, budget, threads, task)


def _keeps_its_name(view: TensorView) -> bool:
    """Return True unless engines look for the values of a tensor under another name, or in another order."""
    return len(view.shape) == 2 or view.encoding is None or not view.encoding.packed


def _title(view: TensorView) -> str:
    """Return the format of a quantized weight."""
    assert view.encoding is not None
    if view.encoding.packed:
        return "MXFP4"
    rows, columns = view.encoding.cell
    granularity = "tensor" if rows is None else "channel" if (rows, columns) == (1, None) else "block"
    return f"FP8, {granularity} scales"
