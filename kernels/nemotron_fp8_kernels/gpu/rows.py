"""Amax and cast with one scale per row in one pass."""

# common.py has the reasons for both lines; RUF005: Triton does not support a star in a tuple.
# ruff: noqa: ANN001, ANN201, ANN202, N803, RUF005
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"

import triton
import triton.language as tl

from .common import divide, edges, encode, float32_bits, inverse, largest, magnitude, multiplier


@triton.jit(do_not_specialize=["phase"])
def rows_kernel(
    w_ptr,
    q_ptr,
    amax_ptr,
    scale_ptr,
    rows,
    columns,
    w_stride,
    q_stride,
    phase,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    HELD: tl.constexpr,
    GIVEN: tl.constexpr,
    CAST: tl.constexpr,
    EDGES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Compute the amaxes and the cast of ROWS rows per program, in PIECES pieces of TILE columns.

    A program has several rows only if one piece holds a row. With HELD the pieces cover the row: their loads all
    precede the first use, so that the whole row is in flight, and the pieces stay in registers until the cast.
    Without HELD the registers cannot hold the row: the program reads PIECES pieces at a time, and again for the
    cast. With GIVEN the int32 amax bits come from ``amax_ptr``. Without CAST the kernel stores only amax bits, there.

    ``phase``, EDGES and WIDTH are explained in common.py. With EDGES the pieces hold only whole vectors. Each row has
    its own vectors, since its address depends on the row.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    if EDGES:
        count = tl.where(row_mask, columns, 0)
        head, span = divide(phase + row * w_stride, count)
        w_rows = w_ptr + (row * w_stride + head)[:, None]
        lane, edge_mask = edges(head[:, None], span[:, None], count[:, None])
        ragged = tl.max(count - span, 0) > 0
        limit = span
    else:
        w_rows = w_ptr + (row * w_stride)[:, None]
        ragged = False
        limit = columns
    if HELD:
        xs = _load(w_rows, row_mask, 0, limit, ROWS, TILE, PIECES, True, EDGES, "evict_first")
    if EDGES:
        # A branch, since all rows may consist of whole vectors. The edges are loaded once and wait with the pieces.
        edge = tl.zeros([ROWS, 16], w_ptr.dtype.element_ty)
        if ragged:
            edge = tl.load(w_ptr + (row * w_stride)[:, None] + lane, mask=edge_mask, other=0.0)
    if GIVEN:
        bits = tl.load(amax_ptr + row, mask=row_mask, other=0)
    else:
        if HELD:
            best = _best(xs, PIECES)
        else:
            best = magnitude(tl.zeros([ROWS, TILE], w_ptr.dtype.element_ty))
            for start in range(0, columns, TILE * PIECES):
                parts = _load(w_rows, row_mask, start, limit, ROWS, TILE, PIECES, False, EDGES, "")
                best = tl.maximum(best, _best(parts, PIECES))
        bits = largest(best, 1)
        if EDGES and ragged:
            bits = tl.maximum(bits, largest(magnitude(edge), 1))
        bits = float32_bits(bits, w_ptr.dtype.element_ty)
    if CAST:
        q_rows = q_ptr + (row * q_stride)[:, None]
        if EDGES:
            q_rows = q_rows + head[:, None]
        mult = multiplier(bits, ROUNDING)
        if HELD:
            _store(q_rows, xs, mult, row_mask, 0, limit, ROWS, TILE, PIECES, True, EDGES, WIDTH)
        else:
            for start in range(0, columns, TILE * PIECES):
                parts = _load(w_rows, row_mask, start, limit, ROWS, TILE, PIECES, False, EDGES, "evict_first")
                _store(q_rows, parts, mult, row_mask, start, limit, ROWS, TILE, PIECES, False, EDGES, WIDTH)
        if EDGES and ragged:
            tl.store(q_ptr + (row * q_stride)[:, None] + lane, encode(edge, mult[:, None], False), mask=edge_mask)
        tl.store(scale_ptr + row, inverse(mult, ROUNDING), mask=row_mask)
    else:
        tl.store(amax_ptr + row, bits, mask=row_mask)


@triton.jit
def _inside(row_mask, column, limit, ROWS: tl.constexpr, EDGES: tl.constexpr):
    """Return the mask of a piece; ``limit`` is the number of columns, or with EDGES that of each row in vectors."""
    if EDGES:
        inside = column[None, :] < limit[:, None]
    else:
        inside = (column < limit)[None, :]
        if ROWS > 1:
            inside = row_mask[:, None] & inside
    return inside


@triton.jit
def _load(
    w_rows,
    row_mask,
    start,
    limit,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    HELD: tl.constexpr,
    EDGES: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Load PIECES pieces from column ``start`` on; only the last piece of a held row can be ragged."""
    xs = ()
    for i in tl.static_range(PIECES):
        column = start + i * TILE + tl.arange(0, TILE)
        if HELD and not EDGES and i < PIECES - 1:
            x = tl.load(w_rows + column[None, :], eviction_policy=POLICY)
        else:
            mask = _inside(row_mask, column, limit, ROWS, EDGES)
            pointers = w_rows + column[None, :]
            if EDGES:
                pointers = tl.multiple_of(pointers, (1, 16))
            x = tl.load(pointers, mask=mask, other=0.0, eviction_policy=POLICY)
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
    limit,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    HELD: tl.constexpr,
    EDGES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    for i in tl.static_range(PIECES):
        column = start + i * TILE + tl.arange(0, TILE)
        q = encode(xs[i], mult[:, None], False)
        if HELD and not EDGES and i < PIECES - 1:
            tl.store(q_rows + column[None, :], q, eviction_policy="evict_first")
        else:
            mask = _inside(row_mask, column, limit, ROWS, EDGES)
            pointers = q_rows + column[None, :]
            if EDGES:
                pointers = tl.multiple_of(pointers, (1, WIDTH))
            tl.store(pointers, q, mask=mask, eviction_policy="evict_first")
