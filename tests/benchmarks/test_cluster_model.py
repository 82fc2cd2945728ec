"""Laws of the calculated model of a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation.model import Cluster, Cost, Shard, nemotron_340b, share, simulate
from benchmarks.simulation.simulate import fit

COST = Cost(fixed=0.7, shard=0.02, byte=1e-9, amax=0.2, driver=0.004, parallel=0.8)
SHARDS = st.lists(st.integers(2, 6_000_000_000).map(lambda n: Shard(n, n // 2)), min_size=1, max_size=40)
CLUSTERS = st.builds(
    Cluster,
    nodes=st.integers(1, 20),
    tasks=st.integers(1, 5),
    threads=st.integers(1, 8),
    network=st.floats(1e7, 1e11),
    storage=st.floats(1e7, 1e12),
)


def computed(shard: Shard, threads: int = 1) -> float:
    """Return the seconds of a shard that has a node to itself, with unlimited network and storage."""
    return COST.shard + shard.read * COST.byte / COST.speed(threads)


@given(shards=SHARDS)
def test_one_worker_makes_one_shard_after_another(shards: list[Shard]) -> None:
    wanted = COST.fixed + sum(map(computed, shards)) + COST.driver
    assert simulate(shards, COST, Cluster(1, 1, 1)) == pytest.approx(wanted)


@given(shards=SHARDS, nodes=st.integers(1, 50), threads=st.integers(1, 8))
def test_without_limits_no_better_than_even_and_by_one_shard_worse(
    shards: list[Shard], nodes: int, threads: int
) -> None:
    """Graham's bounds for any order of independent tasks on equal machines."""
    times = [computed(shard, threads) for shard in shards]
    seconds = simulate(shards, COST, Cluster(nodes, 1, threads)) - COST.fixed
    assert seconds >= max(*times, sum(times) / nodes) * (1 - 1e-6)
    assert seconds <= (sum(times) / nodes + max(times) + COST.driver * len(shards)) * (1 + 1e-6)


@settings(max_examples=60)
@given(shards=SHARDS, cluster=CLUSTERS)
def test_no_faster_than_what_carries_the_bytes(shards: list[Shard], cluster: Cluster) -> None:
    read, written = sum(s.read for s in shards), sum(s.written for s in shards)
    seconds = simulate(shards, COST, cluster)
    assert seconds >= max(read, written) / cluster.storage * (1 - 1e-6)
    assert seconds >= max(read, written) / (cluster.network * cluster.nodes) * (1 - 1e-6)
    assert seconds >= COST.fixed + COST.driver * 1 - 1e-9
    loose = Cluster(cluster.nodes, cluster.tasks, cluster.threads)
    assert seconds >= (max(computed(s, cluster.threads) for s in shards)) * (1 - 1e-6)
    assert simulate(shards[:1], COST, cluster) >= simulate(shards[:1], COST, loose) * (1 - 1e-6)


@given(caps=st.lists(st.floats(0.1, 1e3), min_size=1, max_size=30), total=st.floats(0.1, 1e4))
def test_shares_are_fair(caps: list[float], total: float) -> None:
    """The whole total is used up to the caps; a share below its cap is as large as any other."""
    shares = share(caps, total)
    assert sum(shares) == pytest.approx(min(total, sum(caps)))
    assert all(got <= cap for got, cap in zip(shares, caps, strict=True))
    wanting = [got for got, cap in zip(shares, caps, strict=True) if got < cap]
    assert not wanting or min(wanting) >= max(shares) * (1 - 1e-9)


def test_the_340b_checkpoint() -> None:
    """341 billion parameters in bf16; embedding and head exceed a shard and have one each."""
    shards = nemotron_340b(5_000_000_000)
    layer = 2 * 18432**2 + 2 * 1536 * 18432 + 2 * 73728 * 18432
    parameters = 96 * (layer + 4 * 18432) + 2 * 256000 * 18432 + 2 * 18432
    assert sum(shard.read for shard in shards) == 2 * parameters
    assert sum(shard.written for shard in shards) == 2 * parameters - 96 * layer
    embedding = 2 * 256000 * 18432
    large = [shard for shard in shards if shard.read > 5_000_000_000]
    assert large == [Shard(embedding, embedding)] * 2


def test_the_fit_finds_the_costs_that_made_the_runs() -> None:
    cases: list[tuple[str, int, int, int]] = [
        ("large shards", 48, 86_000_000, 1),
        ("few shards", 12, 86_000_000, 1),
        ("small shards", 48, 5_000_000, 1),
        ("large shards", 48, 86_000_000, 2),
    ]
    records: list[dict[str, Any]] = [
        {
            "what": "run",
            "case": case,
            "workers": 1,
            "threads": threads,
            "shards": count,
            "bytes": count * size,
            "seconds": simulate([Shard(size, size // 2)] * count, COST, Cluster(1, 1, threads)),
            "driver_seconds": 0.1 + count * COST.driver,
        }
        for case, count, size, threads in cases
    ]
    records.append({"what": "amax", "bytes": 10**9, "seconds": COST.amax * COST.byte * 10**9})
    found = fit(records)
    for name in ("shard", "byte", "amax", "driver", "parallel"):
        assert getattr(found, name) == pytest.approx(getattr(COST, name), rel=1e-6), name
    assert found.fixed == pytest.approx(COST.fixed + COST.driver)  # of the last shard
