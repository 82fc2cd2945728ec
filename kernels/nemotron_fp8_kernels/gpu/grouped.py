"""Many tensors in one launch: one tensor's amax beside another's cast, while the data is still in L2."""

# The reasons for both lines are in common.py.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from .common import encode, float32_bits, inverse, magnitude, multiplier


@triton.jit
def grouped_kernel(
    tensors_ptr,
    work_ptr,
    ticket_ptr,
    arrived_ptr,
    amax_ptr,
    scale_ptr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One ticket a program; ticket t does the work of ``work_ptr[t]``, whatever the program's own number is.

    ``tensors_ptr``: int64 [tensors, 5]: address of w, address of q (both multiples of 16), elements, group,
    amax tiles of the group. ``work_ptr``: int32 [tickets, 2]: 2 * tensor + (1 for a cast), tile.
    ``ticket_ptr``, ``arrived_ptr`` [groups] and ``amax_ptr`` [groups]: int32, all zero at the start.
    ``scale_ptr``: float32 [groups].

    A cast waits until all of its group's amax tiles have arrived. They bear lower tickets, and a ticket is
    taken only by a program that runs, so whatever the hardware's order of programs, what is waited for is
    running or
    done: no deadlock, with any number of resident programs down to one.
    """
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    which = tl.load(work_ptr + 2 * ticket)
    tile = tl.load(work_ptr + 2 * ticket + 1)
    entry = tensors_ptr + (which // 2) * 5
    w_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
    n = tl.load(entry + 2)
    group = tl.load(entry + 3)
    start = tile.to(tl.int64) * TILE
    offsets = tl.arange(0, TILE)
    if which % 2 == 0:
        if start + TILE <= n:
            x = tl.load(w_ptr + start + offsets, eviction_policy="evict_last")
        else:
            x = tl.load(w_ptr + start + offsets, mask=start + offsets < n, other=0.0)
        bits = float32_bits(tl.max(magnitude(x), axis=0), DTYPE)
        tl.atomic_max(amax_ptr + group, bits, sem="relaxed")
        # Release: whoever sees this arrival sees the maximum above.
        tl.atomic_add(arrived_ptr + group, 1, sem="release")
    else:
        expected = tl.load(entry + 4).to(tl.int32)
        # The tile is asked for before the wait, which hides the read behind it.
        q_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float8e4nv)), 16)
        whole = start + TILE <= n
        if whole:
            x = tl.load(w_ptr + start + offsets, eviction_policy="evict_first")
        else:
            x = tl.load(w_ptr + start + offsets, mask=start + offsets < n, other=0.0)
        arrived = tl.atomic_add(arrived_ptr + group, 0, sem="acquire")
        while arrived < expected:
            arrived = tl.atomic_add(arrived_ptr + group, 0, sem="acquire")
        # Read by an atomic, so from L2: an L1 line may be older than the arrival.
        mult = multiplier(tl.atomic_max(amax_ptr + group, 0, sem="relaxed"))
        if tile == 0:
            tl.store(scale_ptr + group, inverse(mult))
        q = encode(x, mult, False)
        if whole:
            tl.store(q_ptr + start + offsets, q, eviction_policy="evict_first")
        else:
            tl.store(q_ptr + start + offsets, q, mask=start + offsets < n)
