"""Largest absolute value of a dense tensor, as an integer maximum."""

# The reasons for both lines are in common.py.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .common import float32_bits, magnitude


@triton.jit
def amax_kernel(w_ptr, amax_ptr, n, hot_from, TILE: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr):
    """Raise ``amax_ptr[0]`` (int32 bits of float32) to the amax of ``TILES * TILE`` elements a program.

    Elements from ``hot_from`` on are asked to stay in L2, where the cast finds them; the others are not.
    """
    if PDL:
        # The cast's blocks may take their places as this kernel's leave; they wait for its memory themselves.
        gdc_launch_dependents()
    start = tl.program_id(0).to(tl.int64) * (TILE * TILES)
    offsets = tl.arange(0, TILE)
    largest = tl.zeros([TILE], tl.int32)
    if start + TILE * TILES <= n:
        if start >= hot_from:
            for i in tl.static_range(TILES):
                x = tl.load(w_ptr + start + i * TILE + offsets, eviction_policy="evict_last")
                largest = tl.maximum(largest, magnitude(x))
        else:
            for i in tl.static_range(TILES):
                x = tl.load(w_ptr + start + i * TILE + offsets, eviction_policy="evict_first")
                largest = tl.maximum(largest, magnitude(x))
    else:
        for i in range(TILES):
            mask = start + i * TILE + offsets < n
            x = tl.load(w_ptr + start + i * TILE + offsets, mask=mask, other=0.0)
            largest = tl.maximum(largest, magnitude(x))
    bits = float32_bits(tl.max(largest, axis=0), w_ptr.dtype.element_ty)
    tl.atomic_max(amax_ptr, bits, sem="relaxed")
