"""Launches under a schedule: CTAs or single warps as coroutines, with any number of resident CTAs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import BarrierError, DeadlockError
from .shared import Shared
from .units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from .lower import Program
    from .memory import Memory

POLICIES = ("random", "round_robin", "greedy", "newest", "oldest", "victim", "bursts")
"""Choices of the next unit: one CTA may also stop until all others are stuck (``victim``)."""

ORDERS = ("random", "up", "down")
"""Orders in which CTAs get their places."""


@dataclass(frozen=True)
class Settings:
    """Conditions of launches.

    Attributes:
        scheduled: run kernels whose CTAs do not wait for each other under the schedule, too.
        overlap: run a dependent launch together with its primary.
        resident: CTAs at a time; of a cooperative launch all.
        policy: one of `POLICIES`.
        order: one of `ORDERS`.
        seed: of all random choices.
        weak: strong accesses may be delayed and stale.
        per_warp: units are warps, not CTAs.
        delay: probability that an access that may be delayed is.
        stale: probability that an access that may be stale is.
        lanes: lanes of a batch, where CTAs do not wait for each other.
        cooperative: largest cooperative launch.
        only: function from the size of a grid to the CTAs that run; None for all.
    """

    scheduled: bool = False
    overlap: bool = False
    resident: int = 7
    policy: str = "random"
    order: str = "random"
    seed: int = 0
    weak: bool = True
    per_warp: bool = False
    delay: float = 0.5
    stale: float = 0.5
    lanes: int = 8192
    cooperative: int = 264
    only: Callable[[int], list[int]] | None = None


class Grid:
    """One launch.

    Attributes:
        program: the kernel.
        size: number of CTAs.
        parameters: value of each parameter.
        shared_bytes: shared memory of a CTA.
        memory: global memory.
        first: number of its first CTA among all launches that run together.
        primary: launch that this one depends on.
        signaled: CTAs that let dependent launches start.
        finished: CTAs that have ended.
        cooperative: all CTAs are resident at once.
        preempted: empty, ``ctas`` or ``warps``: units yield before their accesses.
    """

    def __init__(
        self, program: Program, size: int, parameters: dict[str, np.unsignedinteger], shared_bytes: int, memory: Memory
    ) -> None:
        self.program, self.size, self.parameters = program, size, parameters
        self.shared_bytes, self.memory = shared_bytes, memory
        self.rng = np.random.default_rng(0)
        self.first = 0
        self.primary: Grid | None = None
        self.signaled: set[int] = set()
        self.finished: set[int] = set()
        self.cooperative = False
        self.preempted = ""

    def primary_done(self) -> bool:
        return self.primary is None or len(self.primary.finished) == self.primary.size

    def may_start(self) -> bool:
        """Return True if all CTAs of the primary launch have signaled or ended."""
        return self.primary is None or len(self.primary.signaled | self.primary.finished) == self.primary.size

    def see_primary(self, unit: Unit) -> None:
        """Make all writes of the primary launch visible to a unit, after ``griddepcontrol.wait``."""
        if self.primary is None or not self.memory.clocks:
            return
        numbers = range(self.primary.first, self.primary.first + self.primary.size)
        for number in numbers:
            self.memory.release_delayed(self.memory.clocks[number], lambda _: True)
        for cta in np.unique(unit.cta_of):
            self.memory.clocks[int(cta)].base.full[numbers.start : numbers.stop] = np.iinfo(np.int64).max

    def units(self, ctas: np.ndarray, per_warp: bool = False) -> list[Unit]:
        """Return new units of some CTAs: one, or one per warp."""
        threads = self.program.kernel.threads
        shared = Shared(len(ctas), self.shared_bytes, threads // 32, self.rng)
        step = 32 if per_warp else threads
        units = [Unit(self, ctas, shared, range(start, start + step)) for start in range(0, threads, step)]
        for unit in units:
            unit.beside = units
        return units


def run_in_batches(grid: Grid, lanes: int, only: Callable[[int], list[int]] | None = None) -> None:
    """Run CTAs that wait for nobody, several in lockstep, in random order."""
    order = grid.rng.permutation(grid.size if only is None else np.array(only(grid.size)))
    step = max(1, lanes // grid.program.kernel.threads)
    with np.errstate(all="ignore"):
        for start in range(0, len(order), step):
            for _ in grid.units(order[start : start + step])[0].run:
                pass


class Schedule:
    """Run of several launches in the order of a stream, each dependent on the one before it."""

    def __init__(self, grids: list[Grid], settings: Settings, seed: int) -> None:
        self.grids, self.settings = grids, settings
        self.memory = grids[0].memory
        self.rng = np.random.default_rng((seed, 0))
        self.memory.rng = np.random.default_rng((seed, 1))
        self.memory.weak, self.memory.delay, self.memory.stale = settings.weak, settings.delay, settings.stale
        self.waiting: list[list[int]] = []
        self.running = 0
        self.ready: list[Unit] = []
        self.grid_waits: list[Unit] = []
        self.resident = max(settings.resident, grids[0].size if grids[0].cooperative else 0)
        total = 0
        for number, grid in enumerate(grids):
            grid.first = total
            total += grid.size
            grid.rng = np.random.default_rng((seed, 2, number))
            grid.preempted = "warps" if settings.per_warp else "ctas"
            grid.primary = grids[number - 1] if number else None
            order = list(range(grid.size))
            if settings.order == "random":
                self.rng.shuffle(order)
            elif settings.order == "down":
                order.reverse()
            self.waiting.append(order)
        self.memory.start_clocks(total)
        self.turns = 0
        self.vain = 0
        self.current: Unit | None = None
        self.burst = 0
        self.victim, self.victim_steps = int(self.rng.integers(total)), int(self.rng.integers(1, 12))

    def run(self) -> int:
        """Run all CTAs to their ends, and return the number of turns."""
        with np.errstate(all="ignore"):
            self._place()
            while self.running:
                self._turn()
            if any(self.waiting):
                raise DeadlockError("no CTA can start")
            while self.memory.release_one_delayed():
                pass
        return self.turns

    def _place(self) -> None:
        """Start CTAs while there are places: those of a launch after all of the launch before."""
        for grid, numbers in zip(self.grids, self.waiting, strict=True):
            if not grid.may_start():
                return
            while numbers and self.running < self.resident:
                self.ready += grid.units(np.array([numbers.pop(0)]), self.settings.per_warp)
                self.running += 1
            if numbers:
                return

    def _turn(self) -> None:
        """Run one unit up to its next access."""
        ready = self.ready
        if not ready:
            raise DeadlockError(f"all of {self.running} resident CTAs wait")
        useful = [unit for unit in ready if not unit.spinning]
        if not useful and self.memory.release_one_delayed():
            return
        # If all poll in vain, loads return the latest values; if that changes nothing for long, nothing can.
        self.memory.latest = not useful
        self.vain = 0 if useful else self.vain + 1
        if self.vain > 40 * len(ready) + 100:
            text = f"{len(ready)} units of {self.running} resident CTAs poll in vain"
            raise DeadlockError(f"{text}, and {sum(map(len, self.waiting))} CTAs wait for a place")
        unit = self._choose(useful) if useful else ready[int(self.rng.integers(len(ready)))]
        self.current = unit
        self.turns += 1
        if self.settings.weak and self.rng.random() < 0.02:
            self.memory.release_one_delayed()
        signaled = len(unit.grid.signaled)
        next(unit.run, None)
        if unit.state != "ready":
            ready.remove(unit)
            self._stopped(unit)
        elif len(unit.grid.signaled) > signaled:
            self._place()

    def _stopped(self, unit: Unit) -> None:
        """Wake the units that waited for one that now waits or has ended."""
        if unit.state == "grid_wait":
            self.grid_waits.append(unit)
            return
        states = {other.state for other in unit.beside}
        if states == {"barrier", "done"}:
            raise BarrierError("a warp has ended while others wait at bar.sync")
        if states == {"barrier"}:
            unit.pass_barrier()
            self._wake(unit.beside)
        elif states == {"done"}:
            self.running -= 1
            unit.grid.finished.add(int(unit.cta_of[0]))
            woken = [other for other in self.grid_waits if other.grid.primary_done()]
            self.grid_waits = [other for other in self.grid_waits if other not in woken]
            self._wake(woken)
            self._place()

    def _wake(self, units: list[Unit]) -> None:
        for unit in units:
            unit.state = "ready"
        self.ready += units

    def _choose(self, units: list[Unit]) -> Unit:
        policy = self.settings.policy
        drawn = units[int(self.rng.integers(len(units)))]
        if self.turns % 200 == 199:
            return drawn  # even a unit that spins by plain loads lets others run
        if policy == "round_robin":
            return units[self.turns % len(units)]
        if policy == "oldest":
            return units[0]
        if policy == "newest":
            return units[-1]
        if policy == "greedy":
            return self.current if self.current in units else drawn
        if policy == "bursts":
            if self.burst and self.current in units:
                self.burst -= 1
                return self.current
            self.burst = int(self.rng.integers(30))
        if policy == "victim":
            stopped = [u for u in units if int(u.cta_of[0]) == self.victim and u.steps >= self.victim_steps]
            others = [unit for unit in units if unit not in stopped]
            return others[int(self.rng.integers(len(others)))] if others else drawn
        return drawn
