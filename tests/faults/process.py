"""Real processes of the real command line: started, traced, killed.

A process is either started afresh (``python -m nemotron_fp8``), or forked from this one, which has torch loaded
already; from `nemotron_fp8.cli.main` on the two are the same, and both are killed by the same SIGKILL. A fork
takes a twentieth of the time, so sweeps that must be complete use it and samples of them use the fresh one.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WRITES = (
    "openat,write,pwrite64,fsync,fdatasync,fallocate,ftruncate,rename,renameat,renameat2,link,linkat,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir"
)
"""System calls that change a file system; of `openat` those that create."""
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)
SECONDS = 120


@dataclass(frozen=True)
class TaskEnded:
    """The exit status and the output of an ended process.

    Attributes:
        code: its exit status; negative the signal that killed it.
        out, err: what it printed.
        log: lines of strace, where it was traced.
    """

    code: int
    out: str
    err: str
    log: list[str] = field(default_factory=list)

    @property
    def typed(self) -> bool:
        """True if it was rejected with one ``error:`` line and no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.code == 1 and len(lines) == 1 and "Traceback" not in self.err


def fresh(arguments: Sequence[str], inject: Sequence[str] = (), trace: str = WRITES) -> TaskEnded:
    """Run ``python -m nemotron_fp8`` under strace, from the first instruction on."""
    log = Path(f"/tmp/faults-{os.getpid()}.log")
    command = [sys.executable, "-m", "nemotron_fp8", *arguments]
    tracer = strace_command(log, inject, trace)
    done = subprocess.run(
        [*tracer, *command], capture_output=True, text=True, timeout=SECONDS, env=environment(), check=False
    )
    lines = log.read_text(errors="replace").splitlines()
    log.unlink()
    killed = any("+++ killed by SIGKILL +++" in line for line in lines)
    return TaskEnded(-signal.SIGKILL if killed else done.returncode, done.stdout, done.stderr, lines)


def strace_command(log: Path, inject: Sequence[str], trace: str, *more: str) -> list[str]:
    options = [f"-einject={rule}" for rule in inject]
    return ["strace", "-f", "-y", "-qq", "-esignal=none", f"-etrace={trace}", *options, *more, "-o", str(log)]


def environment() -> dict[str, str]:
    """The environment of a fresh process: every run starts with the same system calls."""
    keep = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG", "PYTHONPATH")}
    return {**keep, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}


def forked(
    arguments: Sequence[str],
    inject: Sequence[str] | None = None,
    trace: str = WRITES,
    more: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
) -> TaskEnded:
    """Run the command line in a fork of this process.

    Args:
        arguments: of the command line.
        inject: strace's rules; None to run without strace.
        trace: system calls to trace.
        more: further options of strace.
        prepare: called in the new process before anything else.
    """
    return wait(start(arguments, inject, trace, more, prepare))


@dataclass
class Running:
    """A process that was started."""

    pid: int
    out: int
    err: int
    strace: subprocess.Popen[bytes] | None
    log: Path


def start(
    arguments: Sequence[str],
    inject: Sequence[str] | None = None,
    trace: str = WRITES,
    more: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
) -> Running:
    """Start a fork; see `forked`."""
    out, err = os.memfd_create("out"), os.memfd_create("err")
    pid = os.fork()
    if not pid:
        _child(arguments, out, err, stop=inject is not None, prepare=prepare)
    log = Path(f"/tmp/faults-{os.getpid()}-{pid}.log")
    strace = None
    if inject is not None:
        os.waitpid(pid, os.WUNTRACED)
        strace = subprocess.Popen([*strace_command(log, inject, trace, *more), "-p", str(pid)])
        while not _traced(pid):
            if strace.poll() is not None:
                os.kill(pid, signal.SIGKILL)
                raise RuntimeError("strace could not attach; it may need root or kernel.yama.ptrace_scope=0")
            time.sleep(0.001)
        os.kill(pid, signal.SIGCONT)
    return Running(pid, out, err, strace, log)


def wait(running: Running) -> TaskEnded:
    """Wait until a process has ended."""
    _, status = os.waitpid(running.pid, 0)
    lines: list[str] = []
    if running.strace:
        running.strace.wait()
        lines = running.log.read_text(errors="replace").splitlines()
        running.log.unlink()
    texts = [os.pread(fd, 1 << 22, 0).decode(errors="replace") for fd in (running.out, running.err)]
    os.close(running.out)
    os.close(running.err)
    return TaskEnded(os.waitstatus_to_exitcode(status), texts[0], texts[1], lines)


def _traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return not re.search(r"^TracerPid:\s*0$", status, re.MULTILINE)


def _child(arguments: Sequence[str], out: int, err: int, *, stop: bool, prepare: Callable[[], None] | None) -> NoReturn:
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.argv = ["nemotron-fp8", *arguments]
        if stop:
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
        if prepare:
            prepare()
        code = _main()
    finally:
        os._exit(code)


def _main() -> int:
    import traceback

    from nemotron_fp8.cli.main import main

    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    try:
        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@dataclass(frozen=True)
class Call:
    """A system call of a trace that changes a file system.

    Attributes:
        thread: who made it.
        name: its name.
        number: the how-manieth of its name in its thread, counted from 1 as strace's ``when`` does.
        what: its arguments, names of temporaries made alike.
    """

    thread: str
    name: str
    number: int
    what: str


_LINE = re.compile(r"^(\d+)\s+(\w+)\((.*)$")
_OWN_NAME = re.compile(r"work-[0-9a-f]+-\d+-\d+-[0-9a-f]+")


def calls(log: Sequence[str], places: Sequence[str]) -> list[Call]:
    """The calls of a trace that change something under one of ``places``; `openat` only where it creates."""
    found: list[Call] = []
    counts: dict[tuple[str, str], int] = {}
    for line in log:
        match = _LINE.match(line)
        if not match:
            continue
        thread, name, rest = match.groups()
        number = counts[thread, name] = counts.get((thread, name), 0) + 1
        if name == "openat" and "O_CREAT" not in rest:
            continue
        if any(place in rest for place in places):
            what = _OWN_NAME.sub("work", rest.partition(") = ")[0].removesuffix(" <unfinished ...>"))
            found.append(Call(thread, name, number, re.sub(r"\d+<", "<", what)))
    return found
