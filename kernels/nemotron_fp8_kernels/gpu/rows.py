"""Amax and cast with one scale per row in one pass."""

# common.py has the reasons for both lines; RUF005: Triton does not support a star in a tuple.
# ruff: noqa: ANN001, ANN201, ANN202, N803, RUF005
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"

import triton
import triton.language as tl

from .common import encode, float32_bits, inverse, largest, magnitude, multiplier


@triton.jit
def rows_kernel(
    w_ptr,
    q_ptr,
    amax_ptr,
    scale_ptr,
    rows,
    columns,
    w_stride,
    q_stride,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    HELD: tl.constexpr,
    GIVEN: tl.constexpr,
    CAST: tl.constexpr,
):
    """Compute the amaxes and the cast of ROWS rows per program, in PIECES pieces of TILE columns.

    A program has several rows only if one piece holds a row. With HELD the pieces cover the row: their loads all
    precede the first use, so that the whole row is in flight, and the pieces stay in registers until the cast.
    Without HELD the registers cannot hold the row: the program reads PIECES pieces at a time, and again for the
    cast. With GIVEN the int32 amax bits come from ``amax_ptr``. Without CAST the kernel stores only amax bits, there.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    w_rows = w_ptr + (row * w_stride)[:, None]
    if HELD:
        xs = _load(w_rows, row_mask, 0, columns, ROWS, TILE, PIECES, True, "evict_first")
    if GIVEN:
        bits = tl.load(amax_ptr + row, mask=row_mask, other=0)
    else:
        if HELD:
            best = _best(xs, PIECES)
        else:
            best = magnitude(tl.zeros([ROWS, TILE], w_ptr.dtype.element_ty))
            for start in range(0, columns, TILE * PIECES):
                parts = _load(w_rows, row_mask, start, columns, ROWS, TILE, PIECES, False, "")
                best = tl.maximum(best, _best(parts, PIECES))
        bits = float32_bits(largest(best, 1), w_ptr.dtype.element_ty)
    if CAST:
        q_rows = q_ptr + (row * q_stride)[:, None]
        mult = multiplier(bits)
        if HELD:
            _store(q_rows, xs, mult, row_mask, 0, columns, ROWS, TILE, PIECES, True)
        else:
            for start in range(0, columns, TILE * PIECES):
                parts = _load(w_rows, row_mask, start, columns, ROWS, TILE, PIECES, False, "evict_first")
                _store(q_rows, parts, mult, row_mask, start, columns, ROWS, TILE, PIECES, False)
        tl.store(scale_ptr + row, inverse(mult), mask=row_mask)
    else:
        tl.store(amax_ptr + row, bits, mask=row_mask)


@triton.jit
def _inside(row_mask, column, columns, ROWS: tl.constexpr):
    inside = (column < columns)[None, :]
    if ROWS > 1:
        inside = row_mask[:, None] & inside
    return inside


@triton.jit
def _load(
    w_rows,
    row_mask,
    start,
    columns,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    HELD: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Load PIECES pieces from column ``start`` on; only the last piece of a held row can be ragged."""
    xs = ()
    for i in tl.static_range(PIECES):
        column = start + i * TILE + tl.arange(0, TILE)
        if HELD and i < PIECES - 1:
            x = tl.load(w_rows + column[None, :], eviction_policy=POLICY)
        else:
            mask = _inside(row_mask, column, columns, ROWS)
            x = tl.load(w_rows + column[None, :], mask=mask, other=0.0, eviction_policy=POLICY)
        xs = xs + (x,)
    return xs


@triton.jit
def _best(xs, PIECES: tl.constexpr):
    best = magnitude(xs[0])
    for i in tl.static_range(1, PIECES):
        best = tl.maximum(best, magnitude(xs[i]))
    return best


@triton.jit
def _store(
    q_rows,
    xs,
    mult,
    row_mask,
    start,
    columns,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    HELD: tl.constexpr,
):
    for i in tl.static_range(PIECES):
        column = start + i * TILE + tl.arange(0, TILE)
        q = encode(xs[i], mult[:, None], False)
        if HELD and i < PIECES - 1:
            tl.store(q_rows + column[None, :], q, eviction_policy="evict_first")
        else:
            mask = _inside(row_mask, column, columns, ROWS)
            tl.store(q_rows + column[None, :], q, mask=mask, eviction_policy="evict_first")
