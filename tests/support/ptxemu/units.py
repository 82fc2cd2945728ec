"""Execution of lowered kernels: lanes in lockstep under masks, with reconvergence at post-dominators.

A unit is a coroutine: it yields before each access to memory, so that a schedule (schedule.py) can run another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BarrierError, DeadlockError, EmulatorError, UnsupportedError
from .lower import Segment
from .parse import EXIT
from .storage import WORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .effects import Effect, Source
    from .lower import Code
    from .schedule import Grid
    from .shared import Shared

CLASSES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
MOST_EFFECTS = 5_000_000
"""Effects of one unit after which it counts as running forever."""

GLOBAL = ("load_global", "store_global", "atomic", "fence", "dependents")
WITHIN = ("load_shared", "store_shared", "shuffle", "reduce", "load_matrix", "store_matrix")
"""Effects before which a unit yields: any unit, and a unit of one warp."""
WHOLE_WARPS = ("barrier", "warp_barrier", "shuffle", "reduce", "load_matrix", "store_matrix")
"""Effects of which lanes that the predicate excludes are an error."""
REDUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "max": np.max,
    "min": np.min,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
    "add": lambda values, axis: values.sum(axis=axis, dtype=values.dtype),
}


class Unit:
    """Lanes that run in lockstep: those of several CTAs, of one CTA, or of one warp.

    Attributes:
        state: ``ready``, ``barrier``, ``grid_wait`` or ``done``.
        spinning: a strong access brought the latest value, the same as before: no turn is of use until it changes.
        steps: effects executed.
        beside: all units of the same CTAs, one per warp; only this one if it has all warps.
    """

    def __init__(self, grid: Grid, ctas: np.ndarray, shared: Shared, lanes: range) -> None:
        self.grid, self.ctas, self.shared = grid, ctas, shared
        self.program = grid.program
        self.memory = grid.memory
        self.parameters = grid.parameters
        self.per_cta = len(lanes)
        self.count = len(lanes) * len(ctas)
        self.lane_of = np.tile(np.array(lanes, dtype=np.int64), len(ctas))
        self.local = np.repeat(np.arange(len(ctas)), len(lanes))
        self.cta_of = np.repeat(ctas + grid.first, len(lanes)).astype(np.int64)
        word = np.uint32
        self.special: dict[str, Any] = {
            f"%{name}.{axis}": word(value) for name, value in (("tid", 0), ("ctaid", 0), ("nctaid", 1)) for axis in "yz"
        }
        self.special |= {
            "%tid.x": self.lane_of.astype(word),
            "%ctaid.x": np.repeat(ctas, len(lanes)).astype(word) if len(ctas) > 1 else word(ctas[0]),
            "%ntid.x": word(self.program.kernel.threads),
            "%nctaid.x": word(grid.size),
            "%laneid": (self.lane_of % 32).astype(word),
            "%warpid": (self.lane_of // 32).astype(word),
        }
        # Registers start as noise, so that a use before an assignment shows.
        noise: dict[str, np.ndarray] = {
            kind: grid.rng.integers(0, 256, (self.count, 8), np.uint8).view(np.uint64)[:, 0].astype(word)
            for kind, word in CLASSES.items()
        }
        self.R: list[Any] = [noise[kind] for kind in self.program.classes]
        self.alive = np.ones(self.count, bool)
        self.state = "ready"
        self.spinning = False
        self.steps = 0
        self.beside: list[Unit] = [self]
        self._polled: dict[tuple[int, bytes], bytes] = {}
        self._arrived = np.ones(len(ctas), bool)
        self.run = self._run()

    # Control flow

    def _run(self) -> Iterator[None]:
        blocks = self.program.blocks
        # Block, lanes, and the block at which they wait for the other side of a branch.
        stack: list[list[Any]] = [[0, np.ones(self.count, bool), None]]
        while stack:
            number, mask, joins = stack[-1]
            lanes = mask & self.alive
            if number == joins or not lanes.any():
                stack.pop()
                continue
            if number == EXIT:
                raise EmulatorError(f"{self.program.kernel.name} has no end")
            block = blocks[number]
            some = not lanes.all()
            for step in block.steps:
                if isinstance(step, Segment):
                    step.version(some)(self, self.R, lanes)
                else:
                    yield from self._effect(step, lanes)
            self._end(block, lanes, stack)
        self.state = "done"

    def _end(self, block: Code, lanes: np.ndarray, stack: list[list[Any]]) -> None:
        """Follow the end of a block: change the top of the stack, or replace it by two sides."""
        chosen = lanes
        if block.predicate is not None:
            value = self.R[block.predicate[0]]
            chosen = lanes & (~value if block.predicate[1] else value)
        if block.end == "return":
            self.alive &= ~chosen
            stack[-1][0] = block.following
            if block.predicate is None:
                stack.pop()
        elif block.end == "fall" or not chosen.any():
            stack[-1][0] = block.following
            if block.following == EXIT:
                self.alive &= ~lanes
                stack.pop()
        elif (chosen == lanes).all():
            stack[-1][0] = block.target
        else:
            sides = [[block.following, lanes & ~chosen, block.joins], [block.target, chosen, block.joins]]
            if self.grid.rng.random() < 0.5:
                sides.reverse()
            stack[-1][0] = block.joins
            if block.joins == EXIT:
                stack.pop()  # both sides end by ret
            stack += sides

    def _effect(self, effect: Effect, lanes: np.ndarray) -> Iterator[None]:
        active = lanes
        if effect.predicate is not None:
            value = self.R[effect.predicate[0]]
            active = lanes & (~value if effect.predicate[1] else value)
            if effect.kind not in WHOLE_WARPS and not active.any():
                return
        self.steps += 1
        if self.steps > MOST_EFFECTS:
            raise DeadlockError(f"{self.steps} effects by one unit: {effect.text}")
        preempted = self.grid.preempted
        if (preempted and effect.kind in GLOBAL) or (preempted == "warps" and effect.kind in WITHIN):
            yield
        self.memory.where = f"{effect.text} in {self.program.kernel.name}"
        if effect.kind == "barrier":
            self._check_barrier(active, effect)
            if len(self.beside) > 1:
                self.state = "barrier"
                yield
            else:
                self.pass_barrier()
                if preempted:
                    yield
        elif effect.kind == "grid_wait":
            if not self.grid.primary_done():
                self.state = "grid_wait"
                self.memory.counts["waits"] += 1
                yield
            self.grid.see_primary(self)
        elif effect.kind == "dependents":
            self.grid.signaled |= set(self.cta_of[active].tolist())
        elif effect.kind == "sleep":
            if preempted:
                yield
        else:
            getattr(self, f"e_{effect.kind}")(effect, active)

    def _check_barrier(self, active: np.ndarray, effect: Effect) -> None:
        """Reject ``bar.sync`` unless all lanes of each of its CTAs arrive together."""
        by_cta = active.reshape(len(self.ctas), -1)
        self._arrived = by_cta.all(axis=1)
        if (self._arrived != by_cta.any(axis=1)).any():
            raise BarrierError(f"not all lanes at {effect.text} in {self.program.kernel.name}")

    def pass_barrier(self) -> None:
        """Start the next interval of the CTAs that arrived."""
        self.shared.interval[self._arrived] += 1
        for cta in self.ctas[self._arrived] if self.memory.clocks else ():
            self.memory.clocks[int(cta) + self.grid.first].barrier()

    # Values

    def _all(self, register: int) -> np.ndarray:
        """Return the values of all lanes."""
        value: np.ndarray = self.R[register]
        return value if np.ndim(value) else np.broadcast_to(value, self.count)

    def _values(self, source: Source, active: np.ndarray, width: int) -> np.ndarray:
        """Return the values of the active lanes."""
        register, constant = source
        if register is None:
            return np.full(int(active.sum()), constant)
        value = self._all(register)[active]
        return value if value.dtype.itemsize == width else value.astype(WORDS[width])

    def _set(self, register: int | None, active: np.ndarray, values: np.ndarray) -> None:
        if register is None:
            return
        kind = CLASSES[self.program.classes[register]]
        if active.all():
            self.R[register] = values.astype(kind, copy=False)
        else:
            changed = np.array(self._all(register))
            changed[active] = values
            self.R[register] = changed

    def _addresses(self, effect: Effect, active: np.ndarray) -> np.ndarray:
        count = int(active.sum())
        if effect.base is None:
            return np.full(count, effect.offset, np.int64)
        return self._all(effect.base)[active].astype(np.int64) + effect.offset

    def _loaded(self, effect: Effect, active: np.ndarray, values: np.ndarray) -> None:
        """Set the registers of a load to values [lanes, count], widened to the classes of the registers."""
        for number, register in enumerate(effect.targets):
            if register is None:
                continue
            value = values[:, number]
            have = self.program.bits[register] // 8
            if have != value.dtype.itemsize and effect.signed:
                value = value.view(f"i{value.dtype.itemsize}").astype(f"i{have}").view(WORDS[have])
            self._set(register, active, value.astype(WORDS[have], copy=False))

    # Global memory

    def e_load_global(self, effect: Effect, active: np.ndarray) -> None:
        addresses = self._addresses(effect, active).astype(np.uint64)
        ctas, lanes = self.cta_of[active], self.lane_of[active]
        self.spinning = False
        if effect.order == "weak":
            values = self.memory.load(addresses, effect.width, effect.count, ctas, lanes)
        else:
            stale = self.memory.counts["stale"]
            each = zip(addresses, ctas, lanes, strict=True)
            found = [self.memory.strong_load(effect, int(a), int(cta), int(lane)) for a, cta, lane in each]
            values = np.array(found, WORDS[effect.width])[:, None]
            self._poll(effect, addresses, values, stale)
        self._loaded(effect, active, values)

    def _poll(self, effect: Effect, addresses: np.ndarray, seen: np.ndarray, stale: int) -> None:
        """Note that a strong access brought the values of last time: the unit may be waiting for others.

        Args:
            effect: the access.
            addresses: of the active lanes.
            seen: their values.
            stale: stale values in all of memory before the access; if there are more now, another turn is of use.
        """
        key = (id(effect), addresses.tobytes())
        if self._polled.get(key) == seen.tobytes() and self.memory.counts["stale"] == stale:
            self.spinning = True
            for address in addresses.tolist():
                self.memory.watchers.setdefault(address, []).append(self)
        self._polled[key] = seen.tobytes()

    def e_store_global(self, effect: Effect, active: np.ndarray) -> None:
        addresses = self._addresses(effect, active).astype(np.uint64)
        values = np.stack([self._values(source, active, effect.width) for source in effect.sources], axis=1)
        ctas, lanes = self.cta_of[active], self.lane_of[active]
        self.spinning = False
        if effect.order == "weak":
            self.memory.store(addresses, values, effect.width, ctas, lanes)
            return
        for address, value, cta, lane in zip(addresses, values[:, 0], ctas, lanes, strict=True):
            self.memory.strong_store(effect, int(address), value, int(cta), int(lane))

    def e_atomic(self, effect: Effect, active: np.ndarray) -> None:
        addresses = self._addresses(effect, active).astype(np.uint64)
        operands = [self._values(source, active, effect.width) for source in effect.sources]
        stale = self.memory.counts["stale"]
        each = zip(addresses, self.cta_of[active], self.lane_of[active], *operands, strict=True)
        found = [self.memory.atomic(effect, int(a), values, int(cta), int(lane)) for a, cta, lane, *values in each]
        self.spinning = False
        if effect.dead:
            # Noise: it would show if some instruction did read the result.
            found = list(self.grid.rng.integers(0, 1 << 16, len(found)))
        results = np.array(found, WORDS[effect.width])
        if not effect.dead:
            self._poll(effect, addresses, results, stale)
        self._set(effect.targets[0], active, results)

    def e_fence(self, effect: Effect, active: np.ndarray) -> None:
        for cta in np.unique(self.cta_of[active]):
            self.memory.fence(int(cta), self.lane_of[active & (self.cta_of == cta)], effect.scope)

    # Shared memory

    def e_load_shared(self, effect: Effect, active: np.ndarray) -> None:
        ctas, size = self.local[active], effect.width * effect.count
        places = self.shared.places(effect, self._addresses(effect, active), ctas, size)
        found = self.shared.read(effect, places, ctas, self.lane_of[active])
        self._loaded(effect, active, found.view(WORDS[effect.width]))

    def e_store_shared(self, effect: Effect, active: np.ndarray) -> None:
        ctas, size = self.local[active], effect.width * effect.count
        places = self.shared.places(effect, self._addresses(effect, active), ctas, size)
        values = np.stack([self._values(source, active, effect.width) for source in effect.sources], axis=1)
        self.shared.write(effect, places, np.ascontiguousarray(values).view(np.uint8), ctas, self.lane_of[active])

    def _matrix_rows(self, effect: Effect, active: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return places [warp * matrix * row, 16] of 16-byte rows, and the lanes that name them."""
        self._check_whole_warps(effect, active)
        addresses, local, lanes = (
            values.reshape(-1, 32)[:, : 8 * effect.count].ravel()  # lane 8 m + r names row r of matrix m
            for values in (self._addresses(effect, active), self.local[active], self.lane_of[active])
        )
        return self.shared.places(effect, addresses, local, 16), local, lanes

    def e_load_matrix(self, effect: Effect, active: np.ndarray) -> None:
        found = self.shared.read(effect, *self._matrix_rows(effect, active))
        halves = found.view(np.uint16).reshape(-1, effect.count, 8, 8)  # warp, matrix, row, column
        if effect.detail:
            halves = halves.swapaxes(2, 3)
        pairs = np.ascontiguousarray(halves).view(np.uint32)
        for number, register in enumerate(effect.targets):
            # Lane t holds pair t % 4 of row t // 4.
            self._set(register, active, pairs[:, number].reshape(-1))

    def e_store_matrix(self, effect: Effect, active: np.ndarray) -> None:
        places, local, lanes = self._matrix_rows(effect, active)
        pairs = [self._values(source, active, 4).reshape(-1, 8, 4) for source in effect.sources]
        halves = np.ascontiguousarray(np.stack(pairs, axis=1)).view(np.uint16)  # warp, matrix, row, column
        if effect.detail:
            halves = np.ascontiguousarray(halves.swapaxes(2, 3))
        self.shared.write(effect, places, halves.view(np.uint8).reshape(-1, 16), local, lanes)

    # Exchanges within a warp

    def _check_whole_warps(self, effect: Effect, active: np.ndarray) -> None:
        warps = active.reshape(-1, 32)
        if effect.predicate is not None or not (warps.all(axis=1) | ~warps.any(axis=1)).all():
            raise UnsupportedError(f"part of a warp at {effect.text}")

    def _check_members(self, effect: Effect, source: Source, active: np.ndarray) -> None:
        self._check_whole_warps(effect, active)
        if (self._values(source, active, 4) != np.uint32(0xFFFFFFFF)).any():
            raise UnsupportedError(f"members other than all lanes: {effect.text}")

    def _all_lanes(self, source: Source) -> np.ndarray:
        """Return values [warps, 32], also of lanes that are not active."""
        value = source[1] if source[0] is None else self.R[source[0]]
        return np.array(np.broadcast_to(value, self.count)).reshape(-1, 32)

    def e_shuffle(self, effect: Effect, active: np.ndarray) -> None:
        self._check_members(effect, effect.sources[3], active)
        offset, bounds = (self._all_lanes(source).astype(np.int64) for source in effect.sources[1:3])
        lanes = np.arange(32)
        segment = bounds >> 8 & 31
        limit = lanes & segment | bounds & 31 & ~segment
        mode = effect.detail[0]
        if mode == "up":
            wanted = lanes - (offset & 31)
            inside = wanted >= limit
        else:
            fixed = lanes & segment | offset & 31 & ~segment
            wanted = {"bfly": lanes ^ offset & 31, "idx": fixed, "down": lanes + (offset & 31)}[mode]
            inside = wanted <= limit
        source = np.where(inside, wanted, lanes)
        values = np.take_along_axis(self._all_lanes(effect.sources[0]), source, axis=1)
        self._set(effect.targets[0], active, values.reshape(-1)[active])

    def e_reduce(self, effect: Effect, active: np.ndarray) -> None:
        self._check_members(effect, effect.sources[1], active)
        operation, kind = effect.detail
        values = self._all_lanes(effect.sources[0])
        if kind == "s32":
            values = values.view(np.int32)
        result = np.repeat(REDUCTIONS[operation](values, axis=1), 32).view(np.uint32)
        self._set(effect.targets[0], active, result[active])

    def e_warp_barrier(self, effect: Effect, active: np.ndarray) -> None:
        self._check_members(effect, effect.sources[0], active)
        # Lanes of a warp name the same place, to which numpy adds once.
        self.shared.warp_interval[self.local[active], self.lane_of[active] // 32] += 1
