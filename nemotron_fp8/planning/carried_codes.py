"""Codes that a result may keep from a quantized source: each of its scales covers elements under one scale there.

The scale of the source is then repeated, so that no value changes: from one scale for a tensor to any finer coverage,
from blocks to the same or smaller blocks, from rows to rows or to 32 inputs of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.planning.number_format import E4M3

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.number_format import Coverage, NumberFormat


def may_keep_codes(view: TensorView, numbers: NumberFormat) -> bool:
    """Return True if a view has FP8 codes whose scales can be repeated for the coverage of a number format.

    The values of the scales decide, too: a format may have powers of two only.
    """
    encoding = view.encoding
    if encoding is None or encoding.elements != E4M3.dtype or numbers.element != E4M3 or not view.numel:
        return False
    sides = zip((numbers.coverage.rows, numbers.coverage.columns), encoding.cell, _sides(view), strict=True)
    return all(_within(*side) for side in sides)


def has_same_blocks(view: TensorView, coverage: Coverage) -> bool:
    """Return True if the scales of a view cover the blocks of a coverage, ragged ones at the edges included."""
    return view.encoding is not None and view.encoding.cell == (coverage.rows, coverage.columns)


def _sides(view: TensorView) -> tuple[int, int]:
    return view.rows, view.row_elements


def _within(target: int | None, source: int | None, size: int) -> bool:
    """Return True if each part of a side under a scale of the result lies in one part under a scale of the source.

    Args:
        target: elements of a part in the result; None for the whole side.
        source: elements of a part in the source; None for the whole side.
        size: elements of the side.
    """
    if source is None or source >= size:
        return True
    return target is not None and source % target == 0
