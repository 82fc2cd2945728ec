"""The real command in odd surroundings: closed and broken streams, signals, limits, variables, terminals, folders.

Whatever surrounds it, the command prints no traceback and at most one ``error:`` line, its exit code is right, and a
destination holds the whole result or does not exist. Most cases use ``inspect`` and ``verify DST``, which start in a
fraction of the time of the commands that need torch.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import pty
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import quantize_repo, verify_repo
from tests.support.checkpoints import model, weight, write_checkpoint

pytestmark = pytest.mark.faults  # a minute and a half of real processes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.support.checkpoints import Shards

ROOT = Path(__file__).parents[2]
SECONDS = 120
"""No command on these small checkpoints takes longer, also on a busy machine."""
STRANGER = 54321
"""A user number without a name, a home and a shell."""
MISSING = "/nonexistent/checkpoint"
PATHS = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
INHERITED = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
TTY_SIZE = "HHHH"
"""Rows, columns and two numbers of pixels, as ``TIOCSWINSZ`` takes them."""

Words = tuple[str | bytes | Path, ...]


@dataclass(frozen=True)
class Ended:
    """An ended command.

    Attributes:
        code: its exit code; negative the signal that killed it.
        out, err: what it printed.
    """

    code: int
    out: str = ""
    err: str = ""

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    def check(self, code: int = 0, says: str = "", lines: int | None = None) -> None:
        """Check exit code, streams and the ``error:`` line; by default a failure has one, and a success has none."""
        shown = f"exit code {self.code}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        assert "Traceback" not in self.out + self.err, shown
        assert "Exception ignored" not in self.err, shown
        assert "internal error" not in self.err, shown
        assert self.code == code, shown
        assert len(self.errors) == ((1 if code else 0) if lines is None else lines), shown
        assert says in "".join(self.errors), shown


def words_of(*words: str | bytes | Path) -> list[bytes]:
    """The command line of ``python -m nemotron_fp8``."""
    return [os.fsencode(word) for word in (sys.executable, "-m", "nemotron_fp8", *words)]


def surroundings(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment of a command: few variables, and changes; None removes one."""
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {name: value for name, value in {**kept, **PATHS, **changes}.items() if value is not None}


def run(
    *words: str | bytes | Path,
    shell: str = "",
    env: Mapping[str, str | None] | None = None,
    prefix: Sequence[str] = (),
    cwd: Path | None = None,
    before: Callable[[], object] | None = None,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> Ended:
    """Run the command to its end.

    Args:
        words: the command's own arguments.
        shell: redirections of a shell, like ``>&-``.
        env: changes of the environment; None removes a variable.
        prefix: a command that runs the command.
        cwd: working folder.
        before: called in the new process before it becomes the command.
        stdout: descriptor, or a pipe that is read.
        stderr: descriptor, or a pipe that is read.
    """
    command: list[Any] = [*prefix, *words_of(*words)]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    done = subprocess.run(
        command,
        env=surroundings(env or {}),
        cwd=cwd,
        preexec_fn=before,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        timeout=SECONDS,
        check=False,
    )
    return Ended(done.returncode, _text(done.stdout), _text(done.stderr))


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "backslashreplace")


def limited(*limits: tuple[int, int]) -> Callable[[], None]:
    """Return what sets limits of resources, soft and hard."""

    def apply() -> None:
        for kind, limit in limits:
            resource.setrlimit(kind, (limit, limit))

    return apply


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its result, one with many tensors, and one with odd names; readable by everybody."""
    root = tmp_path_factory.mktemp("shared")
    for folder in (root, *root.parents):
        if folder.stat().st_uid == os.getuid() and folder.is_relative_to(root.parents[2]):
            folder.chmod(folder.stat().st_mode | 0o755)
    write_checkpoint(root / "source", model(layers=1), side={"tokenizer.json": b"{}"})
    quantize_repo(root / "source", root / "result", device="cpu", threads=1)
    many: Shards = {"model.safetensors": {f"layers.{i}.a_long_name_of_a.weight": torch.zeros(1) for i in range(3000)}}
    write_checkpoint(root / "many", many)
    write_checkpoint(root / "modell-é-模型", {"model.safetensors": {"schicht.é.模型.up_proj.weight": weight(16, 16)}})
    return root


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose conversion takes long enough to be interrupted; its disk space is that of its result."""
    root = tmp_path_factory.mktemp("slow")
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": torch.full((2048, 2048), 0.5).bfloat16() for i in range(8)}
    return write_checkpoint(root / "source", {"model.safetensors": tensors})


