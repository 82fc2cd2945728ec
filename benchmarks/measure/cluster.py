"""Ray workers on one machine, one against several: ``python -m benchmarks.measure.cluster``.

Runs in the environment of ``make test-cluster``. The first cluster has a head without processors and one node per
core; each node is pinned to its core, and its tasks have one thread. The second cluster has a single node of all
cores, for a task with one thread per core. An idle actor occupies the processors that a run does not use, so that
Ray's own processes are the same in all runs. The source is read into the page cache before each run; the result goes
to tmpfs if the system has one. The same workers convert a small checkpoint before each timed run. Every round runs
each contestant once, in turn; ratios compare runs of the same round and cluster.

`benchmarks.simulation` fits its costs to the runs with one worker and checks itself against the runs with several.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, Recorder, machine
from tests.cluster.ray_cluster import RayCluster

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Case:
    """A checkpoint of equal shards.

    Attributes:
        shards: number of shards.
        hidden: hidden size of the layers, one per shard.
        computed: use block scales and ``--stats``: arithmetic in the cache of a core, ten times the memory traffic.
    """

    shards: int
    hidden: int
    computed: bool = False

    def write(self, folder: Path) -> int:
        """Write the checkpoint; return its bytes."""
        return write_checkpoint(folder, nemotron(0.0, self.shards, self.hidden))


CASES = {
    "large shards": Case(48, 2048),
    "few shards": Case(12, 2048),
    "small shards": Case(48, 512),
    "blocks, with --stats": Case(40, 2048, computed=True),
}
"""The first is bound by memory and processors, the last by processors alone; the others separate the costs of a byte,
of a shard and of a run."""
QUICK = {
    "large shards": Case(8, 1024),
    "few shards": Case(4, 1024),
    "small shards": Case(8, 256),
    "blocks, with --stats": Case(8, 512, computed=True),
}
WARM = Case(8, 256)


@dataclass(frozen=True)
class Sample:
    """One run: wall seconds, and processor seconds of the driver."""

    seconds: float
    driver: float


@dataclass(frozen=True)
class Workers:
    """A contestant: the number of workers and of threads of each."""

    count: int
    threads: int


@dataclass(frozen=True)
class Order:
    """A conversion: its source and its workers."""

    source: Path
    computed: bool
    workers: Workers


def drive(orders: Connection, address: str, target: Path) -> None:
    """Carry out orders over a cluster, in a process that keeps its connection and therefore its workers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from nemotron_fp8 import Recipe, quantize_repo

    class Idle:  # here, so that Ray sends it by value
        """An actor that occupies the processors of a node."""

        def ready(self) -> None:
            """Return when the processors are occupied."""

    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    cpus = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes()}
    idle: dict[str, tuple[int, Any]] = {}
    while order := orders.recv():
        workers: Workers = order.workers
        left = wanted = workers.count * workers.threads
        for node in sorted(cpus):
            part = min(cpus[node], left)
            left -= part
            spare = cpus[node] - part
            held, actor = idle.pop(node, (0, None))
            if actor is not None and held != spare:
                ray.kill(actor)
                actor = None
            if spare and actor is None:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                actor = ray.remote(Idle).options(num_cpus=spare, scheduling_strategy=there).remote()
                ray.get(actor.ready.remote())
            if spare:
                idle[node] = spare, actor
        while ray.available_resources().get("CPU", 0) != wanted:
            time.sleep(0.1)
        recipe = Recipe(format="fp8", granularity="tensor")
        if order.computed:
            recipe = Recipe(format="fp8", granularity="block", stats=True)
        shutil.rmtree(target, ignore_errors=True)
        computed, started = time.process_time(), time.perf_counter()
        quantize_repo(order.source, target, recipe, device="cpu", threads=workers.threads, cluster=address)
        orders.send(Sample(time.perf_counter() - started, time.process_time() - computed))
    ray.shutdown()


class Driver:
    """A cluster, and a process that converts over it.

    Args:
        nodes: cores of each node.
        target: folder of the results.
        warm: a small checkpoint.
        stack: ends cluster and process.
    """

    def __init__(self, nodes: list[list[int]], target: Path, warm: Path, stack: ExitStack) -> None:
        # By default Ray ends a worker that was idle for a second (the next one would import everything again) and runs
        # workers at a lower priority than everything else on the machine.
        rules = {"RAY_idle_worker_killing_time_threshold_ms": "36000000", "RAY_worker_niceness": "0"}
        cluster = stack.enter_context(RayCluster(cpus=0, environment=rules))
        os.environ.update(cluster.environment)
        for cores in nodes:
            cluster.add(len(cores), ["taskset", "--cpu-list", ",".join(map(str, cores))])
        self._warm = warm
        self._orders, theirs = get_context("spawn").Pipe()
        process = get_context("spawn").Process(target=drive, args=(theirs, cluster.address, target), daemon=True)
        process.start()
        stack.callback(process.join)
        stack.callback(self._orders.send, None)

    def run(self, source: Path, computed: bool, workers: Workers) -> Sample:
        """Convert once, after a conversion that is not timed."""
        self._order(Order(self._warm, computed, workers))
        for path in source.iterdir():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
        return self._order(Order(source, computed, workers))

    def _order(self, order: Order) -> Sample:
        self._orders.send(order)
        sample: Sample = self._orders.recv()
        return sample


