"""Plan a conversion without quantization: unchanged tensors, in the layout of Hugging Face."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.planning.plan import Plan, assemble_plan, refuse_quantized
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.planning.tasks import TensorTask

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.inventory import Inventory


NOT_NEMO = (
    "the source is not a NeMo checkpoint: its tensors are copied as they are; to quantize them use quantize"
    " (quantize_repo)"
)


def _has_own_shards(inventory: Inventory) -> bool:
    """Return True for a checkpoint of Hugging Face, whose tensors are in files with the names of the result's."""
    files = {extent.file for view in inventory.views for extent in view.extents}
    return files <= {shard.name for shard in inventory.shards}


def plan_convert(inventory: Inventory, budget: int, threads: int) -> Plan:
    """Plan a conversion in which every tensor keeps its dtype.

    Args:
        inventory: contents of the source.
        budget: bytes that all working buffers together may take.
        threads: requested number of workers.

    Raises:
        AlreadyQuantizedError: the source holds FP8 weights, or its config has a ``quantization_config``.
        BudgetError: the budget cannot hold one worker's smallest slice of some tensor.
    """
    refuse_quantized(inventory)
    tensor_tasks = {view.name: TensorTask(view) for view in inventory.views}
    reasons = dict.fromkeys(tensor_tasks, "copied without quantization")
    notices = (NOT_NEMO,) if _has_own_shards(inventory) else ()
    return assemble_plan(
        inventory, Recipe(), tensor_tasks, {}, reasons, notices, budget, threads, (("task", "convert"),)
    )
