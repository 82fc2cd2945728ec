"""Ray clusters of several nodes on one machine: processes of `ray start`, ended by their ids, nobody else's touched."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Self

MARK = "NEMOTRON_FP8_TEST_CLUSTER"
"""In the environment of every process of a cluster: the cluster's folder."""
NODE = "NEMOTRON_FP8_TEST_NODE"
"""In the environment of every process of a node: its number, 0 for the head."""
TOKEN = secrets.token_hex(16)
"""Of all clusters of this process: Ray reads it once. It takes 127.0.0.1 for the machine's own address, so that
without a token others could use the cluster."""
ROOT = Path(__file__).parents[2]
"""On the nodes' own import path, for the traps: nothing of a driver's folders is."""
STORE_BYTES = 100_000_000
START_SECONDS = 180


@dataclass
class NodeProcess:
    """A node: the ``ray start --block`` that all its processes hang on."""

    cluster: RayCluster
    number: int
    process: subprocess.Popen[bytes]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """End the node as its owner would."""
        self.process.terminate()
        self._wait()

    def kill(self) -> None:
        """Let the node vanish, with all that runs on it."""
        self.process.kill()
        for pid in self.cluster.processes(self.number):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._wait()

    def _wait(self) -> None:
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class RayCluster:
    """A head node, and more nodes as they are added; gone when the context is left.

    Args:
        cpus: of the head.
        environment: of the nodes alone.
    """

    def __init__(self, cpus: int = 1, environment: Mapping[str, str] | None = None) -> None:
        self._cpus, self._own = cpus, environment or {}
        self.folder = Path(tempfile.mkdtemp(prefix="nfp8-", dir="/tmp"))  # short: Unix sockets lie in it
        self.port, self.client_port, self._agent_port = free_ports(3)
        self.nodes: list[NodeProcess] = []
        self.environment = {
            # Every node and every run has workers of its own: what one has compiled is to spare the next some seconds.
            "PYTHONDONTWRITEBYTECODE": "",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            # Its own limits of 30 s are not enough on a busy machine.
            "RAY_raylet_start_wait_time_s": str(START_SECONDS),
            "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": str(START_SECONDS),
            # Ray forks a process for each client from a server whose threads are inside gRPC; with gRPC's handlers
            # at the fork some of these processes ended at once.
            "GRPC_ENABLE_FORK_SUPPORT": "false",
        }

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def client_address(self) -> str:
        return f"ray://127.0.0.1:{self.client_port}"

    def __enter__(self) -> Self:
        head = ["--head", f"--port={self.port}", f"--ray-client-server-port={self.client_port}"]
        head += [f"--temp-dir={self.folder}", "--include-dashboard=false", "--disable-usage-stats"]
        try:
            self._start([*head, f"--dashboard-agent-listen-port={self._agent_port}", f"--num-cpus={self._cpus}"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            if node.alive:
                node.stop()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(
        self, cpus: int = 1, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> NodeProcess:
        """Start another node, by way of a command that is given as ``prefix``; it has joined when this returns."""
        (agent,) = free_ports(1)
        arguments = [f"--address={self.address}", f"--dashboard-agent-listen-port={agent}", f"--num-cpus={cpus}"]
        return self._start(arguments, prefix, environment)

    def processes(self, node: int | None = None) -> list[int]:
        """All processes of the cluster, or of a node of it, by their environment."""
        marks = {f"{MARK}={self.folder}".encode()} | ({f"{NODE}={node}".encode()} if node is not None else set())
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = set((entry / "environ").read_bytes().split(b"\0"))
                except OSError:
                    continue
                if marks <= environment:
                    found.append(int(entry.name))
        return found

    def _start(
        self, arguments: Sequence[str], prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> NodeProcess:
        number = len(self.nodes)
        log = self.folder / f"node-{number}.log"
        ray = Path(sys.executable).with_name("ray")
        command = [*prefix, str(ray), "start", "--block", "--node-ip-address=127.0.0.1", *arguments]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={STORE_BYTES}"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
                env={
                    **os.environ,
                    **self.environment,
                    **self._own,
                    MARK: str(self.folder),
                    NODE: str(number),
                    "PYTHONPATH": str(ROOT),
                    **(environment or {}),
                },
            )
        node = NodeProcess(self, number, process)
        self.nodes.append(node)
        end = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"a node did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.1)
        return node


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now, below those that the system and Ray give out by themselves."""
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(range(24_000, 32_000))
        with socket.socket() as each, suppress(OSError):
            each.bind(("0.0.0.0", port))
            found.append(port)
    return found