Found = dict[tuple[str, Workers], list[Sample]]


def measure(
    pairs: list[tuple[str, Workers]],
    cases: dict[str, Case],
    sources: dict[str, Path],
    rounds: int,
    minutes: float,
    driver: Driver,
) -> Found:
    """Return the samples of each case and contestant; begin no further round after ``minutes``."""
    found: Found = {pair: [] for pair in pairs}
    end = time.monotonic() + 60 * minutes
    for turn in range(rounds):
        for case, workers in pairs if turn % 2 else reversed(pairs):
            found[case, workers].append(driver.run(sources[case], cases[case].computed, workers))
        if time.monotonic() > end:
            break
    return found


def amax_seconds(source: Path) -> float:
    """Return the processor seconds of all amaxes of a source on one thread: the fastest of three runs."""
    from nemotron_fp8.engines.cpu import CpuEngine
    from nemotron_fp8.planning.quantize import make_plan
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.sources.open import open_source
    from nemotron_fp8.sources.reader import Reader

    opened = open_source(source)
    recipe = Recipe(format="fp8", granularity="tensor")
    plan, engine, found = make_plan(opened.inventory, recipe, 256 << 20, 1), CpuEngine(), []
    for _ in range(3):
        started = time.process_time()
        for shard_task in plan.shard_tasks:
            with Reader(opened.opener) as reader:
                engine.amaxes(shard_task, reader)
        found.append(time.process_time() - started)
    return min(found)


def record_runs(
    record: Recorder, sizes: dict[str, int], cases: dict[str, Case], found: Found, contestants: list[Workers]
) -> None:
    for (case, workers), samples in found.items():
        if workers not in contestants:
            continue
        seconds = [sample.seconds for sample in samples]
        base = [sample.seconds for sample in found[case, Workers(1, 1)]]
        ratios = [one / own for one, own in zip(base, seconds, strict=True)]
        record.write(
            what="computed" if cases[case].computed else "run",
            case=case,
            workers=workers.count,
            threads=workers.threads,
            shards=cases[case].shards,
            bytes=sizes[case],
            seconds=statistics.median(seconds),
            seconds_low=min(seconds),
            seconds_high=max(seconds),
            times_one=statistics.median(ratios),
            times_one_low=min(ratios),
            times_one_high=max(ratios),
            driver_seconds=statistics.median(sample.driver for sample in samples),
            rounds=len(samples),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=30, help="begin no further round after so many")
    parser.add_argument("--quick", action="store_true", help="small checkpoints, to try the script")
    parser.add_argument("--work", type=Path, help="folder for the sources; a temporary one by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "cluster-cpu.jsonl")
    options = parser.parse_args()
    cases = QUICK if options.quick else CASES
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.work)))
        in_memory = MEMORY.is_dir()
        results = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY if in_memory else work)))
        sources = {name: work / str(number) for number, name in enumerate(cases)}
        sizes = {name: case.write(sources[name]) for name, case in cases.items()}
        load = os.getloadavg()[0]
        warm = work / "warm"
        WARM.write(warm)
        by_core = [
            Workers(n, 1) for n in sorted({1, *(1 << k for k in range(1, 8) if 1 << k <= len(cores)), len(cores)})
        ]
        with ExitStack() as cluster:
            driver = Driver([[core] for core in cores], results / "out", warm, cluster)
            pairs = [(case, workers) for case in cases for workers in by_core]
            found = measure(pairs, cases, sources, options.rounds, options.minutes, driver)
        first = next(iter(cases))
        together = [Workers(1, len(cores))]
        with ExitStack() as cluster:
            driver = Driver([cores], results / "out", warm, cluster)
            pairs = [(first, workers) for workers in (by_core[0], *together)]
            threaded = measure(pairs, cases, sources, options.rounds, options.minutes / 4, driver)
        circumstances = {
            **machine("cpu"),
            "cores": len(cores),
            "ray": metadata.version("ray"),
            "destination": "memory" if in_memory else "disk",
            "load_average": load,
        }
        record = Recorder(options.out, circumstances)
        record_runs(record, sizes, cases, found, by_core)
        record_runs(record, sizes, cases, threaded, together if len(cores) > 1 else [])
        record.write(what="amax", case=first, bytes=sizes[first], seconds=amax_seconds(sources[first]))


if __name__ == "__main__":
    main()
