"""Global memory: bounds, alignment, data races, and the weak behavior of atomics.

Two conflicting accesses by different CTAs without happens-before (clocks.py), one of them weak, are a `RaceError` in
whatever order they ran. Equal bytes stored twice are only noted, because no result depends on their order.

Atomics and other strong accesses are never races. Their weak behavior shows in values:

- A relaxed read-modify-write whose result no instruction reads, and a relaxed store, may wait in their CTA: until a
  release or fence by a lane that is ordered after it, until the CTA accesses the same address, or until any later time.
- A relaxed, volatile or acquiring load, and a read-modify-write that would not change the value and does not release,
  may return any older value that coherence and happens-before still allow.
"""

from __future__ import annotations

import bisect
from collections import Counter
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from .clocks import HOST, Clock, Delayed, Message, Stamp, View
from .errors import EmulatorError, MisalignedError, OutOfBoundsError, RaceError, UnsupportedError
from .storage import NOBODY, SEVERAL, SHIFT, WORDS, Accesses, Storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .effects import Effect
    from .units import Unit

    Part = tuple[Storage, np.ndarray, slice | np.ndarray]

WIDE = ("gpu", "sys")
"""Scopes that order accesses of different CTAs."""


class Memory:
    """Global memory of launches that run together.

    Attributes:
        clocks: of each CTA; empty if the CTAs run one after another.
        watchers: units that wait for a change of the word at an address.
        weak: strong accesses may be delayed and stale.
        delay: probability that an access that may be delayed is.
        stale: probability that an access that may be stale is.
        latest: loads return the latest value, whatever `stale` says.
        counts: accesses and bytes.
        equal: bytes that several CTAs stored without order, equal each time; by statement and tensor.
        where: statement that runs, for messages.
    """

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.bases: list[int] = []
        self.clocks: dict[int, Clock] = {}
        # Coherence orders by the base of the allocation, then by address and width.
        self.histories: dict[int, dict[tuple[int, int], list[Message]]] = {}
        self._located: dict[tuple[int, int, bool], tuple[Storage, int]] = {}
        self.watchers: dict[int, list[Unit]] = {}
        self.rng = np.random.default_rng(0)
        self.weak = False
        self.delay = self.stale = 0.0
        self.latest = False
        self.counts: Counter[str] = Counter()
        self.equal: Counter[str] = Counter()
        self.where = ""

    def add(self, storage: Storage) -> None:
        """Register an allocation."""
        at = bisect.bisect_left(self.bases, storage.base)
        for other in self.storages[max(0, at - 1) : at + 1]:
            if other.base < storage.base + storage.size and storage.base < other.base + other.size:
                raise EmulatorError(f"{storage.name} overlaps {other.name}")
        self.bases.insert(at, storage.base)
        self.storages.insert(at, storage)

    def find(self, address: int) -> Storage | None:
        at = bisect.bisect_right(self.bases, address) - 1
        storage = self.storages[at] if at >= 0 else None
        return storage if storage and address < storage.base + storage.size else None

    def start_clocks(self, total: int) -> None:
        """Give ``total`` CTAs their clocks: they run side by side."""
        self.clocks = {cta: Clock.start(cta, total) for cta in range(total)}

    # Plain accesses

    def load(self, addresses: np.ndarray, width: int, count: int, ctas: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Return ``count`` words of each active lane: [lanes, count]."""
        size = width * count
        self.counts["loads"] += 1
        self.counts["bytes loaded"] += size * len(addresses)
        out = np.empty((len(addresses), count), WORDS[width])
        for storage, offsets, chosen in self._parts(addresses, size, ctas, lanes):
            by = ctas[chosen], lanes[chosen]
            self._check(storage, offsets, width, count, *by, store=False)
            index = (offsets >> SHIFT[width])[:, None] + np.arange(count)
            out[chosen] = storage.words(width)[index]
            if storage.large:
                continue
            places = offsets[:, None] + np.arange(size)
            if storage.written is not None:
                self._check_writers(storage, places, *by, "load after store")
            if storage.any_writable:
                storage.note_read(places, *by, self._now(by[0]))
            if storage.base in self.histories:
                self._check_atomics(storage, offsets, size, *by, "load")
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, width: int, ctas: np.ndarray, lanes: np.ndarray) -> None:
        """Store the words of each active lane: [lanes, count]."""
        count = values.shape[1]
        size = width * count
        self.counts["stores"] += 1
        self.counts["bytes stored"] += size * len(addresses)
        for storage, offsets, chosen in self._parts(addresses, size, ctas, lanes):
            by = ctas[chosen], lanes[chosen]
            self._check(storage, offsets, width, count, *by, store=True)
            index = (offsets >> SHIFT[width])[:, None] + np.arange(count)
            words, new = storage.words(width), values[chosen]
            if storage.large:
                words[index] = new
                continue
            places = offsets[:, None] + np.arange(size)
            if storage.written is None:
                storage.written = Accesses(storage.size)
            self._check_writers(storage, places, *by, "store after store", (words[index] != new).any(axis=1))
            self._check_readers(storage, places, *by)
            if storage.base in self.histories:
                self._check_atomics(storage, offsets, size, *by, "store")
            words[index] = new
            wrong = (words[index] != new).any(axis=1)
            if wrong.any():
                self._fail(RaceError, "lanes of one store differ", storage, int(offsets[wrong][0]), *_first(by, wrong))
            self._note_written(storage, places, *by)
            for (address, word), history in self.histories.get(storage.base, {}).items():
                at = address - storage.base
                if ((offsets < at + word) & (offsets + size > at)).any():
                    stamp = _stamp(storage.written, at)
                    message = Message(storage.words(word)[at >> SHIFT[word]], stamp, None, weak=True)
                    history.append(message)
                    self._wake(address)

    def _parts(self, addresses: np.ndarray, size: int, ctas: np.ndarray, lanes: np.ndarray) -> Iterator[Part]:
        """Yield allocation, offsets and lanes; reject misaligned addresses and those outside every allocation."""
        wrong = (addresses & np.uint64(size - 1)) != 0
        if wrong.any():
            cta, lane = _first((ctas, lanes), wrong)
            text = f"{size} bytes at {int(addresses[wrong][0]):#x} by CTA {cta} lane {lane}: {self.where}"
            raise MisalignedError(text)
        storage = self.find(int(addresses.min()))
        if storage is not None and int(addresses.max()) + size <= storage.base + storage.size:
            yield storage, (addresses - np.uint64(storage.base)).astype(np.int64), slice(None)
            return
        bases = np.array(self.bases, dtype=np.uint64)
        which = np.searchsorted(bases, addresses, side="right") - 1
        for number in np.unique(which):
            chosen = np.flatnonzero(which == number)
            at = addresses[chosen]
            outside = np.ones(len(chosen), bool)
            if number >= 0:
                storage = self.storages[number]
                outside = at + np.uint64(size) > np.uint64(storage.base + storage.size)
            if outside.any():
                cta, lane = _first((ctas[chosen], lanes[chosen]), outside)
                text = f"{int(at[outside][0]):#x} by CTA {cta} lane {lane}: {self.where}"
                raise OutOfBoundsError(f"{size} bytes outside every tensor at {text}")
            assert storage is not None
            yield storage, (at - np.uint64(storage.base)).astype(np.int64), chosen

    def _check(
        self,
        storage: Storage,
        offsets: np.ndarray,
        width: int,
        count: int,
        ctas: np.ndarray,
        lanes: np.ndarray,
        store: bool,
    ) -> None:
        good = storage.allowed(offsets, width, count, store)
        if not good.all():
            what = f"{'store' if store else 'load'} of {width * count} bytes outside the tensor"
            self._fail(OutOfBoundsError, what, storage, int(offsets[~good][0]), *_first((ctas, lanes), ~good))

    def _fail(
        self, kind: type[EmulatorError], what: str, storage: Storage, offset: int, cta: int, lane: int
    ) -> NoReturn:
        place = f"{storage.name} + {offset} (of {storage.size} bytes)"
        raise kind(f"{what}, {place}, by CTA {cta} lane {lane}: {self.where}")

    # Races

    def _now(self, ctas: np.ndarray) -> np.ndarray:
        """Return the clock of each CTA."""
        if not self.clocks:
            return np.zeros(len(ctas), np.int32)
        first = int(ctas[0])
        if (ctas == first).all():
            return np.full(len(ctas), self.clocks[first].now, np.int32)
        return np.array([self.clocks[int(cta)].now for cta in ctas], np.int32)

    def _sees(self, cta: int, lane: int, stamp: Stamp) -> bool:
        return bool(self.clocks) and self.clocks[cta].view(lane).sees(stamp)

    def _check_writers(
        self,
        storage: Storage,
        places: np.ndarray,
        ctas: np.ndarray,
        lanes: np.ndarray,
        what: str,
        changed: np.ndarray | None = None,
    ) -> None:
        """Reject accesses that conflict with earlier stores; ``changed``: lanes whose store changes a byte."""
        assert storage.written is not None
        writers = storage.written.cta[places]
        foreign = (writers != NOBODY) & (writers != ctas[:, None])
        for row in np.flatnonzero(foreign.any(axis=1)):
            cta, lane = int(ctas[row]), int(lanes[row])
            for place in places[row][foreign[row]]:
                stamp = _stamp(storage.written, int(place))
                if self._sees(cta, lane, stamp):
                    continue
                if changed is not None and not changed[row]:
                    self.equal[f"{storage.name}: {self.where}"] += 1
                    break
                text = f"{what} by CTA {stamp.cta} lane {stamp.lane} without happens-before"
                self._fail(RaceError, text, storage, int(place), cta, lane)
        if not self.clocks:
            return
        own = (writers == ctas[:, None]) & (storage.written.lane[places] != lanes[:, None])
        if own.any():
            starts = np.array([self.clocks[int(cta)].epoch_start for cta in ctas])
            beside = (own & (storage.written.clock[places] >= starts[:, None])).any(axis=1)
            beside &= True if changed is None else changed
            if beside.any():
                text = f"{what} by another lane without bar.sync"
                self._fail(RaceError, text, storage, int(places[beside][0][0]), *_first((ctas, lanes), beside))

    def _check_readers(self, storage: Storage, places: np.ndarray, ctas: np.ndarray, lanes: np.ndarray) -> None:
        """Reject stores that conflict with earlier loads."""
        if storage.read is None:
            return
        readers = storage.read.cta[places]
        foreign = (readers != NOBODY) & (readers != ctas[:, None])
        for row, byte in zip(*np.nonzero(foreign), strict=True):
            stamp = _stamp(storage.read, int(places[row, byte]))
            cta, lane = int(ctas[row]), int(lanes[row])
            if stamp.cta == SEVERAL or not self._sees(cta, lane, stamp):
                text = f"write after load by CTA {stamp.cta} without happens-before"
                self._fail(RaceError, text, storage, int(places[row, byte]), cta, lane)

    def _note_written(self, storage: Storage, places: np.ndarray, ctas: np.ndarray, lanes: np.ndarray) -> None:
        assert storage.written is not None
        by = np.broadcast_to(ctas[:, None], places.shape)
        storage.written.cta[places] = by
        if (storage.written.cta[places] != by).any():  # several CTAs of one batch stored the same bytes
            self.equal[f"{storage.name}: {self.where}"] += 1
        storage.written.lane[places] = lanes[:, None]
        storage.written.clock[places] = self._now(ctas)[:, None]

    def _check_atomics(
        self, storage: Storage, offsets: np.ndarray, size: int, ctas: np.ndarray, lanes: np.ndarray, what: str
    ) -> None:
        """Reject plain accesses to words that atomics of other CTAs use."""
        for (address, width), history in self.histories[storage.base].items():
            at = address - storage.base
            for row in np.flatnonzero((offsets < at + width) & (offsets + size > at)):
                cta, lane = int(ctas[row]), int(lanes[row])
                others = [message.stamp for message in history]
                late = [clock.cta for clock in self.clocks.values() if any(d.address == address for d in clock.delayed)]
                for other in [
                    s.cta for s in others if s.cta not in (HOST, cta) and not self._sees(cta, lane, s)
                ] + late:
                    if other != cta:
                        text = f"plain {what} beside an atomic by CTA {other} without happens-before"
                        self._fail(RaceError, text, storage, at, cta, lane)

    # Strong accesses

    def strong_load(self, effect: Effect, address: int, cta: int, lane: int) -> np.unsignedinteger:
        """Load a word by a relaxed, volatile or acquiring load of one lane."""
        self.counts["loads"] += 1
        self.counts["bytes loaded"] += effect.width
        storage, index = self._locate(address, effect.width, cta, lane, store=False)
        clock = self.clocks.get(cta)
        if clock is None:
            self._check_lone(storage, address, effect.width, cta, lane, "load after store")
            return storage.words(effect.width)[index]
        self.release_delayed(clock, lambda entry: entry.address == address)
        history = self._history(address, effect.width, storage, index, cta, lane)
        number = len(history) - 1
        if self.weak and not self.latest:
            oldest = self._oldest(clock, lane, address, history)
            if oldest < number and self.rng.random() < self.stale:
                number = int(self.rng.integers(oldest, number))
                self.counts["stale"] += 1
        clock.seen[address] = max(number, clock.seen.get(address, 0))
        view = history[number].view
        if effect.order == "acquire" and effect.scope in WIDE:
            clock.acquire(lane, view)
        else:
            clock.read_relaxed(lane, view)
        return history[number].value

    def strong_store(self, effect: Effect, address: int, value: np.unsignedinteger, cta: int, lane: int) -> None:
        """Store a word by a relaxed, volatile or releasing store of one lane."""
        self._modify(effect, "exch.b", address, [value], cta, lane, dead=True)

    def atomic(
        self, effect: Effect, address: int, operands: Sequence[np.unsignedinteger], cta: int, lane: int
    ) -> np.unsignedinteger | None:
        """Execute an atomic of one lane, and return the old value; None if it is delayed and nothing reads it."""
        self.counts["atomics"] += 1
        return self._modify(effect, ".".join(effect.detail), address, operands, cta, lane, effect.dead)

    def _modify(
        self,
        effect: Effect,
        name: str,
        address: int,
        operands: Sequence[np.unsignedinteger],
        cta: int,
        lane: int,
        dead: bool,
    ) -> np.unsignedinteger | None:
        width = effect.width
        storage, index = self._locate(address, width, cta, lane, store=True)
        if storage.read is not None:
            places = np.arange(width)[None, :] + (address - storage.base)
            self._check_readers(storage, places, np.array([cta]), np.array([lane]))
        clock = self.clocks.get(cta)
        if clock is None:
            self._check_lone(storage, address, width, cta, lane, "atomic after store")
            message = Message(WORDS[width](0), Stamp(cta, lane, 0), None)
            self.histories.setdefault(storage.base, {})[address, width] = [message]
            old = storage.words(width)[index]
            storage.words(width)[index] = _apply(name, old, operands, width)
            return old
        self.release_delayed(clock, lambda entry: entry.address == address)
        wide = effect.scope in WIDE
        releases, acquires = (
            wide and effect.order in ("release", "acq_rel"),
            wide and effect.order in ("acquire", "acq_rel"),
        )
        if self.weak and dead and not releases and not acquires and self.rng.random() < self.delay:
            clock.delayed.append(Delayed(address, name, operands, width, clock.stamp(lane), clock.epoch))
            self.counts["delayed"] += 1
            return None
        if releases:
            self.release_delayed(clock, lambda entry: entry.stamp.lane == lane or entry.epoch < clock.epoch)
        history = self._history(address, width, storage, index, cta, lane)
        if self.weak and not releases and not effect.kind.startswith("store"):
            oldest = self._oldest(clock, lane, address, history)
            if oldest < len(history) - 1 and self.rng.random() < self.stale:
                number = int(self.rng.integers(oldest, len(history) - 1))
                message = history[number]
                if _apply(name, message.value, operands, width) == message.value:
                    self.counts["stale"] += 1
                    clock.seen[address] = max(number, clock.seen.get(address, 0))
                    if acquires:
                        clock.acquire(lane, message.view)
                    return message.value
        stamp = clock.stamp(lane)
        last = history[-1]
        if acquires:
            clock.acquire(lane, last.view)
        elif not effect.kind.startswith("store"):
            clock.read_relaxed(lane, last.view)
        view = clock.release(lane) if releases else clock.fenced.get(lane)
        if effect.kind.startswith("store"):
            self._append(clock, storage, index, history, address, Message(operands[0], stamp, view))
            return None
        return self._commit(clock, storage, index, history, Delayed(address, name, operands, width, stamp, 0), view)

    def _commit(
        self,
        clock: Clock,
        storage: Storage,
        index: int,
        history: list[Message],
        entry: Delayed,
        view: View | None,
    ) -> np.unsignedinteger:
        """Append a read-modify-write to the coherence order; it carries on the release that it reads."""
        last = history[-1].view
        if last is not None:
            view = last.join(view)
        old = storage.words(entry.width)[index]
        new = _apply(entry.name, old, entry.operands, entry.width)
        self._append(clock, storage, index, history, entry.address, Message(new, entry.stamp, view))
        return old

    def _append(
        self, clock: Clock, storage: Storage, index: int, history: list[Message], address: int, message: Message
    ) -> None:
        history.append(message)
        clock.seen[address] = len(history) - 1
        words = storage.words(message.value.itemsize)
        if words[index] != message.value:
            words[index] = message.value
            self._wake(address)

    def _wake(self, address: int) -> None:
        """Let the units run that wait for a change at an address, and the other warps of their CTAs."""
        for unit in self.watchers.pop(address, ()):
            for other in unit.beside:
                other.spinning = False

    def fence(self, cta: int, lanes: np.ndarray, scope: str) -> None:
        """Execute a fence of some lanes."""
        clock = self.clocks.get(cta)
        if clock is None or scope not in WIDE:
            return
        for lane in map(int, lanes):
            self.release_delayed(clock, lambda entry, lane=lane: entry.stamp.lane == lane or entry.epoch < clock.epoch)
            clock.fence(lane)

    def release_delayed(self, clock: Clock, which: Callable[[Delayed], bool]) -> None:
        """Let those delayed writes of a CTA out for which ``which`` holds."""
        if not clock.delayed:
            return
        chosen = [entry for entry in clock.delayed if which(entry)]
        clock.delayed = [entry for entry in clock.delayed if not which(entry)]
        for entry in chosen:
            storage, index = self._locate(entry.address, entry.width, clock.cta, entry.stamp.lane, store=True)
            history = self._history(entry.address, entry.width, storage, index, clock.cta, entry.stamp.lane)
            self._commit(clock, storage, index, history, entry, clock.fenced.get(entry.stamp.lane))

    def release_one_delayed(self) -> bool:
        """Let one delayed write of some CTA out; return False if there is none."""
        waiting = [clock for clock in self.clocks.values() if clock.delayed]
        if not waiting:
            return False
        clock = waiting[int(self.rng.integers(len(waiting)))]
        chosen = clock.delayed[int(self.rng.integers(len(clock.delayed)))]
        self.release_delayed(clock, lambda entry: entry is chosen)
        return True

    def _locate(self, address: int, width: int, cta: int, lane: int, store: bool) -> tuple[Storage, int]:
        """Return the allocation of a word and its place there, after checks of alignment and bounds."""
        key = (address, width, store)
        if key not in self._located:
            by = np.array([cta]), np.array([lane])
            storage, offsets, _ = next(self._parts(np.array([address], np.uint64), width, *by))
            self._check(storage, offsets, width, 1, *by, store=store)
            self._located[key] = storage, int(offsets[0]) >> SHIFT[width]
        return self._located[key]

    def _check_lone(self, storage: Storage, address: int, width: int, cta: int, lane: int, what: str) -> None:
        """Reject a strong access after a plain store by another CTA, where CTAs run one after another."""
        if storage.written is not None:
            places = np.arange(width)[None, :] + (address - storage.base)
            self._check_writers(storage, places, np.array([cta]), np.array([lane]), what)

    def _history(self, address: int, width: int, storage: Storage, index: int, cta: int, lane: int) -> list[Message]:
        """Return the coherence order of a word; reject an access that conflicts with a plain store at its end."""
        key = (address, width)
        histories = self.histories.setdefault(storage.base, {})
        if key not in histories:
            if any(other < address + width and address < other + size for other, size in histories):
                raise UnsupportedError(f"atomics of different widths at one place: {self.where}")
            stamp = Stamp(HOST, 0, 0)
            if storage.written is not None and storage.written.cta[address - storage.base] != NOBODY:
                stamp = _stamp(storage.written, address - storage.base)
            histories[key] = [Message(storage.words(width)[index], stamp, None, weak=stamp.cta != HOST)]
        last = histories[key][-1]
        if last.weak and last.stamp.cta != cta and not self._sees(cta, lane, last.stamp):
            text = f"atomic after a plain store by CTA {last.stamp.cta} without happens-before"
            self._fail(RaceError, text, storage, address - storage.base, cta, lane)
        return histories[key]

    def _oldest(self, clock: Clock, lane: int, address: int, history: list[Message]) -> int:
        """Return the place of the oldest value that a lane may still read."""
        lowest = clock.seen.get(address, 0)
        view = clock.view(lane)
        for number in range(len(history) - 1, lowest, -1):
            stamp = history[number].stamp
            if stamp.cta == clock.cta or view.sees(stamp):
                return number
        return lowest


def _first(by: tuple[np.ndarray, np.ndarray], chosen: np.ndarray) -> tuple[int, int]:
    """Return CTA and lane of the first chosen access."""
    return int(by[0][chosen][0]), int(by[1][chosen][0])


def _stamp(accesses: Accesses, place: int) -> Stamp:
    return Stamp(int(accesses.cta[place]), int(accesses.lane[place]), int(accesses.clock[place]))


def _apply(
    name: str, old: np.unsignedinteger, operands: Sequence[np.unsignedinteger], width: int
) -> np.unsignedinteger:
    """Return the word after a read-modify-write."""
    operation, _, kind = name.partition(".")
    word = WORDS[width]
    value = word(operands[0])
    if operation == "exch":
        return value
    if operation == "cas":
        return word(operands[1]) if old == value else old
    if operation == "add":
        return word((int(old) + int(value)) % (1 << 8 * width))
    if operation in ("and", "or", "xor"):
        return word({"and": old & value, "or": old | value, "xor": old ^ value}[operation])
    signed = np.dtype(f"i{width}")
    a, b = (old.view(signed), value.view(signed)) if kind[0] == "s" else (old, value)
    return old if (a >= b if operation == "max" else a <= b) else value
