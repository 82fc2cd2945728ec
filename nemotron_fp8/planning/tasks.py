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
        bundle: the module that an engine fuses the members into. Groups of one bundle are quantised together
            or
            not at all: engines refuse a fused module of which a part is FP8.
    """

    id: str
    members: tuple[TensorView, ...]
    bundle: str


@dataclass(frozen=True, slots=True)
class Decode:
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
class Work:
    """One tensor of an output shard: quantised where it has a group, decoded where it has that, else copied.

    Attributes:
        view: its input.
        group: id of the scale group it is quantised with, or None.
        decode: how it is made plain, or None.
    """

    view: TensorView
    group: str | None = None
    decode: Decode | None = None

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

    def slice_bytes(self, work: Work) -> int:
        """Bytes of input in one slice of a tensor; whole elements, and whole rows under a scale."""
        if work.group is None and work.decode is None:
            return max(1, min(self.share, COPY_BYTES))
        itemsize, quantum = work.view.itemsize, work.row_quantum(self.granularity)
        elements = min(self.share // (itemsize + work.out_itemsize()), MAX_SLICE_BYTES // itemsize)
        return max(elements // quantum, 1) * quantum * itemsize

    def slices(self, work: Work) -> Iterator[tuple[int, int]]:
        """Byte ranges of a tensor's slices, in order."""
        total, step = work.view.nbytes, self.slice_bytes(work)
        for begin in range(0, total, step):
            yield begin, min(begin + step, total)

    def cost(self, work: Work) -> int:
        """Bytes that one slice of a tensor takes, input and output together, scratch apart."""
        size = min(self.slice_bytes(work), work.view.nbytes)
        return size + size // work.view.itemsize * work.out_itemsize() if work.view.itemsize else size


def least(work: Work, granularity: Granularity) -> int:
    """Bytes that the smallest sensible slice of a tensor takes, input and output together, scratch apart."""
    if work.group is None and work.decode is None:
        return min(work.view.nbytes, MIN_SLICE_ELEMENTS)
    quantum = work.row_quantum(granularity)
    elements = min(work.view.numel, max(quantum, MIN_SLICE_ELEMENTS // quantum * quantum))
    return elements * (work.view.itemsize + work.out_itemsize())


@dataclass(frozen=True, slots=True)
class Unit:
    """One output shard, self-contained: whoever holds it and the source can make the shard.

    Attributes:
        name: file name of the shard.
        metadata: ``__metadata__`` of the shard, as pairs; None where there is none.
        works: its tensors.
        groups: every scale group that the shard's bytes depend on, members in other shards included.
        layout: header and byte offsets of the shard when every group is finite.
        recipe: what to quantise and how.
        slicing: the slices it is worked in.
    """

    name: str
    metadata: tuple[tuple[str, str], ...] | None
    works: tuple[Work, ...]
    groups: tuple[ScaleGroup, ...]
    layout: Header
    recipe: Recipe
    slicing: Slicing

    def keeping(self, bundles: frozenset[str]) -> tuple[Work, ...]:
        """Return the tensors with those of ``bundles`` copied instead of quantised."""
        home = {group.id: group.bundle for group in self.groups}
        return tuple(
            Work(work.view) if work.group is not None and home[work.group] in bundles else work for work in self.works
        )

    def relayout(self, kept: frozenset[str]) -> Header:
        """Return header and offsets of the shard when the bundles in ``kept`` stay as they are."""
        return layout_of(self.keeping(kept), self.metadata, self.recipe) if kept else self.layout


def layout_of(works: Iterable[Work], metadata: tuple[tuple[str, str], ...] | None, recipe: Recipe) -> Header:
    """Return the layout of a shard of these tensors."""
    return safetensors_header.layout([output for work in works for output in outputs_of(work, recipe)], metadata)


def outputs_of(work: Work, recipe: Recipe) -> tuple[Output, ...]:
    """Return what stands in the output for one tensor."""
    view = work.view
    if work.group is not None:
        return Output(view.name, FP8, view.shape), scale_of(view, recipe)
    return (Output(view.name, work.decode.dtype if work.decode else view.dtype, view.shape),)


def files_of(unit: Unit) -> frozenset[str]:
    """The source files that a unit's bytes are made from: those of its own tensors, and of the scales it decodes with.

    Partners of a scale group that lie elsewhere are not among them: they are read by range, and what they lead to is
    compared with what their own shard finds (`nemotron_fp8.planning.receipt.disagreeing`).
    """
    views = [work.view for work in unit.works] + [work.decode.scale for work in unit.works if work.decode]
    return frozenset(extent.file for view in views for extent in view.extents)
