"""Stack single experts again: the views of FP8 matrices that become one 3-D tensor when they are dequantized.

transformers loads the unquantized experts of some families as stacks only (`StackedExperts.always`), as their sources
hold them. A stack of codes, and the stack of its scales, are views of the single experts: no tensor is copied.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.checkpoint.dtypes import FLOAT8
from nemotron_fp8.checkpoint.tensor_view import Encoding, Extent, TensorView, encoded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.planning.families import Family


ROWS_PER_SCALE = 64
"""Most rows of a transposed stack under one row of its view of scales: fewer rows, more reading of the same scales."""


class _Piece(NamedTuple):
    """One projection of one expert: its codes, its scales, and the cell of a scale."""

    codes: TensorView
    scales: TensorView
    cell: tuple[int | None, int | None]


def restack(
    inventory: Inventory, decoded: Mapping[str, TensorView], family: Family
) -> tuple[Inventory, dict[str, TensorView]]:
    """Return an inventory whose single experts are views of stacks, and the view of values of every FP8 tensor.

    The manifest of the FP8 checkpoint tells which stacks its source had; without that record, a family whose sources
    always have stacks gets them again. A layer stays as it is if an expert or a projection is missing, or is not FP8.

    Args:
        inventory: contents of the source: an FP8 checkpoint.
        decoded: view of the values of every FP8 tensor, by name.
        family: model family.
    """
    stacked = family.stacked
    recorded = {family.canonical_stack(stack.name): stack for stack in inventory.stacks}
    if stacked is None or not (stacked.always or recorded):
        return inventory, dict(decoded)
    stacks: dict[str, TensorView] = {}
    gone: set[str] = set()
    made = dict(decoded)
    for stem, experts in _experts(decoded, family).items():
        parts = {
            part: [f"{stem}{expert}.{each}.weight" for expert in range(len(experts)) for each in projections]
            for part, projections in stacked.parts
        }
        pieces = {part: [_piece(decoded[name]) for name in names if name in decoded] for part, names in parts.items()}
        if not all(len(pieces[part]) == len(names) and _alike(pieces[part]) for part, names in parts.items()):
            continue
        for part, projections in stacked.parts:
            known = recorded.get(f"{stem}{part}")
            if not (known or stacked.always):
                continue
            transposed = known.transposed if known else stacked.transposed is not False
            build = _transposed if transposed else _upright
            name = known.name if known else stacked.published(f"{stem}{part}")
            stack = build(name, pieces[part], len(projections))
            first, *others = parts[part]
            stacks[first] = stack
            gone.update(others)
            gone.update(piece.scales.name for piece in pieces[part])
            for single in parts[part]:
                del made[single]
            made[stack.name] = stack
    shards = tuple(
        replace(
            shard,
            views=tuple(stacks.get(v.name, v) for v in shard.views if v.name not in gone),
        )
        for shard in inventory.shards
    )
    return replace(inventory, shards=shards), made


def _experts(decoded: Iterable[str], family: Family) -> dict[str, set[int]]:
    """Return the numbers of the experts by the start of their names; only where they count from 0 without a gap."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for name in decoded:
        if place := family.routed.search(name):
            number = place.group().strip(".").rpartition(".")[2]
            found[name[: place.end() - len(number) - 1]].add(int(number))
    return {stem: numbers for stem, numbers in found.items() if numbers == set(range(len(numbers)))}


def _piece(view: TensorView) -> _Piece:
    assert view.encoding is not None
    return _Piece(view.encoding.codes, view.encoding.scales, view.encoding.cell)


def _alike(pieces: list[_Piece]) -> bool:
    """Return True if all pieces are FP8 of one shape and one kind of scale."""
    kinds = {(piece.codes.dtype, piece.codes.shape, piece.scales.dtype, piece.cell) for piece in pieces}
    if len(kinds) != 1 or pieces[0].codes.dtype not in FLOAT8:
        return False
    return len(pieces[0].codes.shape) == 2 and all(len(piece.codes.extents) == 1 for piece in pieces)


def _upright(name: str, pieces: list[_Piece], parts: int) -> TensorView:
    """Return the stack ``[experts, parts * N, K]`` of matrices ``[N, K]``: one below the other."""
    rows, columns = pieces[0].codes.shape
    codes = tuple(
        piece.codes.extents[0]._replace(row=i * rows, stride=columns, runs=rows, length=columns)
        for i, piece in enumerate(pieces)
    )
    (tall, wide), item = pieces[0].cell, pieces[0].scales.itemsize
    width = 1 if wide is None else -(-columns // wide)
    # Every row gets its scales: those of a block or of a whole matrix are read once for each of its rows.
    scales: list[Extent] = []
    for i, piece in enumerate(pieces):
        (extent,) = piece.scales.extents
        if tall == 1:
            scales.append(extent._replace(row=i * rows, stride=width * item, runs=rows, length=width * item))
            continue
        height = tall or rows
        for block, first in enumerate(range(0, rows, height)):
            count, start = min(height, rows - first), extent.offset + block * width * item
            scales.append(Extent(extent.file, start, 0, count, width * item, row=i * rows + first))
    shape = len(pieces) // parts, parts * rows, columns
    return _stack(name, pieces, shape, codes, (len(pieces) * rows, width), tuple(scales), (1, wide))


def _transposed(name: str, pieces: list[_Piece], parts: int) -> TensorView:
    """Return the stack ``[experts, K, parts * N]`` of matrices ``[N, K]``: the transposes side by side."""
    rows, columns = pieces[0].codes.shape
    (cell_rows, wide), item = pieces[0].cell, pieces[0].scales.itemsize
    height = gcd(columns, wide or ROWS_PER_SCALE, ROWS_PER_SCALE)
    bands, across = columns // height, 1 if wide is None else -(-columns // wide)
    codes, scales = [], []
    for i, piece in enumerate(pieces):
        expert, part = divmod(i, parts)
        extent, scale = piece.codes.extents[0], piece.scales.extents[0]
        codes.append(Extent(extent.file, extent.offset, 1, columns, rows, expert * columns, part * rows, 1, columns))
        for band in range(bands):
            block = 0 if wide is None else band * height // wide
            tall = cell_rows or rows
            for place, first in enumerate(range(0, rows, tall)):
                count = min(tall, rows - first)
                start = scale.offset + (place * across + block) * item
                column = (part * rows + first) * item
                if cell_rows == 1 and place:
                    break  # one extent holds the scales of all output rows of the matrix
                length, step = (rows * item, across * item) if cell_rows == 1 else (count * item, 0)
                scales.append(Extent(scale.file, start, 0, 1, length, expert * bands + band, column, item, step))
    width = parts * rows
    shape = len(pieces) // parts, columns, width
    return _stack(name, pieces, shape, tuple(codes), (len(pieces) // parts * bands, width), tuple(scales), (height, 1))


def _stack(
    name: str,
    pieces: list[_Piece],
    shape: tuple[int, int, int],
    codes: tuple[Extent, ...],
    scale_shape: tuple[int, int],
    scales: tuple[Extent, ...],
    cell: tuple[int | None, int | None],
) -> TensorView:
    first = pieces[0]
    scale = TensorView(f"{name}_scale", first.scales.dtype, scale_shape, scales)
    view = TensorView(name, first.codes.dtype, shape, codes)
    return encoded(name, shape, Encoding(first.codes.dtype, view, scale, cell))
