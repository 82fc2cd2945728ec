"""Amax and cast with one scale per block of rows and columns, in one pass; and tensors of strided rows."""

# The reasons for both lines are in common.py.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from .common import encode, float32_bits, inverse, magnitude, multiplier


@triton.jit
def _tile(base, row, column, stride):
    # int64: a row times a row stride can pass 2^31 elements.
    return base + (row.to(tl.int64) * stride)[:, None] + column[None, :]


@triton.jit
def blocks_kernel(  # noqa: PLR0915  (three kinds of input times whole and ragged blocks, on one set of tiles)
    w_ptr,
    q_ptr,
    amax_ptr,
    scale_ptr,
    rows,
    columns,
    w_stride,
    q_stride,
    across,
    amax_down,
    amax_across,
    B0: tl.constexpr,
    B1: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    GIVEN: tl.constexpr,
    CAST: tl.constexpr,
    ORIGINAL: tl.constexpr,
):
    """One block of B0 x B1 a program, in tiles of T0 x T1 (powers of two); ``across`` blocks side by side.

    A block of one tile stays in registers between amax and cast; a larger one is read again. The amax and
    scale of a block lie at ``amax_down * block row + amax_across * block column``: both 0 stand for one
    value for all, which is how a tensor of strided rows gets its one scale. GIVEN, CAST and ORIGINAL as in
    rows.py and cast.py.
    """
    down_at = tl.program_id(0) // across
    across_at = tl.program_id(0) % across
    top = down_at.to(tl.int64) * B0
    left = across_at.to(tl.int64) * B1
    value_at = down_at.to(tl.int64) * amax_down + across_at.to(tl.int64) * amax_across
    row = tl.arange(0, T0)
    column = tl.arange(0, T1)
    w_block = w_ptr + top * w_stride + left
    height = tl.minimum(rows - top, B0).to(tl.int32)
    width = tl.minimum(columns - left, B1).to(tl.int32)
    w_tile = _tile(w_block, row, column, w_stride)
    if CAST:
        q_block = q_ptr + top * q_stride + left
        q_tile = _tile(q_block, row, column, q_stride)
    ONE: tl.constexpr = B0 == T0 and B1 == T1
    if ONE:
        if height == B0 and width == B1:
            x = tl.load(w_tile)
        else:
            x = tl.load(w_tile, mask=(row < height)[:, None] & (column < width)[None, :], other=0.0)
    if ORIGINAL:
        mult = tl.load(amax_ptr)
    elif GIVEN:
        bits = tl.load(amax_ptr + value_at)
        mult = multiplier(bits)
    else:
        if ONE:
            largest = tl.max(tl.max(magnitude(x), axis=1), axis=0)
        else:
            best = tl.zeros([T0, T1], tl.int32)
            for i in range(0, height, T0):
                for j in range(0, width, T1):
                    mask = (i + row < height)[:, None] & (j + column < width)[None, :]
                    part = tl.load(_tile(w_block, i + row, j + column, w_stride), mask=mask, other=0.0)
                    best = tl.maximum(best, magnitude(part))
            largest = tl.max(tl.max(best, axis=1), axis=0)
        bits = float32_bits(largest, w_ptr.dtype.element_ty)
        mult = multiplier(bits)
    if CAST:
        if amax_down + amax_across > 0 or tl.program_id(0) == 0:
            tl.store(scale_ptr + value_at, inverse(mult))
        if ONE:
            q = encode(x, mult, ORIGINAL)
            if height == B0 and width == B1:
                tl.store(q_tile, q)
            else:
                tl.store(q_tile, q, mask=(row < height)[:, None] & (column < width)[None, :])
        else:
            for i in range(0, height, T0):
                for j in range(0, width, T1):
                    mask = (i + row < height)[:, None] & (j + column < width)[None, :]
                    part = tl.load(_tile(w_block, i + row, j + column, w_stride), mask=mask, other=0.0)
                    q_part = _tile(q_block, i + row, j + column, q_stride)
                    tl.store(q_part, encode(part, mult, ORIGINAL), mask=mask)
    else:
        tl.store(amax_ptr + value_at, bits)