def published(source: Path, destination: Path) -> bool:
    """Return True for a whole result, False for none; anything else fails."""
    if not destination.exists():
        return False
    assert verify_repo(source, destination, threads=1).problems == ()
    assert verify_repo(None, destination, threads=1).problems == ()
    return True


def unprivileged() -> list[str]:
    """Return what runs a command as a user without a name, who may read every file and write only those of all."""
    if os.getuid() != 0:
        return []
    tool = shutil.which("setpriv")
    if tool is None:
        pytest.skip("root has no setpriv to become another user")
    caps = "+dac_read_search"  # the interpreter may lie in a folder of root
    user = str(STRANGER)
    return [tool, "--reuid", user, "--regid", user, "--clear-groups", "--inh-caps", caps, "--ambient-caps", caps]


def open_folder(path: Path) -> Path:
    """Make a folder that everybody may write."""
    path.mkdir()
    path.chmod(0o777)
    for parent in path.parents[:3]:
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o711)
    return path


# Streams.

CLOSED = {
    "stdin closed": "<&-",
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
}


@pytest.mark.parametrize("closed", CLOSED)
def test_a_closed_stream_is_like_dev_null(shared: Path, closed: str) -> None:
    shell = CLOSED[closed]
    for words, code in (
        (("verify", shared / "result"), 0),
        (("inspect", shared / "source"), 0),
        (("inspect", MISSING), 1),
        (("inspect",), 2),
    ):
        run(*words, shell=shell).check(code, lines=int(code > 0 and "2>&-" not in shell))


def test_no_output_file_gets_the_descriptor_of_a_closed_stream(shared: Path, tmp_path: Path) -> None:
    shell = CLOSED["all closed"]
    run("quantize", shared / "source", tmp_path / "result", "--stats", shell=shell).check()
    assert published(shared / "source", tmp_path / "result")
    run("report", tmp_path / "result", "--html", tmp_path / "page.html", shell=shell).check()
    assert (tmp_path / "page.html").read_bytes().startswith(b"<!doctype html>")


def test_results_that_do_not_fit_on_the_disk_are_one_error(shared: Path) -> None:
    for words in (
        ("inspect", shared / "source"),
        ("inspect", shared / "many", "--json"),
        ("verify", shared / "result"),
        ("--help",),
        ("--version",),
    ):
        run(*words, shell=">/dev/full").check(1, "No space left on device")


def test_a_summary_that_does_not_fit_leaves_the_result(shared: Path, tmp_path: Path) -> None:
    run("quantize", shared / "source", tmp_path / "result", shell=">/dev/full").check(1, "No space left on device")
    assert published(shared / "source", tmp_path / "result")


def test_messages_that_do_not_fit_on_the_disk_do_not_stop_the_work(shared: Path) -> None:
    run("inspect", shared / "source", shell="2>/dev/full").check()
    run("inspect", MISSING, shell="2>/dev/full").check(1, lines=0)
    run("verify", shared / "result", shell="2>/dev/full").check()


