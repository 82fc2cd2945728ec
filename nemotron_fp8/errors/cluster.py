"""What can go wrong between this process and a cluster. Errors of a shard arrive as what they are anywhere else."""

from __future__ import annotations

from nemotron_fp8.errors.base import NemotronFp8Error, printable


class ClusterError(NemotronFp8Error):
    """A cluster cannot carry out the work."""


class RayMissingError(ClusterError, ImportError):
    """Ray is not installed here."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"Ray cannot be imported ({problem}); pip install 'nemotron_fp8[ray]'")


class ClusterUnreachableError(ClusterError, ConnectionError):
    """No cluster answers at the address, or it refuses this process.

    Attributes:
        address: what was asked for.
    """

    def __init__(self, address: str, problem: str) -> None:
        self.address = address
        super().__init__(
            f"Ray at {printable(address)}: {problem}; start a cluster (ray start --head), or name its address: auto,"
            " HOST:PORT or ray://HOST:PORT"
        )


class ClusterRefusedError(ClusterError, ConnectionError):
    """Somebody answers at the address, but does not take this process for one of the cluster's.

    Attributes:
        address: what was asked for, or found.
    """

    def __init__(self, address: str, problem: str) -> None:
        self.address = address
        super().__init__(f"Ray at {printable(address)}: {problem}")


class ClusterLostError(ClusterError, ConnectionError):
    """The connection to the cluster broke.

    Attributes:
        address: what was connected to.
    """

    def __init__(self, address: str, problem: str) -> None:
        self.address = address
        super().__init__(
            f"Ray at {printable(address)}: {problem}; finished shards are kept, the same command carries on once the"
            " cluster answers"
        )


class NoCapacityError(ClusterError):
    """No node of the cluster can ever run a task.

    Attributes:
        threads: CPUs that a task asks for.
        gpus: GPUs that it asks for.
        largest: the most CPUs that a node (with a GPU, where one is asked for) has.
    """

    def __init__(self, threads: int, gpus: int, largest: int) -> None:
        self.threads, self.gpus, self.largest = threads, gpus, largest
        what = f"{threads} CPUs and {gpus} GPU" if gpus else f"{threads} CPUs"
        there = f"the largest has {largest} CPUs" if largest else "none has any"
        super().__init__(
            f"a task needs {what}, and of the cluster's nodes {there}; ask for fewer threads (--threads), another"
            " device (--device), or add nodes"
        )


class NodeVersionError(ClusterError):
    """A node has another nemotron_fp8 than this process, or none that can be imported; results could differ.

    Attributes:
        node: its name.
        found: what it has.
        expected: what this process has.
    """

    def __init__(self, node: str, found: str, expected: str) -> None:
        self.node, self.found, self.expected = node, found, expected
        super().__init__(
            f"node {node}: nemotron_fp8 {found}, but {expected} here; install the same version on every node"
        )


class NodeBlindError(ClusterError):
    """A node cannot reach the source or the destination.

    Attributes:
        node: its name.
        what: ``source`` or ``destination``.
        on_hub: whether that is a repository on the Hub.
    """

    def __init__(self, node: str, what: str, problem: str, on_hub: bool = False) -> None:
        self.node, self.what, self.on_hub = node, what, on_hub
        wanted = (
            "every node needs the way to the Hub and the token, in the same variable (--token-env) or by its own login"
            if on_hub
            else "it must be on storage that every node sees under the same path"
        )
        super().__init__(f"node {node}: cannot reach the {what} ({problem}); {wanted}")


class NodeDeviceError(ClusterError):
    """A node's GPU is none that the kernels run on.

    Attributes:
        node: its name.
    """

    def __init__(self, node: str, problem: str) -> None:
        self.node = node
        super().__init__(f"node {node}: {problem}; use other nodes, or the CPUs of these (--device cpu)")


class WorkerLostError(ClusterError):
    """Whatever worker was given a shard, it was lost.

    Attributes:
        shard: the output file.
        attempts: how many workers were lost over it.
    """

    def __init__(self, shard: str, attempts: int, problem: str) -> None:
        self.shard, self.attempts = shard, attempts
        super().__init__(
            f"{printable(shard)}: {attempts} workers were lost while they made it, the last one: {problem}; where"
            " memory is short, lower max_memory (--max-memory) or give tasks more threads (--threads), so that fewer"
            " run on a node"
        )
