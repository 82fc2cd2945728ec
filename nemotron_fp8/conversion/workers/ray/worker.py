"""The worker's side: looks whether a node can work, and makes one shard."""

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
from nemotron_fp8.progress import TransferTracker

if TYPE_CHECKING:
    from typing_extensions import Self

    from nemotron_fp8.conversion.workers.base import Job
    from nemotron_fp8.engines.devices import EngineSpec
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.progress import Progress


WATCH_SECONDS = 0.5
"""A worker asks whether its run goes on no more often than this."""
INTERRUPT_SECONDS = 5.0
"""How long an interrupted worker may take to let go of its shard."""
REPORT_SECONDS = 0.5
"""A worker tells how far it is no more often than this."""


@dataclass(frozen=True, slots=True)
class NodeCheck:
    """What a node must be able to reach.

    Attributes:
        job: one of the jobs; its staging is tried under a name of its own.
        files: all files of the source that the jobs read.
    """

    job: Job
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt at a shard.

    Attributes:
        job: the shard, its staging that of this attempt alone.
        spec: the engine.
    """

    job: Job
    spec: EngineSpec


@dataclass(frozen=True, slots=True)
class NodeCheckFailed:
    """A node cannot reach something: ``source`` or ``destination``, why, and whether that is on the Hub."""

    what: str
    problem: str
    on_hub: bool = False


@dataclass(frozen=True, slots=True)
class NoDevice:
    """A node has no device that the kernels run on."""

    problem: str


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """The run was over before the shard was made; nobody is told."""


@dataclass(frozen=True, slots=True)
class ShardMade:
    """A shard is made.

    Attributes:
        receipt: what became of it.
        count: input bytes that were worked on for it.
    """

    receipt: ShardReceipt
    count: int


def check_node(payload: bytes, _board: Any = None) -> NodeCheckFailed | None:
    """Try to read a byte of every source file and to reach where shards are staged."""
    check: NodeCheck = pickle.loads(payload)
    try:
        for file in check.files:
            opened = check.job.opener.open(file)
            opened.read_into(0, memoryview(bytearray(1)))
            opened.close()
    except (NemotronFp8Error, OSError) as error:
        return NodeCheckFailed("source", str(error), isinstance(error, HubError))
    try:
        check.job.staging.probe()
    except (NemotronFp8Error, OSError) as error:
        return NodeCheckFailed("destination", str(error), isinstance(error, HubError))
    return None


def make(payload: bytes, board: Any = None) -> ShardMade | Failed | NoDevice | TaskEnded:
    """Make a shard. What a job raises is an answer, so that the scheduler does not take it for its own."""
    task: Task = pickle.loads(payload)
    progress = Reporter(task.job.shard_task.name, board)
    transfers = TransferTracker(progress.transfers)
    staging = task.job.staging.reporting_to(transfers)
    try:
        if task.spec.device != "cpu":
            from nemotron_fp8.engines.devices import usable_cuda_devices

            if not usable_cuda_devices():
                return NoDevice("its GPU is none that the kernels run on")
        output = task.job.shard_task.layout.file_size if staging.uses_cache else 0
        with DriverWatch(board), task.job.prefetcher.start(transfers, 1, output) as prefetch:
            for shard_task in prefetch.shard_tasks([task.job.shard_task]):
                job = replace(task.job, shard_task=shard_task, staging=staging)
                (receipt,) = run_jobs(task.spec, [job], progress.advance)
    except Exception as error:
        return Failed(portable(error), traceback.format_exc())
    except KeyboardInterrupt:  # of the lifeline; the process can serve others
        return TaskEnded()
    return ShardMade(receipt, progress.count)


class DriverWatch:
    """Interrupts the work of this process when the run that it works for is over: nobody would take what it makes.

    As Ctrl-C does; where nothing has come of that after a while, the process is ended.

    Args:
        board: lives as long as the run; None where there is no other process that could end before this one.
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
        with self._lock:  # no interruption from here on
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
                pass  # its node may be gone; a board that comes back elsewhere answers the next time
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
    """Tells a board how far a shard is. A board that is gone is nobody's loss: nothing is waited for."""

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
        """Note what is on its way and what is waited for, from any thread."""
        moving = tuple(astuple(each) for each in progress.transfers)
        with self._lock:
            # What begins and ends is told at once: nothing else may come for a long time.
            names, before = ([each[:2] for each in some] for some in (moving, self._moving))
            news = names != before or progress.waiting != self._waiting
            self._moving, self._waiting = moving, progress.waiting
            self._tell(at_once=news)

    def _tell(self, *, at_once: bool) -> None:
        if self._board is None or not (at_once or time.monotonic() - self._last >= REPORT_SECONDS):
            return
        self._last = time.monotonic()
        self._board.tell.remote(self._shard, (self.count, self._moving, self._waiting))
