"""The scale group, the unit of work and its receipt: the values that the stages hand to each other.

All are frozen and picklable, hold no tensor bytes, and know nothing of threads, devices or machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint import header as safetensors_header
from nemotron_fp8.checkpoint.dtypes import BITS, FP8
from nemotron_fp8.planning.layouts import BLOCK, Output, scale_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.recipe import Granularity, Recipe


MIN_SLICE_ELEMENTS = 1 << 16
"""Smaller slices cost more in calls than in work."""
MAX_SLICE_BYTES = 4 << 20
"""Larger slices fall out of the cache between cast and write, and were measured to be slower."""
COPY_BYTES = 1 << 22
"""Bytes of a slice of a tensor that is copied as it is."""


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Tensors under one amax: an order-free integer maximum over the bits of ``float32(|w|)`` of every
    member.

    Attributes:
        id: name of the group; for a tensor alone the tensor's own name.
        members: the views whose values the amax is taken over, in this shard or any other.
        bundle: the module that an engine fuses the members into. Groups of one bundle are quantized together
            or
            not at all: engines refuse a fused module of which a part is FP8.
    """

    id: str
    members: tuple[TensorView, ...]
    fused_module: str


@dataclass(frozen=True, slots=True)
class Dequantization:
    """How a tensor that is FP8 in the source becomes a plain one.

    Attributes:
        scale: its scale, float32 or bf16.
        granularity: what one scale covers.
        block: rows and columns of a block.
        dtype: safetensors name of the dtype that it becomes.
    """

    scale: TensorView
    granularity: Granularity
    block: tuple[int, int]
    dtype: str


@dataclass(frozen=True, slots=True)
class TensorTask:
    """One tensor of an output shard: quantized where it has a group, decoded where it has that, else copied.

    Attributes:
        view: its input.
        group: id of the scale group it is quantized with, or None.
        decode: how it is made plain, or None.
    """

    view: TensorView
    group: str | None = None
    decode: Dequantization | None = None

    def row_quantum(self, granularity: Granularity) -> int:
        """Elements that a slice must hold a multiple of, so that no scale's rows are torn."""
        if self.decode:
            granularity, height = self.decode.granularity, self.decode.block[0]
        else:
            height = BLOCK[0]
        if granularity == "tensor" or (self.group is None and self.decode is None):
            return 64
        return max(1, self.view.row_elements * (1 if granularity == "channel" else height))  # rows may be empty

    def out_itemsize(self) -> int:
        """Bytes of one element of output; 0 for a copy, whose output is its input."""
        return 1 if self.group is not None else BITS[self.decode.dtype] // 8 if self.decode else 0


@dataclass(frozen=True, slots=True)
class Slicing:
    """The slices that tensors are worked in, and by how many at a time: what a memory budget allows for.

    Attributes:
        workers: threads that work on slices at the same time.
        share: bytes that each has for its slice, input and output together, scratch apart.
        granularity: of the recipe: a slice holds whole rows under a scale.
    """

    workers: int
    share: int
    granularity: Granularity = "tensor"

    def slice_bytes(self, tensor_task: TensorTask) -> int:
        """Bytes of input in one slice of a tensor; whole elements, and whole rows under a scale."""
        if tensor_task.group is None and tensor_task.decode is None:
            return max(1, min(self.share, COPY_BYTES))
        itemsize, quantum = tensor_task.view.itemsize, tensor_task.row_quantum(self.granularity)
        elements = min(self.share // (itemsize + tensor_task.out_itemsize()), MAX_SLICE_BYTES // itemsize)
        return max(elements // quantum, 1) * quantum * itemsize

    def slices(self, tensor_task: TensorTask) -> Iterator[tuple[int, int]]:
        """Byte ranges of a tensor's slices, in order."""
        total, step = tensor_task.view.nbytes, self.slice_bytes(tensor_task)
        for begin in range(0, total, step):
            yield begin, min(begin + step, total)

    def cost(self, tensor_task: TensorTask) -> int:
        """Bytes that one slice of a tensor takes, input and output together, scratch apart."""
        size = min(self.slice_bytes(tensor_task), tensor_task.view.nbytes)
        return (
            size + size // tensor_task.view.itemsize * tensor_task.out_itemsize() if tensor_task.view.itemsize else size
        )


def least(tensor_task: TensorTask, granularity: Granularity) -> int:
    """Bytes that the smallest sensible slice of a tensor takes, input and output together, scratch apart."""
    if tensor_task.group is None and tensor_task.decode is None:
        return min(tensor_task.view.nbytes, MIN_SLICE_ELEMENTS)
    quantum = tensor_task.row_quantum(granularity)
    elements = min(tensor_task.view.numel, max(quantum, MIN_SLICE_ELEMENTS // quantum * quantum))
    return elements * (tensor_task.view.itemsize + tensor_task.out_itemsize())


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One output shard, self-contained: whoever holds it and the source can make the shard.

    Attributes:
        name: file name of the shard.
        metadata: ``__metadata__`` of the shard, as pairs; None where there is none.
        works: its tensors.
        groups: every scale group that the shard's bytes depend on, members in other shards included.
        layout: header and byte offsets of the shard when every group is finite.
        recipe: what to quantize and how.
        slicing: the slices it is worked in.
    """

    name: str
    metadata: tuple[tuple[str, str], ...] | None
    tensor_tasks: tuple[TensorTask, ...]
    groups: tuple[ScaleGroup, ...]
    layout: Header
    recipe: Recipe
    slicing: Slicing

    def tensor_tasks_without(self, fused_modules: frozenset[str]) -> tuple[TensorTask, ...]:
        """Return the tensors with those of ``fused_modules`` copied instead of quantized."""
        home = {group.id: group.fused_module for group in self.groups}
        return tuple(
            TensorTask(tensor_task.view)
            if tensor_task.group is not None and home[tensor_task.group] in fused_modules
            else tensor_task
            for tensor_task in self.tensor_tasks
        )

    def header_without(self, unquantized: frozenset[str]) -> Header:
        """Return header and offsets of the shard when the bundles in ``unquantized`` stay as they are."""
        return (
            layout_of(self.tensor_tasks_without(unquantized), self.metadata, self.recipe)
            if unquantized
            else self.layout
        )


def layout_of(
    tensor_tasks: Iterable[TensorTask], metadata: tuple[tuple[str, str], ...] | None, recipe: Recipe
) -> Header:
    """Return the layout of a shard of these tensors."""
    return safetensors_header.build_header(
        [output for tensor_task in tensor_tasks for output in outputs_of(tensor_task, recipe)], metadata
    )


def outputs_of(tensor_task: TensorTask, recipe: Recipe) -> tuple[Output, ...]:
    """Return what stands in the output for one tensor."""
    view = tensor_task.view
    if tensor_task.group is not None:
        return Output(view.name, FP8, view.shape), scale_of(view, recipe)
    return (Output(view.name, tensor_task.decode.dtype if tensor_task.decode else view.dtype, view.shape),)


def files_of(shard_task: ShardTask) -> frozenset[str]:
    """The source files that a unit's bytes are made from: those of its own tensors, and of the scales it decodes with.

    Partners of a scale group that lie elsewhere are not among them: they are read by range, and what they lead to is
    compared with what their own shard finds (`nemotron_fp8.planning.receipt.disagreeing`).
    """
    views = [tensor_task.view for tensor_task in shard_task.tensor_tasks] + [
        tensor_task.decode.scale for tensor_task in shard_task.tensor_tasks if tensor_task.decode
    ]
    return frozenset(extent.file for view in views for extent in view.extents)
