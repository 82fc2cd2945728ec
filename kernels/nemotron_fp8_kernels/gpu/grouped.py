"""Many tensors in one launch: amaxes of a tensor alternate with casts of another, whose data is still in L2.

Resident programs take one ticket after another, in the order of ``grouping.py``.
"""

# common.py has the reasons for both lines; RUF005: Triton does not support a star in a tuple.
# ruff: noqa: ANN001, ANN201, ANN202, N803, RUF005
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"

import triton
import triton.language as tl

from .common import encode, float32_bits, inverse, largest, magnitude, multiplier

# As an unsigned integer, -1 (a missing amax) is above the bits of every amax.
MISSING = tl.constexpr(0x7FFFFFFF)


@triton.jit
def grouped_kernel(
    tensors_ptr,
    work_ptr,
    tickets,
    ticket_ptr,
    found_ptr,
    slots_ptr,
    scale_ptr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Process tickets until none is left; ``work_ptr[t]`` is the work of ticket t for any program.

    A ticket is the amax or the cast of a chunk: ``TILES * TILE`` elements of a tensor.

    ``tensors_ptr``: int64 [tensors, 8]: address of w, address of q (both multiples of 16), elements, group, first
    slot and number of slots of the group, first slot of the tensor, 0. ``work_ptr``: int32 [tickets, 2]:
    2 * tensor + (1 for a cast), chunk. ``ticket_ptr`` int32 [1], ``found_ptr`` int32 [groups] and ``slots_ptr``
    int32 [chunks]: all -1 at the start. ``scale_ptr``: float32 [groups].

    Each chunk has its own slot for its amax. The value of the slot also signals that the amax is present, so that no
    counter, fence or memory order is necessary. A cast reads the slots of its group until none is missing.

    The kernel terminates with any number of resident programs, even with one. An amax waits for nothing. A cast
    waits only for amaxes, and all of these have lower tickets. Each ticket that was taken belongs to a resident
    program. A program takes its next ticket before it finishes the current one, but the next ticket is higher, and
    the program processes its tickets in ascending order. Therefore the lowest unfinished ticket is always in
    progress and has nothing to wait for.

    Every change must preserve these conditions. The kernel can deadlock if tickets have another order, if a program
    takes work without a ticket, or if a cast waits for anything except amaxes with lower tickets.
    """
    lanes = tl.arange(0, THREADS)
    offsets = tl.arange(0, TILE)
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed") + 1
    while ticket < tickets:
        # One lane takes the next ticket now; the end of the loop distributes it, when the atomic has completed.
        pending = tl.atomic_add(ticket_ptr + lanes * 0, 1, mask=lanes == 0, sem="relaxed") + 1
        which = tl.load(work_ptr + 2 * ticket)
        chunk = tl.load(work_ptr + 2 * ticket + 1)
        entry = tensors_ptr + (which // 2) * 8
        w_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
        n = tl.load(entry + 2)
        start = chunk.to(tl.int64) * (TILE * TILES)
        # Predicated loads: one mask for elements in whole vectors, the same for all chunks; another for up to 15 more.
        whole = n // 16 * 16
        limit = tl.minimum(whole - start, TILE * TILES).to(tl.int32) // 16 * 16
        ragged = (start + TILE * TILES > whole) & (whole < n)
        tail = whole + tl.arange(0, 16)
        if which % 2 == 0:
            xs = _load(w_ptr + start, offsets, limit, TILE, TILES, "")
            best = magnitude(xs[0])
            for i in tl.static_range(1, TILES):
                best = tl.maximum(best, magnitude(xs[i]))
            bits = largest(best, 0)
            if ragged:
                x = tl.load(w_ptr + tail, mask=tail < n, other=0.0)
                bits = tl.maximum(bits, largest(magnitude(x), 0))
            tl.atomic_xchg(slots_ptr + tl.load(entry + 6) + chunk, float32_bits(bits, DTYPE), sem="relaxed")
        else:
            q_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float8e4nv)), 16)
            group = tl.load(entry + 3)
            slots = slots_ptr + tl.load(entry + 4)
            count = tl.load(entry + 5).to(tl.int32)
            # The loads precede the wait for the amaxes, so that they overlap with it.
            xs = _load(w_ptr + start, offsets, limit, TILE, TILES, "evict_first")
            # The first program that has read all slots stores the maximum: later casts read one word, not all slots.
            top = _told(found_ptr + group, lanes)
            if top > MISSING:
                while top > MISSING:
                    top = _top(slots, count, THREADS)
                tl.atomic_xchg(found_ptr + group, top.to(tl.int32, bitcast=True), sem="relaxed")
            mult = multiplier(top.to(tl.int32, bitcast=True), ROUNDING)
            for i in tl.static_range(TILES):
                q = encode(xs[i], mult, False)
                inside = i * TILE + offsets < limit
                tl.store(q_ptr + start + i * TILE + offsets, q, mask=inside, eviction_policy="evict_first")
            if ragged:
                x = tl.load(w_ptr + tail, mask=tail < n, other=0.0)
                tl.store(q_ptr + tail, encode(x, mult, False), mask=tail < n)
            if chunk == 0:
                tl.store(scale_ptr + group, inverse(mult, ROUNDING))
        # At the end, when the atomic has completed: any earlier, and the compiler waits for it before the loads.
        ticket = tl.max(tl.where(lanes == 0, pending, -1), axis=0)


@triton.jit
def _load(w_chunk, offsets, limit, TILE: tl.constexpr, TILES: tl.constexpr, POLICY: tl.constexpr):
    xs = ()
    for i in tl.static_range(TILES):
        inside = i * TILE + offsets < limit
        xs = xs + (tl.load(w_chunk + i * TILE + offsets, mask=inside, other=0.0, eviction_policy=POLICY),)
    return xs


@triton.jit
def _told(word, lanes):
    """Read one word of memory by one lane for all: the word could change between reads of different lanes."""
    seen = tl.load(word + lanes * 0, mask=lanes == 0, other=0, volatile=True)
    return tl.max(seen.to(tl.uint32, bitcast=True), axis=0)


@triton.jit
def _top(slots, count, THREADS: tl.constexpr):
    """Return the unsigned maximum of ``count`` slots, four per thread at a time: missing, or the amax."""
    top = tl.full((), 0, tl.uint32)
    lanes = tl.arange(0, 4 * THREADS)
    for at in range(0, count, 4 * THREADS):
        seen = tl.load(slots + at + lanes, mask=at + lanes < count, other=0, volatile=True)
        top = tl.maximum(top, tl.max(seen.to(tl.uint32, bitcast=True), axis=0))
    return top