def broken_pipe() -> int:
    """Return the end for writing of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_a_reader_of_results_that_has_gone_ends_the_command_without_a_word(shared: Path, tmp_path: Path) -> None:
    calls: tuple[Words, ...] = (
        ("inspect", shared / "source"),
        ("inspect", shared / "many", "--json"),
        ("verify", shared / "result"),
        ("--help",),
        ("quantize", shared / "source", tmp_path / "result"),
    )
    for words in calls:
        writer = broken_pipe()
        ended = run(*words, stdout=writer)
        os.close(writer)
        ended.check(1, lines=0)
    assert published(shared / "source", tmp_path / "result")


def test_a_reader_of_messages_that_has_gone_does_not_stop_the_work(shared: Path, tmp_path: Path) -> None:
    for words, code in (
        (("inspect", shared / "source"), 0),
        (("inspect", MISSING), 1),
        (("inspect",), 2),
        (("quantize", shared / "source", tmp_path / "result"), 0),
    ):
        writer = broken_pipe()
        ended = run(*words, stderr=writer)
        os.close(writer)
        ended.check(code, lines=0)
    assert published(shared / "source", tmp_path / "result")


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "JSON"])
def test_head_reads_one_line_of_many(shared: Path, form: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        words_of("inspect", shared / "many", *form),
        env=surroundings({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.read(100)
    process.stdout.close()
    err = _text(process.stderr.read())
    process.stderr.close()
    Ended(process.wait(SECONDS), "", err).check(1, lines=0)
    assert err == ""


# Signals.

SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}


def start(*words: str | bytes | Path, before: Callable[[], object] | None = None) -> subprocess.Popen[bytes]:
    """Start the command, whose signals have their default actions."""

    def defaults() -> None:
        for number in SIGNALS.values():
            signal.signal(number, signal.SIG_DFL)
        if before:
            before()

    return subprocess.Popen(
        words_of(*words),
        env=surroundings({}),
        preexec_fn=defaults,  # noqa: PLW1509  (no other thread runs here)
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end_of(process: subprocess.Popen[bytes]) -> Ended:
    out, err = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, _text(out), _text(err))


def until_work(process: subprocess.Popen[bytes], destination: Path) -> None:
    """Wait until the command has begun to write its result: a folder beside it."""
    end = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < end:
        if any(path.name.startswith(destination.name) for path in destination.parent.iterdir()):
            return
        time.sleep(0.001)
    raise AssertionError(f"ended with {process.returncode} before any work")


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("seconds", [0.02, 0.15])
def test_a_signal_during_the_start_leaves_nothing(slow: Path, tmp_path: Path, name: str, seconds: float) -> None:
    """The interpreter's own start is not ours: it has a traceback for SIGINT, and dies of the others."""
    number = SIGNALS[name]
    process = start("quantize", slow, tmp_path / "result", "--threads", "1")
    time.sleep(seconds)
    process.send_signal(number)
    ended = end_of(process)
    assert not published(slow, tmp_path / "result")
    if ended.code == -number or (number == signal.SIGINT and ended.err.endswith("KeyboardInterrupt\n")):
        assert "nemotron_fp8/cli" not in ended.err
        # Python ends by SIGINT, for a shell 130 as well, if it has interrupted a text that a module runs.
        assert len(ended.errors) <= (number == signal.SIGINT)
    else:
        ended.check(128 + number, "terminated" if number != signal.SIGINT else "interrupted")


SENDER = """
import os, sys


class Sender:
    \"\"\"Sends a signal to its own process when a module is about to be imported.\"\"\"

    module, number = os.environ["SENT_AT"], int(os.environ["SENT"])

    def find_spec(self, name, path=None, target=None):
        if name == self.module:
            self.module = None
            os.kill(os.getpid(), self.number)


sys.meta_path.insert(0, Sender())
"""


