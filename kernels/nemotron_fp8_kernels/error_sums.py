"""Quantization error of a matrix as sums over each of its rows: the specification, in plain torch.

The order of the additions is part of the specification, so that the sums are the same on every machine. A row is
divided into pieces of `PIECE` columns. Element i of a piece is added to lane ``i % LANES``, one after the other. Then
the lanes of a piece are added in their order, and the pieces of the row. All sums are float64.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from .formats import DEFAULT_BLOCK, Granularity
from .scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator

LANES = 16
"""Partial sums of a piece."""

PIECE = 1024
"""Columns of a piece."""

AT_A_TIME = 1 << 18
"""Elements that are measured at a time."""


_scratch = Scratch()


class ErrorSums(NamedTuple):
    """Sums over the rows of a matrix, each of shape ``[rows]``.

    Attributes:
        signal: float64 sums of the squares of the values.
        noise: float64 sums of the squares of the errors; an error is ``float32(code * scale) - value``, in float64.
        max_abs_error: float64, the largest errors; NaN if an error is NaN.
        clamped: int64 numbers of values whose product with the multiplier exceeds the largest code.
        flushed_to_zero: int64 numbers of nonzero values with a code of 0.
    """

    signal: torch.Tensor
    noise: torch.Tensor
    max_abs_error: torch.Tensor
    clamped: torch.Tensor
    flushed_to_zero: torch.Tensor


def error_sums(
    w: torch.Tensor,
    q: torch.Tensor,
    mult: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
) -> ErrorSums:
    """Return the error sums of the rows of a matrix and its codes.

    Args:
        w: bf16, fp16 or fp32 of shape ``[rows, columns]``.
        q: 8-bit floats of the same shape.
        mult: multipliers before the cast, of the shape of the scales, in the dtype of the product.
        scale: float32 scales.
        granularity: elements that share a scale.
        block: rows and columns of a block.
    """
    rows, columns = w.shape
    totals = torch.zeros(2, rows, dtype=torch.float64)
    worst = torch.zeros(rows, dtype=torch.float64)
    counts = torch.zeros(2, rows, dtype=torch.int64)
    most = torch.finfo(q.dtype).max
    width = min(columns, AT_A_TIME)
    for span, here in _parts(rows, columns, max(1, AT_A_TIME // max(1, width)), width):
        values, codes = w[span, here], q[span, here]
        shape = values.shape
        flags, others = _scratch.shaped(torch.bool, shape), _scratch.shaped(torch.bool, shape, 1)
        factor, unit = (_expand(x, span, here, granularity, block) for x in (mult, scale))
        product = _scratch.shaped(values.dtype if factor.dtype == values.dtype else torch.float32, shape)
        torch.gt(product.copy_(values).mul_(factor).abs_(), most, out=flags)
        counts[0, span] += flags.sum(1)
        decoded = _decoded(codes)
        torch.eq(decoded, 0, out=flags)
        torch.ne(values, 0, out=others)
        counts[1, span] += flags.logical_and_(others).sum(1)
        # Rows of whole pieces: zeros add nothing to a sum.
        padded = torch.Size((shape[0], -(-shape[1] // PIECE) * PIECE))
        value, error = (_scratch.shaped(torch.float64, padded, which) for which in (0, 1))
        for rest in (value, error):
            rest[:, shape[1] :] = 0.0
        value[:, : shape[1]] = values
        error[:, : shape[1]] = decoded.mul_(unit)
        error.sub_(value)
        worst[span] = torch.maximum(worst[span], torch.maximum(error.amax(1), error.amin(1).neg_()))
        for total, squares in zip(totals, (value.square_(), error.square_()), strict=True):
            for piece in _pieces(squares).unbind(1):
                total[span] += piece
    return ErrorSums(totals[0], totals[1], worst.abs_(), counts[0], counts[1])  # no zero has a sign


def _decoded(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of codes in scratch: float32, of their shape."""
    index = _scratch.shaped(torch.int32, codes.shape).copy_(codes.view(torch.uint8))
    found = _scratch.shaped(torch.float32, codes.shape, 1)
    torch.index_select(_values(codes.dtype), 0, index.view(-1), out=found.view(-1))
    return found


@cache
def _values(dtype: torch.dtype) -> torch.Tensor:
    """Return the value of every code of an 8-bit dtype: a lookup takes a fifth of the time of torch's conversion."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _parts(rows: int, columns: int, height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield ranges of rows and columns, the columns of each row in order and from the first of a piece on."""
    for top in range(0, rows if columns else 0, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _expand(
    scales: torch.Tensor, span: slice, here: slice, granularity: Granularity, block: tuple[int, int]
) -> torch.Tensor:
    """Return the scales of a part of a matrix, to broadcast against it."""
    if granularity == "tensor":
        return scales.reshape(())
    if granularity == "channel":
        return scales[span]
    rows, columns = (
        torch.arange(part.start, part.stop) // side for part, side in zip((span, here), block, strict=True)
    )
    return scales[rows[:, None], columns]


def _pieces(squares: torch.Tensor) -> torch.Tensor:
    """Return the sums of the pieces of rows ``[rows, columns]``, whole pieces: ``[rows, pieces]``."""
    rows, count = squares.shape[0], squares.shape[1] // PIECE
    # An operation adds one step of all pieces, so that the order within each is that of the specification.
    lanes = squares.new_zeros(rows * count, LANES)
    for step in squares.view(rows * count, PIECE // LANES, LANES).unbind(1):
        lanes += step
    total = squares.new_zeros(rows * count)
    for lane in lanes.unbind(1):
        total += lane
    return total.view(rows, count)
