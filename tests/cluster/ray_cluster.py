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
STORE_BYTES = 100_000_000
START_SECONDS = 180


@dataclass
class NodeProcess:
    """A node: the ``ray start --block`` that all its processes hang on."""

    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        """End the node as its owner would."""
        self.process.terminate()
        self._wait()

    def kill(self) -> None:
        """Let the node vanish, with all that runs on it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self._wait()

    def _wait(self) -> None:
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class RayCluster:
    """A head node, and more nodes as they are added; gone when the context is left.

    Ray takes 127.0.0.1 for the machine's own address, so a token keeps others away.

    Args:
        cpus: of the head.
    """

    def __init__(self, cpus: int = 1) -> None:
        self._cpus = cpus
        self.folder = Path(tempfile.mkdtemp(prefix="nfp8-", dir="/tmp"))  # short: Unix sockets lie in it
        self.port, self.client_port, self._agent_port = _free_ports(3)
        self.nodes: list[NodeProcess] = []
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_raylet_start_wait_time_s": str(START_SECONDS),  # 30 s are not enough on a busy machine
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
            if node.process.poll() is None:
                node.stop()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(
        self, cpus: int = 1, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> NodeProcess:
        """Start another node, by way of a command that is given as ``prefix``; it has joined when this returns."""
        (agent,) = _free_ports(1)
        arguments = [f"--address={self.address}", f"--dashboard-agent-listen-port={agent}", f"--num-cpus={cpus}"]
        return self._start(arguments, prefix, environment)

    def processes(self) -> list[int]:
        """All processes of the cluster, by their environment."""
        mark = f"{MARK}={self.folder}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if mark in environment:
                    found.append(int(entry.name))
        return found

    def _start(
        self, arguments: Sequence[str], prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> NodeProcess:
        log = self.folder / f"node-{len(self.nodes)}.log"
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
                env={**os.environ, **self.environment, MARK: str(self.folder), **(environment or {})},
            )
        node = NodeProcess(process, log)
        self.nodes.append(node)
        end = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"a node did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.1)
        return node


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