@pytest.mark.parametrize(("module", "name"), [("torch.nn", "SIGTERM"), *(("numpy.version", name) for name in SIGNALS)])
def test_a_signal_while_a_library_is_imported_is_not_lost(shared: Path, tmp_path: Path, module: str, name: str) -> None:
    """The library of torch imports NumPy, and drops whatever is raised meanwhile."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"no {module}")
    number = SIGNALS[name]
    (tmp_path / "sitecustomize.py").write_text(SENDER)
    paths = os.pathsep.join((str(tmp_path), PATHS["PYTHONPATH"]))
    env = {"PYTHONPATH": paths, "SENT_AT": module, "SENT": str(number.value)}
    defaults = partial(signal.signal, number, signal.SIG_DFL)
    ended = run("quantize", shared / "source", tmp_path / "result", env=env, before=defaults)
    assert not published(shared / "source", tmp_path / "result")
    if ended.code == -number:
        assert len(ended.errors) <= 1
        assert "Traceback" not in ended.err
    else:
        ended.check(128 + number, "terminated" if number != signal.SIGINT else "interrupted")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_during_the_work_leaves_what_a_second_run_resumes(slow: Path, tmp_path: Path, name: str) -> None:
    """The second run is that of one signal only, to save time; the state that it finds is that of all."""
    number, destination = SIGNALS[name], tmp_path / "result"
    process = start("quantize", slow, destination, "--threads", "1")
    until_work(process, destination)
    process.send_signal(number)
    ended = end_of(process)
    ended.check(128 + number, "run the same command again to resume")
    assert not destination.exists()
    if number == signal.SIGTERM:
        run("quantize", slow, destination).check()
        assert published(slow, destination)


def test_several_signals_at_once_are_one(slow: Path, tmp_path: Path) -> None:
    """A terminal that closes sends SIGHUP, its shell SIGTERM, and somebody presses Ctrl-C meanwhile."""
    process = start("quantize", slow, tmp_path / "result", "--threads", "1")
    until_work(process, tmp_path / "result")
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.01)
    ended = end_of(process)
    # The last ones may come when Python has ended so far that they have their default actions again.
    assert ended.code in {code for number in SIGNALS.values() for code in (128 + number, -number)}
    ended.check(ended.code)
    assert not (tmp_path / "result").exists()


def test_under_nohup_the_work_goes_on(slow: Path, tmp_path: Path) -> None:
    ignored = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = start("quantize", slow, tmp_path / "result", before=ignored)
    until_work(process, tmp_path / "result")
    process.send_signal(signal.SIGHUP)
    end_of(process).check()
    assert published(slow, tmp_path / "result")


@pytest.mark.parametrize("seconds", [0.02, 0.3])
def test_a_signal_ends_a_command_that_only_reads(shared: Path, seconds: float) -> None:
    process = start("verify", shared / "source", shared / "result")
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    ended = end_of(process)
    assert ended.code in (128 + signal.SIGTERM, -signal.SIGTERM, 0)
    ended.check(ended.code, lines=1 if ended.code == 128 + signal.SIGTERM else 0)


# Variables.

VARIABLES: dict[str, dict[str, str | None]] = {
    "no HOME": {"HOME": None},
    "a HOME that does not exist": {"HOME": "/nonexistent"},
    "a HOME that is a file": {"HOME": "/etc/passwd"},
    "an empty HOME": {"HOME": ""},
    "a relative HOME": {"HOME": "home"},
    "an odd XDG_CACHE_HOME": {"XDG_CACHE_HOME": "/dev/null/\n é"},
    "a relative HF_HOME": {"HF_HOME": "relative/folder"},
    "an HF_HOME that is a file": {"HF_HOME": "/etc/passwd"},
    "an empty HF_HOME": {"HF_HOME": ""},
    "a TMPDIR that does not exist": {"TMPDIR": "/nonexistent"},
    "a TMPDIR that is a file": {"TMPDIR": "/etc/passwd"},
    "no PATH": {"PATH": None},
    "TERM=dumb": {"TERM": "dumb"},
    "no TERM": {"TERM": None},
    "COLUMNS=abc": {"COLUMNS": "abc", "LINES": "-1"},
    "COLUMNS=0": {"COLUMNS": "0"},
    "COLUMNS=-5": {"COLUMNS": "-5"},
    "an odd TZ": {"TZ": ":/nonexistent/\x01"},
    "NO_COLOR": {"NO_COLOR": "1", "FORCE_COLOR": "1"},
    "LC_ALL=C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "LC_ALL=xx_XX": {"LC_ALL": "xx_XX", "LANG": "xx_XX"},
    "PYTHONIOENCODING=ascii": {"PYTHONIOENCODING": "ascii"},
    "PYTHONIOENCODING=utf-16": {"PYTHONIOENCODING": "utf-16"},
    "PYTHONIOENCODING=latin-1:strict": {"PYTHONIOENCODING": "latin-1:strict"},
    "PYTHONOPTIMIZE=2": {"PYTHONOPTIMIZE": "2", "PYTHONDONTWRITEBYTECODE": "1"},
    "PYTHONWARNINGS=error": {"PYTHONWARNINGS": "error"},
    "PYTHONDEVMODE": {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"},
    "PYTHONUNBUFFERED": {"PYTHONUNBUFFERED": "1"},
    "PYTHONDONTWRITEBYTECODE": {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"},
    "OMP_NUM_THREADS=abc": {"OMP_NUM_THREADS": "abc"},
    "odd proxies": {"HTTPS_PROXY": "not a proxy", "NO_PROXY": "[::"},
    "odd tokens": {"HF_TOKEN": "\t", "HF_ENDPOINT": "not an address"},
}


CHECKED = ("PYTHONWARNINGS=error", "PYTHONDEVMODE", "an HF_HOME that is a file")
"""Variables under which `verify` is tried as well."""


@pytest.mark.parametrize("name", VARIABLES)
def test_variables_change_nothing(shared: Path, name: str) -> None:
    """A checkpoint whose names are not ASCII, and one that is not there, of which the message repeats the name."""
    odd, env = shared / "modell-é-模型", VARIABLES[name]
    inspected = run("inspect", odd, env=env)
    inspected.check()
    assert "up_proj" in inspected.out.replace("\0", "")
    if name in CHECKED:
        run("verify", shared / "result", env=env).check()
    if "utf-16" in name:
        missing = run("inspect", odd / "fehlt-é", env=env)
        Ended(missing.code, "", missing.err.replace("\0", "").replace("\\xff\\xfe", "")).check(1)
    elif "PYTHONIOENCODING" in env or "LC_ALL" in env:
        run("inspect", odd / "fehlt-é", env=env).check(1)


ODD: dict[str, str | None] = {
    "HOME": "/nonexistent",
    "XDG_CACHE_HOME": "/dev/null/x",
    "HF_HOME": "/etc/passwd",
    "TMPDIR": "/nonexistent",
    "TZ": ":/nonexistent",
    "COLUMNS": "abc",
    "TERM": None,
    "PATH": None,
}
C_LOCALE: dict[str, str | None] = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMBINED: dict[str, dict[str, str | None]] = {
    "odd values": {**ODD, "LC_ALL": "xx_XX", "OMP_NUM_THREADS": "abc", "PYTHONIOENCODING": "utf-16"},
    "warnings are errors": {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "ascii"},
}


@pytest.mark.parametrize("name", COMBINED)
def test_a_conversion_under_odd_variables_with_20_open_files(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "modell-é-模型"
    destination, few = tmp_path / "ergebnis-é-模型", limited((resource.RLIMIT_NOFILE, 20))
    run("quantize", source, destination, "--stats", env=COMBINED[name], before=few).check()
    assert published(source, destination)


def test_a_plan_under_odd_variables(shared: Path) -> None:
    run("plan", shared / "modell-é-模型", env={**ODD, **C_LOCALE, "PYTHONWARNINGS": "error"}).check()


def test_names_that_are_no_text(shared: Path, tmp_path: Path) -> None:
    """The names of the file system are bytes."""
    env = C_LOCALE
    source = os.fsencode(tmp_path) + b"/source-\xff\xfe\xe9"
    shutil.copytree(os.fsencode(shared / "source"), source)
    destination = os.fsencode(tmp_path) + b"/result-\xff-\xc3\xa9"
    inspected = run("inspect", source, env=env)
    inspected.check()
    run("inspect", source, "--json", env=env).check()
    run("inspect", source + b"/\xff", env=env).check(1)
    run("quantize", source, destination, env=env).check()
    assert published(Path(os.fsdecode(source)), Path(os.fsdecode(destination)))
    run("verify", destination, env=env).check()
    run("verify", destination + b"\xff", env=env).check(1)


def test_a_user_without_a_name_and_a_home(shared: Path, tmp_path: Path) -> None:
    env = {"HOME": None, "XDG_CACHE_HOME": None, "TMPDIR": "/proc", "USER": None, "LOGNAME": None}
    folder = open_folder(tmp_path / "open")
    run("quantize", shared / "source", folder / "result", env=env, prefix=unprivileged(), cwd=Path("/")).check()
    assert published(shared / "source", folder / "result")


# Terminals.


def on_terminal(*words: str | bytes | Path, columns: int, env: Mapping[str, str | None]) -> tuple[int, str]:
    """Run the command on a terminal of some columns; return its exit code, and what the terminal got."""
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack(TTY_SIZE, 24 if columns else 0, columns, 0, 0))
    process = subprocess.Popen(
        words_of(*words), env=surroundings(env), stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    got = b""
    while True:
        try:
            data = os.read(control, 65536)
        except OSError as error:
            assert error.errno == errno.EIO  # so Linux reports the end of a terminal
            break
        if not data:
            break
        got += data
    os.close(control)
    return process.wait(SECONDS), _text(got)


TERMINALS: dict[str, tuple[int, dict[str, str | None]]] = {
    "no columns": (0, {"TERM": "xterm"}),
    "a column": (1, {"TERM": "xterm"}),
    "20 columns": (20, {"TERM": "xterm"}),
    "TERM=dumb": (80, {"TERM": "dumb"}),
    "no TERM": (80, {"TERM": None}),
    "an unknown TERM": (80, {"TERM": "\x01odd"}),
    "no columns and COLUMNS=abc": (0, {"TERM": "xterm", "COLUMNS": "abc"}),
    "no columns and COLUMNS=-1": (0, {"TERM": "xterm", "COLUMNS": "-1"}),
}


@pytest.mark.parametrize("name", TERMINALS)
def test_a_terminal_of_any_size(shared: Path, name: str) -> None:
    columns, env = TERMINALS[name]
    calls: list[tuple[Words, int]] = [(("inspect", shared / "source"), 0), (("inspect", MISSING), 1)]
    if "column" in name:
        calls += [(("verify", shared / "result"), 0), (("--help",), 0)]
    for words, code in calls:
        got = on_terminal(*words, columns=columns, env=env)
        assert got[0] == code, got
        assert "Traceback" not in got[1]
        assert got[1].count("error:") == code
        assert got[1]


def test_a_conversion_on_a_narrow_terminal(slow: Path, tmp_path: Path) -> None:
    """Its line of progress is redrawn, in the columns that there are."""
    code, got = on_terminal("quantize", slow, tmp_path / "result", columns=20, env={"TERM": "xterm"})
    assert code == 0, got
    assert "Traceback" not in got
    drawn = [part.partition("\x1b[K")[0] for part in got.split("\r") if "\x1b[K" in part]
    assert all(len(part) < 20 for part in drawn)
    assert published(slow, tmp_path / "result")


# Limits.


@pytest.mark.parametrize("files", [4, 6, 20])
def test_few_open_files_are_enough_or_one_error(shared: Path, files: int) -> None:
    """Below a handful not even the interpreter starts, which is not ours to report."""
    for words in (("inspect", shared / "source"), ("verify", shared / "result")):
        ended = run(*words, before=limited((resource.RLIMIT_NOFILE, files)))
        if files == 4 and not ended.errors:
            continue
        ended.check(ended.code, "open files" if ended.code else "")
        assert ended.code == 0 or files < 20


def test_files_that_may_not_grow_are_one_error(slow: Path, tmp_path: Path) -> None:
    """The limit of a file's size sends a signal that would end the process."""
    small = limited((resource.RLIMIT_FSIZE, 1 << 20))
    ended = run("quantize", slow, tmp_path / "result", before=small)
    ended.check(1, "File too large")
    assert not published(slow, tmp_path / "result")


