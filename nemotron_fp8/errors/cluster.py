"""Errors of a Ray cluster; an error in a shard keeps its own class."""

from __future__ import annotations

from nemotron_fp8.errors.base import NemotronFp8Error


class ClusterError(NemotronFp8Error):
    """The cluster cannot run the conversion."""


class RayMissingError(ClusterError, ImportError):
    """Ray is not installed on this machine.

    Attributes:
        problem: the import error.
    """

    problem: str
    message = "Ray cannot be imported ({problem}); install it with pip install 'nemotron_fp8[ray]'"


class ClusterUnreachableError(ClusterError, ConnectionError):
    """No cluster answers at the address, or the cluster rejects this process.

    Attributes:
        address: the requested address.
        problem: the reason, often a message of Ray.
    """

    address: str
    problem: str
    message = (
        "Ray at {address!a}: {problem}; start a cluster (ray start --head), or name its address: auto, HOST:PORT with"
        " the --port of the head (6379), or ray://HOST:PORT with its --ray-client-server-port (10001); a cluster with"
        " token authentication needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token"
    )


class ClusterLostError(ClusterError, ConnectionError):
    """The connection to the cluster broke.

    Attributes:
        address: address of the cluster.
    """

    address: str
    problem: str
    message = (
        "Ray at {address!a}: {problem}; finished shards are kept: run the same command again to resume once the cluster"
        " answers"
    )


class ClusterTaskError(ClusterError):
    """Ray could not run a task of this process.

    Attributes:
        address: address of the cluster.
    """

    address: str
    problem: str
    message = "Ray at {address!a}: a task could not run: {problem}"


class NoCapacityError(ClusterError):
    """No node of the cluster is large enough for a task.

    Attributes:
        threads: CPUs that a task requests.
        gpus: GPUs that a task requests.
        largest: CPUs of the largest node (with a GPU, if one is requested).
    """

    threads: int
    gpus: int
    largest: int
    message = (
        "a task needs {threads} CPUs{_gpus}, but {_largest}; request fewer threads (--threads) or another device"
        " (--device), or add nodes"
    )

    @property
    def _gpus(self) -> str:
        return f" and {self.gpus} GPU" if self.gpus else ""

    @property
    def _largest(self) -> str:
        kind = "node with a GPU" if self.gpus else "node"
        return f"the cluster's largest {kind} has {self.largest} CPUs" if self.largest else f"the cluster has no {kind}"


class NodeVersionError(ClusterError):
    """A node has another version of nemotron_fp8 than this process, or cannot import it, so results could differ.

    Attributes:
        node: name of the node.
        found: version on the node.
        expected: version of this process.
    """

    node: str
    found: str
    expected: str
    message = "node {node}: nemotron_fp8 {found}, but {expected} on the driver; install the same version on every node"


class NodeBlindError(ClusterError):
    """A node cannot reach the source or the destination.

    Attributes:
        node: name of the node.
        what: ``source`` or ``destination``.
        on_hub: True if the problem is an error of the Hub.
        in_store: True if it is an error of an object store.
    """

    node: str
    what: str
    problem: str
    on_hub: bool = False
    in_store: bool = False
    message = "node {node}: cannot reach the {what} ({problem}); {_advice}"

    @property
    def _advice(self) -> str:
        if self.on_hub:
            return (
                "every node needs access to the Hub and the token, in the same variable (--token-env) or from its own"
                " login"
            )
        if self.in_store:
            return "every node needs access to the store, and the credentials in its own environment"
        return f"put the {self.what} on storage that every node mounts under the same path"


class NodeDeviceError(ClusterError):
    """The kernels do not support the GPU of a node.

    Attributes:
        node: name of the node.
    """

    node: str
    problem: str
    message = "node {node}: {problem}; use other nodes, or the CPUs (--device cpu)"


class WorkerLostError(ClusterError):
    """Every worker that tried to write a shard was lost.

    Attributes:
        shard: the output file.
        attempts: number of lost workers.
        problem: cause of the last loss.
    """

    shard: str
    attempts: int
    problem: str
    message = (
        "{shard!a}: {attempts} workers were lost while they wrote this shard, the last one: {problem}; if memory is"
        " short, lower max_memory (--max-memory) or raise the threads of each task (--threads), so that fewer tasks run"
        " on a node"
    )
