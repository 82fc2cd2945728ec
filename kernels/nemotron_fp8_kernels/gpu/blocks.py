"""Amax and cast with one scale per block in one pass; also for tensors with strided rows."""

# common.py has the reasons for both lines; PLR0915: the statements are those of all variants.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806, PLR0915
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from . import configs
from .common import (
    divide,
    edges,
    encode,
    float32_bits,
    inverse,
    largest,
    magnitude,
    multiplier,
)

TWO_WARPS = tl.constexpr(2 * configs.WARP_ELEMENTS)
"""Elements of a tile from which on a program has more than one warp."""


@triton.jit
def _tile(base, row, column, stride):
    # int64: a row times a row stride can exceed 2^31 elements.
    return base + (row.to(tl.int64) * stride)[:, None] + column[None, :]


@triton.jit(do_not_specialize=["phase"])
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
    phase,
    B0: tl.constexpr,
    B1: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    GIVEN: tl.constexpr,
    CAST: tl.constexpr,
    ORIGINAL: tl.constexpr,
    EDGES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Compute the amax and the cast of one block of B0 x B1 per program, in tiles of T0 x T1 (powers of two).

    A block of one tile stays in registers between amax and cast; a larger block is read twice. ``across`` is the
    number of blocks side by side. The amax and the scale of a block are at
    ``amax_down * block row + amax_across * block column``. If both factors are 0, all blocks share one value: the
    scale of a tensor with strided rows. GIVEN and CAST are those of rows.py, ORIGINAL that of cast.py.

    ``phase``, EDGES and WIDTH are explained in common.py; each row of a tile has its own vectors. Blocks of several
    tiles need EDGES.
    """
    ONE: tl.constexpr = B0 == T0 and B1 == T1
    tl.static_assert(ONE or EDGES)
    down_at = tl.program_id(0) // across
    across_at = tl.program_id(0) % across
    top = down_at.to(tl.int64) * B0
    left = across_at.to(tl.int64) * B1
    value_at = down_at.to(tl.int64) * amax_down + across_at.to(tl.int64) * amax_across
    row = tl.arange(0, T0)
    column = tl.arange(0, T1)
    w_block = w_ptr + top * w_stride + left
    height = tl.minimum(rows - top, B0)
    width = tl.minimum(columns - left, B1)
    if B0 < 1 << 31:
        height = height.to(tl.int32)
    if B1 < 1 << 31:
        width = width.to(tl.int32)
    if CAST:
        q_block = q_ptr + top * q_stride + left
    if EDGES:
        at = phase + top * w_stride + left
        # A block without edges skips them: its rows all start and end with whole vectors.
        ragged = (w_stride % 8 + at % 8 + width % 8 + T1 % 8) > 0
        if ONE:
            x, edge = _load(w_block, at, w_stride, height, width, ragged, T0, T1)
    else:
        # One mask for whole and ragged blocks: a branch would double the code, and its merge splits registers. The
        # mask compares with the columns of the tensor: if divisible, the compiler knows it is constant over a vector.
        mask = (row < height)[:, None] & (left + column < columns)[None, :]
        x = tl.load(_tile(w_block, row, column, w_stride), mask=mask, other=0.0)
    if ORIGINAL:
        mult = tl.load(amax_ptr)
    elif GIVEN:
        bits = tl.load(amax_ptr + value_at)
        mult = multiplier(bits, ROUNDING)
    else:
        if ONE:
            best = magnitude(x)
            if EDGES:
                best_edge = magnitude(edge)
        else:
            best, best_edge = _best(w_block, at, w_stride, height, width, ragged, T0, T1)
        bits = largest(best, None)
        if EDGES:
            # Not a branch in a program of one warp: ptxas 12.8 would predicate the reduction instead, by a predicate
            # that it overwrites before, so that threads with edges would take no part in it.
            if T0 * T1 < TWO_WARPS:  # noqa: SIM114  (a constant, so that the second branch alone is in the program)
                bits = tl.maximum(bits, largest(best_edge, None))
            elif ragged:
                bits = tl.maximum(bits, largest(best_edge, None))
        bits = float32_bits(bits, w_ptr.dtype.element_ty)
        mult = multiplier(bits, ROUNDING)
    if CAST:
        if EDGES:
            if ONE:
                q = encode(x, mult, ORIGINAL), encode(edge, mult, ORIGINAL)
                _store(q_block, q, q_stride, at, w_stride, height, width, ragged, T0, T1, WIDTH)
            else:
                _cast(w_block, q_block, at, w_stride, q_stride, height, width, ragged, mult, T0, T1, ORIGINAL, WIDTH)
        else:
            tl.store(_tile(q_block, row, column, q_stride), encode(x, mult, ORIGINAL), mask=mask)
        if amax_down + amax_across > 0 or tl.program_id(0) == 0:
            tl.store(scale_ptr + value_at, inverse(mult, ROUNDING))
    else:
        tl.store(amax_ptr + value_at, bits)


@triton.jit
def _divide(at, stride, height, width, T0: tl.constexpr, T1: tl.constexpr):
    """Divide the rows of a tile at position ``at``: heads, spans and counts, each [T0, 1]."""
    row = tl.arange(0, T0)
    count = tl.where(row < height, tl.minimum(width, T1).to(tl.int32), 0)
    # Modulo 8 and in 32 bits: the positions themselves would need many registers. The compiler turns a stride of 1 into
    # a constant, which has no method ``to``.
    step = (tl.full((), 0, tl.int64) + stride) % 8
    head, span = divide((at % 8).to(tl.int32) + row * step.to(tl.int32), count)
    return head[:, None], span[:, None], count[:, None]


@triton.jit
def _load(w_tile, at, stride, height, width, ragged, T0: tl.constexpr, T1: tl.constexpr):
    """Load a tile: the whole vectors of its rows [T0, T1], and their edges [T0, 16]."""
    head, span, count = _divide(at, stride, height, width, T0, T1)
    row, column = tl.arange(0, T0), tl.arange(0, T1)
    w_rows = w_tile + (row.to(tl.int64) * stride)[:, None]
    # A hint on the row pointers would not do: for one row the compiler makes them scalars, and fails on the hint.
    pointers = tl.multiple_of(w_rows + head + column[None, :], (1, 16))
    x = tl.load(pointers, mask=column[None, :] < span, other=0.0)
    edge = tl.zeros([T0, 16], w_tile.dtype.element_ty)
    if ragged:
        lane, inside = edges(head, span, count)
        edge = tl.load(w_rows + lane, mask=inside, other=0.0)
    return x, edge


@triton.jit
def _store(
    q_tile,
    q,
    q_stride,
    at,
    w_stride,
    height,
    width,
    ragged,
    T0: tl.constexpr,
    T1: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the codes of a tile, ``q``: its whole vectors and its edges."""
    head, span, count = _divide(at, w_stride, height, width, T0, T1)
    row, column = tl.arange(0, T0), tl.arange(0, T1)
    q_rows = q_tile + (row.to(tl.int64) * q_stride)[:, None]
    pointers = tl.multiple_of(q_rows + head + column[None, :], (1, WIDTH))
    tl.store(pointers, q[0], mask=column[None, :] < span)
    if ragged:
        lane, inside = edges(head, span, count)
        tl.store(q_rows + lane, q[1], mask=inside)


