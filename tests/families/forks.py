"""One process a task: what a task allocates, patches or crashes stays in it, and none runs longer than its limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = dict[str, Any]


def forked(task: Callable[[], Answer], seconds: float) -> Answer:
    """Run ``task`` in a fork of this process and return its answer.

    An answer with ``raised`` stands for an exception (its last line, and ``trace``), a signal, or the time limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        answered, trace = Path(folder, "answer.json"), Path(folder, "trace.txt")
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            answer_and_exit(task, answered, trace)
        status = wait(child, seconds)
        written = trace.read_text(errors="replace") if trace.exists() else ""
        if status is None:
            return {"raised": f"no answer after {seconds:.0f} s", "trace": written[-2000:]}
        if not answered.exists():
            return {"raised": f"ended by signal {os.WTERMSIG(status)}", "trace": written[-2000:]}
        answer: Answer = json.loads(answered.read_text())
        return answer


def answer_and_exit(task: Callable[[], Answer], answered: Path, trace: Path) -> None:
    """Write the answer of ``task`` and end this process, without the exit handlers of its parent."""
    output = os.open(trace, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        answer = task()
    except BaseException as error:
        traceback.print_exc()
        answer = {"raised": one_line(error), "trace": traceback.format_exc()[-3000:]}
    sys.stdout.flush()
    sys.stderr.flush()
    answered.write_text(json.dumps(answer))
    os._exit(0)


def wait(child: int, seconds: float) -> int | None:
    """Wait for ``child``; end it after ``seconds`` and answer ``None``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def one_line(error: BaseException) -> str:
    """Say an exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
