"""Driver of the run: starts each stage as processes with a limit, and writes their lines; standard library only.

A process sends lines through a pipe of its own. The driver checks each and writes it to ``results.jsonl`` at once.
What a process prints goes to ``log.txt``. A process that hangs, crashes or writes something else loses its own lines
alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from benchmarks.gpu import lines as lines_
from benchmarks.gpu.lines import LINES, MODE, NO_DEVICE, Line, kind, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.plan import Stage

ROOT = Path(__file__).resolve().parent.parent.parent

MOST_RESULTS, MOST_LOG = 15 << 20, 4 << 20
"""Most bytes of each file: a result folder holds files of up to 16 MiB."""

LOG_ENDS = 48 << 10
"""Bytes of the output of a process that are kept, from its start and from its end."""

LEAST_SECONDS = 5.0
"""Time under which a stage is not started."""

GRACE_SECONDS = 4.0
"""Time between the request to end and the kill of a process."""

PIPE_SECONDS = 2.0
"""Time in which the rest of the lines of an ended process is read; a child outside its group can hold a pipe open."""

POLL_SECONDS = 0.02

PAGE_SECONDS = 6.0
"""Time kept for the summary."""


class Results:
    """File of the lines, which stays usable when the disk is full: lines that cannot be written are printed."""

    def __init__(self, folder: Path, began: float, run: int) -> None:
        self.path = folder / "results.jsonl"
        self.lines: list[Line] = []
        self.circumstances: Line = {"run": run}
        self._began = began
        self._lock = threading.Lock()
        self._bytes = 0
        self._told = False
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")

    def add(self, line: Line, stage: str, job: str) -> None:
        """Write one line with its stage, second and circumstances."""
        with self._lock:
            if line.get("case") == "environment":
                self.circumstances |= {key: value for key, value in line.items() if key not in ("case", "mode")}
            fields = {"stage": stage, "job": job} if job else {"stage": stage}
            full = line | fields | {"at_second": round(time.monotonic() - self._began, 1)} | self.circumstances
            self.lines.append(full)
            self._write(full)
        if kind(line) != "test" and line.get("case") != "compiled":
            _print(_short(line, stage))

    def _write(self, line: Line) -> None:
        data = (json.dumps(line, sort_keys=True) + "\n").encode()
        try:
            if self._bytes + len(data) > MOST_RESULTS:
                raise OSError(f"more than {MOST_RESULTS >> 20} MiB")
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                written = os.write(descriptor, data)
                if written < len(data):
                    os.ftruncate(descriptor, before)
                    raise OSError("only a part of the line fits")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._bytes += len(data)
        except OSError as error:
            if not self._told:
                _print(f"results cannot be written, lines follow here: {error}")
                self._told = True
            _print(data.decode().rstrip("\n"))


class Process:
    """A process of a stage, the leader of its own process group."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        add: Callable[[Line], None],
        stop: threading.Event,
    ) -> None:
        self.garbage = 0
        self.stop = stop
        self._add = add
        self._head, self._tail = bytearray(), bytearray()
        receive, send = os.pipe()
        try:
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | {LINES: str(send)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(send,),
                start_new_session=True,
            )
        except OSError:
            os.close(receive)
            raise
        finally:
            os.close(send)
        assert self.process.stdout is not None
        self._threads = [
            threading.Thread(target=self._read_lines, args=(os.fdopen(receive, "rb"),), daemon=True),
            threading.Thread(target=self._read_log, args=(self.process.stdout,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read_lines(self, pipe: BinaryIO) -> None:
        with pipe:
            while data := pipe.readline(lines_.MOST_BYTES + 2):
                line = parse(data.decode("utf-8", errors="replace"))
                if line is None:
                    self.garbage += 1
                else:
                    self._add(line)

    def _read_log(self, pipe: BinaryIO) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), 1 << 16):
                room = LOG_ENDS - len(self._head)
                self._head += data[:room]
                self._tail = (self._tail + data[room:])[-LOG_ENDS:]

    def log(self) -> bytes:
        """Return the output of the process, without the middle of a long one."""
        cut = b"\n...\n" if len(self._tail) == LOG_ENDS else b""
        return bytes(self._head) + cut + bytes(self._tail)

    def end(self, limit: float) -> tuple[int, bool]:
        """Wait at most until ``limit`` on the monotonic clock; return the exit status, and whether it was ended."""
        overdue = not self._ended(limit, self.stop)
        if overdue:
            self._signal(signal.SIGTERM)
            self._ended(time.monotonic() + GRACE_SECONDS)
        # The rest of the group ends, too: it holds the pipes open. The number of the group is not reused before
        # the process has been waited for.
        self._signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # in a call of the system, it ends whenever it can
            self.process.wait(GRACE_SECONDS)
        for thread in self._threads:
            thread.join(PIPE_SECONDS)
        return -signal.SIGKILL if self.process.returncode is None else self.process.returncode, overdue

    def _ended(self, limit: float, stop: threading.Event | None = None) -> bool:
        """Wait until the process has ended, without taking its status; return False at the limit or stop."""
        while os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= limit or (stop is not None and stop.is_set()):
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class Driver:
    """Runs stages.

    Args:
        folder: folder of the results.
        limit: seconds of the whole run.
        mode: ``device``, ``dry`` or ``until-launch``.
        environment: additional environment variables of the stages.
        cores: number of processes at a time.
        began: start of the run on the monotonic clock.
        run: number of the run in the lines.
        command: command line of a stage's process, before the names of stage and job.
    """

    def __init__(
        self,
        folder: Path,
        limit: float,
        mode: str,
        environment: dict[str, str],
        cores: int,
        began: float | None = None,
        run: int = 1,
        command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu.stage"),
    ) -> None:
        self.folder, self.mode = folder, mode
        self._began = time.monotonic() if began is None else began
        self.results = Results(folder, self._began, run)
        self._end = self._began + limit - PAGE_SECONDS
        self._environment = dict(os.environ) | environment | {MODE: mode}
        self._command, self._cores = command, max(1, cores)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._log_bytes = 0

    def run(self, stages: Sequence[Stage]) -> None:
        """Run the stages in order; those marked ``beside`` at the same time as the stage before."""
        groups: list[list[Stage]] = []
        for stage in stages:
            if stage.beside and groups:
                groups[-1].append(stage)
            else:
                groups.append([stage])
        for group in groups:
            self._run_group(group)
            if self._without_device():
                break

    def stop(self) -> None:
        """End all processes and start no other stage; the results so far remain. Safe in a signal handler."""
        self._stop.set()

    def _run_group(self, stages: Sequence[Stage]) -> None:
        queue = [(stage, job) for stage in stages for job in stage.jobs]
        failed: dict[str, int] = {stage.name: 0 for stage in stages}
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    if not queue:
                        return
                    stage, job = queue.pop(0)
                failed[stage.name] += self._run_job(stage, job) != 0

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self._cores, len(queue)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a join without a limit would hold back signals
                thread.join(0.2)
        for stage in stages:
            self._sum_tests(stage, failed[stage.name])

    def _run_job(self, stage: Stage, job: str) -> int:
        left = self._end - time.monotonic()
        if left < LEAST_SECONDS or self._stop.is_set():
            self.results.add(
                {"case": "skipped", "reason": "stopped" if self._stop.is_set() else "no time left"}, stage.name, job
            )
            return 1
        seconds = min(stage.seconds, left - GRACE_SECONDS / 2)
        limit = time.monotonic() + seconds
        command = [*self._command, stage.name, *([job] if job else [])]
        try:
            process = Process(
                command, self._environment, lambda line: self.results.add(line, stage.name, job), self._stop
            )
        except OSError as error:
            self.results.add({"error": f"the process cannot be started: {error}"}, stage.name, job)
            self.results.add({"case": "exit", "code": 1}, stage.name, job)
            return 1
        code, overdue = process.end(limit)
        if overdue:
            reason = "the run was stopped" if self._stop.is_set() else f"ended after its limit of {seconds:.0f} s"
            self.results.add({"error": reason}, stage.name, job)
        if process.garbage:
            self.results.add({"error": f"{process.garbage} lines that are no results"}, stage.name, job)
        spent = round(time.monotonic() - process.started, 1)
        left = round(self._end - time.monotonic(), 1)
        self.results.add({"case": "exit", "code": code, "stage_seconds": spent, "left": left}, stage.name, job)
        self._write_log(f"===== {stage.name} {job}: exit status {code}, {spent} s\n".encode() + process.log() + b"\n")
        return code

    def _sum_tests(self, stage: Stage, code: int) -> None:
        """Write the number of tests that passed, failed and were skipped in all shares."""
        found = [line for line in self.results.lines if line["stage"] == stage.name and kind(line) == "test"]
        if not found:
            return
        worst: dict[str, str] = {}
        for line in found:
            if worst.get(line["test"]) != "failed":
                worst[line["test"]] = line["outcome"]
        counts = {outcome: list(worst.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        self.results.add({"check": found[0]["check"], "exit_code": int(code > 0)} | counts, stage.name, "")

    def _without_device(self) -> bool:
        return any(line.get("case") == "exit" and line.get("code") == NO_DEVICE for line in self.results.lines)

    def _write_log(self, data: bytes) -> None:
        with self._lock:
            if self._log_bytes + len(data) > MOST_LOG:
                return
            try:
                with (self.folder / "log.txt").open("ab") as file:
                    file.write(data)
                self._log_bytes += len(data)
            except OSError as error:
                _print(f"log cannot be written: {error}")


def _print(text: str) -> None:
    """Print a line; a closed terminal does not end the run."""
    with suppress(OSError):
        print(text, flush=True)


def _short(line: Line, stage: str) -> str:
    """Return a line for the terminal, with a few of its fields."""
    if kind(line) == "figure":
        rate = f"{line['seconds'] * 1e6:10.1f} us {line['bytes_per_second'] / 1e9:7.0f} GB/s"
        return f"{stage:14} {rate}  {line['shape']}, {line['granularity']}: {line['operation']}"
    fields: dict[str, Any] = {key: value for key, value in line.items() if key != "compiled"}
    return f"{stage:14} " + " ".join(f"{key}={str(value)[:200]}" for key, value in fields.items())
