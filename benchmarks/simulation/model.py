"""Calculated, not measured: a model of the time of a conversion on a cluster, from the costs of one worker.

A shard has two phases, like in the CPU engine: read and amax, then cast and write; the second read comes from the
node's page cache. In each phase the bytes flow at the minimum of the task's processor rate and its fair shares of the
node's network and of the storage; shares are recomputed whenever a task ends a phase. Reads and writes do not affect
each other. The driver records one shard after another.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.tensor_view import TensorView
from nemotron_fp8.sources.nemo.sharding import split

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

UNLIMITED = math.inf


@dataclass(frozen=True)
class Cost:
    """Costs of a conversion, fitted to measurements.

    Attributes:
        fixed: seconds of a run without its shards: planning, node checks, publishing.
        shard: seconds of a worker per shard of any size.
        byte: seconds of one processor per byte of input.
        amax: share of ``byte`` in the first phase.
        driver: seconds of the driver per shard.
        parallel: share of a shard's work that the threads of a task divide.
    """

    fixed: float
    shard: float
    byte: float
    amax: float
    driver: float
    parallel: float = 1.0

    def speed(self, threads: int) -> float:
        """Return the speed of a task relative to one thread (Amdahl's law)."""
        return 1 / (1 - self.parallel + self.parallel / threads)


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes.

    Attributes:
        nodes: number of nodes.
        tasks: concurrent tasks of a node.
        threads: threads of a task.
        network: bytes a second of a node, in each direction.
        storage: bytes a second of the shared storage, for reading and for writing.
    """

    nodes: int
    tasks: int
    threads: int
    network: float = UNLIMITED
    storage: float = UNLIMITED


@dataclass(frozen=True)
class Shard:
    """Bytes read and written for a shard; both above 0."""

    read: int
    written: int


@dataclass
class _Task:
    """A shard in progress: node, phase, and remaining share of the phase."""

    shard: Shard
    node: int
    phase: int = 0
    left: float = 1.0

    def seconds(self, cost: Cost, threads: int) -> float:
        """Return the seconds of the phase if the processors alone limit it."""
        if self.phase == 0:
            return cost.shard
        part = cost.amax if self.phase == 1 else 1 - cost.amax
        return self.shard.read * cost.byte * part / cost.speed(threads)

    @property
    def moved(self) -> int:
        """Bytes that the phase moves between node and storage."""
        return (0, self.shard.read, self.shard.written)[self.phase]


def simulate(shards: Iterable[Shard], cost: Cost, cluster: Cluster) -> float:
    """Return the seconds of a run on a running cluster: largest shards first, each on the node with most free tasks."""
    waiting = sorted(shards, key=lambda shard: shard.read)
    free = [cluster.tasks] * cluster.nodes
    active: list[_Task] = []
    now = recorded = 0.0
    while waiting or active:
        while waiting and max(free) > 0:
            node = free.index(max(free))
            free[node] -= 1
            active.append(_Task(waiting.pop(), node))
        rates = _rates(active, cost, cluster)
        step = min(task.left / rate for task, rate in zip(active, rates, strict=True))
        now += step
        going = []
        for task, rate in zip(active, rates, strict=True):
            task.left -= rate * step
            if task.left > 1e-9:
                going.append(task)
            elif task.phase < 2:
                task.phase, task.left = task.phase + 1, 1.0
                going.append(task)
            else:
                free[task.node] += 1
                recorded = max(recorded, now) + cost.driver
        active = going
    return cost.fixed + max(now, recorded)


def _rates(active: Sequence[_Task], cost: Cost, cluster: Cluster) -> list[float]:
    """Return the share of its phase that each task completes in a second."""
    beside = Counter((task.node, task.phase) for task in active)
    # In bytes a second if the phase moves any; reading and writing do not share the network or the storage.
    caps = []
    for task in active:
        alone = task.seconds(cost, cluster.threads)
        fastest = task.moved / alone if alone else UNLIMITED
        caps.append(min(fastest, cluster.network / beside[task.node, task.phase]))
    rates = [0.0] * len(active)
    for phase in (1, 2):
        among = [i for i, task in enumerate(active) if task.phase == phase]
        for i, rate in zip(among, share([caps[i] for i in among], cluster.storage), strict=True):
            rates[i] = rate / active[i].moved
    for i, task in enumerate(active):
        if task.phase == 0:
            rates[i] = 1 / cost.shard if cost.shard else 1e12
    return rates


def share(caps: Sequence[float], total: float) -> list[float]:
    """Divide ``total`` into equal shares, each at most its cap; what a cap leaves over goes to the others."""
    shares = [0.0] * len(caps)
    left = total
    for done, i in enumerate(sorted(range(len(caps)), key=lambda i: caps[i])):
        shares[i] = min(caps[i], left / (len(caps) - done))
        left -= shares[i]
    return shares


def nemotron_340b(shard_size: int) -> list[Shard]:
    """Return the shards of Nemotron-4-340B, as this library divides the published NeMo checkpoint.

    Shapes: the arrays of nvidia/Nemotron-4-340B-Instruct (96 layers, hidden 18432, feed-forward 73728, 96 heads in 8
    groups of 192, vocabulary 256000); order: `nemotron_fp8.sources.nemo.name_mapping.tensors`; division:
    `nemotron_fp8.sources.nemo.sharding.split`.
    """
    shards = split((TensorView(name, "BF16", shape, ()) for name, shape in nemotron_340b_tensors()), shard_size)
    return [
        Shard(shard.size, sum(view.nbytes // (2 if "_proj." in view.name else 1) for view in shard.views))
        for shard in shards
    ]


def nemotron_340b_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of Nemotron-4-340B in the layout of transformers."""
    hidden, inner, vocabulary, kv = 18432, 73728, 256000, 8 * 192
    norm = [("weight", (hidden,)), ("bias", (hidden,))]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(96):
        stem = f"model.layers.{layer}."
        for part, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{stem}self_attn.{part}_proj.weight", (rows, hidden)
        yield f"{stem}mlp.up_proj.weight", (inner, hidden)
        yield f"{stem}mlp.down_proj.weight", (hidden, inner)
        for which in ("input", "post_attention"):
            for part, shape in norm:
                yield f"{stem}{which}_layernorm.{part}", shape
    for part, shape in norm:
        yield f"model.norm.{part}", shape
    yield "lm_head.weight", (vocabulary, hidden)
