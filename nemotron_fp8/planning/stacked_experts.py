"""Stacked experts: one 3-D tensor for all routed experts of a layer, split into the 2-D names that engines load.

Every engine quantizes experts one by one, under names like ``experts.7.down_proj.weight``, each with its scale. The
split consists of views only: no tensor is copied or transposed before it is read. Names and order of the parts come
from the family (`nemotron_fp8.planning.families.StackedExperts`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.dtypes import QUANTIZABLE, nbytes
from nemotron_fp8.checkpoint.tensor_view import Extent, TensorView
from nemotron_fp8.errors import StackedExpertsError
from nemotron_fp8.planning.families import family_of

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.planning.families import Family


def split_stacks(inventory: Inventory, keep: Callable[[str], bool]) -> Inventory:
    """Return an inventory whose stacks of experts are split into views of single experts.

    All stacks of a layer are split or none: engines have one quantization for all routed experts of a layer.

    Args:
        inventory: contents of the source.
        keep: returns True for the name of a stack that is copied as one tensor.

    Raises:
        StackedExpertsError: a stack must be split, but the engines' names for its experts are unknown.
    """
    family = family_of(inventory.config)
    whole = {experts_of(view.name, family) for view in inventory.views if is_stack(view, family) and keep(view.name)}
    shards = tuple(
        replace(shard, views=tuple(part for v in shard.views for part in _parts(v, family, whole)))
        for shard in inventory.shards
    )
    return inventory if shards == inventory.shards else replace(inventory, shards=shards)


def is_stack(view: TensorView, family: Family) -> bool:
    """Return True if a tensor holds the matrices of all experts of a layer."""
    return len(view.shape) == 3 and view.dtype in QUANTIZABLE and bool(family.stack.search(view.name))


def experts_of(stack: str, family: Family) -> str:
    """Return the module that holds the experts of a stack, ``...mlp.experts``, by the stack's name."""
    found = family.stack.search(stack)
    return stack[: found.start("part") - 1] if found else stack


def _parts(view: TensorView, family: Family, whole: Container[str]) -> tuple[TensorView, ...]:
    """Return the views of the single experts of a stack; any other tensor is returned unchanged."""
    if not is_stack(view, family) or experts_of(view.name, family) in whole:
        return (view,)
    found, stacked = family.stack.search(view.name), family.stacked
    projections = dict(stacked.parts).get(found.group("part")) if stacked and found else None
    if stacked is None or found is None or projections is None:
        raise StackedExpertsError(view.name, view.shape)
    experts, rows, columns = view.shape if not stacked.transposed else (view.shape[0], view.shape[2], view.shape[1])
    if rows % len(projections):
        raise StackedExpertsError(view.name, view.shape)
    stem = view.name[: found.start("part")]
    height = rows // len(projections)
    return tuple(
        _matrix(view, stacked.transposed, expert, i * height, height, columns, f"{stem}{expert}.{projection}.weight")
        for expert in range(experts)
        for i, projection in enumerate(projections)
    )


def _matrix(
    view: TensorView, transposed: bool, expert: int, first: int, height: int, columns: int, name: str
) -> TensorView:
    """Return output rows ``[first, first + height)`` of one expert of a contiguous stack as a matrix."""
    stack = view.extents[0]
    item = view.itemsize
    base = stack.offset + expert * nbytes(view.dtype, view.shape[1:])
    if transposed:
        step = view.shape[2] * item
        extent = Extent(stack.file, base + first * item, item, height, columns * item, item=item, step=step)
    else:
        extent = Extent(stack.file, base + first * columns * item, columns * item, height, columns * item)
    return TensorView(name, view.dtype, (height, columns), (extent,))
