"""Stack single experts again: the views of FP8 matrices that become one 3-D tensor when they are dequantized.

transformers loads the unquantized experts of some families as stacks only (`StackedExperts.always`), as their sources
hold them. A stack of codes, and the stack of its scales, are views of the single experts: no tensor is copied.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.checkpoint.tensor_view import Extent, TensorView
from nemotron_fp8.planning.number_format import Coverage
from nemotron_fp8.planning.tasks import Dequantization

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.planning.families import Family


ROWS_PER_SCALE = 64
"""Most rows of a transposed stack under one row of its view of scales: fewer rows, more reading of the same scales."""


class Stack(NamedTuple):
    """A stack of FP8 experts, and how it is dequantized."""

    view: TensorView
    decode: Dequantization


class _Piece(NamedTuple):
    """One projection of one expert."""

    view: TensorView
    decode: Dequantization


def restack(
    inventory: Inventory, decoded: Mapping[str, Dequantization], family: Family
) -> tuple[Inventory, dict[str, Dequantization]]:
    """Return an inventory whose single experts are views of stacks, and the dequantization of every FP8 tensor.

    The manifest of the FP8 checkpoint tells which stacks its source had; without that record, a family whose sources
    always have stacks gets them again. A layer stays as it is if an expert or a projection is missing, or is not FP8.

    Args:
        inventory: contents of the source: an FP8 checkpoint.
        decoded: dequantization of every FP8 tensor, by name.
        family: model family.
    """
    stacked = family.stacked
    recorded = {family.canonical_stack(stack.name): stack for stack in inventory.stacks}
    if stacked is None or not (stacked.always or recorded):
        return inventory, dict(decoded)
    views = {view.name: view for view in inventory.views}
    stacks: dict[str, Stack] = {}
    gone: set[str] = set()
    made = dict(decoded)
    for stem, experts in _experts(decoded, family).items():
        parts = {
            part: [f"{stem}{expert}.{each}.weight" for expert in range(len(experts)) for each in projections]
            for part, projections in stacked.parts
        }
        pieces = {
            part: [_Piece(views[name], decoded[name]) for name in names if name in decoded]
            for part, names in parts.items()
        }
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
            gone.update(piece.decode.scale.name for piece in pieces[part])
            for single in parts[part]:
                del made[single]
            made[stack.view.name] = stack.decode
    shards = tuple(
        replace(
            shard,
            views=tuple(stacks[v.name].view if v.name in stacks else v for v in shard.views if v.name not in gone),
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


def _alike(pieces: list[_Piece]) -> bool:
    """Return True if all pieces have one shape and one kind of scale."""
    kinds = {(p.view.dtype, p.view.shape, p.decode.scale.dtype, p.decode.coverage, p.decode.dtype) for p in pieces}
    return len(kinds) == 1 and len(pieces[0].view.shape) == 2 and all(len(p.view.extents) == 1 for p in pieces)


def _upright(name: str, pieces: list[_Piece], parts: int) -> Stack:
    """Return the stack ``[experts, parts * N, K]`` of matrices ``[N, K]``: one below the other."""
    rows, columns = pieces[0].view.shape
    codes = tuple(
        piece.view.extents[0]._replace(row=i * rows, stride=columns, runs=rows, length=columns)
        for i, piece in enumerate(pieces)
    )
    coverage, item = pieces[0].decode.coverage, BITS[pieces[0].decode.scale.dtype] // 8
    width = 1 if coverage.columns is None else -(-columns // coverage.columns)
    # Every row gets its scales: those of a block or of a whole matrix are read once for each of its rows.
    scales: list[Extent] = []
    for i, piece in enumerate(pieces):
        (extent,) = piece.decode.scale.extents
        if coverage.rows == 1:
            scales.append(extent._replace(row=i * rows, stride=width * item, runs=rows, length=width * item))
            continue
        height = coverage.rows or rows
        for block, first in enumerate(range(0, rows, height)):
            count, start = min(height, rows - first), extent.offset + block * width * item
            scales.append(Extent(extent.file, start, 0, count, width * item, row=i * rows + first))
    covers = Coverage("channel") if coverage.columns is None else Coverage("block", (1, coverage.columns))
    shape = len(pieces) // parts, parts * rows, columns
    return _stack(name, pieces, shape, codes, (len(pieces) * rows, width), tuple(scales), covers)


def _transposed(name: str, pieces: list[_Piece], parts: int) -> Stack:
    """Return the stack ``[experts, K, parts * N]`` of matrices ``[N, K]``: the transposes side by side."""
    rows, columns = pieces[0].view.shape
    coverage, item = pieces[0].decode.coverage, BITS[pieces[0].decode.scale.dtype] // 8
    height = gcd(columns, coverage.columns or ROWS_PER_SCALE, ROWS_PER_SCALE)
    bands, across = columns // height, 1 if coverage.columns is None else -(-columns // coverage.columns)
    codes, scales = [], []
    for i, piece in enumerate(pieces):
        expert, part = divmod(i, parts)
        extent, scale = piece.view.extents[0], piece.decode.scale.extents[0]
        codes.append(Extent(extent.file, extent.offset, 1, columns, rows, expert * columns, part * rows, 1, columns))
        for band in range(bands):
            block = 0 if coverage.columns is None else band * height // coverage.columns
            tall = coverage.rows or rows
            for place, first in enumerate(range(0, rows, tall)):
                count = min(tall, rows - first)
                start = scale.offset + (place * across + block) * item
                column = (part * rows + first) * item
                if coverage.rows == 1 and place:
                    break  # one extent holds the scales of all output rows of the matrix
                length, step = (rows * item, across * item) if coverage.rows == 1 else (count * item, 0)
                scales.append(Extent(scale.file, start, 0, 1, length, expert * bands + band, column, item, step))
    width = parts * rows
    shape = len(pieces) // parts, columns, width
    covers = Coverage("block", (height, 1))
    return _stack(name, pieces, shape, tuple(codes), (len(pieces) // parts * bands, width), tuple(scales), covers)


def _stack(
    name: str,
    pieces: list[_Piece],
    shape: tuple[int, int, int],
    codes: tuple[Extent, ...],
    scale_shape: tuple[int, int],
    scales: tuple[Extent, ...],
    coverage: Coverage,
) -> Stack:
    first = pieces[0]
    scale = TensorView(f"{name}_scale", first.decode.scale.dtype, scale_shape, scales)
    view = TensorView(name, first.view.dtype, shape, codes)
    return Stack(view, Dequantization(scale, coverage, first.decode.dtype))
