"""Amax of a dense tensor as an integer maximum."""

# common.py has the reasons for both lines.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .common import divide, edges, float32_bits, largest, magnitude


@triton.jit(do_not_specialize=["phase"])
def amax_kernel(
    w_ptr,
    amax_ptr,
    n,
    phase,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    POLICY: tl.constexpr,
    PDL: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Raise ``amax_ptr[0]`` (int32 bits of float32) to the amax of ``TILES * TILE`` elements per program.

    ``POLICY`` is the L2 eviction policy of the loads: ``evict_last`` keeps the elements for the cast. ``phase``
    and EDGES are explained in common.py; the first program computes the edges.
    """
    if PDL:
        # Programs of the cast may start as those of this kernel finish. They wait for its memory themselves.
        gdc_launch_dependents()
    start = tl.program_id(0).to(tl.int64) * (TILE * TILES)
    offsets = tl.arange(0, TILE)
    best = magnitude(tl.zeros([TILE], w_ptr.dtype.element_ty))
    count = n
    if EDGES:
        head, n = divide(phase, n)
        w_all = w_ptr
        w_ptr = tl.multiple_of(w_ptr + head, 16)
    if start + TILE * TILES <= n:
        for i in tl.static_range(TILES):
            x = tl.load(w_ptr + start + i * TILE + offsets, eviction_policy=POLICY)
            best = tl.maximum(best, magnitude(x))
    else:
        for i in range(TILES):
            mask = start + i * TILE + offsets < n
            x = tl.load(w_ptr + start + i * TILE + offsets, mask=mask, other=0.0)
            best = tl.maximum(best, magnitude(x))
    bits = largest(best, 0)
    if EDGES and tl.program_id(0) == 0:
        at, inside = edges(head, n, count)
        bits = tl.maximum(bits, largest(magnitude(tl.load(w_all + at, mask=inside, other=0.0)), 0))
    tl.atomic_max(amax_ptr, float32_bits(bits, w_ptr.dtype.element_ty), sem="relaxed")
