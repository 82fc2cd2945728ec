"""Functions that Ray sends to the nodes by value: compare the installed code, then call it.

They also run on a node with another version of this package, or without the package, and report the difference. They
import the standard library only.
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
    """Return the installed version, and a digest of its code, because a checkout changes under one version.

    Raises:
        ImportError: the package is not installed.
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
        expected: `identity` of the driver.
        call: name of the function.
        payload: pickled argument; unpickled only if the code is the same.
        board: actor for progress, or None.

    Returns:
        The id of the node, and one of: ``"missing"`` and the reason, ``"differs"`` and the `identity` of the node,
        ``"done"`` and the return value of the function.
    """
    node = str(import_module("ray").get_runtime_context().get_node_id())
    before = sys.path[:]
    drivers = drivers_folders()
    sys.path[:] = [folder for folder in sys.path if folder not in drivers]
    try:
        return node, *called(expected, call, payload, board)
    finally:
        sys.path[:] = before  # the process may also run other tasks of the caller


def drivers_folders() -> list[str]:
    """Return the folders of the driver that Ray has put on the import path: its current folder and its script's folder.

    These folders are removed from the path: the folder of a checkpoint may contain a file ``torch.py``. A connection of
    `connect` adds no folder (`own_job`), but a connection of the caller does. Modules that Ray imports before it calls
    `enter` are not covered.
    """
    try:
        job = import_module("ray._private.worker").global_worker.core_worker.get_job_config()
        return [str(folder) for folder in job.py_driver_sys_path]
    except (ImportError, AttributeError, TypeError):  # private names of Ray, which may be missing in another version
        return []


def called(expected: tuple[str, str], call: str, payload: bytes, board: object) -> tuple[str, object]:
    """Return the answer of `enter` without the id of the node."""
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
    """Actor that stores the progress of all workers until the driver reads it; lost with its node.

    The actor lives as long as its run.
    """

    def __init__(self) -> None:
        self._states: dict[str, object] = {}

    def tell(self, shard: str, state: object) -> None:
        """Store the progress of a shard: builtin values only, because the node may lack the package."""
        self._states[shard] = state

    def goes_on(self) -> bool:
        """Return True: an answer shows that the run is active."""
        return True

    def read(self) -> Mapping[str, object]:
        """Return the progress that was stored since the last call."""
        states, self._states = self._states, {}
        return states
