"""Amax and cast with one scale per row, in one pass."""

# The reasons for both lines are in common.py.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from .common import encode, float32_bits, inverse, magnitude, multiplier


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
    SINGLE: tl.constexpr,
    GIVEN: tl.constexpr,
    CAST: tl.constexpr,
):
    """ROWS rows a program, TILE columns at a time.

    With SINGLE a row fits one tile and stays in registers; otherwise it is read again for the cast, out of
    L1 or L2 (one row a program in flight). GIVEN takes int32 amax bits from ``amax_ptr``; without CAST they
    are stored there and nothing else is.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    column = tl.arange(0, TILE)
    w_rows = w_ptr + (row * w_stride)[:, None]
    if CAST:
        q_rows = q_ptr + (row * q_stride)[:, None]
    full = columns // TILE * TILE
    if SINGLE:
        mask = row_mask[:, None] & (column < columns)[None, :]
        x = tl.load(w_rows + column[None, :], mask=mask, other=0.0)
    if GIVEN:
        bits = tl.load(amax_ptr + row, mask=row_mask, other=0)
    else:
        if SINGLE:
            largest = tl.max(magnitude(x), axis=1)
        else:
            best = tl.zeros([ROWS, TILE], tl.int32)
            for start in range(0, full, TILE):
                part = tl.load(w_rows + (start + column)[None, :], mask=row_mask[:, None], other=0.0)
                best = tl.maximum(best, magnitude(part))
            if full < columns:
                mask = row_mask[:, None] & (full + column < columns)[None, :]
                part = tl.load(w_rows + (full + column)[None, :], mask=mask, other=0.0)
                best = tl.maximum(best, magnitude(part))
            largest = tl.max(best, axis=1)
        bits = float32_bits(largest, w_ptr.dtype.element_ty)
    if CAST:
        mult = multiplier(bits)
        tl.store(scale_ptr + row, inverse(mult), mask=row_mask)
        if SINGLE:
            tl.store(q_rows + column[None, :], encode(x, mult[:, None], False), mask=mask)
        else:
            for start in range(0, full, TILE):
                part = tl.load(w_rows + (start + column)[None, :], mask=row_mask[:, None], other=0.0)
                tl.store(
                    q_rows + (start + column)[None, :],
                    encode(part, mult[:, None], False),
                    mask=row_mask[:, None],
                )
            if full < columns:
                mask = row_mask[:, None] & (full + column < columns)[None, :]
                part = tl.load(w_rows + (full + column)[None, :], mask=mask, other=0.0)
                tl.store(q_rows + (full + column)[None, :], encode(part, mult[:, None], False), mask=mask)
    else:
        tl.store(amax_ptr + row, bits, mask=row_mask)
