"""Stacked experts: one 3-D tensor for all routed experts of a layer, split into the 2-D names that engines load.

Every engine quantizes experts one by one, under names like ``experts.7.down_proj.weight``, each with its scale. The
split consists of views only: no tensor is copied or transposed before it is read. Names and order of the parts come
from the family (`nemotron_fp8.planning.families.StackedExperts`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.checkpoint.dtypes import QUANTIZABLE, nbytes
from nemotron_fp8.checkpoint.inventory import CONFIG, SplitStack
from nemotron_fp8.checkpoint.tensor_view import Extent, TensorView, encoded
from nemotron_fp8.errors import StackedExpertsError
from nemotron_fp8.planning.evidence import LAYER, Evidence
from nemotron_fp8.planning.families import family_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from nemotron_fp8.checkpoint.inventory import Inventory, Shard
    from nemotron_fp8.checkpoint.tensor_view import Encoding
    from nemotron_fp8.planning.families import Family


UNKNOWN_PARTS = "a stack of experts whose parts engines do not load one by one"
LARGEST_KERNEL = 8
"""Largest side of a convolution's kernel; the sides of an expert have hundreds of elements."""


def split_stacks(inventory: Inventory, keep: Callable[[str], bool], named: Callable[[str], bool]) -> Inventory:
    """Return an inventory whose stacks of experts are split into views of single experts.

    All stacks of a layer are split or none: engines have one quantization for all routed experts of a layer. A stack
    stays one tensor if the engines' names for its experts are unknown, or the order of its sides.

    Args:
        inventory: contents of the source.
        keep: returns True for the name of a stack that is copied as one tensor.
        named: returns True for the name of a stack that the user wants to be quantized.

    Raises:
        StackedExpertsError: the user wants a stack to be quantized that cannot be split, or an expert of a stack is
            stored by itself, too.
    """
    family = family_of(inventory.config)
    layers: defaultdict[tuple[str, ...], dict[str, _Split | None]] = defaultdict(dict)
    views = inventory.views
    for view, split in _splits(views, family, Evidence(views, family, inventory.config).hidden_size):
        found = None if keep(view.name) or isinstance(split, str) else split
        if isinstance(split, str) and not keep(view.name) and named(view.name):
            raise StackedExpertsError(view.name, view.shape, split)
        layers[experts_of(view.name, family)][view.name] = found
    splits = {name: split for found in layers.values() if None not in found.values() for name, split in found.items()}
    if not splits:
        return inventory
    shards = tuple(
        replace(shard, views=tuple(part for v in shard.views for part in _parts(v, splits.get(v.name))))
        for shard in inventory.shards
    )
    _refuse_duplicates(views, splits, shards)
    packed = {view.name for view in views if view.encoding is not None and view.encoding.packed}
    done = tuple(SplitStack(name, split.transposed, name in packed) for name, split in splits.items() if split)
    return replace(inventory, shards=shards, stacks=done)


def _refuse_duplicates(
    views: Sequence[TensorView], splits: Mapping[str, _Split | None], shards: Iterable[Shard]
) -> None:
    """Raise StackedExpertsError for a stack of which an expert is stored by itself, too."""
    count = Counter(view.name for shard in shards for view in shard.views)
    if len(count) == count.total():
        return
    for view in views:
        for part in _parts(view, splits.get(view.name)):
            if view.name in splits and count[part.name] > 1:
                raise StackedExpertsError(view.name, view.shape, f"its part {part.name} is stored by itself, too")


def single_experts(inventory: Inventory) -> list[str]:
    """Return the names of all experts that stacks can be split into."""
    family = family_of(inventory.config)
    hidden = Evidence(inventory.views, family, inventory.config).hidden_size
    found = _splits(inventory.views, family, hidden)
    return [part.name for view, split in found if not isinstance(split, str) for part in _parts(view, split)]


def why_whole(views: Iterable[TensorView], family: Family, hidden: int | None) -> dict[str, str]:
    """Return the reason why a stack cannot be split, by its name; only stacks that cannot.

    Args:
        views: all tensors of a source.
        family: model family.
        hidden: size of a hidden state; None if unknown.
    """
    return {view.name: split for view, split in _splits(views, family, hidden) if isinstance(split, str)}


def is_stack(view: TensorView, family: Family) -> bool:
    """Return True if a tensor holds the matrices of all experts of a layer.

    Beside stacks that the family's record describes, that is a 3-D weight of a repeated layer that is no convolution.
    """
    if len(view.shape) != 3 or view.dtype not in QUANTIZABLE:
        return False
    if family.stack.search(family.canonical_stack(view.name)):
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
    name = family.canonical_stack(stack)
    found = family.stack.search(name)
    if found:
        return (name[: found.start("part") - 1],)
    module = stack.removesuffix(".weight")
    return f"{module.rpartition('.')[0]}.{family.experts}", module


class _Split(NamedTuple):
    """Split of a stack into single experts.

    Attributes:
        stem: start of the names of the experts.
        projections: projections of an expert, in order along the output dimension.
        transposed: True if an expert's matrix is stored ``[in, out]``.
        interleaved: True if the outputs of the projections alternate.
    """

    stem: str
    projections: tuple[str, ...]
    transposed: bool
    interleaved: bool = False


def _projections(view: TensorView, family: Family) -> tuple[str, tuple[str, ...]] | None:
    """Return the start of the names of a stack's experts, and its projections; None if they are unknown."""
    name = family.canonical_stack(view.name)
    found, stacked = family.stack.search(name), family.stacked
    if stacked is None or found is None:
        return None
    projections = dict(stacked.parts).get(found.group("part"))
    return None if projections is None else (name[: found.start("part")], projections)


