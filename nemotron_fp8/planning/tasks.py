"""Tasks: the values that planning hands to workers.

All are frozen and picklable. They hold no tensor bytes and no reference to threads, devices or machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.checkpoint import header as safetensors_header
from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.planning.layouts import Output
from nemotron_fp8.planning.number_format import PER_TENSOR, float32_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.layouts import WeightFormat
    from nemotron_fp8.planning.number_format import NumberFormat
    from nemotron_fp8.planning.recipe import Recipe


MIN_SLICE_ELEMENTS = 1 << 16
"""Elements of the smallest slice; the calls for a smaller slice cost more than its processing."""
MAX_SLICE_BYTES = 8 << 20
"""Bytes of the largest slice. Twice as much took a tenth less processor time, and 24 MiB more memory of two workers."""
COPY_BYTES = 1 << 22
"""Bytes of a slice of a copied tensor."""


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Tensors under one amax: an order-free integer maximum over the bits of ``float32(|w|)`` of every member.

    Attributes:
        id: name of the group; a lone tensor's own name.
        members: views that contribute to the amax, of any shard.
        fused_module: module that an engine fuses the members into. All groups of a fused module are quantized or
            none: engines reject a fused module of which only a part is FP8.
    """

    id: str
    members: tuple[TensorView, ...]
    fused_module: str


class StoredScale(NamedTuple):
    """A float32 scale from a calibration, which the output holds beside a tensor.

    Attributes:
        name: name of its tensor.
        shape: shape of the tensor, which has one element.
        value: the scale, a float32 value.
        of_codes: True for a scale of the inputs of a quantized weight; False for one that is stored whatever the dtype
            of the tensor beside it.
    """

    name: str
    shape: tuple[int, ...]
    value: float
    of_codes: bool

    @property
    def output(self) -> Output:
        """The tensor of the output."""
        return Output(self.name, "F32", self.shape)

    @property
    def data(self) -> bytes:
        """Bytes of the tensor."""
        return float32_bytes(self.value)


@dataclass(frozen=True, slots=True)
class TensorTask:
    """One tensor of an output shard: quantized if it has a group, dequantized if it has ``decode``, else copied.

    Attributes:
        view: input; codes and scales of a quantized source are a view of their values (`TensorView.encoding`).
        group: id of its scale group; None for a tensor that is not quantized.
        decode: safetensors name of the target dtype of a view with an encoding; None for a tensor that is not
            dequantized.
        carry: True to keep the codes of the source and to repeat its scales, if their values permit that. A tensor to
            quantize is quantized again otherwise.
        stored_scales: scales from a calibration that the output holds beside the tensor.
    """

    view: TensorView
    group: str | None = None
    decode: str | None = None
    carry: bool = False
    stored_scales: tuple[StoredScale, ...] = ()

    @property
    def unquantized(self) -> TensorTask:
        """The task that copies the tensor instead."""
        return TensorTask(self.view, stored_scales=tuple(s for s in self.stored_scales if not s.of_codes))

    def row_quantum(self, numbers: NumberFormat) -> int:
        """Return the divisor of the number of elements in a slice, so that no slice splits the rows of a scale.

        Args:
            numbers: number format of the tensors to quantize.
        """
        rows = None
        if self.group is not None:
            rows = numbers.coverage.rows
        elif self.decode is not None and self.view.encoding is not None:
            rows = self.view.encoding.cell[0]
        return 64 if rows is None else max(1, self.view.row_elements * rows)  # rows may be empty

    def out_itemsize(self, numbers: NumberFormat) -> int:
        """Return the bytes of one element of output; 0 for a copy, whose output is its input."""
        if self.group is not None:
            return BITS[numbers.element.dtype] // 8
        return BITS[self.decode] // 8 if self.decode else 0

    def held_itemsize(self, numbers: NumberFormat) -> int:
        """Return the bytes in memory for each element of a slice: input, output, and values to compare both by."""
        compared = BITS["F32"] // 8 if self.group is not None and self.view.encoding is not None else 0
        return self.view.held_itemsize + self.out_itemsize(numbers) + compared


