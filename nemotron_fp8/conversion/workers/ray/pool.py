"""Worker pool of a Ray cluster: one task for each shard, and a new attempt for each lost task."""

from __future__ import annotations

import logging
import pickle
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from nemotron_fp8._process import stopping
from nemotron_fp8._utils import LONGEST_WAIT
from nemotron_fp8.conversion.workers.processes import Failed, RemoteTraceback
from nemotron_fp8.conversion.workers.ray.cluster import LostError
from nemotron_fp8.conversion.workers.ray.worker import NodeCheck, NodeCheckFailed, NoDevice, ShardMade, Task, TaskEnded
from nemotron_fp8.errors.cluster import (
    NoCapacityError,
    NodeBlindError,
    NodeDeviceError,
    NodeVersionError,
    WorkerLostError,
)
from nemotron_fp8.events import emit
from nemotron_fp8.planning.tasks import files_of_views
from nemotron_fp8.progress import Transfer

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from nemotron_fp8.conversion.progress import ConversionProgress
    from nemotron_fp8.conversion.workers.base import Job
    from nemotron_fp8.conversion.workers.ray.cluster import Cluster, Need
    from nemotron_fp8.engines.devices import EngineSpec
    from nemotron_fp8.planning.receipt import ShardReceipt


MAX_ATTEMPTS = 4
"""Maximum attempts at a shard; if every attempt loses its worker, the shard is assumed to be the cause."""
POLL_SECONDS = 0.5
"""Longest interval between two readings of the progress, and between two searches for new nodes."""
NODE_CHECK_SECONDS = 120.0
"""Longest wait for node checks before the first shard; later answers are still evaluated."""
STOP_SECONDS = 30.0
"""Longest wait for the tasks of a run that has ended."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt at a shard.

    Attributes:
        job: job of the shard.
        own: the same job with the staging of this attempt.
        number: 1 for the first attempt.
    """

    job: Job
    own: Job
    number: int


class RayPool:
    """Workers on a Ray cluster: one task for each shard.

    Args:
        cluster: connection to the cluster.
        spec: engine of every task.
        need: resources of a node that a task takes.
    """

    count = 0  # none on this machine
    shares_disk = False

    def __init__(self, cluster: Cluster, spec: EngineSpec, need: Need) -> None:
        self.cluster, self.spec, self.need = cluster, spec, need
        self._names: dict[str, str] = {}
        self._checks: list[Any] = []

    def run(self, jobs: Iterable[Job], progress: ConversionProgress) -> Generator[ShardReceipt, None, None]:
        """Run jobs as in `nemotron_fp8.conversion.workers.base.WorkerPool`.

        Raises:
            NodeVersionError, NodeBlindError: a node is unusable; raised before the first shard, or when a node joins.
            NodeDeviceError: the first task on a node found no usable GPU.
            WorkerLostError: every attempt at a shard lost its worker.
            ClusterLostError, NoCapacityError: the cluster is lost, or no node remains that can run a task.
        """
        self._progress = ProgressCollector(self.cluster, progress)
        # Largest first: the workers then finish within one small job of each other.
        left = deque((job, 1) for job in sorted(jobs, key=lambda job: (-job.nbytes, job.shard_task.name)))
        if not left:
            return
        check = _node_check([job for job, _ in left])
        running: dict[Any, Attempt] = {}
        try:
            slots = self._start_node_checks(check)
            self._progress.begin()  # the actor takes some seconds to start, in parallel with the node checks
            self._collect_node_checks(self.cluster.wait(self._checks, len(self._checks), NODE_CHECK_SECONDS))
            while left or running:
                # Twice as many as can run: a queued task starts without a round trip, and an autoscaler sees the
                # backlog. Not all: each task carries its job, and a failed run waits for the submitted tasks.
                for _ in range(min(len(left), max(2, 2 * slots) - len(running))):
                    attempt = _attempt(*left.popleft())
                    running[self._submit(attempt)] = attempt
                over = self.cluster.wait(list(running), 1, POLL_SECONDS)
                self._progress.read()
                self._collect_node_checks(self.cluster.wait(self._checks, len(self._checks), 0))
                for reference in over:
                    receipt = self._collect(reference, running.pop(reference), left)
                    if receipt is not None:
                        yield receipt
                slots = self._start_node_checks(check)
        finally:
            self._progress.end([*running, *self._checks] if running else [])
            for attempt in running.values():
                attempt.own.staging.discard()

    def _start_node_checks(self, check: bytes) -> int:
        """Start the check of every new node, and return the number of tasks that all nodes can run at the same time.

        Raises:
            NoCapacityError: no node can run a task.
        """
        nodes = [node for node in self.cluster.nodes() if node.slots(self.need)]
        if not nodes:
            raise NoCapacityError(self.need.cpus, self.need.gpus, 0)
        for node in nodes:
            if node.id not in self._names:
                self._names[node.id] = node.name
                self._checks.append(self.cluster.submit_to(node, "check_node", check))
        return sum(node.slots(self.need) for node in nodes)

    def _collect_node_checks(self, finished: Sequence[Any]) -> None:
        """Collect finished node checks.

        Raises:
            NodeVersionError, NodeBlindError: a node is unusable.
        """
        for reference in finished:
            self._checks.remove(reference)
            try:
                node, result = self._answer(reference)
            except LostError:  # the node is lost and gets no shard
                continue
            if isinstance(result, NodeCheckFailed):
                raise NodeBlindError(node, result.what, result.problem, result.on_hub, result.in_store)

    def _submit(self, attempt: Attempt) -> Any:
        payload = pickle.dumps(Task(attempt.own, self.spec))
        return self.cluster.submit(self.need, "make", payload, self._progress.board)

    def _collect(self, reference: Any, attempt: Attempt, left: deque[tuple[Job, int]]) -> ShardReceipt | None:
        """Return the receipt of a finished task; if its worker was lost, put the shard back and return None."""
        name = attempt.job.shard_task.name
        try:
            node, made = self._answer(reference)
            if isinstance(made, TaskEnded):
                raise LostError("the worker lost contact with the driver and stopped")
        except LostError as error:
            attempt.own.staging.discard()
            self._progress.lost(name)
            if attempt.number >= MAX_ATTEMPTS:
                raise WorkerLostError(name, attempt.number, str(error)) from error
            text = f"{name}: the worker was lost, and the shard is restarted ({error})"
            emit("worker.lost", text, logging.WARNING, shard=name, error=str(error))
            left.appendleft((attempt.job, attempt.number + 1))
            return None
        if isinstance(made, NoDevice):
            raise NodeDeviceError(node, made.problem)
        if isinstance(made, Failed):
            raise made.error from RemoteTraceback(made.trace)
        if not isinstance(made, ShardMade):
            raise TypeError(f"a worker answered {type(made).__name__}")
        attempt.own.staging.accept(made.receipt)
        self._progress.finish(name, made.count)
        return made.receipt

    def _answer(self, reference: Any) -> tuple[str, Any]:
        """Return the name of a task's node, and the return value of the function that was called there.

        Raises:
            NodeVersionError: the node has other code, so nothing was called.
            LostError: the worker was lost.
        """
        node, kind, value = self.cluster.get(reference)
        name = self._names.get(node, node)
        version, code = self.cluster.identity
        if kind == "missing":
            raise NodeVersionError(name, f"cannot be imported ({value})", version)
        if kind == "differs":
            found, other = value
            if found != version:
                raise NodeVersionError(name, str(found), version)
            raise NodeVersionError(name, f"{found} with other code ({other})", f"{version} ({code})")
        return name, value


