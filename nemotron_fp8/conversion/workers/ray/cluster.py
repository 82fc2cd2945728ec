"""Connection to a Ray cluster: nodes, tasks, and the resources of a task."""

from __future__ import annotations

import logging
import os
import signal
import socket
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

from nemotron_fp8._process import stopping
from nemotron_fp8._utils import LONGEST_WAIT, within
from nemotron_fp8.conversion.workers.ray import entry
from nemotron_fp8.engines.devices import EngineSpec
from nemotron_fp8.errors import DeviceError, NemotronFp8Error
from nemotron_fp8.errors.cluster import (
    ClusterLostError,
    ClusterTaskError,
    ClusterUnreachableError,
    NoCapacityError,
    RayMissingError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType


MAX_THREADS = 4
"""Default threads of a task on CPUs: few enough that some tasks read while others compute."""
CONNECT_SECONDS = 5.0
SHUTDOWN_SECONDS = 30.0
"""Longest wait for a client to disconnect."""


@dataclass(frozen=True, slots=True)
class Node:
    """A live node of the cluster.

    Attributes:
        id: id in Ray.
        name: host name, address and start of the id, for messages.
        cpus, gpus: CPUs and GPUs for tasks.
    """

    id: str
    name: str
    cpus: int
    gpus: int

    def slots(self, need: Need) -> int:
        """Return the number of tasks that the node can run at the same time."""
        count = self.cpus // need.cpus
        return min(count, self.gpus // need.gpus) if need.gpus else count


@dataclass(frozen=True, slots=True)
class Need:
    """Resources of a node that one task takes."""

    cpus: int
    gpus: int


class LostError(NemotronFp8Error):
    """The worker of a task was lost. Internal: the shard is started again."""

    problem: str
    message = "{problem}"


class Cluster:
    """Connection of this process to a cluster.

    Args:
        ray: the module ``ray``.
        address: address of the cluster, for messages.
    """

    def __init__(self, ray: ModuleType, address: str) -> None:
        self.ray, self.address = ray, address
        self.identity = entry.identity()
        # Ray sends functions of an importable module by name, but these functions also run on nodes without the module.
        ray.cloudpickle.register_pickle_by_value(entry)
        self._enter = ray.remote(entry.enter)
        self._board = ray.remote(entry.Board)

    def nodes(self) -> list[Node]:
        """Return the live nodes.

        Raises:
            ClusterLostError: the cluster does not answer.
        """
        with self._typed():
            return [_node(entry) for entry in self.ray.nodes() if entry["Alive"]]

    def submit(self, need: Need, call: str, payload: bytes, board: Any = None) -> Any:
        """Submit a task to any node, and return its reference.

        Raises:
            ClusterError: Ray rejects the task.
        """
        # No retries by Ray: every attempt needs its own staging, which the pool creates.
        options = self._enter.options(num_cpus=need.cpus, num_gpus=need.gpus, max_retries=0)
        with self._typed():
            return options.remote(self.identity, call, payload, board)

    def submit_to(self, node: Node, call: str, payload: bytes) -> Any:
        """Submit a task to one node, even if the node is busy, and return its reference.

        Raises:
            ClusterError: Ray rejects the task.
        """
        strategies = self.ray.util.scheduling_strategies
        where = strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)
        options = self._enter.options(num_cpus=0, max_retries=1, scheduling_strategy=where)
        with self._typed():
            return options.remote(self.identity, call, payload)

    def wait(self, references: Sequence[Any], count: int, seconds: float) -> list[Any]:
        """Wait for tasks to end, successfully or not, and return the ended ones.

        Args:
            references: the tasks.
            count: return as soon as this many have ended.
            seconds: longest wait.

        Raises:
            ClusterLostError: the cluster does not answer.
        """
        if not references:
            return []
        with self._typed():
            over, _ = self.ray.wait(list(references), num_returns=count, timeout=seconds)
            return list(over)

    def get(self, reference: Any) -> tuple[str, str, Any]:
        """Return the answer of `entry.enter` from an ended task.

        Raises:
            LostError: the worker of the task was lost, alone or with its node.
            ClusterError: Ray could not run the task.
        """
        kinds = self.ray.exceptions
        lost = (
            kinds.WorkerCrashedError,
            kinds.NodeDiedError,
            kinds.OutOfMemoryError,
            kinds.LocalRayletDiedError,
            kinds.ObjectLostError,
            kinds.TaskUnschedulableError,
        )
        with self._typed():
            try:
                answer: tuple[str, str, Any] = self.ray.get(reference)
            except lost as error:
                raise LostError(in_short(error)) from error
        return answer

    def stop(self, board: Any, references: Sequence[Any], seconds: float) -> None:
        """Kill a board, which ends its tasks, and wait for the tasks as long as the cluster answers.

        The tasks are not canceled: a task that ends at that moment makes Ray abort this process (seen with 2.60; see
        also Ray's issue 54846 and pull request 54798).
        """

        def end() -> None:
            with suppress(Exception):
                self.ray.kill(board)
                self.wait(references, len(references), seconds)

        within(seconds, end)

    @contextmanager
    def _typed(self) -> Iterator[None]:
        """Turn exceptions of Ray into errors of this package."""
        kinds = self.ray.exceptions
        try:
            yield
        except NemotronFp8Error:
            raise
        except (ConnectionError, kinds.RaySystemError) as error:
            raise ClusterLostError(self.address, in_short(error)) from error
        except kinds.RayError as error:
            raise ClusterTaskError(self.address, in_short(error)) from error

    def board(self) -> Any:
        """Start an actor that receives the progress of workers and ends with the run.

        Raises:
            ClusterError: Ray rejects the actor.
        """
        with self._typed():
            strategies = self.ray.util.scheduling_strategies
            # On the driver's node if possible: if that node is lost, the run is lost too.
            near = strategies.NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=True)
            return self._board.options(num_cpus=0, max_restarts=-1, scheduling_strategy=near).remote()

    def ask(self, board: Any) -> Any:
        """Ask a board for new progress, and return the reference of the answer."""
        with self._typed():
            return board.read.remote()

    def told(self, reference: Any) -> dict[str, Any]:
        """Return the answer of a board; empty if the board was lost with its node: a restarted board is empty."""
        with self._typed():
            try:
                return dict(self.ray.get(reference))
            except (self.ray.exceptions.RayActorError, self.ray.exceptions.ObjectLostError):
                return {}

    def spec(
        self, device: str, threads: int | None, host_bytes: int, device_bytes: int | None
    ) -> tuple[EngineSpec, Need]:
        """Return the engine of every task, and the resources that a task takes of a node.

        Args:
            device: ``auto`` (GPUs if the cluster has any, else CPUs), ``cpu`` or ``cuda``.
            threads: threads of a task; None for the CPUs of a node divided by its GPUs, or for at most `MAX_THREADS`
                on nodes without GPUs.
            host_bytes: bytes of host buffers of each task.
            device_bytes: bytes on the device of each task; None for the default share of the free bytes.

        Raises:
            DeviceError: another device is requested, or the cluster has no GPU.
            NoCapacityError: no node can run such a task.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError(str(device), "on a cluster Ray assigns the devices; use auto, cpu or cuda")
        nodes = self.nodes()
        gpus = [node for node in nodes if node.gpus]
        if device == "cuda" and not gpus:
            raise DeviceError(device, "no node of the cluster has a GPU; use cpu")
        use_gpus = bool(gpus) and device != "cpu"
        if use_gpus:
            need = Need(threads or max(1, min(node.cpus // node.gpus for node in gpus)), 1)
        else:
            offers = [node.cpus for node in nodes if node.cpus]
            need = Need(threads or min(MAX_THREADS, min(offers, default=1)), 0)
        if not any(node.slots(need) for node in nodes):
            largest = max((node.cpus for node in (gpus if use_gpus else nodes)), default=0)
            raise NoCapacityError(need.cpus, need.gpus, largest)
        # A task sees only its own GPU, as cuda:0.
        return EngineSpec("cuda:0" if use_gpus else "cpu", host_bytes, device_bytes, need.cpus), need


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """Connect to a cluster until the context ends; a connection of the caller is used and left open.

    Args:
        address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Raises:
        RayMissingError: Ray is not installed.
        ClusterUnreachableError: no cluster answers, or it rejects this process.
    """
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise RayMissingError(str(error)) from error
    if ray.is_initialized():
        yield Cluster(ray, address)
        return
    asked = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    probe_port(asked)
    try:
        with sigterm_kept():
            # Ray also raises the errors that it logs, and after Ctrl-C its client logs errors without a cause.
            ray.init(asked, logging_level=logging.CRITICAL, log_to_driver=False, **own_job(asked))
    except Exception as error:
        with suppress(Exception):
            ray.shutdown()
            # A failed client leaves a state in Ray that blocks every later connection of this process.
            ray.util.disconnect()
        if asked == "auto" and isinstance(error, ConnectionError):
            raise ClusterUnreachableError(asked, "no cluster found from this machine") from error
        # ConnectionError, RuntimeError for another version of Ray or Python, ValueError, or an exception of Ray.
        raise ClusterUnreachableError(asked, in_short(error)) from error
    try:
        yield Cluster(ray, asked)
    finally:
        if asked.startswith("ray://"):
            # A client that is interrupted during a call may hang in its next call (seen with 2.60).
            within(LONGEST_WAIT if stopping.is_set() else SHUTDOWN_SECONDS, ray.shutdown)
        else:
            ray.shutdown()


def own_job(address: str) -> dict[str, Any]:
    """Return arguments of `ray.init` that keep this process's folders off the import path of the workers.

    Ray puts the driver's current folder and its script's folder first on that path. The command may run in the folder
    of an untrusted checkpoint, and every node would import a ``pydantic.py`` of that folder.
    """
    if address.startswith("ray://"):  # then the driver is a process of the cluster, and Ray adds no folder
        return {}
    from ray.job_config import JobConfig

    class Bare(JobConfig):  # type: ignore[misc]  # Ray has no type information
        """Job configuration without folders; Ray has no option for that."""

        @property
        def _py_driver_sys_path(self) -> list[str]:
            return []

        @_py_driver_sys_path.setter
        def _py_driver_sys_path(self, folders: list[str]) -> None:
            del folders

    return {"job_config": Bare()}


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Restore the program's SIGTERM handler, which `ray.init` replaces.

    If the program has no handler, Ray's handler is left in place: it ends a driver cleanly.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and current_thread() is main_thread():
        signal.signal(signal.SIGTERM, before)


def probe_port(address: str) -> None:
    """Check that a port accepts connections: ``ray.init`` retries for more than five minutes (seen with 2.60).

    Raises:
        ClusterUnreachableError: the address is malformed, or its port refuses connections.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not port.isascii():
        raise ClusterUnreachableError(address, "not an address of a cluster")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except socket.gaierror as error:
        raise ClusterUnreachableError(address, f"no such host ({error.strerror})") from error
    except (OSError, OverflowError) as error:
        raise ClusterUnreachableError(address, f"no process listens on this port ({error})") from error


def in_short(error: BaseException) -> str:
    """Return an exception of Ray as one line; a long message is cut in the middle, because the end names the cause."""
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = f"{text[:200]} ... {text[-200:]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _node(entry: dict[str, Any]) -> Node:
    """Return a node from its entry in Ray's list."""
    resources = entry["Resources"]
    # Several nodes may share a host, so the host name alone is not unique.
    name = f"{entry['NodeManagerHostname']} ({entry['NodeManagerAddress']}, {entry['NodeID'][:8]})"
    return Node(entry["NodeID"], name, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
