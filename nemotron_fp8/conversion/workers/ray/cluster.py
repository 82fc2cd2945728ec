"""The way to a cluster: connecting, its nodes, what a task may take there."""

from __future__ import annotations

import logging
import os
import signal
import socket
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any

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
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType


MAX_THREADS = 4
"""Threads of a task on CPUs where none are asked for: more tasks then read while others compute."""
CONNECT_SECONDS = 5.0
SHUTDOWN_SECONDS = 30.0
"""How long a client may take to say goodbye."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster that runs.

    Attributes:
        id: Ray's name for it.
        name: what people know it by.
        cpus, gpus: what it offers to tasks.
    """

    id: str
    name: str
    cpus: int
    gpus: int

    def slots(self, need: Need) -> int:
        """Tasks that it can run at the same time."""
        count = self.cpus // need.cpus
        return min(count, self.gpus // need.gpus) if need.gpus else count


@dataclass(frozen=True, slots=True)
class Need:
    """What one task takes of a node."""

    cpus: int
    gpus: int


class LostError(NemotronFp8Error):
    """A task ended with its worker. Never leaves this package: the shard is begun again."""

    problem: str
    message = "{problem}"


class Cluster:
    """A cluster that this process is connected to.

    Args:
        ray: Ray's module.
        address: where it is, for messages.
    """

    def __init__(self, ray: ModuleType, address: str) -> None:
        self.ray, self.address = ray, address
        self.identity = entry.identity()
        # Functions of an importable module go by name as a rule; these are to reach nodes that lack the module.
        ray.cloudpickle.register_pickle_by_value(entry)
        self._enter = ray.remote(entry.enter)
        self._board = ray.remote(entry.Board)

    def nodes(self) -> list[Node]:
        """The nodes that are alive now.

        Raises:
            ClusterLostError: the cluster does not answer.
        """
        with self._typed():
            return [_node(entry) for entry in self.ray.nodes() if entry["Alive"]]

    def submit(self, need: Need, call: str, payload: bytes, board: Any = None) -> Any:
        """Begin a task wherever there is room; its reference.

        Raises:
            ClusterError: Ray does not take it.
        """
        # No retries by Ray: the runner does them, because every attempt must have a folder of its own.
        options = self._enter.options(num_cpus=need.cpus, num_gpus=need.gpus, max_retries=0)
        with self._typed():
            return options.remote(self.identity, call, payload, board)

    def submit_to(self, node: Node, call: str, payload: bytes) -> Any:
        """Begin a task on one node, however busy it is; its reference.

        Raises:
            ClusterError: Ray does not take it.
        """
        strategies = self.ray.util.scheduling_strategies
        where = strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)
        options = self._enter.options(num_cpus=0, max_retries=1, scheduling_strategy=where)
        with self._typed():
            return options.remote(self.identity, call, payload)

    def wait(self, references: Sequence[Any], count: int, seconds: float) -> list[Any]:
        """Wait until so many tasks are over, however they ended, but not for longer; those that are.

        Raises:
            ClusterLostError: the cluster does not answer.
        """
        if not references:
            return []
        with self._typed():
            over, _ = self.ray.wait(list(references), num_returns=count, timeout=seconds)
            return list(over)

    def get(self, reference: Any) -> tuple[str, str, Any]:
        """What a task that is over has answered: the node's id, and what `entry.enter` returns beside it.

        Raises:
            LostError: its worker was lost, with its node or alone.
            ClusterError: Ray could not run it.
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
        """End a board, and with it the tasks that have it; wait until they are over, as far as the cluster answers.

        They are not canceled: a task that ends just then makes Ray abort this process (seen with 2.60; its issue
        54846 and pull request 54798 are about the same).
        """

        def end() -> None:
            with suppress(Exception):
                self.ray.kill(board)
                self.wait(references, len(references), seconds)

        within(seconds, end)

    @contextmanager
    def _typed(self) -> Iterator[None]:
        """Turn what Ray raises into errors of ours."""
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
        """An actor that workers tell their progress, and that ends with the run.

        Raises:
            ClusterError: Ray does not take it.
        """
        with self._typed():
            strategies = self.ray.util.scheduling_strategies
            # With the driver's node the run is lost anyway; a node that only works may go at any time.
            near = strategies.NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=True)
            return self._board.options(num_cpus=0, max_restarts=-1, scheduling_strategy=near).remote()

    def ask(self, board: Any) -> Any:
        """Ask a board what it was told since the last time; the reference of its answer."""
        with self._typed():
            return board.read.remote()

    def told(self, reference: Any) -> dict[str, Any]:
        """What a board has answered; nothing where it was lost with its node, for it comes back empty."""
        with self._typed():
            try:
                return dict(self.ray.get(reference))
            except (self.ray.exceptions.RayActorError, self.ray.exceptions.ObjectLostError):
                return {}

    def spec(
        self, device: str, threads: int | None, host_bytes: int, device_bytes: int | None
    ) -> tuple[EngineSpec, Need]:
        """What every task works with, and what it takes of a node.

        Args:
            device: ``auto`` (GPUs where the cluster has any, else CPUs), ``cpu`` or ``cuda``.
            threads: of a task; None for the CPUs of a node by its GPUs, or up to `MAX_THREADS` where there are none.
            host_bytes, device_bytes: see `EngineSpec`; of every task.

        Raises:
            DeviceError: another device is asked for, or the cluster has no GPU.
            NoCapacityError: no node can run such a task.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError(str(device), "on a cluster Ray deals the devices: say auto, cpu or cuda")
        nodes = self.nodes()
        gpus = [node for node in nodes if node.gpus]
        if device == "cuda" and not gpus:
            raise DeviceError(device, "no node of the cluster offers a GPU")
        use_gpus = bool(gpus) and device != "cpu"
        if use_gpus:
            need = Need(threads or max(1, min(node.cpus // node.gpus for node in gpus)), 1)
        else:
            offers = [node.cpus for node in nodes if node.cpus]
            need = Need(threads or min(MAX_THREADS, min(offers, default=1)), 0)
        if not any(node.slots(need) for node in nodes):
            largest = max((node.cpus for node in (gpus if use_gpus else nodes)), default=0)
            raise NoCapacityError(need.cpus, need.gpus, largest)
        # Ray shows a task its own GPU only, and that is cuda:0 then.
        return EngineSpec("cuda:0" if use_gpus else "cpu", host_bytes, device_bytes, need.cpus), need


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """Connect to a cluster for as long as the context lasts; a connection that the caller has made is used as it is.

    Args:
        address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Raises:
        RayMissingError: Ray is not installed here.
        ClusterUnreachableError: no cluster answers.
        ClusterRefusedError: it answers, but not to this process.
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
            # What goes wrong is raised too; Ctrl-C makes the client log errors that are none.
            ray.init(asked, logging_level=logging.CRITICAL, log_to_driver=False, **own_job(asked))
    except Exception as error:
        with suppress(Exception):
            ray.shutdown()
            # A client that failed leaves Ray waiting for it; no later connection of this process would come about.
            ray.util.disconnect()
        if asked == "auto" and isinstance(error, ConnectionError):
            raise ClusterUnreachableError(asked, "no cluster was found from this machine") from error
        # Of every kind: ConnectionError, RuntimeError for another version of Ray or Python, ValueError, its own.
        raise ClusterUnreachableError(asked, in_short(error)) from error
    try:
        yield Cluster(ray, asked)
    finally:
        if asked.startswith("ray://"):
            within(SHUTDOWN_SECONDS, ray.shutdown)
        else:
            ray.shutdown()


def own_job(address: str) -> dict[str, Any]:
    """Arguments of `ray.init` that keep this process's folders off the import path of the workers.

    Ray puts a driver's current folder and its script's folder before everything else there. The command may be run
    from the folder of a checkpoint of unknown origin, and a ``pydantic.py`` in it would be imported on every node.
    """
    if address.startswith("ray://"):  # the driver is a process of the cluster then, and Ray adds no folder of it
        return {}
    from ray.job_config import JobConfig

    class Bare(JobConfig):  # type: ignore[misc]  # there are no types of Ray's
        """Takes no folders, for Ray has no switch for that."""

        @property
        def _py_driver_sys_path(self) -> list[str]:
            return []

        @_py_driver_sys_path.setter
        def _py_driver_sys_path(self, folders: list[str]) -> None:
            del folders

    return {"job_config": Bare()}


def within(seconds: float, call: Callable[[], None]) -> None:
    """Carry out what may never return, and do not wait for longer.

    A client of Ray that was interrupted in the middle of a call has been seen to wait for ever in its next one (2.60).
    """
    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Let a program that handles SIGTERM go on to do so: Ray puts a handler of its own in the place of any other.

    Where there was none, Ray's stays: it ends a driver in order.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and current_thread() is main_thread():
        signal.signal(signal.SIGTERM, before)


def probe_port(address: str) -> None:
    """See whether anybody listens at an address: Ray itself tries for a minute and more.

    Raises:
        ClusterUnreachableError: nobody does.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not port.isascii():
        raise ClusterUnreachableError(address, "is no address")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except socket.gaierror as error:
        raise ClusterUnreachableError(address, f"there is no such host ({error.strerror})") from error
    except (OSError, OverflowError) as error:
        raise ClusterUnreachableError(address, f"nobody listens there ({error})") from error


def in_short(error: BaseException) -> str:
    """What an error of Ray's says, in one line and not too long; the end of it tells the cause."""
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = f"{text[:200]} ... {text[-200:]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _node(entry: dict[str, Any]) -> Node:
    """A node of Ray's list."""
    resources = entry["Resources"]
    # Several nodes may share a host, so its name alone would not tell them apart.
    name = f"{entry['NodeManagerHostname']} ({entry['NodeManagerAddress']}, {entry['NodeID'][:8]})"
    return Node(entry["NodeID"], name, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
