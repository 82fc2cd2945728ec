"""The scale group, the unit of work and its receipt: the values that the stages hand to each other.

All are frozen and picklable, hold no tensor bytes, and know nothing of threads, devices or machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8 import header as safetensors_header
from nemotron_fp8.layouts import outputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.header import Header
    from nemotron_fp8.recipe import Recipe
    from nemotron_fp8.view import TensorView

MIN_SLICE_ELEMENTS = 1 << 16
"""Smaller slices cost more in calls than in work."""
MAX_SLICE_BYTES = 32 << 20
"""Larger slices gain nothing."""
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
class Work:
    """One tensor of an output shard.

    Attributes:
        view: its input.
        group: id of the scale group it is quantised with; None where it is copied.
    """

    view: TensorView
    group: str | None


@dataclass(frozen=True, slots=True)
class Slicing:
    """The slices that tensors are worked in, and by how many at a time: what a memory budget allows for.

    Attributes:
        workers: threads that work on slices at the same time.
        share: bytes that each has for its slice, input and output together, scratch apart.
    """

    workers: int
    share: int

    def slice_bytes(self, view: TensorView, quantise: bool) -> int:
        """Bytes of input in one slice of a tensor; whole elements where it is quantised."""
        if not quantise:
            return max(1, min(self.share, COPY_BYTES))
        elements = min(self.share // (view.itemsize + 1), MAX_SLICE_BYTES // view.itemsize)
        return max(elements // 64 * 64, 1) * view.itemsize

    def slices(self, view: TensorView, quantise: bool) -> Iterator[tuple[int, int]]:
        """Byte ranges of a tensor's slices, in order."""
        total, step = view.nbytes, self.slice_bytes(view, quantise)
        for begin in range(0, total, step):
            yield begin, min(begin + step, total)

    def cost(self, view: TensorView, quantise: bool) -> int:
        """Bytes that one slice of a tensor takes, input and output together, scratch apart."""
        size = min(self.slice_bytes(view, quantise), view.nbytes)
        return size + size // view.itemsize if quantise else size


def least(view: TensorView, quantise: bool) -> int:
    """Bytes that the smallest sensible slice of a tensor takes, input and output together, scratch apart."""
    if not quantise:
        return min(view.nbytes, MIN_SLICE_ELEMENTS)
    return min(view.numel, MIN_SLICE_ELEMENTS) * (view.itemsize + 1)


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

    def relayout(self, kept: frozenset[str]) -> Header:
        """Return header and offsets of the shard when the bundles in ``kept`` stay as they are."""
        if not kept:
            return self.layout
        bundles = {group.id: group.bundle for group in self.groups}
        return layout_of(
            [(work.view, work.group is not None and bundles[work.group] not in kept) for work in self.works],
            self.metadata,
            self.recipe,
        )


def layout_of(
    tensors: list[tuple[TensorView, bool]], metadata: tuple[tuple[str, str], ...] | None, recipe: Recipe
) -> Header:
    """Return the layout of a shard of these tensors, each with whether it is quantised."""
    entries = [entry for view, quantised in tensors for entry in outputs(view, quantised, recipe)]
    return safetensors_header.layout(entries, metadata)


@dataclass(frozen=True, slots=True)
class NonFinite:
    """NaN and Inf found in a tensor.

    Attributes:
        tensor: its name.
        count: how many of its elements are NaN or Inf.
        position: index of the first of them, one number a dimension.
        value: ``"nan"``, ``"inf"`` or ``"-inf"``, the first of them.
    """

    tensor: str
    count: int
    position: tuple[int, ...]
    value: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a unit.

    Attributes:
        name: file name of the shard.
        size: its bytes.
        sha256: hexadecimal digest of its bytes; None where digests are off.
        kept: bundles that stay as they are because a member is not finite.
        nonfinite: the tensors of this shard's groups that hold NaN or Inf.
    """

    name: str
    size: int
    sha256: str | None
    kept: frozenset[str] = frozenset()
    nonfinite: tuple[NonFinite, ...] = ()
