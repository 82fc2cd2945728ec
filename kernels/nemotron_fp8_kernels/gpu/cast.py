"""Cast of a dense tensor with one multiplier."""

# common.py has the reasons for both lines.
# ruff: noqa: ANN001, ANN201, ANN202, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .common import divide, edges, encode, inverse, multiplier


@triton.jit(do_not_specialize=["phase"])
def cast_kernel(
    w_ptr,
    q_ptr,
    amax_ptr,
    scale_ptr,
    n,
    phase,
    TILE: tl.constexpr,
    ORIGINAL: tl.constexpr,
    REVERSE: tl.constexpr,
    PDL: tl.constexpr,
    EDGES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Cast one tile per program; the program of the first tile stores the scale.

    ``amax_ptr`` points to the int32 bits of the amax, or with ORIGINAL to the float32 multiplier. With REVERSE the
    last tile comes first: the amax kernel read it last, and L2 still holds it. ``phase``, EDGES and WIDTH
    are explained in common.py; the first program casts the edges.
    """
    tile = tl.program_id(0)
    if REVERSE:
        tile = tl.num_programs(0) - 1 - tile
    start = tile.to(tl.int64) * TILE
    offsets = tl.arange(0, TILE)
    count = n
    if EDGES:
        head, n = divide(phase, n)
        w_all, q_all = w_ptr, q_ptr
        w_ptr = tl.multiple_of(w_ptr + head, 16)
        q_ptr = tl.multiple_of(q_ptr + head, WIDTH)
    # The load precedes the wait for the amax kernel, so that it overlaps with the last amaxes. It is safe: the amax
    # kernel does not write the tile, and the kernel that did finished before the amax kernel started.
    if start + TILE <= n:
        x = tl.load(w_ptr + start + offsets, eviction_policy="evict_first")
        mult = _factor(amax_ptr, ORIGINAL, PDL, ROUNDING)
        tl.store(q_ptr + start + offsets, encode(x, mult, ORIGINAL), eviction_policy="evict_first")
    else:
        mask = start + offsets < n
        x = tl.load(w_ptr + start + offsets, mask=mask, other=0.0)
        mult = _factor(amax_ptr, ORIGINAL, PDL, ROUNDING)
        tl.store(q_ptr + start + offsets, encode(x, mult, ORIGINAL), mask=mask)
    if EDGES and tl.program_id(0) == 0:
        at, inside = edges(head, n, count)
        edge = tl.load(w_all + at, mask=inside, other=0.0)
        tl.store(q_all + at, encode(edge, mult, ORIGINAL), mask=inside)
    if tile == 0:
        tl.store(scale_ptr, inverse(mult, ROUNDING))


@triton.jit
def _factor(amax_ptr, ORIGINAL: tl.constexpr, PDL: tl.constexpr, ROUNDING: tl.constexpr):
    if PDL:
        gdc_wait()
    factor = tl.load(amax_ptr)
    if not ORIGINAL:
        factor = multiplier(factor, ROUNDING)
    return factor
