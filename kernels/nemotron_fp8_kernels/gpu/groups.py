"""Amax and cast with one scale per group of adjacent elements in one pass: blocks of one row of a dense tensor."""

# common.py has the reasons for both lines.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from .common import encode, float32_bits, inverse, largest, magnitude, multiplier


@triton.jit
def groups_kernel(
    w_ptr,
    q_ptr,
    amax_ptr,
    scale_ptr,
    groups,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GIVEN: tl.constexpr,
    CAST: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Compute the amaxes and the cast of GROUPS groups of GROUP elements per program; both are powers of two.

    A tensor whose rows are whole groups is a list of ``groups`` groups. A group is at least 16 elements, so that each
    of them consists of whole vectors. GIVEN and CAST are those of rows.py.
    """
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = tl.arange(0, GROUPS)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = group < groups - first
    # One mask for all programs, constant over a vector: a branch would double the code.
    x = tl.load(w_ptr + first * GROUP + offsets, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
    if GIVEN:
        bits = tl.load(amax_ptr + first + group, mask=inside, other=0)
    else:
        bits = float32_bits(largest(magnitude(x), 1), w_ptr.dtype.element_ty)
    if CAST:
        mult = multiplier(bits, ROUNDING)
        q = encode(x, mult[:, None], False)
        tl.store(q_ptr + first * GROUP + offsets, q, mask=inside[:, None], eviction_policy="evict_first")
        tl.store(scale_ptr + first + group, inverse(mult, ROUNDING), mask=inside)
    else:
        tl.store(amax_ptr + first + group, bits, mask=inside)
