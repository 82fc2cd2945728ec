"""Shards of a quantized source: tensors that keep their codes, and values that change where a tensor is rounded again.

Plan and scales decide: a tensor keeps its codes if the plan permits that, and if the scales of its source are scales of
the result, too. Such a tensor is then a copy of its codes, beside the scales of the source, repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.engines.base import matrix, scale_rows, slice_amax
from nemotron_fp8.engines.kept_codes import check_codes, check_scales, fits
from nemotron_fp8.planning.receipt import Recoded, TensorStats
from nemotron_fp8.planning.tasks import MIN_SLICE_ELEMENTS, TensorTask
from nemotron_fp8.sources.reader import TORCH_DTYPES
from nemotron_fp8_kernels.cpu import dequantize, scales

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.engines.base import Emit
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.sources.reader import Reader


@dataclass(frozen=True, slots=True)
class SettledShard:
    """Task of a shard whose scales have been read.

    Attributes:
        shard_task: the task, with copies of codes in place of the tensors that keep them.
        kept: views of the values of the tensors that keep their codes.
        stats: their quantization errors, which are 0, if the recipe asks for them.
    """

    shard_task: ShardTask
    kept: tuple[TensorView, ...] = ()
    stats: tuple[TensorStats, ...] = ()

    @property
    def requantized(self) -> dict[str, TensorTask]:
        """Tasks of the tensors of a quantized source that are quantized again, by name."""
        tasks = self.shard_task.tensor_tasks
        return {task.view.name: task for task in tasks if task.group is not None and task.view.encoding is not None}


def settle(shard_task: ShardTask, reader: Reader) -> SettledShard:
    """Decide which tensors of a shard keep their codes; the shard of an unquantized source remains as it is.

    Raises:
        ScaleError: a scale of the source is not positive and finite.
        NonFiniteCodesError: a tensor that keeps its codes contains NaN.
    """
    tensor_tasks: list[TensorTask] = []
    kept: list[TensorView] = []
    for task in shard_task.tensor_tasks:
        view = task.view
        if view.encoding is not None and fits(check_scales(view, reader), shard_task.numbers) and task.carry:
            tensor_tasks.append(TensorTask(view.encoding.codes, stored_scales=task.stored_scales))
            kept.append(view)
        else:
            tensor_tasks.append(task)
    if not kept:
        return SettledShard(shard_task)
    with_signal = check_codes(kept, reader, shard_task.slicing.workers)
    stats = [
        TensorStats(view.name, math.inf if view.name in with_signal else math.nan, 0.0, 0, 0)
        for view in kept
        if shard_task.recipe.stats
    ]
    names = {view.name for view in kept}
    groups = tuple(group for group in shard_task.groups if names.isdisjoint(member.name for member in group.members))
    return SettledShard(replace(shard_task, tensor_tasks=tuple(tensor_tasks), groups=groups), tuple(kept), tuple(stats))


class ChangedValues:
    """Counter of the values that a second rounding changes, by the codes as they are emitted. Thread-safe.

    Args:
        settled: the shard.
        scales: scales by the id of their group, as far as they are held for a whole tensor.
        reader: reads the source.
        emit: receives the codes after they were compared.
    """

    def __init__(self, settled: SettledShard, scales: Mapping[str, torch.Tensor], reader: Reader, emit: Emit) -> None:
        self._tasks, self._kept = settled.requantized, len(settled.kept)
        self._shard_task, self._scales, self._reader, self._emit = settled.shard_task, scales, reader, emit
        self._changed = dict.fromkeys(self._tasks, 0)
        self._lock = Lock()

    def emit(self, name: str, begin: int, data: memoryview) -> None:
        """Pass bytes on; compare those that are codes of a tensor which is quantized again."""
        task = self._tasks.get(name)
        if task is not None:
            changed = self._compare(task, begin, data)
            with self._lock:
                self._changed[name] += changed
        self._emit(name, begin, data)

    def _compare(self, task: TensorTask, begin: int, data: memoryview) -> int:
        dtype, changed = TORCH_DTYPES[self._shard_task.numbers.element.dtype], 0
        for first, last in self._parts(task, begin, len(data)):
            codes = torch.frombuffer(data[first - begin : last - begin], dtype=dtype)
            changed += self._compare_part(task, first, codes)
        return changed

    def _parts(self, task: TensorTask, begin: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of ``count`` codes to compare at a time: small ones, each under one row of scales of blocks.

        The values of a band of blocks of a wide tensor are many times a part, and as large as the slice itself.
        """
        coverage, width, end = self._shard_task.numbers.coverage, max(1, task.view.row_elements), begin + count
        if coverage.whole:
            step, band = MIN_SLICE_ELEMENTS, count
        else:
            step = max(1, MIN_SLICE_ELEMENTS // width) * width
            band = count if coverage.rows == 1 else width * (coverage.rows or 1)
        for top in range(begin, end, max(1, band)):
            for first in range(top, min(top + band, end), step):
                yield first, min(first + step, top + band, end)

    def _compare_part(self, task: TensorTask, begin: int, codes: torch.Tensor) -> int:
        """Count the values of a part that differ from those of the source."""
        numbers, view, end = self._shard_task.numbers, task.view, begin + codes.numel()
        coverage, size = numbers.coverage, view.itemsize
        with self._reader.elements(view, begin, end) as values:
            if coverage.fine:
                scale = scales(slice_amax(values, view, coverage), numbers.scale_rounding)
            else:
                assert task.group is not None
                scale = scale_rows(self._scales[task.group], view, coverage, begin * size, end * size)
            result = dequantize(
                matrix(codes, view, coverage), scale, coverage.granularity, coverage.block, TORCH_DTYPES[view.dtype]
            )
            changed = int((result.flatten() != values).sum())
            del values
        return changed

    @property
    def recoded(self) -> Recoded:
        """Counts of the shard's tensors."""
        changed = self._changed.values()
        return Recoded(self._kept, sum(not count for count in changed), sum(map(bool, changed)), sum(changed))
