"""A cluster in this process: tasks run one after another in `wait`, and are lost as a script says."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8.conversion.workers.ray import worker
from nemotron_fp8.conversion.workers.ray.cluster import LostError, Need, Node

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NODES = [Node("a" * 56, "a", 2, 0), Node("b" * 56, "b", 1, 0)]
NEED = Need(1, 0)


class FakeCluster:
    """Stands for `nemotron_fp8.conversion.workers.ray.cluster.Cluster`.

    Args:
        fates: of the tasks in the order in which they run: ``ok``, ``lost`` before it began, ``late`` (taken for
            lost, but at work all the same: it runs after whatever else is there), ``ended`` (took the run for over),
            ``dead`` (lost with its file half written). ``ok`` when there are no more.
        nodes: the nodes; may be changed meanwhile.

    Attributes:
        most: the most tasks that were ever in flight.
        made: the shards whose tasks have run, in order.
        late: how many of them were taken for lost.
        stopped: tasks that were killed.
        answers: what ``check_node`` is answered with, by node; as of `entry.enter`, the node left out.
    """

    identity = ("1.0", "0123456789ab")
    address = "fake"

    def __init__(self, fates: Iterable[str] = (), nodes: Sequence[Node] = NODES) -> None:
        self._fates = iter(fates)
        self._nodes = list(nodes)
        self._ends: dict[int, tuple[str, str, Any] | LostError] = {}
        self._waiting: dict[int, bytes] = {}
        self._late: list[bytes] = []
        self._count = 0
        self._told: dict[str, tuple[int, tuple[tuple[str, str, int, int], ...], str]] = {}
        self.most = 0
        self.made: list[str] = []
        self.late = 0
        self.stopped: list[int] = []
        self.answers: dict[str, tuple[str, Any]] = {}

    def nodes(self) -> list[Node]:
        return list(self._nodes)

    def submit(self, need: Need, call: str, payload: bytes, board: Any = None) -> int:
        assert (need, call) == (NEED, "make")
        self._count += 1
        self._waiting[self._count] = payload
        name = pickle.loads(payload).job.shard_task.name
        self._told[name] = (0, (("download", name, 1, 2),), "5 s: no answer")
        self.most = max(self.most, len(self._waiting))
        return self._count

    def submit_to(self, node: Node, call: str, payload: bytes) -> int:
        self._count += 1
        kind, value = self.answers.get(node.name, ("done", None))
        seen = getattr(worker, call)(payload) if value is None else value
        self._ends[self._count] = (node.id, kind, seen)
        return self._count

    def wait(self, references: Sequence[int], count: int, seconds: float) -> list[int]:
        over = [reference for reference in references if reference in self._ends]
        if not over and references and seconds:
            self._run(references[0])
            over = [references[0]]
        return over[:count]

    def get(self, reference: int) -> tuple[str, str, Any]:
        end = self._ends.pop(reference)
        if isinstance(end, LostError):
            raise end
        return end

    def stop(self, board: FakeCluster, references: Sequence[int], seconds: float) -> None:
        assert board is self
        self.stopped += references
        for payload in self._late:
            self._make(payload)

    def board(self) -> FakeCluster:
        return self

    def ask(self, board: FakeCluster) -> int:
        self._count += 1
        self._ends[self._count] = ("", "done", dict(self._told))
        return self._count

    def told(self, reference: int) -> dict[str, Any]:
        answer: dict[str, Any] = self.get(reference)[2]
        return answer

    def _run(self, reference: int) -> None:
        payload = self._waiting.pop(reference)
        fate = next(self._fates, "ok")
        if fate == "ok":
            self._ends[reference] = (self._nodes[0].id, "done", self._make(payload))
            return
        self._ends[reference] = LostError("its worker is gone")
        if fate == "ended":
            self._ends[reference] = (self._nodes[0].id, "done", worker.TaskEnded())
        if fate == "late":
            self._late.append(payload)
            self.late += 1
        if fate == "dead":
            task: worker.Task = pickle.loads(payload)
            staging = replace(task.job.staging, digests=False)  # a thread of the dead worker would outlive it here
            sink = staging.stage(task.job.shard_task.name, task.job.shard_task.layout.file_size)
            sink.write_at(0, memoryview(b"half a shard"))
            self._told[task.job.shard_task.name] = (12, (("upload", task.job.shard_task.name, 6, 12),), "")

    def _make(self, payload: bytes) -> Any:
        task: worker.Task = pickle.loads(payload)
        self.made.append(task.job.shard_task.name)
        made = worker.make(payload)
        if isinstance(made, worker.ShardMade):
            self._told[task.job.shard_task.name] = (made.count, (("upload", task.job.shard_task.name, 1, 1),), "")
        return made
