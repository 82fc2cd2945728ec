"""Back from FP8: a plan in which every FP8 weight is multiplied by its scale and the scales are gone.

Reads every layout that `nemotron_fp8.planning.layouts` describes, and DeepSeek's (blocks with ragged edges).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.dtypes import FP8
from nemotron_fp8.errors import LayoutError, NotQuantizedError
from nemotron_fp8.planning.layouts import BLOCK, granularity_of
from nemotron_fp8.planning.plan import Plan, assemble_plan
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.planning.tasks import Dequantization, TensorTask

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView


DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""What FP8 weights can become, by torch's name."""
SCALES = ("_scale", "_scale_inv")
"""What is put after a weight's name to name its scale; both are multipliers."""
EXECUTION = re.compile(r"\.(input_scale|activation_scale|[kvq]_scale|output_scale|input_global_scale)$")
"""Scales of activations and of the KV cache: they say how to run FP8, and a plain checkpoint has no use for them."""
SCALE_DTYPES = frozenset({"F32", "BF16", "F16"})


def plan_dequantize(inventory: Inventory, dtype: str, budget: int, threads: int) -> Plan:
    """Decide everything about a conversion from FP8 back to a plain checkpoint.

    Args:
        inventory: what the source holds.
        dtype: what FP8 weights become: ``bfloat16``, ``float16`` or ``float32``.
        budget: bytes that all working buffers together may take.
        threads: workers wanted.

    Raises:
        NotQuantizedError: the source holds no FP8 weight.
        LayoutError: an FP8 tensor has no scale, or one whose shape fits no layout.
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    views = {view.name: view for view in inventory.views}
    block = _block(inventory)
    tensor_tasks: dict[str, TensorTask] = {}
    reasons: dict[str, str] = {}
    used: set[str] = set()
    for view in views.values():
        if view.dtype == FP8:
            decode = _decode(view, views, block, DTYPES[dtype])
            used.add(decode.scale.name)
            tensor_tasks[view.name] = TensorTask(view, decode=decode)
            reasons[view.name] = f"FP8, {decode.granularity} scales"
    if not tensor_tasks:
        raise NotQuantizedError(inventory.source, len(views))
    dropped = 0
    for view in views.values():
        if view.name in used:
            reasons[view.name] = "a scale"
        elif view.name not in tensor_tasks and EXECUTION.search(view.name):
            reasons[view.name] = "a scale of activations or of the KV cache"
            dropped += 1
        elif view.name not in tensor_tasks:
            tensor_tasks[view.name] = TensorTask(view)
            reasons[view.name] = "not FP8"
    notices = (f"{dropped} scales of activations or of the KV cache are dropped",) if dropped else ()
    task = (("task", "dequantize"), ("dtype", dtype))
    return assemble_plan(inventory, Recipe(), tensor_tasks, {}, reasons, notices, budget, threads, task)


def _decode(view: TensorView, views: dict[str, TensorView], block: tuple[int, int], dtype: str) -> Dequantization:
    """Find the scale of an FP8 tensor and what it covers."""
    scale = next((views[view.name + suffix] for suffix in SCALES if view.name + suffix in views), None)
    if scale is None:
        raise LayoutError(view.name, "FP8, but neither weight_scale nor weight_scale_inv stands beside it")
    granularity = granularity_of(view.shape, scale.shape, block)
    if granularity is None or scale.dtype not in SCALE_DTYPES:
        found = f"{scale.dtype} {list(scale.shape)}"
        raise LayoutError(scale.name, f"{found} fits no layout of an FP8 weight {list(view.shape)}")
    return Dequantization(scale, granularity, block, dtype)


def _block(inventory: Inventory) -> tuple[int, int]:
    """The block size that a config names; 128 x 128 where it names none."""
    config: Any = (inventory.config or {}).get("quantization_config") or {}
    size = config.get("weight_block_size") if isinstance(config, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return BLOCK
