"""Amax and cast with one scale per block in one pass; also for tensors with strided rows."""

# common.py has the reasons for both lines.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from .common import encode, float32_bits, inverse, largest, magnitude, multiplier


@triton.jit
def _tile(base, row, column, stride):
    # int64: a row times a row stride can exceed 2^31 elements.
    return base + (row.to(tl.int64) * stride)[:, None] + column[None, :]


@triton.jit
def blocks_kernel(
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
    """Compute the amax and the cast of one block of B0 x B1 per program, in tiles of T0 x T1 (powers of two).

    A block of one tile stays in registers between amax and cast; a larger block is read twice. ``across`` is the
    number of blocks side by side. The amax and the scale of a block are at
    ``amax_down * block row + amax_across * block column``. If both factors are 0, all blocks share one value: the
    scale of a tensor with strided rows. GIVEN and CAST are those of rows.py, ORIGINAL that of cast.py.
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
    if CAST:
        q_block = q_ptr + top * q_stride + left
    ONE: tl.constexpr = B0 == T0 and B1 == T1
    if ONE:
        # One mask for whole and ragged blocks: a branch would double the code, and its merge splits registers. The
        # mask compares with the columns of the tensor: if divisible, the compiler knows it is constant over a vector.
        mask = (row < height)[:, None] & (left + column < columns)[None, :]
        x = tl.load(_tile(w_block, row, column, w_stride), mask=mask, other=0.0)
    if ORIGINAL:
        mult = tl.load(amax_ptr)
    elif GIVEN:
        bits = tl.load(amax_ptr + value_at)
        mult = multiplier(bits)
    else:
        if ONE:
            best = magnitude(x)
        else:
            best = magnitude(tl.zeros([T0, T1], w_ptr.dtype.element_ty))
            for i in range(0, height, T0):
                for j in range(0, width, T1):
                    mask = (i + row < height)[:, None] & (j + column < width)[None, :]
                    part = tl.load(_tile(w_block, i + row, j + column, w_stride), mask=mask, other=0.0)
                    best = tl.maximum(best, magnitude(part))
        bits = float32_bits(largest(best, None), w_ptr.dtype.element_ty)
        mult = multiplier(bits)
    if CAST:
        if ONE:
            tl.store(_tile(q_block, row, column, q_stride), encode(x, mult, ORIGINAL), mask=mask)
        else:
            for i in range(0, height, T0):
                for j in range(0, width, T1):
                    mask = (i + row < height)[:, None] & (j + column < width)[None, :]
                    part = tl.load(_tile(w_block, i + row, j + column, w_stride), mask=mask, other=0.0)
                    q_part = _tile(q_block, i + row, j + column, q_stride)
                    tl.store(q_part, encode(part, mult, ORIGINAL), mask=mask)
        if amax_down + amax_across > 0 or tl.program_id(0) == 0:
            tl.store(scale_ptr + value_at, inverse(mult))
    else:
        tl.store(amax_ptr + value_at, bits)
