"""SIGTERM and Ctrl-C: the command ends within ten seconds whatever it does, and says how to go on.

The Hub is in tests/hub/test_stops.py, a cluster in tests/cluster, evaluation and calibration in tests/inference.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import _process, quantize_repo, status_of
from nemotron_fp8._utils import parallel_for, shut_down
from nemotron_fp8.checkpoint.local_files import FileDigest, check_files
from nemotron_fp8.cli.main import main
from tests.support.checkpoints import Shards, contents, weight, write_checkpoint
from tests.support.doubles import wait_for
from tests.support.ends import MAIN, Command

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

FIRST, SECOND = (f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shards: Shards = {
        FIRST: {"model.layers.0.mlp.down_proj.weight": weight(96, 256)},
        SECOND: {"model.layers.1.mlp.down_proj.weight": weight(96, 256, seed=2)},
    }
    return write_checkpoint(tmp_path / "source", shards)


HANG = """
import sys, threading
from pathlib import Path
from nemotron_fp8.destinations import folder
from tests.support.doubles import HangingStaging
flag = Path(sys.argv.pop(1))
staging = folder.FolderDestination.staging.fget
folder.FolderDestination.staging = property(
    lambda self: HangingStaging(staging(self).folder, "model-00002-of-00002.safetensors", flag, digests=True)
)
"""
"""The second shard is begun and never comes to an end."""
WORKERS = """
from nemotron_fp8.engines import devices
devices.resolve_devices = lambda name: ("cpu", "cpu")
"""
"""Two worker processes, as for two devices."""
SHORT = """
from nemotron_fp8.cli import signals
signals.STOP_SECONDS = 1.0
"""
"""The clean stop has one second, to save time."""
IN_C = """
import ctypes, sys
from pathlib import Path
from nemotron_fp8.conversion import shard
from tests.support.doubles import announce
flag = Path(sys.argv.pop(1))
def hang(*arguments):
    announce(flag)
    every = (ctypes.c_ulong * 16)(*[2**64 - 1] * 16)
    libc = ctypes.CDLL(None)
    libc.pthread_sigmask(0, every, None)
    libc.sleep(100)
shard.make_shard = hang
"""
"""The main thread is in a call of C code that no signal interrupts; other threads run."""
STUCK = """
import sys, time
from pathlib import Path
from nemotron_fp8.destinations import partial_folder
from tests.support.doubles import announce
stuck = Path(sys.argv.pop(1))
discard_work = partial_folder.PartialFolder.discard_work
def hang(self):
    announce(stuck)
    while True:
        time.sleep(100)
