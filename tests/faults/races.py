"""Several at once on one destination, and a reader who never stops looking."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import signal
import time
from contextlib import suppress
from threading import Barrier, Thread
from typing import TYPE_CHECKING

from tests.faults import fixture
from tests.faults.flips import convert
from tests.faults.process import start, wait
from tests.faults.row import Outcome, Row, Share
from tests.faults.world import Mode, World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def no_locks() -> None:
    """As on a network file system that grants every lock, and on another host. Runs in the child only."""
    from nemotron_fp8.destinations import partial_folder

    fcntl.flock = lambda _fd, _how: None  # type: ignore[assignment]  # what such a file system answers
    host = os.urandom(4).hex()
    partial_folder._system = lambda: host  # by which a process knows its own system


class Races(Row):
    """Two processes, two hosts without working locks, eight threads."""

    name, title = "concurrent-runs", "at once: two processes; two hosts, every lock granted; 8 threads of one process"
    target = "200 rounds: one winner or identical results"

    def cases(self, share: Share) -> Iterator[object]:
        """Rounds of each kind, starting apart by a random time."""
        kinds = ("processes", "processes", "hosts", "hosts", "threads")
        for i in range(share.of(2000, ci=100)):
            yield kinds[i % len(kinds)], ("folder", "overwrite", "in-place")[i // len(kinds) % 3], i

    def run(self, case: tuple[str, Mode, int]) -> Outcome:
        """Start them, wait for them, look at what they made."""
        kind, mode, seed = case
        if kind == "hosts" and mode == "in-place":
            mode = "folder"  # in place, a lock is needed: shards are replaced one by one
        chance = random.Random(seed)
        with World(mode) as world:
            wrong, won = self._threads(world) if kind == "threads" else self._processes(world, kind, chance)
            wrong += world.broken_now()
            if not won:
                wrong.append("nobody won")
            # Whoever lost may have left its traces where the winner no longer looked.
            return Outcome(wrong + world.resume(), {f"{kind}, {'several' if won > 1 else 'one'} succeeded": 1})

    def _processes(self, world: World, kind: str, chance: random.Random) -> tuple[list[str], int]:
        prepare = no_locks if kind == "hosts" else None
        first = start(world.command(chance.choice((1, 2))), prepare=prepare)
        time.sleep(chance.choice((0, 0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08)))
        second = start(world.command(chance.choice((1, 2))), prepare=prepare)
        ends = [wait(first), wait(second)]
        wrong = [f"not a typed error: {end.code} {end.err[-500:]}" for end in ends if end.code and not end.typed]
        return wrong, sum(end.code == 0 for end in ends)

    def _threads(self, world: World) -> tuple[list[str], int]:
        together, reports, wrong = Barrier(8), [], []

        def one() -> None:
            together.wait()
            options = {"overwrite": True} if world.mode == "overwrite" else {}
            report, problems = convert(world, **options)
            reports.append(report)
            wrong.extend(problems)

        threads = [Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong, sum(report is not None for report in reports)


class Reader(Row):
    """Someone who lists and reads the destination all the time."""

    name, title = "polling-reader", "a reader polling the destination while it is made, killed, resumed and replaced"
    target = "no partial observation in 10,000 polls"

    def cases(self, share: Share) -> Iterator[object]:
        """Polls."""
        for seed in range(share.of(8, ci=2)):
            yield seed, share.of(4000, ci=1500)

    def run(self, case: tuple[int, int]) -> Outcome:
        """Poll until there are enough polls; convert, kill and remove meanwhile."""
        seed, polls = case
        chance = random.Random(seed)
        with World("folder") as world:
            reading, writing = os.pipe()
            reader = os.fork()
            if not reader:
                os.close(reading)
                _poll(world.dst, polls, _listing(world.made.result), writing)
            os.close(writing)
            rounds = 0
            while not os.waitpid(reader, os.WNOHANG)[0]:
                rounds += 1
                running = start(world.command())
                if chance.random() < 0.5:
                    time.sleep(chance.random() * 0.04)
                    with suppress(ProcessLookupError):
                        os.kill(running.pid, signal.SIGKILL)
                wait(running)
                if rounds % 3 == 0 and world.dst.exists():
                    world.dst.rename(world.root / "gone")  # in one step: a removal is not what is watched here
                    import shutil

                    shutil.rmtree(world.root / "gone")
            with os.fdopen(reading) as pipe:
                seen, *wrong = pipe.read().splitlines()
            whole, absent = map(int, seen.split())
            counts = {"polls": whole + absent, "of them complete": whole, "runs": rounds}
            return Outcome(wrong + world.resume(), counts)


def _listing(result: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(result.items())).encode()).hexdigest()


def _poll(folder: Path, polls: int, expected: str, answer: int) -> None:
    """Look; tell how often the result was there and whole, how often it was not there, and what else was seen."""
    whole = absent = 0
    wrong: list[str] = []
    try:
        while whole + absent < polls or whole < polls // 4:
            try:
                seen = fixture.tree_at(folder)
            except FileNotFoundError:
                absent += 1
                continue
            if seen is None:  # it was another folder at the end than at the beginning
                continue
            if _listing(seen) == expected:
                whole += 1
            else:
                wrong.append(f"seen: {sorted(seen)}")
                break
    finally:
        os.write(answer, "\n".join([f"{whole} {absent}", *wrong]).encode())
        os._exit(0)
