"""Run the command line in a forked child, measure it, and judge how it ended.

A child runs what the console script runs, from `nemotron_fp8.cli.main.main` on. All modules are loaded before the
fork, which therefore takes a hundredth of the time of a new process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import pkgutil
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn

from tests.fuzz.tree import CANARY, Input, write_tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Event

SECONDS = 10.0
MEMORY = 512 << 20
LINE = 20_000
"""Most characters of one line of output."""
ADDRESS_SPACE = 4 << 30
"""Bytes of address space that a child may add: more ends it before the machine suffers."""
OUTPUT = 32 << 20
KILLED = 9
HURRY = 10
"""Times faster than they say do the waits between the tries of a request pass."""
LONG = 400
"""Characters of a path above which its links are not resolved."""
SHOWN = 12
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that must not reach a terminal: control characters but the line feed, and marks of direction."""
ERROR, INTERNAL = "error: ", "internal error"
HARMLESS = ("/dev/null", "/dev/full", "/dev/tty", "/proc/", "/dev/stdout", "/dev/stderr")
"""Paths that may be opened for writing outside of an input's folder."""
MAKERS = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1, "os.mkfifo": 0, "os.truncate": 0}
"""Audit events that make or change a file, and the number of the argument that is its path."""


@dataclass(frozen=True)
class Ended:
    """The end of a child.

    Attributes:
        code: exit status; negative the signal that ended it.
        out, err: its output.
        seconds, memory: elapsed seconds, most bytes of resident memory.
        late: True if it was killed at the limit of time.
        outside: paths outside of its folder that it made or changed.
        where: the stacks of its threads shortly before the limit of time.
    """

    code: int
    out: str
    err: str
    seconds: float
    memory: int
    late: bool
    outside: list[str]
    where: str