def test_no_threads_are_one_error_or_none_are_needed(shared: Path, tmp_path: Path) -> None:
    prefix = unprivileged()
    if not prefix:
        pytest.skip("the limit counts the processes of the user, who runs this test")
    folder = open_folder(tmp_path / "open")
    one = limited((resource.RLIMIT_NPROC, 1))
    run("inspect", shared / "source", prefix=prefix, before=one).check()
    ended = run("quantize", shared / "source", folder / "result", "--threads", "4", prefix=prefix, before=one)
    ended.check(ended.code)
    assert ended.code in (0, 1, 130)  # OpenBLAS, which NumPy loads, interrupts the process by SIGINT
    assert published(shared / "source", folder / "result") is (ended.code == 0)


@pytest.mark.parametrize("megabytes", [100, 400])
def test_little_address_space_is_one_error(shared: Path, tmp_path: Path, megabytes: int) -> None:
    """Unless a library ends the process itself, as those of C++ do."""
    little = limited((resource.RLIMIT_AS, megabytes << 20))
    run("inspect", shared / "source", before=little).check()
    ended = run("quantize", shared / "source", tmp_path / "result", "--threads", "1", before=little)
    if ended.code == -signal.SIGABRT:
        ended.check(-signal.SIGABRT, lines=0)
    else:
        ended.check(1)
    assert not published(shared / "source", tmp_path / "result")


