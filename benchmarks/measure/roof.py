"""The roof: a kernel that only reads an element and writes one byte, in several forms, of which the fastest counts."""

# Triton compiles the function from its source; no Python annotation describes its parameters.
# ruff: noqa: ANN001, ANN201, N803

import triton
import triton.language as tl


@triton.jit
def move_kernel(w_ptr, q_ptr, n, TILE: tl.constexpr, EIGHT: tl.constexpr, POLICY: tl.constexpr):
    """Write the low byte of every integer; one tile per program.

    With EIGHT a thread moves 8 adjacent elements, so that its accesses leave no gap; else 16. ``POLICY`` is the L2
    eviction policy of loads and stores.
    """
    start = tl.program_id(0).to(tl.int64) * TILE
    offsets = start + tl.arange(0, TILE)
    stores = start + tl.max_contiguous(tl.arange(0, TILE), [8]) if EIGHT else offsets
    if start + TILE <= n:
        moved = tl.load(w_ptr + offsets, eviction_policy=POLICY)
        tl.store(q_ptr + stores, moved.to(tl.uint8), eviction_policy=POLICY)
    else:
        moved = tl.load(w_ptr + offsets, mask=offsets < n)
        tl.store(q_ptr + stores, moved.to(tl.uint8), mask=stores < n)
