"""Many tensors in one launch: one tensor's amax beside another's cast, while the data is still in L2.

Programs stay, and take one piece of work after another, in the order that ``grouping.py`` gives.
"""

# The reasons for both lines are in common.py; and Triton knows tuples, but no star in them.
# ruff: noqa: ANN001, ANN201, ANN202, N803, RUF005
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"

import triton
import triton.language as tl

from .common import encode, float32_bits, inverse, largest, magnitude, multiplier

# As unsigned integers, -1 (not there yet) is above the bits of every amax.
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
):
    """Take tickets until there are none; ticket t is the work of ``work_ptr[t]``, whichever program has it.

    A ticket is a chunk of ``TILES * TILE`` elements of a tensor, to be searched for its amax or to be cast.

    ``tensors_ptr``: int64 [tensors, 8]: address of w, address of q (both multiples of 16), elements, group, first
    slot and number of slots of the group, first slot of the tensor, 0. ``work_ptr``: int32 [tickets, 2]:
    2 * tensor + (1 for a cast), chunk. ``ticket_ptr`` int32 [1], ``found_ptr`` int32 [groups] and ``slots_ptr``
    int32 [chunks]: all -1 at the start. ``scale_ptr``: float32 [groups].

    The amax of a chunk goes to a slot of its own, whose value says too that it is there: neither a counter nor a
    fence nor an order of memory is needed. A cast reads the slots of its group until none is missing.

    It always ends, with any number of programs running at once, down to one. A cast waits for amaxes alone, all of
    which have lower tickets, and an amax for nothing. A ticket that was taken is held by a running program, which
    works its tickets off in rising order: the next one is taken while a program is still at work on the last, but
    it is also the higher of the two. So of all tickets that are not done, the lowest is being worked on, and has
    nothing left to wait for. This must stay true: tickets in any other order, work that is drawn without a
    ticket, or a cast that waits for more than amaxes before it, can wait for ever.
    """
    lanes = tl.arange(0, THREADS)
    offsets = tl.arange(0, TILE)
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed") + 1
    while ticket < tickets:
        # The next ticket is asked for by one lane and told to the others at the end, where it has long come.
        pending = tl.atomic_add(ticket_ptr + lanes * 0, 1, mask=lanes == 0, sem="relaxed") + 1
        which = tl.load(work_ptr + 2 * ticket)
        chunk = tl.load(work_ptr + 2 * ticket + 1)
        entry = tensors_ptr + (which // 2) * 8
        w_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
        n = tl.load(entry + 2)
        start = chunk.to(tl.int64) * (TILE * TILES)
        # Elements in whole vectors by one mask, the same for all chunks; at most 15 behind them by another.
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
            # The chunk is asked for before the wait, which hides the read behind it.
            xs = _load(w_ptr + start, offsets, limit, TILE, TILES, "evict_first")
            # Whoever has seen all slots says so: later casts read one word, however many slots there are.
            top = _told(found_ptr + group, lanes)
            if top > MISSING:
                while top > MISSING:
                    top = _top(slots, count, THREADS)
                tl.atomic_xchg(found_ptr + group, top.to(tl.int32, bitcast=True), sem="relaxed")
            mult = multiplier(top.to(tl.int32, bitcast=True))
            for i in tl.static_range(TILES):
                q = encode(xs[i], mult, False)
                inside = i * TILE + offsets < limit
                tl.store(q_ptr + start + i * TILE + offsets, q, mask=inside, eviction_policy="evict_first")
            if ragged:
                x = tl.load(w_ptr + tail, mask=tail < n, other=0.0)
                tl.store(q_ptr + tail, encode(x, mult, False), mask=tail < n)
            if chunk == 0:
                tl.store(scale_ptr + group, inverse(mult))
        # Last, where the atomic has long answered: any earlier, and the compiler waits for it before the loads.
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
    """Read one word of memory, the same for all lanes: read by each for itself, its value could change between."""
    seen = tl.load(word + lanes * 0, mask=lanes == 0, other=0, volatile=True)
    return tl.max(seen.to(tl.uint32, bitcast=True), axis=0)


@triton.jit
def _top(slots, count, THREADS: tl.constexpr):
    """Return the unsigned maximum of ``count`` slots, four a thread at a time: missing, or the amax."""
    top = tl.full((), 0, tl.uint32)
    lanes = tl.arange(0, 4 * THREADS)
    for at in range(0, count, 4 * THREADS):
        seen = tl.load(slots + at + lanes, mask=at + lanes < count, other=0, volatile=True)
        top = tl.maximum(top, tl.max(seen.to(tl.uint32, bitcast=True), axis=0))
    return top