class ProgressCollector:
    """Collects the progress of all workers. Bytes that a second attempt processes again are not counted again.

    Args:
        cluster: connection to the cluster.
        progress: progress of the conversion.
    """

    def __init__(self, cluster: Cluster, progress: ConversionProgress) -> None:
        self._cluster, self._conversion = cluster, progress
        self._counted: dict[str, int] = {}
        self._finished: set[str] = set()
        self._asked: Any = None
        self.board: Any = None

    def begin(self) -> None:
        """Start the board: it receives the workers' progress and shows the workers that the run is active."""
        self._finished.clear()
        self.board = self._cluster.board()

    def read(self) -> None:
        """Read new progress from the board, without waiting for an answer."""
        if not self._conversion.wanted:
            return
        if self._asked is None:
            self._asked = self._cluster.ask(self.board)
        if not self._cluster.wait([self._asked], 1, 0):
            return
        asked, self._asked = self._asked, None
        for shard, (count, moving, waiting) in self._cluster.told(asked).items():
            if shard not in self._finished:  # an answer may be older than the receipt of the shard
                self._reach(shard, count)
                self._conversion.transfers.elsewhere(shard, tuple(Transfer(*each) for each in moving), waiting)

    def finish(self, shard: str, count: int) -> None:
        """Count the remaining bytes of a finished shard."""
        self._finished.add(shard)
        self._reach(shard, count)
        self.lost(shard)

    def lost(self, shard: str) -> None:
        """Drop the transfers of a shard."""
        self._conversion.transfers.elsewhere(shard, (), "")

    def end(self, references: Sequence[Any]) -> None:
        """Stop the board, which ends the workers' tasks, and wait for the tasks."""
        if self.board is not None:
            self._cluster.stop(self.board, references, LONGEST_WAIT if stopping.is_set() else STOP_SECONDS)
        self.board = self._asked = None

    def _reach(self, shard: str, count: int) -> None:
        more = count - self._counted.get(shard, 0)
        if more > 0 and self._conversion.wanted:
            self._counted[shard] = count
            self._conversion.add(shard, more)


def _attempt(job: Job, number: int) -> Attempt:
    """Return a new attempt at a job."""
    own = replace(job, staging=job.staging.for_attempt(f"attempt-{uuid4().hex}"))
    return Attempt(job, own, number)


def _node_check(jobs: Sequence[Job]) -> bytes:
    """Return the pickled argument of `worker.check_node`: the files of all jobs, and a staging to probe."""
    views = {work.view.name: work.view for job in jobs for work in job.shard_task.tensor_tasks}
    views |= {view.name: view for job in jobs for group in job.shard_task.groups for view in group.members}
    files = files_of_views(views.values())
    return pickle.dumps(NodeCheck(_attempt(jobs[0], 0).own, tuple(sorted(files))))