# Folders.


@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
@pytest.mark.parametrize("command", ["inspect", "verify", "quantize", "plan", "report"])
def test_a_deleted_working_folder_is_one_error(shared: Path, tmp_path: Path, command: str, absolute: bool) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    def enter() -> None:
        os.chdir(gone)
        gone.rmdir()

    paths: list[str | bytes | Path] = [shared / "source" if absolute else Path("source")]
    if command in ("verify", "report"):
        paths = [shared / "result" if absolute else Path("result")]
    if command == "quantize":
        paths.append(tmp_path / "result" if absolute else Path("result"))
    ended = run(command, *paths, before=enter)
    ended.check(1, "folder")
    assert not (tmp_path / "result").exists()


def test_a_working_folder_and_folders_for_temporary_files_without_permission(shared: Path, tmp_path: Path) -> None:
    """Whoever may not write there names a place elsewhere, or gets one error."""
    locked, folder, prefix = tmp_path / "locked", open_folder(tmp_path / "open"), unprivileged()
    locked.mkdir(mode=0o500 if not prefix else 0o755)
    env = {"TMPDIR": str(locked), "HOME": str(locked), "XDG_CACHE_HOME": str(locked), "HF_HOME": str(locked)}
    run("quantize", shared / "source", folder / "result", env=env, prefix=prefix, cwd=locked).check()
    assert published(shared / "source", folder / "result")
    run("quantize", shared / "source", "result", prefix=prefix, cwd=locked).check(1, "ermission")
    assert list(locked.iterdir()) == []


