"""What Ray carries to the nodes as code: looks at what is installed there, then calls it.

Ray sends these by value, so that they run on a node that has another version of this package, or none, and
can say so. The standard library is all that they may import.
"""

from __future__ import annotations

import hashlib
import sys
from importlib import import_module
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


PACKAGES = ("nemotron_fp8", "nemotron_fp8_kernels")


def identity() -> tuple[str, str]:
    """The version that is installed here, and a digest of its code: a checkout changes under one version.

    Raises:
        ImportError: there is none.
    """
    digest = hashlib.sha256()
    for name in PACKAGES:
        folder = Path(str(import_module(name).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return str(import_module(PACKAGES[0]).__version__), digest.hexdigest()[:12]


def enter(expected: tuple[str, str], call: str, payload: bytes, board: object = None) -> tuple[str, str, object]:
    """Call a function of `nemotron_fp8.conversion.workers.ray.worker` on a node.

    Args:
        expected: `identity` where the call comes from.
        call: the function's name.
        payload: its argument, pickled; unpickled only where the code is the same.
        board: where progress is told, or None.

    Returns:
        The node's id, and ``"missing"`` and why, ``"differs"`` and what is here, or ``"done"`` and the function's
        answer.
    """
    node = str(import_module("ray").get_runtime_context().get_node_id())
    before = sys.path[:]
    for folder in drivers_folders():
        if folder in sys.path:
            sys.path.remove(folder)
    try:
        return node, *called(expected, call, payload, board)
    finally:
        sys.path[:] = before  # the process may serve a caller's own tasks too


def drivers_folders() -> list[str]:
    """What Ray has put on the import path here for the driver: its current folder, and its script's.

    Nothing may be imported from there: a file ``torch.py`` in the folder of a checkpoint would be. A connection that
    `ray.cluster` makes brings none (`own_job`); one that the caller has made does, and what Ray itself
    imports before it calls `enter` is out of reach here.
    """
    try:
        job = import_module("ray._private.worker").global_worker.core_worker.get_job_config()
        return list(job.py_driver_sys_path)
    except (ImportError, AttributeError):  # Ray's insides, of a version that has others
        return []


def called(expected: tuple[str, str], call: str, payload: bytes, board: object) -> tuple[str, object]:
    """What `enter` returns beside the node's id."""
    try:
        found = identity()
        if found == tuple(expected):
            worker = import_module("nemotron_fp8.conversion.workers.ray.worker")
    except Exception as error:
        return "missing", f"{type(error).__name__}: {error}"
    if found != tuple(expected):
        return "differs", found
    return "done", getattr(worker, call)(payload, board)


class Board:
    """Holds what workers tell of their progress until the driver asks. Forgets it when its node is lost.

    While it lives, its run goes on.
    """

    def __init__(self) -> None:
        self._states: dict[str, object] = {}

    def tell(self, shard: str, state: object) -> None:
        """Note how far an attempt at a shard is; of plain values, for this may run where the package is missing."""
        self._states[shard] = state

    def goes_on(self) -> bool:
        """Answer at all."""
        return True

    def read(self) -> Mapping[str, object]:
        """What was told since the last call."""
        states, self._states = self._states, {}
        return states