def _splits(
    views: Iterable[TensorView], family: Family, hidden: int | None
) -> Iterator[tuple[TensorView, _Split | str]]:
    """Yield every stack with its split, or with the reason why it cannot be split."""
    stacks = [view for view in views if is_stack(view, family)]
    transposed = _is_transposed(stacks, family, hidden)
    for view in stacks:
        yield view, _split_of(view, family, transposed, hidden)


def _is_transposed(stacks: list[TensorView], family: Family, hidden: int | None) -> bool | None:
    """Return True if the stacks of a checkpoint are stored ``[in, out]``; None if nothing tells."""
    if family.stacked is None or family.stacked.transposed is not None:
        return None if family.stacked is None else family.stacked.transposed
    for view in stacks:
        found = _projections(view, family)
        if found is not None and (side := _hidden_side(view, hidden)) is not None:
            return side == (2 if _is_last(found[1], family) else 1)
    return None


def _is_last(projections: tuple[str, ...], family: Family) -> bool:
    """Return True for the projections whose output is a hidden state; the input of the others is one."""
    return family.stacked is not None and projections == family.stacked.parts[-1][1]


def _hidden_side(view: TensorView, hidden: int | None) -> int | None:
    """Return which side of the matrices of a stack has the size of a hidden state; None if both or none has it."""
    sides = [side for side in (1, 2) if view.shape[side] == hidden]
    return sides[0] if len(sides) == 1 else None


def _split_of(view: TensorView, family: Family, transposed: bool | None, hidden: int | None) -> _Split | str:
    """Return how a stack is split, or why it cannot be."""
    found = _projections(view, family)
    if found is None:
        return UNKNOWN_PARTS
    if not view.numel:
        return "a stack of experts without elements"
    if family.stacked is not None and family.stacked.only_packed and view.encoding is None:
        return UNKNOWN_PARTS
    if view.encoding is not None:
        transposed = False
    size = "x".join(map(str, view.shape[1:]))
    if transposed is None:
        why = f"{CONFIG} has no hidden_size" if hidden is None else f"hidden_size {hidden} is none or both of its sides"
        return f"a stack of experts of {size} in unknown order: {why}"
    expected = 2 if transposed == _is_last(found[1], family) else 1
    if _hidden_side(view, hidden) == 3 - expected:
        order = "[in, out]" if transposed else "[out, in]"
        return f"a stack of experts of {size}: not in the order {order} of its family, by hidden_size {hidden}"
    if view.shape[2 if transposed else 1] % len(found[1]):
        return f"a stack of experts of {size}: outputs do not divide among {', '.join(found[1])}"
    interleaved = family.stacked is not None and family.stacked.interleaved and len(found[1]) > 1
    if not _has_whole_cells(view, len(found[1]), interleaved):
        return f"a stack of experts of {size}: scales cover parts of several projections"
    return _Split(*found, transposed, interleaved)


def _has_whole_cells(view: TensorView, projections: int, interleaved: bool) -> bool:
    """Return True if every scale of a stack of codes covers rows of one projection only."""
    if view.encoding is None or view.encoding.cell[0] in (None, 1):
        return True
    height = view.shape[1] // projections
    return not interleaved and not height % view.encoding.cell[0]


def _parts(view: TensorView, split: _Split | None) -> tuple[TensorView, ...]:
    """Return the views of the single experts of a stack; any other tensor is returned unchanged."""
    if split is None:
        return (view,)
    experts, rows, columns = view.shape if not split.transposed else (view.shape[0], view.shape[2], view.shape[1])
    height = rows // len(split.projections)
    if view.encoding is not None:
        step = len(split.projections) if split.interleaved else 1
        return tuple(
            _encoded_rows(
                view.encoding,
                _Rows(expert * rows + i * (1 if split.interleaved else height), step, height),
                columns,
                f"{split.stem}{expert}.{name}.weight",
            )
            for expert in range(experts)
            for i, name in enumerate(split.projections)
        )
    return tuple(
        _matrix(view, split.transposed, expert, i * height, height, columns, f"{split.stem}{expert}.{name}.weight")
        for expert in range(experts)
        for i, name in enumerate(split.projections)
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


class _Rows(NamedTuple):
    """Rows of a matrix: the first one, the step from one to the next, and their number."""

    first: int
    step: int
    height: int


def _encoded_rows(encoding: Encoding, rows: _Rows, columns: int, name: str) -> TensorView:
    """Return some rows of codes as a view of their values."""
    codes = _rows(encoding.codes, rows, name, (rows.height, encoding.codes.shape[-1]))
    tall, wide = encoding.cell
    scales = encoding.scales
    if tall is not None:
        across = 1 if wide is None else -(-columns // wide)
        # A step goes with scales of single rows, and blocks begin with the first row.
        held = _Rows(rows.first // tall, rows.step, -(-rows.height // tall))
        scales = _rows(scales, held, scales.name, (held.height, across))
    return encoded(name, (rows.height, columns), replace(encoding, codes=codes, scales=scales))


def _rows(view: TensorView, rows: _Rows, name: str, shape: tuple[int, int]) -> TensorView:
    """Return some rows of a contiguous tensor, as a matrix."""
    (extent,) = view.extents
    width = nbytes(view.dtype, shape[1:])
    part = Extent(extent.file, extent.offset + rows.first * width, rows.step * width, rows.height, width)
    return TensorView(name, view.dtype, shape, (part,))
