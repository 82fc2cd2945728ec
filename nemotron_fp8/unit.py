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


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Tensors under one amax: an order-free integer maximum over the bits of ``float32(|w|)`` of every member.

    Attributes:
        id: name of the group; for a tensor alone the tensor's own name.
        members: the views whose values the amax is taken over, in this shard or any other.
        bundle: the module that an engine fuses the members into. Groups of one bundle are quantised together or
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
        slice_bytes: bytes of input worked on at a time; whole elements where the tensor is quantised.
    """

    view: TensorView
    group: str | None
    slice_bytes: int

    def slices(self) -> Iterator[tuple[int, int]]:
        """Byte ranges of the slices, in order."""
        total = self.view.nbytes
        for begin in range(0, total, self.slice_bytes):
            yield begin, min(begin + self.slice_bytes, total)


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
        workers: threads that the buffers of the plan allow for.
    """

    name: str
    metadata: tuple[tuple[str, str], ...] | None
    works: tuple[Work, ...]
    groups: tuple[ScaleGroup, ...]
    layout: Header
    recipe: Recipe
    workers: int

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
    return safetensors_header.layout(entries, dict(metadata) if metadata is not None else None)


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