def test_a_full_folder_for_temporary_files(shared: Path, tmp_path: Path) -> None:
    tool = shutil.which("unshare")
    full = tmp_path / "full"
    full.mkdir()
    fill = 'mount -t tmpfs -o size=4k none "$0" && { cat /dev/zero >"$0/x" 2>/dev/null; test -s "$0/x"; }'
    prefix = [str(tool), "-m", "sh", "-c", f'{fill} && exec "$@"', str(full)]
    if tool is None or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted")
    env = {"TMPDIR": str(full), "HOME": str(full), "HF_HOME": str(full)}
    run("quantize", shared / "source", tmp_path / "result", env=env, prefix=prefix).check()
    assert published(shared / "source", tmp_path / "result")


def test_a_umask_that_takes_all_permissions(shared: Path, tmp_path: Path) -> None:
    """The result is made, or there is one error: what the command makes, it may not open again by its name."""
    folder = open_folder(tmp_path / "open")
    ended = run(
        "quantize",
        shared / "source",
        folder / "result",
        prefix=unprivileged(),
        before=partial(os.umask, 0o777),
    )
    ended.check(ended.code)
    assert ended.code in (0, 1, 130)  # OpenBLAS, which NumPy loads, interrupts the process by SIGINT
    if ended.code == 0:
        if os.getuid() != 0:
            for path in (folder / "result", *(folder / "result").iterdir()):
                path.chmod(stat.S_IRWXU)
        assert published(shared / "source", folder / "result")
    else:
        assert not (folder / "result").exists()


def test_json_is_one_object_on_stdout_in_every_surrounding(shared: Path) -> None:
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "abc"}
    ended = run("inspect", shared / "modell-é-模型", "--json", env=env)
    ended.check()
    assert "schicht.é.模型.up_proj.weight" in json.dumps(json.loads(ended.out), ensure_ascii=False)
