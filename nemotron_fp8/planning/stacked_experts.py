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
from nemotron_fp8.planning.evidence import LAYER
from nemotron_fp8.planning.families import family_of

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.planning.families import Family


LARGEST_KERNEL = 8
"""Largest side of a convolution's kernel; the sides of an expert have hundreds of elements."""


def split_stacks(inventory: Inventory, keep: Callable[[str], bool], named: Callable[[str], bool]) -> Inventory:
    """Return an inventory whose stacks of experts are split into views of single experts.

    All stacks of a layer are split or none: engines have one quantization for all routed experts of a layer. A stack
    stays one tensor if the engines' names for its experts are unknown.

    Args:
        inventory: contents of the source.
        keep: returns True for the name of a stack that is copied as one tensor.
        named: returns True for the name of a stack that the user wants to be quantized.

    Raises:
        StackedExpertsError: the user wants a stack to be quantized whose experts have no known names.
    """
    family = family_of(inventory.config)
    stacks = [view for view in inventory.views if is_stack(view, family)]
    whole: set[tuple[str, ...]] = set()
    for view in stacks:
        kept = keep(view.name)
        if not kept and _projections(view, family) is None:
            if named(view.name):
                raise StackedExpertsError(view.name, view.shape)
            kept = True
        if kept:
            whole.add(experts_of(view.name, family))
    shards = tuple(
        replace(shard, views=tuple(part for v in shard.views for part in _parts(v, family, whole)))
        for shard in inventory.shards
    )
    return inventory if shards == inventory.shards else replace(inventory, shards=shards)


def is_stack(view: TensorView, family: Family) -> bool:
    """Return True if a tensor holds the matrices of all experts of a layer.

    Beside stacks that the family's record describes, that is a 3-D weight of a repeated layer that is no convolution.
    """
    if len(view.shape) != 3 or view.dtype not in QUANTIZABLE:
        return False
    if family.stack.search(view.name):
        return True
    return (
        LAYER.match(view.name) is not None
        and (view.name.endswith(".weight") or "expert" in view.name)
        and min(view.shape[1:]) > LARGEST_KERNEL
        and not any(rule.matches(f"{view.name.removesuffix('.weight')}.weight") for rule in family.unquantized)
    )


def experts_of(stack: str, family: Family) -> tuple[str, ...]:
    """Return the names under which engines may look up the module of a stack, by the stack's name.

    That is the module which holds a stack named ``...experts.down_proj``. Beside one of another name,
    ``block_sparse_moe.input_linear``, engines build a module ``experts``.
    """
    found = family.stack.search(stack)
    if found:
        return (stack[: found.start("part") - 1],)
    module = stack.removesuffix(".weight")
    return f"{module.rpartition('.')[0]}.{family.experts}", module


def _projections(view: TensorView, family: Family) -> tuple[str, ...] | None:
    """Return the projections in a stack, in order along the output dimension; None if they are unknown."""
    found, stacked = family.stack.search(view.name), family.stacked
    projections = dict(stacked.parts).get(found.group("part")) if stacked and found else None
    if stacked is None or projections is None:
        return None
    return None if view.shape[2 if stacked.transposed else 1] % len(projections) else projections


def _parts(view: TensorView, family: Family, whole: Container[tuple[str, ...]]) -> tuple[TensorView, ...]:
    """Return the views of the single experts of a stack; any other tensor is returned unchanged."""
    if not is_stack(view, family) or experts_of(view.name, family) in whole:
        return (view,)
    found, stacked, projections = family.stack.search(view.name), family.stacked, _projections(view, family)
    if stacked is None or found is None or projections is None:
        raise StackedExpertsError(view.name, view.shape)
    experts, rows, columns = view.shape if not stacked.transposed else (view.shape[0], view.shape[2], view.shape[1])
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
