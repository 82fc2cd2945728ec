"""Functions that run on the nodes of a cluster: check a node, and make one shard."""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from dataclasses import astuple, dataclass, replace
from threading import Event, Lock, Thread, main_thread
from typing import TYPE_CHECKING, Any

from nemotron_fp8.conversion.workers.base import run_jobs
from nemotron_fp8.conversion.workers.processes import Failed, portable
from nemotron_fp8.errors import NemotronFp8Error
from nemotron_fp8.errors.hub import HubError
from nemotron_fp8.errors.stores import StoreError
from nemotron_fp8.progress import TransferTracker

if TYPE_CHECKING:
    from typing_extensions import Self

    from nemotron_fp8.conversion.workers.base import Job
    from nemotron_fp8.engines.devices import EngineSpec
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.progress import Progress


WATCH_SECONDS = 0.5
"""Interval between two checks that the run is still active."""
INTERRUPT_SECONDS = 5.0
"""Longest wait for an interrupted worker before its process is killed."""
REPORT_SECONDS = 0.5
"""Shortest interval between two progress reports of a worker."""


@dataclass(frozen=True, slots=True)
class NodeCheck:
    """Files and staging that a node must reach.

    Attributes:
        job: one of the jobs; its staging is probed.
        files: all files of the source that the jobs read.
    """

    job: Job
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt at a shard.

    Attributes:
        job: job of the shard, with the staging of this attempt.
        spec: the engine.
    """

    job: Job
    spec: EngineSpec


@dataclass(frozen=True, slots=True)
class NodeCheckFailed:
    """Answer of a node that cannot reach the source or the destination.

    Attributes:
        what: ``source`` or ``destination``.
        problem: the error message.
        on_hub: True if the problem is an error of the Hub.
        in_store: True if it is an error of an object store.
    """

    what: str
    problem: str
    on_hub: bool = False
    in_store: bool = False

    @classmethod
    def of(cls, what: str, error: Exception) -> NodeCheckFailed:
        """Return the answer for an error."""
        return cls(what, str(error), isinstance(error, HubError), isinstance(error, StoreError))


@dataclass(frozen=True, slots=True)
class NoDevice:
    """Answer of a node without a GPU that the kernels support."""

    problem: str


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """Answer of a worker whose run ended before its shard was finished."""


@dataclass(frozen=True, slots=True)
class ShardMade:
    """Answer of a worker that has finished its shard.

    Attributes:
        receipt: receipt of the shard.
        count: input bytes that were processed.
    """

    receipt: ShardReceipt
    count: int


def check_node(payload: bytes, _board: Any = None) -> NodeCheckFailed | None:
    """Read one byte of every source file and probe the staging; return the first failure."""
    check: NodeCheck = pickle.loads(payload)
    try:
        for file in check.files:
            opened = check.job.opener.open(file)
            opened.read_into(0, memoryview(bytearray(1)))
            opened.close()
    except (NemotronFp8Error, OSError) as error:
        return NodeCheckFailed.of("source", error)
    try:
        check.job.staging.probe()
    except (NemotronFp8Error, OSError) as error:
        return NodeCheckFailed.of("destination", error)
    return None


def make(payload: bytes, board: Any = None) -> ShardMade | Failed | NoDevice | TaskEnded:
    """Make a shard. An exception of the job is returned in the answer, so that Ray does not handle it."""
    task: Task = pickle.loads(payload)
    progress = Reporter(task.job.shard_task.name, board)
    transfers = TransferTracker(progress.transfers)
    staging = task.job.staging.reporting_to(transfers)
    try:
        if task.spec.device != "cpu":
            from nemotron_fp8.engines.devices import usable_cuda_devices

            if not usable_cuda_devices():
                return NoDevice("the kernels do not support its GPU")
        output = task.job.shard_task.layout.file_size if staging.uses_cache else 0
        with DriverWatch(board), task.job.prefetcher.start(transfers, 1, output) as prefetch:
            for shard_task in prefetch.shard_tasks([task.job.shard_task]):
                job = replace(task.job, shard_task=shard_task, staging=staging)
                (receipt,) = run_jobs(task.spec, [job], progress.advance)
    except Exception as error:
        return Failed(portable(error), traceback.format_exc())
    except KeyboardInterrupt:  # from the driver watch; the process can run other tasks
        return TaskEnded()
    return ShardMade(receipt, progress.count)


class DriverWatch:
    """Interrupts this process when its run has ended, because the driver would not receive the shard.

    The main thread gets a SIGINT; if that has no effect for `INTERRUPT_SECONDS`, the process is killed.

    Args:
        board: actor that lives as long as the run; None if the driver is this process.
    """

    def __init__(self, board: Any) -> None:
        self._board = board
        self._over = Event()
        self._lock = Lock()

    def __enter__(self) -> Self:
        if self._board is not None:
            Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:  # from here on, the watch does not interrupt
            self._over.set()

    def _watch(self) -> None:
        import ray

        going = True
        while going:
            try:
                ray.get(self._board.goes_on.remote(), timeout=10 * WATCH_SECONDS)
            except ray.exceptions.ActorDiedError:
                return self._interrupt()
            except Exception:
                pass  # the node of the board may be lost; a board that restarts on another node answers the next check
            going = not self._over.wait(WATCH_SECONDS)
        return None

    def _interrupt(self) -> None:
        with self._lock:
            if self._over.is_set():
                return
            signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
        if not self._over.wait(INTERRUPT_SECONDS):
            os._exit(1)


class Reporter:
    """Reports the progress of a shard to a board, without waiting for an answer: the board may be lost."""

    def __init__(self, shard: str, board: Any) -> None:
        self._shard, self._board = shard, board
        self._lock = Lock()
        self._last = time.monotonic()
        self._moving: tuple[tuple[str, str, int, int], ...] = ()
        self._waiting = ""
        self.count = 0

    def advance(self, _shard: str, count: int) -> None:
        """Count bytes, from any thread."""
        with self._lock:
            self.count += count
            self._tell(at_once=False)

    def transfers(self, progress: Progress) -> None:
        """Store transfers and waits of the shard, from any thread."""
        moving = tuple(astuple(each) for each in progress.transfers)
        with self._lock:
            # The start and the end of a transfer are reported at once: the next report may be minutes away.
            names, before = ([each[:2] for each in some] for some in (moving, self._moving))
            news = names != before or progress.waiting != self._waiting
            self._moving, self._waiting = moving, progress.waiting
            self._tell(at_once=news)

    def _tell(self, *, at_once: bool) -> None:
        if self._board is None or not (at_once or time.monotonic() - self._last >= REPORT_SECONDS):
            return
        self._last = time.monotonic()
        self._board.tell.remote(self._shard, (self.count, self._moving, self._waiting))
