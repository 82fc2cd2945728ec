"""Happens-before between CTAs, lane by lane, by vector clocks.

The clock of a CTA ticks at ``bar.sync`` and at releases. A release by a lane covers the writes of that lane, and those
of any lane of its CTA before the last ``bar.sync``. An acquire counts for its own lane until the next ``bar.sync``,
then for the whole CTA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

HOST = -1
"""CTA of the values that memory had before the launch."""


class Stamp(NamedTuple):
    """One access: CTA, lane, and clock of the CTA."""

    cta: int
    lane: int
    clock: int


@dataclass(frozen=True)
class View:
    """Writes that a lane has seen.

    Attributes:
        full: for each CTA, the clock up to which all its writes have been seen.
        lanes: for single lanes (CTA, lane), the clock up to which their writes have been seen.
    """

    full: np.ndarray
    lanes: dict[tuple[int, int], int]

    def join(self, other: View | None) -> View:
        if other is None:
            return self
        lanes = dict(self.lanes)
        for key, clock in other.lanes.items():
            lanes[key] = max(clock, lanes.get(key, -1))
        return View(np.maximum(self.full, other.full), lanes)

    def sees(self, stamp: Stamp) -> bool:
        return (
            stamp.cta == HOST
            or stamp.clock <= self.full[stamp.cta]
            or stamp.clock <= self.lanes.get((stamp.cta, stamp.lane), -1)
        )


@dataclass
class Message:
    """One write to a word that atomics use; a list of them is the coherence order of the word.

    Attributes:
        value: the word after the write.
        stamp: the writer.
        view: all that an acquire which reads this value sees; None without a release.
        weak: a plain store wrote it.
    """

    value: np.unsignedinteger
    stamp: Stamp
    view: View | None
    weak: bool = False


@dataclass(frozen=True)
class Delayed:
    """An atomic or a relaxed store that has not left its CTA.

    Attributes:
        address: of the word.
        name: operation and type, such as ``max.s32``.
        operands: its operands.
        width: bytes of the word.
        stamp: the writer.
        epoch: number of ``bar.sync`` that the CTA had passed.
    """

    address: int
    name: str
    operands: Sequence[np.unsignedinteger]
    width: int
    stamp: Stamp
    epoch: int


@dataclass
class Clock:
    """One CTA in happens-before.

    Attributes:
        cta: number of the CTA.
        base: writes that every lane of it has seen.
        now: the clock.
        epoch: number of ``bar.sync`` passed.
        epoch_start: the clock at the last of them.
        acquired: writes that single lanes have seen since.
        fenced: of each lane, all that its last fence covers: its later relaxed writes release it.
        unfenced: of each lane, releases that it read relaxed: its next fence acquires them.
        seen: place in the coherence order of the newest value that the CTA has read or written at each address.
        delayed: writes that have not left the CTA.
    """

    cta: int
    base: View
    now: int = 0
    epoch: int = 0
    epoch_start: int = 0
    acquired: dict[int, View] = field(default_factory=dict)
    fenced: dict[int, View] = field(default_factory=dict)
    unfenced: dict[int, View] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)
    delayed: list[Delayed] = field(default_factory=list)

    @classmethod
    def start(cls, cta: int, total: int) -> Clock:
        """Return the clock of a CTA that starts, one of ``total``."""
        return cls(cta, View(np.full(total, -1, np.int64), {}))

    def stamp(self, lane: int) -> Stamp:
        return Stamp(self.cta, lane, self.now)

    def view(self, lane: int) -> View:
        return self.base.join(self.acquired.get(lane))

    def barrier(self) -> None:
        for view in self.acquired.values():
            self.base = self.base.join(view)
        self.acquired.clear()
        self.now += 1
        self.epoch += 1
        self.epoch_start = self.now

    def acquire(self, lane: int, view: View | None) -> None:
        if view is not None:
            self.acquired[lane] = view.join(self.acquired.get(lane))

    def read_relaxed(self, lane: int, view: View | None) -> None:
        """Note a release that a later fence of the lane will acquire."""
        if view is not None:
            self.unfenced[lane] = view.join(self.unfenced.get(lane))

    def release(self, lane: int) -> View:
        """Return all that a release by the lane covers."""
        seen = self.view(lane)
        full = seen.full.copy()
        full[self.cta] = max(full[self.cta], self.epoch_start - 1)
        view = View(full, seen.lanes | {(self.cta, lane): self.now})
        self.now += 1
        return view

    def fence(self, lane: int) -> None:
        self.acquire(lane, self.unfenced.pop(lane, None))
        self.fenced[lane] = self.release(lane)