def preload() -> None:
    """Import everything that a command may import, and freeze it: a child then copies few pages."""
    import huggingface_hub
    import safetensors.torch
    import torch
    import yaml

    import nemotron_fp8

    # A pool of threads that was started before a fork has no threads after it.
    torch.set_num_threads(1)
    names = [module.name for module in pkgutil.walk_packages(nemotron_fp8.__path__, "nemotron_fp8.")]
    for name in names:
        if not name.endswith("__main__") and "cuda" not in name and "ray" not in name.rpartition(".")[2]:
            importlib.import_module(name)
    for name in ("numcodecs.blosc", "numcodecs.zstd", "huggingface_hub.hf_api", "email.mime.multipart"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _ = huggingface_hub.HfApi, safetensors.torch.load_file, yaml.SafeLoader
    gc.collect()
    gc.freeze()
    _preloaded.append(resident())


_preloaded: list[int] = []
PRELOADED = 256 << 20
"""Most bytes that the libraries of the command take by themselves; a process that runs other tests, too, has more."""


def resident() -> int:
    """Return the bytes of resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run(
    given: Input,
    folder: Path,
    seconds: float = SECONDS,
    main: Callable[[], object] | None = None,
) -> Ended:
    """Write an input's folder and run its command there.

    Args:
        given: the input.
        folder: the folder, which does not exist.
        seconds: limit of elapsed time, after which the child is killed.
        main: what to call in place of the command.
    """
    write_tree(folder, given.tree)
    folder.with_name(CANARY).write_text(CANARY)
    # Beside the files, so that a command which counts files of its source does not see it.
    for name in ("home", "tmp"):
        if not os.path.lexists(folder / name):
            (folder / name).mkdir()
    stop = given.serve() if given.serve else None
    try:
        return _fork(given, folder, seconds, main)
    finally:
        if stop:
            stop()


def _fork(given: Input, folder: Path, seconds: float, main: Callable[[], object] | None) -> Ended:
    files = [os.memfd_create(name) for name in ("out", "err", "outside", "where")]
    # What the generators left here counts for the child, too.
    inherited = max(0, resident() - min(_preloaded[0], PRELOADED)) if _preloaded else 0
    begun = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(given, folder, files, seconds, main)
    ended = os.pidfd_open(pid)
    try:
        waiting = select.poll()
        waiting.register(ended, select.POLLIN)
        late = not waiting.poll(seconds * 1000)
    finally:
        os.close(ended)
    if late:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    took = time.monotonic() - begun
    # Worker processes of the command share its group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    texts = [os.pread(fd, OUTPUT, 0).decode("utf-8", "replace") for fd in files]
    for fd in files:
        os.close(fd)
    code = os.waitstatus_to_exitcode(status)
    return Ended(
        code, texts[0], texts[1], took, (usage.ru_maxrss << 10) - inherited, late, texts[2].splitlines(), texts[3]
    )


def _child(given: Input, folder: Path, files: list[int], seconds: float, main: Callable[[], object] | None) -> NoReturn:
    code = 70
    try:
        os.setsid()  # no terminal, and a group of its own
        empty = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((empty, 0), (files[0], 1), (files[1], 2)):
            os.dup2(source, target)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(folder)
        _environment(folder, given.environment)
        _hurry()
        _streams(given.streams)
        _watch(folder, files[2])
        faulthandler.dump_traceback_later(seconds * 0.95, file=files[3])
        sys.argv = ["nemotron-fp8", *given.command]
        code = _main(main)
    finally:
        os._exit(code)


def _environment(folder: Path, changes: dict[str, str | None]) -> None:
    """Give the child an environment that leads to its own folder, and to no network."""
    keep = {key: value for key, value in os.environ.items() if key in ("PATH", "PYTHONPATH", "LANG", "LC_ALL")}
    home = str(folder / "home")
    made: dict[str, str | None] = {
        **keep,
        "HOME": home,
        "TMPDIR": str(folder / "tmp"),
        "HF_HOME": home,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **changes,
    }
    os.environ.clear()
    os.environ.update({key: value for key, value in made.items() if value is not None})
    # What these modules read when they are imported, a new process would read now.
    import tempfile

    from huggingface_hub import constants

    tempfile.tempdir = None
    constants.HF_HOME = os.environ.get("HF_HOME") or home
    constants.HF_HUB_CACHE = os.path.join(constants.HF_HOME, "hub")  # noqa: PTH118  (any text)
    constants.HF_TOKEN_PATH = os.path.join(constants.HF_HOME, "token")  # noqa: PTH118
    constants.ENDPOINT = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_DISABLE_XET = True
    constants.HF_HUB_DISABLE_PROGRESS_BARS = True


def _hurry() -> None:
    """Let the waits between the tries of a request pass at once: half an hour of them is one of the limits."""
    from huggingface_hub.utils import _http

    from nemotron_fp8._retry import SystemClock

    passed = [0.0]

    def wait(_clock: SystemClock, seconds: float, cancel: Event | None) -> None:
        passed[0] += HURRY * seconds

    SystemClock.now = lambda _clock: time.monotonic() + passed[0]  # type: ignore[method-assign]  # in this child alone
    SystemClock.wait = wait  # type: ignore[method-assign]
    quick = {**vars(time), "sleep": lambda _seconds: None}
    _http.time = SimpleNamespace(**quick)  # type: ignore[attr-defined]


def _streams(states: dict[int, str]) -> None:
    """Open standard output and error as Python does when it starts."""
    # Those that are closed come last, so that their numbers are not used again here.
    for number, state in sorted(states.items(), key=lambda item: item[1] == "closed"):
        if state == "closed":
            os.close(number)
        elif state == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        else:
            reading, writing = os.pipe()
            os.dup2(writing, number)
            os.close(writing)
            os.close(reading)
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    if os.environ.get("LC_ALL") == "C" and not encoding:
        errors = errors or "surrogateescape"
    encoding = encoding or "utf-8"
    # A closed stream is None; the number is then free, and must not become that of another file of the harness.
    sys.stdout = sys.stderr = None
    if states.get(1) != "closed":
        sys.stdout = os.fdopen(1, "w", encoding=encoding, errors=errors or "strict", closefd=False)
    if states.get(2) != "closed":
        sys.stderr = os.fdopen(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)


def _watch(folder: Path, report: int) -> None:
    """Report every path outside of the folder that is opened for writing, made or renamed."""
    home = os.path.realpath(folder)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, flags = arguments[0], arguments[2]
            if not isinstance(flags, int) or not flags & writing:
                return
        elif event in MAKERS:
            path = arguments[MAKERS[event]]
        else:
            return
        if isinstance(path, (str, bytes, os.PathLike)):
            name = os.fsdecode(path)
            if "\0" in name:
                return
            # Thousands of folders in one path would take seconds to resolve, again and again.
            resolve = os.path.realpath if len(name) < LONG else os.path.abspath
            place = os.path.join(resolve(os.path.dirname(name) or "."), os.path.basename(name))  # noqa: PTH118, PTH119, PTH120
            if event == "os.mkdir" and os.path.lexists(place):  # it fails, and the caller expects that
                return
            if not place.startswith(f"{home}/") and not place.startswith(HARMLESS):
                os.write(report, f"{event} {place!a}\n".encode())

    sys.addaudithook(hook)


def _main(main: Callable[[], object] | None) -> int:
    """Call the command and return the exit status that Python would return."""
    import traceback

    if main is None:
        from nemotron_fp8.cli.main import main
    code: object = 0
    text = ""
    try:
        main()
    except SystemExit as error:
        code = error.code
        if code is not None and not isinstance(code, int):
            text, code = f"{code}\n", 1
    except BaseException:
        text, code = traceback.format_exc(), 1
    if text and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except ValueError:  # closed by the command
            pass
        except OSError:
            code = code or 120
    return int(code or 0) & 0xFF if isinstance(code, int) else 0


def judge(given: Input, folder: Path, ended: Ended, seconds: float = SECONDS) -> list[str]:
    """Return what is wrong with how a command ended."""
    wrong = []
    if ended.late:
        wrong.append(f"took more than {seconds:g} s {_place_of(ended.where)}".rstrip())
    elif ended.code < 0:
        wrong.append(f"ended by signal {-ended.code}")
    elif ended.code not in (0, 1, 2):
        wrong.append(f"exit code {ended.code}")
    both = f"{ended.out}\n{ended.err}"
    if "Traceback (most recent call last)" in both:
        wrong.append(f"traceback: {last_of_traceback(both)}")
    if any(INTERNAL in line.lower() for line in both.splitlines()):
        wrong.append(INTERNAL)
    # Without arguments, the help is printed, with exit code 2. About a pipe that nobody reads there is no error line.
    ends_silently = given.streams.get(1) == "broken" and ended.code == 1 and f"\n{ERROR}" not in f"\n{ended.err}"
    if given.command and 2 not in given.streams and not ends_silently:
        wrong += _wrong_errors(ended)
    if ended.memory > MEMORY:
        wrong.append(f"took {ended.memory >> 20:,} MiB")
    for name, text in (("stdout", ended.out), ("stderr", ended.err)):
        longest = max(map(len, text.split("\n")))
        # One JSON object is one line, and lists what a file holds.
        if longest > LINE and (name == "stderr" or "--json" not in given.command):
            wrong.append(f"a line of {longest:,} characters on {name}")
        if found := CONTROL.search(text):
            wrong.append(f"{found.group()!a} on {name}")
    wrong += [f"outside of the folder: {line}" for line in ended.outside[:SHOWN]]
    if folder.with_name(CANARY).read_text() != CANARY:
        wrong.append("a file outside of the folder was changed through a link")
    # A result whose summary could not be printed is complete.
    if (
        given.result
        and ended.code != 0
        and not given.streams
        and given.result not in given.tree
        and os.path.lexists(folder / given.result)
    ):
        before = any(name.startswith(f"{given.result}/") for name in given.tree)
        wrong += [] if before else [f"{given.result} exists after exit code {ended.code}"]
    return wrong


def _wrong_errors(ended: Ended) -> list[str]:
    lines = ended.err.split("\n")
    while lines and not lines[-1]:
        lines.pop()
    errors = [line for line in lines if line.startswith(ERROR)]
    if ended.code == 0:
        return ["exit code 0 with an error line"] if errors else []
    if ended.code not in (1, 2) or ended.late:
        return []
    if len(errors) != 1:
        return [f"{len(errors)} error lines"]
    return [] if lines[-1] == errors[0] else ["the error line is not the last"]


def _place_of(stacks: str) -> str:
    """Return the innermost places of the product in the stacks of threads, the main thread last."""
    found = []
    for stack in stacks.split("\n\n"):
        places = re.findall(r'File "[^"]*/(nemotron_fp8/[^"]+)", line (\d+)', stack)
        found += [":".join(places[0])] if places else []
    return f"at {', '.join(found)}" if found else ""


def last_of_traceback(text: str) -> str:
    """Return the last place of the product in a traceback, and the exception."""
    places = re.findall(r'File "[^"]*/(nemotron_fp8/[^"]+)", line (\d+)', text)
    place = ":".join(places[-1]) if places else "outside of the product"
    tail = text.rpartition("Traceback (most recent call last)")[2]
    names = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Warning)\b.*", tail, re.MULTILINE)
    return f"{place} {names[-1][:160] if names else ''}"


def clean(folder: Path) -> None:
    """Remove an input's folder, whatever it holds, or a file."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return

    def allow(function: Callable[[str], object], path: str, _error: object) -> None:
        for place in (Path(path).parent, Path(path)):
            with contextlib.suppress(OSError):
                place.chmod(0o700)
        with contextlib.suppress(OSError):
            function(path)

    try:
        shutil.rmtree(folder, onerror=allow)
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # thousands of folders, one in another
        subprocess.run(["rm", "-rf", "--", str(folder)], check=True)
