"""Dequantization: codes times scales."""

# common.py has the reasons for both lines.
# ruff: noqa: ANN001, ANN201, ANN202, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from .common import divide, edges


@triton.jit
def dequant_kernel(q_ptr, scale_ptr, w_ptr, n, TILE: tl.constexpr, EDGES: tl.constexpr, WIDTH: tl.constexpr):
    """Dequantize one tile per program of a dense tensor with one scale.

    ``w`` starts at an aligned address. EDGES and WIDTH are explained in common.py: the vectors are those of ``w``, and
    the first program has the up to 7 elements after them.
    """
    start = tl.program_id(0).to(tl.int64) * TILE
    offsets = tl.arange(0, TILE)
    scale = tl.load(scale_ptr)
    count = n
    q_tile = q_ptr + start
    if EDGES:
        n = n // 8 * 8
        q_tile = tl.multiple_of(q_tile, WIDTH)
    if start + TILE <= n:
        q = tl.load(q_tile + offsets)
        tl.store(w_ptr + start + offsets, _times(q, scale, w_ptr))
    else:
        mask = start + offsets < n
        q = tl.load(q_tile + offsets, mask=mask, other=0.0)
        tl.store(w_ptr + start + offsets, _times(q, scale, w_ptr), mask=mask)
    if EDGES and tl.program_id(0) == 0:
        last = n + tl.arange(0, 8)
        edge = tl.load(q_ptr + last, mask=last < count, other=0.0)
        tl.store(w_ptr + last, _times(edge, scale, w_ptr), mask=last < count)


@triton.jit
def dequant_rows_kernel(
    q_ptr,
    scale_ptr,
    w_ptr,
    rows,
    columns,
    q_stride,
    across,
    scale_down,
    scale_across,
    B0: tl.constexpr,
    B1: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    LONG: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    EDGES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Dequantize one tile of T0 x T1 per program; the scale of an element is at its row // B0 and column // B1.

    With ``scale_across`` 0 each row has one scale; with ``scale_down`` 0, too, the tensor has one. ``w`` is dense and
    starts at an aligned address. LONG: columns need 64 bits. ROW_SCALE: a row of a tile has one scale, which is loaded
    once. EDGES and WIDTH are explained in common.py: the vectors are those of the rows of ``w``, and the program of the
    first tile of a row has its edges.
    """
    row = (tl.program_id(0) // across).to(tl.int64) * T0 + tl.arange(0, T0)
    tile = tl.program_id(0) % across
    if LONG:
        tile = tile.to(tl.int64)
    column = (tile * T1 + tl.arange(0, T1))[None, :]
    q_rows = q_ptr + (row * q_stride)[:, None]
    w_rows = w_ptr + (row * columns)[:, None]
    scale_rows = scale_ptr + (row // B0 * scale_down)[:, None]
    if ROW_SCALE:
        scale = tl.load(scale_rows + tile * T1 // B1 * scale_across, mask=(row < rows)[:, None], other=0.0)
    if EDGES:
        count = tl.where(row < rows, columns, 0)
        head, span = divide(row * columns, count)
        head, span, count = head[:, None], span[:, None], count[:, None]
        mask = column < span
        # The hints are on all pointers: blocks.py has the reason.
        q = tl.load(tl.multiple_of(q_rows + (head + column), (1, WIDTH)), mask=mask, other=0.0)
        if not ROW_SCALE:
            scale = tl.load(scale_rows + (head + column) // B1 * scale_across, mask=mask, other=0.0)
        tl.store(tl.multiple_of(w_rows + (head + column), (1, 16)), _times(q, scale, w_ptr), mask=mask)
        if tile == 0:
            lane, inside = edges(head, span, count)
            edge = tl.load(q_rows + lane, mask=inside, other=0.0)
            scale_edge = tl.load(scale_rows + lane // B1 * scale_across, mask=inside, other=0.0)
            tl.store(w_rows + lane, _times(edge, scale_edge, w_ptr), mask=inside)
    else:
        mask = (row < rows)[:, None] & (column < columns)
        q = tl.load(q_rows + column, mask=mask, other=0.0)
        if not ROW_SCALE:
            scale = tl.load(scale_rows + column // B1 * scale_across, mask=mask, other=0.0)
        tl.store(w_rows + column, _times(q, scale, w_ptr), mask=mask)


@triton.jit
def _times(q, scale, w_ptr):
    return (q.to(tl.float32) * scale).to(w_ptr.dtype.element_ty)
