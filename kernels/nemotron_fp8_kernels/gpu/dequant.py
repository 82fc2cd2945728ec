"""Dequantization: codes times scales."""

# common.py has the reasons for both lines.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit
def dequant_kernel(q_ptr, scale_ptr, w_ptr, n, TILE: tl.constexpr):
    """Dequantize one tile per program of a dense tensor with one scale."""
    start = tl.program_id(0).to(tl.int64) * TILE
    offsets = tl.arange(0, TILE)
    scale = tl.load(scale_ptr)
    if start + TILE <= n:
        q = tl.load(q_ptr + start + offsets)
        tl.store(w_ptr + start + offsets, (q.to(tl.float32) * scale).to(w_ptr.dtype.element_ty))
    else:
        mask = start + offsets < n
        q = tl.load(q_ptr + start + offsets, mask=mask, other=0.0)
        tl.store(w_ptr + start + offsets, (q.to(tl.float32) * scale).to(w_ptr.dtype.element_ty), mask=mask)


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
):
    """Dequantize one tile of T0 x T1 per program; the scale of an element is at its row // B0 and column // B1.

    With ``scale_across`` 0 each row has one scale; with ``scale_down`` 0, too, the tensor has one. ``w`` is dense.
    """
    row = (tl.program_id(0) // across).to(tl.int64) * T0 + tl.arange(0, T0)
    column = (tl.program_id(0) % across) * T1 + tl.arange(0, T1)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = (row // B0 * scale_down)[:, None] + (column // B1 * scale_across)[None, :]
    q = tl.load(q_ptr + (row * q_stride)[:, None] + column[None, :], mask=mask, other=0.0)
    w = q.to(tl.float32) * tl.load(scale_ptr + at, mask=mask, other=0.0)
    w_tile = w_ptr + (row * columns)[:, None] + column[None, :]
    tl.store(w_tile, w.to(w_ptr.dtype.element_ty), mask=mask)
