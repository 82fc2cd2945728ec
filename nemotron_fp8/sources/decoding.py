"""Values of codes and scales: any range of elements of a matrix, with the scales of its cells only."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from nemotron_fp8_kernels.cpu import dequantize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.checkpoint.tensor_view import Encoding


PAIRS_AT_ONCE = 1 << 16
"""Bytes of packed codes that are looked up at a time: an index takes four bytes."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of E2M1 without the sign. Source: OCP Microscaling Formats (MX), section 5.3.3."""


class Cells(NamedTuple):
    """A rectangle of elements of a matrix, dense in it, and its scales.

    Attributes:
        begin, end: elements of the matrix.
        scales_from, scales_to: scales of the matrix.
        rows: rows of the rectangle.
        height, width: rows and columns of a cell in the rectangle, which begins with a whole cell or lies in one.
    """

    begin: int
    end: int
    scales_from: int
    scales_to: int
    rows: int
    height: int
    width: int


def cells_of(rows: int, columns: int, encoding: Encoding, start: int, stop: int) -> Iterator[Cells]:
    """Yield the rectangles of elements ``[start, stop)`` of a matrix, in order.

    Whole rows are divided where a row of cells ends, and parts of a row where a cell ends.

    Args:
        rows: rows of the matrix.
        columns: columns of the matrix.
        encoding: the codes and scales.
        start, stop: elements of the matrix, row by row.
    """
    tall, wide = encoding.cell[0] or max(rows, 1), encoding.cell[1] or max(columns, 1)
    across = -(-columns // wide)
    while start < stop:
        row, first = divmod(start, columns)
        last, count = min(columns, first + stop - start), 1
        if first % wide:
            last = min(last, (first // wide + 1) * wide)
        elif not first and last == columns:
            count = min((stop - start) // columns, tall - row % tall if row % tall else rows)
        band, bands = row // tall, -(-(row + count) // tall)
        end = (row + count - 1) * columns + last
        yield Cells(
            begin=start,
            end=end,
            scales_from=band * across + first // wide,
            scales_to=(bands - 1) * across + -(-last // wide),
            rows=count,
            height=min(tall, count),
            width=min(wide, last - first),
        )
        start = end


def decode(codes: torch.Tensor, scale: torch.Tensor, cells: Cells, dtype: torch.dtype) -> torch.Tensor:
    """Return codes times scales in float32, rounded to ``dtype``, flat.

    Args:
        codes: float8_e4m3fn, flat: the elements of the rectangle.
        scale: float32, flat: its scales.
        cells: the rectangle.
        dtype: dtype of the values.
    """
    matrix = codes.view(cells.rows, -1)
    across = -(-matrix.shape[1] // cells.width)
    if scale.numel() == 1:
        values = dequantize(matrix, scale.reshape(()), dtype=dtype)
    elif cells.height == across == 1:
        values = dequantize(matrix, scale.view(-1, 1), "channel", dtype=dtype)
    else:
        values = dequantize(matrix, scale.view(-1, across), "block", (cells.height, cells.width), dtype)
    return values.flatten()


def codes_from_pairs(pairs: torch.Tensor) -> torch.Tensor:
    """Return packed E2M1 codes as E4M3 codes of the same values, flat: two for each byte, the lower half first."""
    table = _pair_table()
    found = torch.empty(pairs.numel(), dtype=torch.int16)
    for first in range(0, pairs.numel(), PAIRS_AT_ONCE):
        part = pairs[first : first + PAIRS_AT_ONCE]
        torch.index_select(table, 0, part.to(torch.int32), out=found[first : first + PAIRS_AT_ONCE])
    return found.view(torch.float8_e4m3fn)


def _pair_table() -> torch.Tensor:
    """Return the E4M3 codes of the two elements of every byte, as int16: the first one in the lower half."""
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    codes = values.to(torch.float8_e4m3fn)
    low, high = codes.repeat(16), codes.repeat_interleave(16)
    return torch.stack((low, high), dim=1).view(torch.int16).flatten()
