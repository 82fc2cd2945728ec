"""Calculated, not measured: the 340B checkpoint on 1 to 64 nodes, ``python -m benchmarks.simulation.simulate``.

Costs are fitted to the runs of `benchmarks.measure.cluster` with one worker; the runs with several workers, which the
fit does not use, give the error of the model. The speeds of network and storage are assumptions. Writes JSON lines
with the fit, the check and the calculation.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Recorder, read
from benchmarks.simulation.model import Cluster, Cost, Shard, nemotron_340b, simulate
from nemotron_fp8._utils import parse_bytes
from nemotron_fp8.sources.base import DEFAULT_SHARD_SIZE

NODES = (1, 2, 4, 8, 16, 32, 64)
CORES, THREADS = 16, 4
"""Cores of a node and of a task: the defaults of `nemotron_fp8.conversion.workers.ray` on nodes without GPUs."""
NETWORK = 25e9 / 8
"""Bytes a second of a node: 25 Gbit/s, a common network card."""
STORAGES = {"1 GB/s": 1e9, "5 GB/s": 5e9, "20 GB/s": 20e9, "100 GB/s": 100e9}
"""Bytes a second of the shared storage: from one file server to a large parallel file system."""
THREADED = "large shards"
"""Case whose run with several threads gives the parallel part of the work."""
CIRCUMSTANCES = ("processor", "cores", "vector", "python", "torch", "ray", "commit", "destination")


def fit(records: list[dict[str, Any]]) -> Cost:
    """Fit the costs to the runs with one worker of one thread: seconds = fixed + shards x shard + bytes x byte.

    Three cases give three unknowns. Two cases that differ in the number of shards give the driver's cost per shard.
    Amdahl's law, applied to the run with several threads, gives the parallel part.
    """
    single = {r["case"]: r for r in records if r["what"] == "run" and r["workers"] == r["threads"] == 1}
    large, few, small = (single[name] for name in ("large shards", "few shards", "small shards"))
    byte = (large["seconds"] - small["seconds"]) / (large["bytes"] - small["bytes"])
    per_shard = (large["seconds"] - few["seconds"]) / (large["shards"] - few["shards"])
    # The difference of two medians can be below a very small cost.
    shard = max(0.0, per_shard - byte * large["bytes"] / large["shards"])
    fixed = large["seconds"] - byte * large["bytes"] - shard * large["shards"]
    driver = (large["driver_seconds"] - few["driver_seconds"]) / (large["shards"] - few["shards"])
    measured = next(r for r in records if r["what"] == "amax")
    amax = measured["seconds"] / measured["bytes"] / byte
    parallel = 1.0
    for run in records:
        if run["what"] == "run" and run["case"] == THREADED and run["workers"] == 1 and run["threads"] > 1:
            task = (run["seconds"] - fixed - shard * run["shards"]) / (byte * run["bytes"])
            parallel = min(1.0, (1 - task) / (1 - 1 / run["threads"]))
    return Cost(fixed, shard, byte, amax, max(0.0, driver), parallel)


def check(record: Recorder, cost: Cost, records: list[dict[str, Any]]) -> None:
    """Record the calculated time of each measured run."""
    for run in records:
        if run["what"] != "run":
            continue
        size = run["bytes"] // run["shards"]
        shards = [Shard(size, size // 2)] * run["shards"]
        seconds = simulate(shards, cost, Cluster(run["workers"], 1, run["threads"]))
        named = {key: run[key] for key in ("case", "workers", "threads")}
        fitted = run["workers"] == 1 and (run["threads"] == 1 or run["case"] == THREADED)
        record.write(what="check", **named, measured=run["seconds"], calculated=seconds, fitted=fitted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=RESULTS / "cluster-cpu.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "cluster-340b.jsonl")
    options = parser.parse_args()
    records = read(options.measured)
    cost = fit(records)
    record = Recorder(options.out, {key: records[0][key] for key in CIRCUMSTANCES})
    record.write(what="cost", **asdict(cost))
    check(record, cost, records)
    shards = nemotron_340b(parse_bytes(DEFAULT_SHARD_SIZE))
    total = {"read": sum(s.read for s in shards), "written": sum(s.written for s in shards)}
    for name, storage in STORAGES.items():
        for nodes in NODES:
            cluster = Cluster(nodes, CORES // THREADS, THREADS, NETWORK, storage)
            record.write(
                what="nodes",
                storage=name,
                nodes=nodes,
                tasks=cluster.tasks,
                threads=THREADS,
                network=NETWORK,
                shards=len(shards),
                **total,
                seconds=simulate(shards, cost, cluster),
                # Lower bound of any schedule: the storage must deliver the source.
                storage_seconds=total["read"] / storage,
            )


if __name__ == "__main__":
    main()