@dataclass(frozen=True, slots=True)
class Slicing:
    """Division of tensors into slices, within a memory budget.

    Attributes:
        workers: threads that process slices at the same time.
        share: bytes for the slice of each thread (input + output, without scratch).
        numbers: number format of the tensors to quantize; a slice holds whole rows under a scale.
    """

    workers: int
    share: int
    numbers: NumberFormat = PER_TENSOR

    def slice_bytes(self, tensor_task: TensorTask) -> int:
        """Return the input bytes of one slice of a tensor: whole elements, and whole rows under a scale."""
        if tensor_task.group is None and tensor_task.decode is None:
            return max(1, min(self.share, COPY_BYTES))
        itemsize, quantum = tensor_task.view.itemsize, tensor_task.row_quantum(self.numbers)
        if tensor_task.group is not None and self.numbers.coverage.whole:
            quantum = MIN_SLICE_ELEMENTS  # the rows of the error sums of a tensor with one scale
        elements = min(self.share // tensor_task.held_itemsize(self.numbers), MAX_SLICE_BYTES // itemsize)
        return max(elements // quantum, 1) * quantum * itemsize

    def slices(self, tensor_task: TensorTask) -> Iterator[tuple[int, int]]:
        """Yield the byte ranges of a tensor's slices, in order."""
        total, step = tensor_task.view.nbytes, self.slice_bytes(tensor_task)
        for begin in range(0, total, step):
            yield begin, min(begin + step, total)

    def cost(self, tensor_task: TensorTask) -> int:
        """Return the buffer bytes of one slice of a tensor (input + output, without scratch)."""
        size = min(self.slice_bytes(tensor_task), tensor_task.view.nbytes)
        if tensor_task.group is None and tensor_task.decode is None:
            return size
        itemsize = tensor_task.view.itemsize
        return size // itemsize * tensor_task.held_itemsize(self.numbers) if itemsize else size


def least(tensor_task: TensorTask, numbers: NumberFormat) -> int:
    """Return the buffer bytes of the smallest slice worth processing (input + output, without scratch)."""
    if tensor_task.group is None and tensor_task.decode is None:
        return min(tensor_task.view.nbytes, MIN_SLICE_ELEMENTS)
    quantum = tensor_task.row_quantum(numbers)
    elements = min(tensor_task.view.numel, max(quantum, MIN_SLICE_ELEMENTS // quantum * quantum))
    return elements * tensor_task.held_itemsize(numbers)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One output shard, self-contained: a worker needs nothing but this task and the source.

    Attributes:
        name: file name of the shard.
        metadata: ``__metadata__`` of the shard, as pairs; None without metadata.
        tensor_tasks: tensors of the shard.
        groups: every scale group that the shard's bytes depend on, including those with members in other shards.
        layout: header and byte offsets of the shard if every group is finite.
        recipe: settings of the quantization.
        slicing: division of tensors into slices.
        weight_format: format of a quantized weight.
    """

    name: str
    metadata: tuple[tuple[str, str], ...] | None
    tensor_tasks: tuple[TensorTask, ...]
    groups: tuple[ScaleGroup, ...]
    layout: Header
    recipe: Recipe
    slicing: Slicing
    weight_format: WeightFormat

    @property
    def numbers(self) -> NumberFormat:
        """Number format of a quantized weight."""
        return self.weight_format.numbers

    def tensor_tasks_without(self, fused_modules: frozenset[str]) -> tuple[TensorTask, ...]:
        """Return the tensor tasks, with tensors of ``fused_modules`` copied instead of quantized."""
        home = {group.id: group.fused_module for group in self.groups}
        return tuple(
            tensor_task.unquantized
            if tensor_task.group is not None and home[tensor_task.group] in fused_modules
            else tensor_task
            for tensor_task in self.tensor_tasks
        )

    def header_without(self, unquantized: frozenset[str]) -> Header:
        """Return header and offsets of the shard if the fused modules in ``unquantized`` are copied."""
        if not unquantized:
            return self.layout
        return layout_of(self.tensor_tasks_without(unquantized), self.metadata, self.weight_format)


def layout_of(
    tensor_tasks: Iterable[TensorTask], metadata: tuple[tuple[str, str], ...] | None, weight_format: WeightFormat
) -> Header:
    """Return header and offsets of a shard of these tensors."""
    return safetensors_header.build_header(
        [output for tensor_task in tensor_tasks for output in outputs_of(tensor_task, weight_format)], metadata
    )


def outputs_of(tensor_task: TensorTask, weight_format: WeightFormat) -> tuple[Output, ...]:
    """Return the tensors that the output holds for one input tensor."""
    view, stored = tensor_task.view, tuple(scale.output for scale in tensor_task.stored_scales)
    if tensor_task.group is not None:
        return *weight_format.outputs(view), *stored
    return Output(view.name, tensor_task.decode or view.dtype, view.shape), *stored


def files_of(shard_task: ShardTask) -> frozenset[str]:
    """Return the source files of a shard's own tensors, with those of their scales.

    Files of other members of its scale groups are not included: those members are read by range, and the scale is
    compared with the scale that their own shard computes (`nemotron_fp8.planning.receipt.disagreeing`).
    """
    return files_of_views(tensor_task.view for tensor_task in shard_task.tensor_tasks)


def files_of_views(views: Iterable[TensorView]) -> frozenset[str]:
    """Return the source files that hold the bytes of some views."""
    return frozenset(extent.file for view in views for stored in view.stored for extent in stored.extents)