partial_folder.PartialFolder.discard_work = hang
"""
"""The clean stop itself never comes to an end."""


def begun(source: Path, tmp_path: Path, program: str, *more: object, env: Mapping[str, str] | None = None) -> Command:
    """A conversion that has finished its first shard, and hangs in the second."""
    flag = tmp_path / "flag"
    command = Command.start(
        flag, *more, "quantize", source, tmp_path / "out", "-q", "--threads", "1", program=program, env=env
    )
    wait_for(flag, process=command.process)
    return command


def resumes(source: Path, tmp_path: Path) -> None:
    """The status says that the run was stopped, and the same command makes the same bytes."""
    found = status_of(tmp_path / "out")
    assert (found.state, found.shards_total) == ("stopped", 2)
    report = quantize_repo(source, tmp_path / "out", threads=1)
    assert report.resumed == found.shards_done
    quantize_repo(source, tmp_path / "expected", threads=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not (tmp_path / "out.partial").exists()


SLOW = pytest.mark.faults
"""Variants that are left to `make test-faults`: each starts two or more processes."""


@pytest.mark.parametrize(
    ("number", "group"),
    [
        pytest.param(signal.SIGTERM, True, id="SIGTERM to the whole group"),
        pytest.param(signal.SIGTERM, False, id="SIGTERM", marks=SLOW),
        pytest.param(signal.SIGINT, True, id="Ctrl-C", marks=SLOW),
        pytest.param(signal.SIGHUP, True, id="SIGHUP to the whole group", marks=SLOW),
    ],
)
def test_worker_processes(source: Path, tmp_path: Path, number: signal.Signals, group: bool) -> None:
    """They end with their parent, also when every process gets the signal; nothing says that a worker died."""
    command = begun(source, tmp_path, WORKERS + HANG + MAIN)
    assert command.end(number, group=group) < 5
    resumes(source, tmp_path)


def test_a_call_that_no_signal_interrupts(source: Path, tmp_path: Path) -> None:
    """The clean stop has its time, one second here; then the process ends anyway."""
    watched = {"NEMOTRON_FP8_LOG_JSON": str(tmp_path / "log"), "NEMOTRON_FP8_METRICS": str(tmp_path / "x.prom")}
    command = begun(source, tmp_path, SHORT + IN_C + MAIN, env=watched)
    assert 1.0 <= command.end() < 5
    # Whoever watches the command learns of its end, too.
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert (last["event"], last["exit"]) == ("command.ended", 143)
    assert last["text"] == "terminated by SIGTERM; run the same command again to resume"
    assert 'state="interrupted"} 1\n' in (tmp_path / "x.prom").read_text()
    resumes(source, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_a_second_signal_ends_at_once(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = begun(source, tmp_path, HANG + STUCK + MAIN, tmp_path / "stuck")
    assert command.end(number, again=1.0) < 4
    resumes(source, tmp_path)


@SLOW
def test_a_stop_that_never_ends(source: Path, tmp_path: Path) -> None:
    command = begun(source, tmp_path, SHORT + HANG + STUCK + MAIN, tmp_path / "stuck")
    assert 1.0 <= command.end() < 5
    resumes(source, tmp_path)


def test_a_burst_is_one_signal(source: Path, tmp_path: Path) -> None:
    """`timeout` sends SIGTERM to the process, and then to its group: the stop is still clean."""
    command = begun(source, tmp_path, HANG + MAIN)
    command.end(again=0.05)
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == ["journal.jsonl", "lock", "out"]
    assert status_of(tmp_path / "out").error == "interrupted"
    resumes(source, tmp_path)


@pytest.fixture
def told() -> Iterator[threading.Event]:
    """The event that tells the threads of a command to stop."""
    yield _process.stopping
    _process.stopping.clear()


def test_files_that_are_hashed(tmp_path: Path, told: threading.Event) -> None:
    """A resumed run hashes finished shards of gigabytes, several at a time: each stops within a piece."""
    for name in "ab":
        with (tmp_path / name).open("wb") as file:
            file.truncate(64 << 30)
    files = {name: FileDigest(64 << 30, "0" * 64) for name in "ab"}
    threading.Timer(0.2, told.set).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        check_files(tmp_path, files, 2)
    assert time.monotonic() - begun < 5


def test_threads_begin_no_further_job(told: threading.Event) -> None:
    done = []

    def work(job: int) -> None:
        done.append(job)
        if job == 3:
            told.set()

    with pytest.raises(KeyboardInterrupt):
        parallel_for(1, range(10), work)
    assert done == [0, 1, 2, 3]


def test_a_thread_that_waits_for_a_server(told: threading.Event) -> None:
    answer = threading.Event()
    pool = ThreadPoolExecutor(1)
    waiting = pool.submit(answer.wait)
    pending = pool.submit(answer.wait)
    told.set()
    begun = time.monotonic()
    shut_down(pool)
    assert 1 < time.monotonic() - begun < 6
    assert pending.cancelled()
    answer.set()
    assert waiting.result()


def test_a_program_that_calls_the_command_keeps_its_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr("sys.argv", ["nemotron-fp8", "--version"])
    main()
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_library_leaves_the_signals_of_a_program_alone(source: Path, tmp_path: Path) -> None:
    """In the main thread and in another one; whoever embeds it decides what SIGTERM does."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    quantize_repo(source, tmp_path / "out")
    thread = threading.Thread(target=quantize_repo, args=(source, tmp_path / "other"))
    thread.start()
    thread.join()
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
    assert not _process.stopping.is_set()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(numbers) == set()
