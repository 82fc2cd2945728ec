"""SIGKILL at every system call that changes a file system, and again while the next run recovers."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING

from tests.faults.process import Call, TaskEnded, calls, forked, fresh
from tests.faults.row import Outcome, Row, Share
from tests.faults.tools import STRACE
from tests.faults.world import MODES, Mode, World, reference

if TYPE_CHECKING:
    from collections.abc import Iterator


def kill(name: str, number: int) -> list[str]:
    """strace's rule that kills a process at its ``number``-th call of a name."""
    return [f"{name}:signal=SIGKILL:when={number}"]


def points(mode: Mode, threads: int, *, from_start: bool = False) -> list[Call]:
    """The calls of an undisturbed run."""
    with World(mode) as world:
        ended = fresh(world.command(threads)) if from_start else forked(world.command(threads), inject=())
        if ended.code or world.wrong_at_the_end():
            raise RuntimeError(f"a traced run failed: {ended.err}")
        return calls(ended.log, [str(world.root)])


def _shown(call: Call) -> str:
    return f"{call.name} {call.number}"


class EveryPoint(Row):
    """A kill at every point of a run on one thread, where the points are the same every time."""

    name, title = "sigkill", "SIGKILL at every write-class call, then resume"
    target = "all points; identical, nothing early, no orphans"
    needs = (STRACE,)

    def cases(self, share: Share) -> Iterator[object]:
        """Points on one thread from a fork: all, or every sixth. On four threads and from a fresh start: a sample."""
        chance = random.Random(1)
        for mode in MODES:
            for call in points(mode, 1)[:: share.of(1, ci=6)]:
                yield "fork", mode, 1, call.name, call.number
            several = [(call.name, call.number) for call in points(mode, 4)]
            for name, number in chance.sample(several, min(len(several), share.of(30, ci=5))):
                yield "fork", mode, 4, name, number
            if not share.full and mode != "folder":
                continue
            started = points(mode, 1, from_start=True)
            for call in started[:: share.of(10, ci=30)]:
                yield "fresh", mode, 1, call.name, call.number

    def run(self, case: tuple[str, Mode, int, str, int]) -> Outcome:
        """Kill, look, carry on, look again."""
        how, mode, threads, name, number = case
        with World(mode) as world:
            command, rule = world.command(threads), kill(name, number)
            ended = forked(command, rule, name) if how == "fork" else fresh(command, rule, name)
            wrong = world.broken_now()
            if ended.code != -signal.SIGKILL:
                if threads == 1:
                    wrong.append(f"not reached: it ended with {ended.code}")
                return Outcome(wrong + world.resume(), {"not reached": 1})
            return Outcome(wrong + world.resume(threads), {f"{mode}, {threads} threads, {how}": 1})


class KilledTwice(Row):
    """A kill during the recovery from a kill."""

    name, title = "sigkill-twice", "killed again during recovery, then resume"
    target = "200 random pairs"
    needs = (STRACE,)

    def cases(self, share: Share) -> Iterator[object]:
        """Random pairs of points, in every mode, on one to four threads."""
        chance = random.Random(2)
        known = {mode: [(call.name, call.number) for call in points(mode, 1)] for mode in MODES}
        for i in range(share.of(300, ci=30)):
            mode = MODES[i % len(MODES)]
            yield mode, chance.choice((1, 1, 2, 4)), chance.choice(known[mode]), chance.random()

    def run(self, case: tuple[Mode, int, tuple[str, int], float]) -> Outcome:
        """Kill at one point; find the points of the recovery; kill at one of those; resume."""
        mode, threads, (name, number), where = case
        with World(mode) as world:
            wrong = _killed(forked(world.command(threads), kill(name, number), name), threads, world)
            second = self._recovery_point(world, threads, where)
            if second is None:
                return Outcome([*wrong, *world.resume(threads)], {"nothing to recover": 1})
            wrong += _killed(forked(world.command(threads), kill(*second), second[0]), threads, world)
            return Outcome([*wrong, *world.resume(threads)], {"pairs": 1})

    def _recovery_point(self, world: World, threads: int, where: float) -> tuple[str, int] | None:
        """A point of the recovery of this very state, tried on a copy."""
        import shutil
        import tempfile
        from pathlib import Path

        from tests.faults.world import base

        with tempfile.TemporaryDirectory(prefix="faults-copy-", dir=base()) as name:
            copy = Path(name) / "copy"
            shutil.copytree(world.root, copy, symlinks=True)
            command = [part.replace(str(world.root), str(copy)) for part in world.command(threads)]
            found = calls(forked(command, inject=()).log, [str(copy)])
        if not found:
            return None
        call = found[int(where * len(found))]
        return call.name, call.number


def _killed(ended: TaskEnded, threads: int, world: World) -> list[str]:
    wrong = world.broken_now()
    if ended.code not in (-signal.SIGKILL, 0) or (threads == 1 and ended.code == 0 and world.wrong_at_the_end()):
        wrong.append(f"ended with {ended.code}: {ended.err[-300:]}")
    return wrong


__all__ = ["EveryPoint", "KilledTwice", "kill", "points", "reference"]
