"""How long a conversion takes on a cluster, from what one worker was measured to take: a model, no measurement.

A shard is made in two phases, as the CPU engine does it: its bytes are read and measured, then it is cast and
written; the second time its bytes come from the node's own cache. In each phase bytes flow at the least of what the
task's processors compute and its fair share of its node's network and of the storage; shares are worked out anew
whenever a task ends a phase. Reading and writing do not disturb each other. The driver records one shard after another.
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
    """What was measured.

    Attributes:
        fixed: seconds of a run beside its shards: planning, a look by every node, publishing.
        shard: seconds of a worker for a shard, whatever its size.
        byte: seconds of one processor for a byte of input.
        amax: the part of ``byte`` that the first phase takes.
        driver: seconds of the driver for a shard.
        parallel: the part of a shard's work that the threads of a task divide among them.
    """

    fixed: float
    shard: float
    byte: float
    amax: float
    driver: float
    parallel: float = 1.0

    def speed(self, threads: int) -> float:
        """How many times as fast as one thread a task is (Amdahl's law)."""
        return 1 / (1 - self.parallel + self.parallel / threads)


@dataclass(frozen=True)
class Cluster:
    """Nodes that are all alike.

    Attributes:
        nodes: how many.
        tasks: that each runs at the same time.
        threads: of each task.
        network: bytes a second of a node, in each direction.
        storage: bytes a second of what all nodes share, read and written each.
    """

    nodes: int
    tasks: int
    threads: int
    network: float = UNLIMITED
    storage: float = UNLIMITED


@dataclass(frozen=True)
class Shard:
    """Bytes that are read and bytes that are written, neither of them 0."""

    read: int
    written: int


@dataclass
class _Task:
    """A shard in the making: on which node, in which phase, and what is left of the phase, of 1."""

    shard: Shard
    node: int
    phase: int = 0
    left: float = 1.0

    def seconds(self, cost: Cost, threads: int) -> float:
        """What the phase takes if nothing but the processors limits it."""
        if self.phase == 0:
            return cost.shard
        part = cost.amax if self.phase == 1 else 1 - cost.amax
        return self.shard.read * cost.byte * part / cost.speed(threads)

    @property
    def moved(self) -> int:
        """Bytes that the phase moves between node and storage."""
        return (0, self.shard.read, self.shard.written)[self.phase]


def simulate(shards: Iterable[Shard], cost: Cost, cluster: Cluster) -> float:
    """Seconds from the command to its end, the cluster being there: largest shards first, each to the emptiest node."""
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
    """How much of its phase each task does in a second."""
    beside = Counter((task.node, task.phase) for task in active)
    # In bytes a second where a phase moves any; each direction has the network and the storage to itself.
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
    """Divide ``total`` so that all get the same, but nobody more than its cap, and nothing is left that one wants."""
    shares = [0.0] * len(caps)
    left = total
    for done, i in enumerate(sorted(range(len(caps)), key=lambda i: caps[i])):
        shares[i] = min(caps[i], left / (len(caps) - done))
        left -= shares[i]
    return shares


def nemotron_340b(shard_size: int) -> list[Shard]:
    """The shards of Nemotron-4-340B, as this library divides the NeMo checkpoint that was published.

    Shapes: the arrays of nvidia/Nemotron-4-340B-Instruct (96 layers, hidden 18432, feed-forward 73728, 96 heads in 8
    groups of 192, vocabulary 256000); order: `nemotron_fp8.sources.nemo.name_mapping.tensors`; division:
    `nemotron_fp8.sources.nemo.sharding.split`.
    """
    shards = split((TensorView(name, "BF16", shape, ()) for name, shape in _tensors()), shard_size)
    return [
        Shard(shard.size, sum(view.nbytes // (2 if "_proj." in view.name else 1) for view in shard.views))
        for shard in shards
    ]


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
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
