"""Simulation of the grouped kernel: resident programs take tickets, and share HBM, L2 and the crossbar.

The order of the tickets is the real one, from ``grouping.py``. L2 keeps what was used last, up to `L2_KEPT`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from .model import ATOMIC, CLOCK, CROSSBAR, DRAM, L2_HIT, LAUNCH, ROOF, SLOTS, SM_RATE, SMS, Prediction, roof_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .model import Program

L2_KEPT = 30 << 20
"""Bytes of L2 that hold data between amax and cast: 50 MiB in two partitions, which copy some lines to each other."""


@dataclass(frozen=True)
class Chunk:
    """Work of a ticket.

    Attributes:
        key: number of the chunk among those of all tensors.
        group: group of its tensor.
        elements: elements of the chunk.
        cast: True for a cast, False for an amax.
    """

    key: int
    group: int
    elements: int
    cast: bool


def tickets(sizes: Sequence[int], chunk: int, itemsize: int) -> list[Chunk]:
    """Return the tickets of a list of tensors with one scale each, in the order of the kernel.

    Args:
        sizes: elements of each tensor.
        chunk: elements of a ticket.
        itemsize: bytes of an element.
    """
    from ..gpu import configs
    from ..grouping import order

    counts = [-(-size // chunk) for size in sizes]
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    groups = [[number] for number in range(len(sizes))]
    work = order(counts, groups, configs.LEAD // chunk, configs.L2_BYTES // (chunk * itemsize)).work.tolist()
    found = []
    for which, part in work:
        tensor = which // 2
        elements = min(chunk, sizes[tensor] - part * chunk)
        found.append(Chunk(firsts[tensor] + part, tensor, elements, which % 2 == 1))
    return found


class _Server:
    """Serve requests in the order of their arrival, at a rate in bytes per second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free = 0.0
        self.moved = 0.0

    def serve(self, now: float, moved: float) -> float:
        self.free = max(self.free, now) + moved / self.rate
        self.moved += moved
        return self.free


