"""Worker processes on one machine: one for each device.

Workers are fresh interpreters that run `serve`, not children of `multiprocessing`: multiprocessing would import the
caller's main module again, so that a script without a ``__main__`` guard would run again in each worker.

The socket between parent and worker closes when either process ends. The parent then reports a dead worker, and a
worker without a parent exits.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.conversion.workers.base import Job, run_jobs
from nemotron_fp8.errors import WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from nemotron_fp8.conversion.progress import ConversionProgress
    from nemotron_fp8.engines.devices import EngineSpec
    from nemotron_fp8.planning.receipt import ShardReceipt


REPORT_SECONDS = 0.05
"""Shortest interval between two progress messages of a worker."""
PARENTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Signals that end the command; its worker processes end with it."""
_START = "import sys; sys.path[:] = {path!r}; from nemotron_fp8.conversion.workers.processes import serve; serve({fd})"


class Advanced(NamedTuple):
    """Message of a worker: input bytes of a shard are processed."""

    shard: str
    nbytes: int


class Done(NamedTuple):
    """Message of a worker: a shard is finished."""

    receipt: ShardReceipt


class Failed(NamedTuple):
    """Message of a worker: the exception of a job, and its traceback as text."""

    error: BaseException
    trace: str


class RemoteTraceback(Exception):  # noqa: N818  (carries the text of a cause; never raised itself)
    """Cause of a worker's exception: the worker's traceback, as text."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


@dataclass(eq=False)
class _Worker:
    """A worker process and the shard that it makes."""

    spec: EngineSpec
    process: subprocess.Popen[bytes]
    connection: Connection
    shard: str | None = None

    def send(self, job: Job) -> None:
        """Send a job; a dead worker is noticed by `read`."""
        self.shard = job.shard_task.name
        with suppress(OSError):
            self.connection.send(job)

    def read(self) -> Advanced | Done | Failed:
        """Return the worker's next message.

        Raises:
            WorkerDiedError: the worker ended without a message.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            raise WorkerDiedError(self.spec.device, self.shard, code) from None
        if not isinstance(message, (Advanced, Done, Failed)):
            raise TypeError(f"a worker sent {type(message).__name__}")
        return message


class Processes:
    """Worker processes, one for each spec; each takes the largest remaining job.

    Jobs that arrive one by one, as their input is fetched, run in order of arrival.

    Args:
        specs: engines of the workers; they differ in the device alone.
    """

    shares_disk = True

    def __init__(self, specs: Sequence[EngineSpec]) -> None:
        self._specs = tuple(specs)
        self.spec, self.count = self._specs[0], len(self._specs)

    def run(self, jobs: Iterable[Job], progress: ConversionProgress) -> Generator[ShardReceipt, None, None]:
        # Largest first: the workers then finish within one small job of each other.
        if isinstance(jobs, Sequence):
            jobs = sorted(jobs, key=lambda job: (-job.nbytes, job.shard_task.name))
        left = iter(jobs)
        workers: list[_Worker] = []
        try:
            for spec, job in zip(self._specs, left, strict=False):
                workers.append(_start(spec))
                workers[-1].send(job)
            busy = list(workers)
            while busy:
                ready = wait([worker.connection for worker in busy])
                for worker in [worker for worker in busy if worker.connection in ready]:
                    message = worker.read()
                    if isinstance(message, Advanced):
                        progress.add(message.shard, message.nbytes)
                        continue
                    if isinstance(message, Failed):
                        raise message.error from RemoteTraceback(message.trace)
                    worker.shard = None
                    if (following := next(left, None)) is not None:
                        worker.send(following)
                    else:
                        busy.remove(worker)
                    yield message.receipt
        finally:
            _end(workers)


def _start(spec: EngineSpec) -> _Worker:
    """Start a worker process for a spec."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Ctrl-C reaches the whole foreground group, and service managers send SIGTERM to every process. The parent
        # alone handles them. A worker inherits the mask, so that it ignores them from its first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START.format(path=sys.path, fd=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # only the parent prints results
                pass_fds=[theirs.fileno()],
            )
            connection = Connection(ours.detach())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    worker = _Worker(spec, process, connection)
    with suppress(OSError):
        connection.send(spec)
    return worker


def _end(workers: Iterable[_Worker]) -> None:
    """Kill the workers; the destination removes their unfinished shards."""
    workers = list(workers)
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.connection.close()
        worker.process.wait()


def serve(fd: int) -> None:
    """Run a worker: receive jobs from the socket ``fd`` and send receipts, until the parent dies or kills it."""
    connection = Connection(fd)
    spec: EngineSpec = connection.recv()
    inbox: SimpleQueue[Job] = SimpleQueue()
    outbox = _Outbox(connection)

    def listen() -> None:
        try:
            while True:
                inbox.put(connection.recv())
        except (EOFError, OSError):
            # The parent is dead. The unfinished shard is left in its partial folder.
            os._exit(1)

    Thread(target=listen, name="jobs", daemon=True).start()

    def jobs() -> Iterator[Job]:
        while True:
            yield inbox.get()

    try:
        for receipt in run_jobs(spec, jobs(), outbox.advance):
            outbox.flush()
            outbox.send(Done(receipt))
    except BaseException as error:
        outbox.send(Failed(portable(error), traceback.format_exc()))
        # Wait for the parent to kill this process: an exit could overtake the message.
        while True:
            signal.pause()


class _Outbox:
    """Sends messages from any thread, and adds up progress between two messages."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = Lock()
        self._shard, self._count, self._last = "", 0, 0.0

    def advance(self, shard: str, count: int) -> None:
        """Count bytes, and send them if the last progress message is old enough."""
        with self._lock:
            self._shard, self._count = shard, self._count + count
            if time.monotonic() - self._last < REPORT_SECONDS:
                return
        self.flush()

    def flush(self) -> None:
        """Send the bytes that were counted since the last progress message."""
        with self._lock:
            shard, count, self._count, self._last = self._shard, self._count, 0, time.monotonic()
        if count:
            self.send(Advanced(shard, count))

    def send(self, message: Advanced | Done | Failed) -> None:
        """Send one message; the listening thread handles a dead parent."""
        with self._lock, suppress(OSError):
            self._connection.send(message)


def portable(error: BaseException) -> BaseException:
    """Return the error if it can be pickled, else a RuntimeError with the same text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