@triton.jit
def _best(w_block, at, stride, height, width, ragged, T0: tl.constexpr, T1: tl.constexpr):
    """Return the elementwise maxima of magnitudes of all tiles of a block, whole vectors and edges."""
    best = magnitude(tl.zeros([T0, T1], w_block.dtype.element_ty))
    best_edge = magnitude(tl.zeros([T0, 16], w_block.dtype.element_ty))
    for i in range(0, height, T0):
        for j in range(0, width, T1):
            step = i * stride + j
            x, edge = _load(w_block + step, at + step, stride, height - i, width - j, ragged, T0, T1)
            best = tl.maximum(best, magnitude(x))
            best_edge = tl.maximum(best_edge, magnitude(edge))
    return best, best_edge


@triton.jit
def _cast(
    w_block,
    q_block,
    at,
    w_stride,
    q_stride,
    height,
    width,
    ragged,
    mult,
    T0: tl.constexpr,
    T1: tl.constexpr,
    ORIGINAL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Read all tiles of a block again, and store their codes."""
    for i in range(0, height, T0):
        for j in range(0, width, T1):
            step = i * w_stride + j
            x, edge = _load(w_block + step, at + step, w_stride, height - i, width - j, ragged, T0, T1)
            q = encode(x, mult, ORIGINAL), encode(edge, mult, ORIGINAL)
            q_tile = q_block + i * q_stride + j
            _store(q_tile, q, q_stride, at + step, w_stride, height - i, width - j, ragged, T0, T1, WIDTH)