class _Cache:
    """Keep the chunks that were added last, up to a number of bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self.held: OrderedDict[tuple[bool, int], int] = OrderedDict()

    def add(self, key: tuple[bool, int], size: int) -> None:
        """Add a chunk of weights that was read, or of codes that was written."""
        self.held[key] = size
        self.used += size
        while self.used > self.size:
            _, freed = self.held.popitem(last=False)
            self.used -= freed

    def take(self, key: tuple[bool, int]) -> bool:
        """Remove a chunk that is read for the last time (``evict_first``), and return True if it was there."""
        size = self.held.pop(key, None)
        self.used -= size or 0
        return size is not None


class _Run:
    """One launch: events in the order of time. Each is a request to a server, or the end of a computation."""

    def __init__(self, sizes: Sequence[int], chunk: int, itemsize: int, amax: Program, cast: Program) -> None:
        self.itemsize, self.amax, self.cast = itemsize, amax, cast
        self.order = deque(tickets(sizes, chunk, itemsize))
        self.missing = [-(-size // chunk) for size in sizes]
        self.waiting: dict[int, list[Chunk]] = {}
        self.hbm, self.crossbar, self.cache = _Server(ROOF), _Server(CROSSBAR), _Cache(L2_KEPT)
        self.events: list[tuple[float, int, Callable[[float, Chunk], None], Chunk]] = []
        self.count = 0

    def run(self, programs: int) -> float:
        """Return the seconds until the last byte is written."""
        for _ in range(min(programs, len(self.order))):
            self.take(LAUNCH)
        now = 0.0
        while self.events:
            now, _, action, work = heappop(self.events)
            action(now, work)
        if self.order or self.waiting:
            raise RuntimeError("programs wait for amaxes that no program computes: the order of the tickets is wrong")
        return max(now, self.hbm.free)

    def at(self, when: float, action: Callable[[float, Chunk], None], work: Chunk) -> None:
        """Queue an event."""
        self.count += 1
        heappush(self.events, (when, self.count, action, work))

    def take(self, now: float) -> None:
        """Give the next ticket to a program; it came before, and its entry and that of the tensor are two loads."""
        if self.order:
            self.at(now + 2 * L2_HIT, self.load, self.order.popleft())

    def load(self, now: float, work: Chunk) -> None:
        size = work.elements * self.itemsize
        hit = work.cast and self.cache.take((False, work.key))
        if not work.cast:
            self.cache.add((False, work.key), size)
        arrival = max(self.crossbar.serve(now, size), now + size / SM_RATE) + L2_HIT
        if not hit:
            arrival = max(arrival, self.hbm.serve(now, size) + DRAM)
        if work.cast:
            self.at(arrival, self.wait, work)
        else:
            self.at(arrival + self.amax.finish, self.found, work)

    def found(self, now: float, work: Chunk) -> None:
        """Publish an amax, which others see later, and go on to the next ticket."""
        self.at(now + ATOMIC, self.seen, work)
        self.take(now)

    def seen(self, now: float, work: Chunk) -> None:
        self.missing[work.group] -= 1
        if not self.missing[work.group]:
            for other in self.waiting.pop(work.group, ()):
                self.at(now + L2_HIT + self.cast.finish, self.store, other)

    def wait(self, now: float, work: Chunk) -> None:
        """Cast a chunk whose weights are there, or wait for the amaxes of its group."""
        if self.missing[work.group]:
            self.waiting.setdefault(work.group, []).append(work)
        else:
            self.at(now + self.cast.finish, self.store, work)

    def store(self, now: float, work: Chunk) -> None:
        size = int(work.elements * self.cast.written)
        self.crossbar.serve(now, size)
        self.hbm.serve(now, size)
        self.cache.add((True, work.key), size)
        self.take(now)


def predict_list(
    shape: str, sizes: Sequence[int], chunk: int, itemsize: int, amax: Program, cast: Program, programs_per_sm: int
) -> Prediction:
    """Predict the time of the grouped kernel on a list of tensors with one scale each.

    Args:
        shape: description of the list.
        sizes: elements of each tensor.
        chunk: elements of a ticket.
        itemsize: bytes of an element.
        amax: work of an amax ticket.
        cast: work of a cast ticket.
        programs_per_sm: programs of the launch on each SM.
    """
    programs = SMS * min(programs_per_sm, amax.resident)
    state = _Run(sizes, chunk, itemsize, amax, cast)
    seconds = state.run(programs)
    hbm, crossbar = state.hbm, state.crossbar
    elements = sum(sizes)
    roof = roof_seconds(elements, itemsize + cast.written)
    hbm_bytes, crossbar_bytes = hbm.moved / elements, crossbar.moved / elements
    # Little's law: what the resident programs could do if nothing but their own chains took time.
    chains = 2 * (2 * L2_HIT) + DRAM + L2_HIT + 2 * chunk * itemsize / SM_RATE + amax.finish + cast.finish
    margin = programs * chunk / chains * (itemsize + cast.written) / ROOF
    issue = (amax.executed * amax.warps + cast.executed * cast.warps) / (chunk * (itemsize + cast.written)) * ROOF
    busy = {
        "HBM bytes of tensors that left L2": hbm.moved / ROOF if hbm_bytes > 1.01 * (itemsize + cast.written) else 0.0,
        "memory": elements * (itemsize + cast.written) / ROOF,
        "crossbar": crossbar.moved / CROSSBAR,
    }
    limit = max(busy, key=lambda name: busy[name])
    if busy[limit] < 0.9 * seconds:
        limit = "waits for amaxes"
    return Prediction(
        shape,
        elements,
        programs,
        hbm_bytes,
        crossbar_bytes,
        issue / (SMS * SLOTS * CLOCK),
        margin,
        seconds,
        roof / seconds,
        limit,
    )
