"""`status_of`: it says of every run, alive or dead, what the journal says; and it changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import NemotronFp8Error, quantize_repo, status_of
from nemotron_fp8._process import ProcessRecord
from nemotron_fp8.cli.status import headline, rows
from nemotron_fp8.destinations import journal as journals
from nemotron_fp8.destinations.journal import Journal
from nemotron_fp8.destinations.lock_record import LockRecord, read_record, write_record
from nemotron_fp8.destinations.status import Finished, Pace, total_of
from nemotron_fp8.errors import EvaluationStateError, MalformedManifestError
from nemotron_fp8.errors.destination import DamagedJournalError
from nemotron_fp8.inference.state import Saved, SavedState
from tests.support.checkpoints import Shards, contents, snapshot, weight, write_checkpoint
from tests.support.doubles import HANG, wait_for
from tests.support.stops import StoppedError, changes, killed_at, stop_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8 import Progress

POINTS = 20
SHARDS = 4
NAMES = [f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(1, SHARDS + 1)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shards: Shards = {
        name: {f"model.layers.{layer}.mlp.down_proj.weight": weight(32, 64, seed=layer)}
        for layer, name in enumerate(NAMES)
    }
    return write_checkpoint(tmp_path / "source", shards)


def lines_of(path: Path) -> list[dict[str, Any]] | None:
    """The entries of a journal, read without any code of the package: None if there is no whole line."""
    if not path.exists():
        return None
    whole = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line)["entry"] for line in whole] or None


def check(folder: Path, working: Path, sizes: dict[str, int]) -> str:
    """Compare the status of a folder whose run is dead with the files; return the state."""
    before = snapshot(folder.parent)
    found = status_of(folder)
    assert snapshot(folder.parent) == before
    entries = lines_of(working / "journal.jsonl")
    done = {entry["name"]: entry["size"] for entry in entries or [] if entry["kind"] == "shard"}
    published = (folder / "nemotron_fp8.json").exists() and not (folder / "nemotron_fp8.unfinished").exists()
    if published and (entries is None or entries[-1]["kind"] == "publish"):
        wanted = "complete"
    else:
        wanted = "stopped" if working.exists() else "none"
    assert found.state == wanted
    if wanted == "complete":
        assert (found.shards_done, found.shards_left, found.bytes_done) == (SHARDS, 0, sum(sizes.values()))
    elif entries is not None:
        assert (found.shards_done, found.bytes_done) == (len(done), sum(done.values()))
        assert (found.shards_total, found.bytes_total) == (SHARDS, sum(sizes.values()))
        assert (found.shards_left, found.bytes_left) == (SHARDS - len(done), sum(sizes.values()) - sum(done.values()))
        assert found.last == max(entry["time"] for entry in entries)
        assert found.plan == entries[0]["plan"]
        assert dict(found.recipe) == entries[0]["recipe"]
        assert found.measured == (0 if done else sum(entry["kind"] == "amax" for entry in entries))
        assert "run the same command again to resume" in found.advice
    else:
        assert (found.shards_done, found.shards_total) == (0, None)
    assert not found.active
    return found.state


@pytest.mark.parametrize("in_place", [False, True], ids=["folder", "in place"])
def test_a_run_killed_at_20_points(source: Path, tmp_path: Path, in_place: bool) -> None:
    """From before the journal exists until after the publication; every state is met, and every count of shards."""
    quantize_repo(source, tmp_path / "expected", threads=1)
    sizes = {name: (tmp_path / "expected" / name).stat().st_size for name in NAMES}

    def place(number: int) -> tuple[Path, Path, Callable[[], object]]:
        home = tmp_path / f"at-{number}"
        if in_place:
            folder = shutil.copytree(source, home / "folder")
            return folder, folder / ".nemotron_fp8", lambda: quantize_repo(folder, None, in_place=True, threads=1)
        home.mkdir()
        return home / "out", home / "out.partial", lambda: quantize_repo(source, home / "out", threads=1)

    total = changes(place(0)[2])
    states: dict[str, int] = {}
    counts = set()
    for number in sorted({1 + round(step * (total - 1) / (POINTS - 1)) for step in range(POINTS)}):
        folder, working, work = place(number)
        assert killed_at(number, work)
        state = check(folder, working, sizes)
        states[state] = states.get(state, 0) + 1
        counts.add(status_of(folder).shards_done)
        work()
        assert status_of(folder).state == "complete"
    assert sum(states.values()) == POINTS
    assert {"stopped", "complete"} <= states.keys()
    assert {0, SHARDS} <= counts
    assert len(counts) >= SHARDS


HANGING = """
import sys
from pathlib import Path
from nemotron_fp8.cli.main import main
from nemotron_fp8.destinations import folder
from tests.support.doubles import HangingStaging
flag, at = Path(sys.argv.pop(1)), sys.argv.pop(1)
staging = folder.FolderDestination.staging.fget
folder.FolderDestination.staging = property(
    lambda self: HangingStaging(staging(self).folder, at, flag, digests=True)
)
main()
"""
"""The command line, with a shard that is begun and never comes to an end."""


def hanging(source: Path, tmp_path: Path, at: str) -> subprocess.Popen[str]:
    arguments = ["quantize", source, tmp_path / "out", "--threads", "1", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, tmp_path / "flag", at, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "flag", process=process)
    return process


def test_a_live_run(source: Path, tmp_path: Path) -> None:
    """Running, suspended, running, a zombie, dead; the shard that it makes is named while it is alive."""
    process = hanging(source, tmp_path, NAMES[2])
    try:
        found = status_of(tmp_path / "out")
        assert found.state == "running"
        assert found.process is not None
        assert (found.process.pid, found.process.host, found.process.suspended) == (
            process.pid,
            socket.gethostname(),
            False,
        )
        assert found.process.since is not None
        assert 0 <= time.time() - found.process.since < HANG
        assert (found.shards_done, found.shards_left, found.active) == (2, 2, (NAMES[2],))
        assert found.source == str(source)
        assert found.command.endswith(f"quantize {source} {tmp_path / 'out'} --threads 1 -q")
        assert found.bytes_per_second
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        found = status_of(tmp_path / "out")
        assert found.state == "running"
        assert found.process is not None
        assert found.process.suspended
        assert f"kill -CONT {process.pid}" in found.advice
        process.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, process.pid, os.WCONTINUED | os.WNOWAIT)
        found = status_of(tmp_path / "out")
        assert found.process is not None
        assert not found.process.suspended
    finally:
        process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for its exit code
    assert status_of(tmp_path / "out").state == "stopped"
    process.communicate(timeout=HANG)
    found = status_of(tmp_path / "out")
    assert (found.state, found.shards_done, found.active, found.error) == ("stopped", 2, (), "")
    assert found.advice == f"run the same command again to resume: {found.command}"


def test_the_end_of_a_run_is_recorded(source: Path, tmp_path: Path) -> None:
    """Also of a run in a process that lives on; with the error that stopped it."""
    with pytest.raises(StoppedError):
        quantize_repo(source, tmp_path / "out", threads=1, progress=stop_at(NAMES[1]))
    found = status_of(tmp_path / "out")
    assert found.process is not None
    assert (found.state, found.process.pid) == ("stopped", os.getpid())
    assert found.error == "StoppedError: "
    quantize_repo(source, tmp_path / "out", threads=1)
    assert status_of(tmp_path / "out").state == "complete"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


@pytest.fixture
def half(source: Path, tmp_path: Path) -> Path:
    """A destination of which two shards are finished; its working folder."""
    with pytest.raises(StoppedError):
        quantize_repo(source, tmp_path / "out", threads=1, progress=stop_at(NAMES[2]))
    return tmp_path / "out.partial"


def recorded(half: Path, **fields: object) -> None:
    """Let a lock name the process of this test, with other fields."""
    process = {**ProcessRecord.own().entry(), **{key: value for key, value in fields.items() if key != "since"}}
    record = LockRecord(ProcessRecord.parse(process), since=1.0)
    fd = os.open(half / "lock", os.O_RDWR)
    write_record(fd, record)
    os.close(fd)
    assert read_record(half / "lock") == record


OTHER_BOOT = {"boot": "0" * 8, "system": "1" * 8}
OF_PROCESSES: dict[str, tuple[dict[str, object], str]] = {
    "this process": ({}, "running"),
    "a number that another process got": ({"start": 1}, "stopped"),
    "a number that no process has": ({"pid": 2**22 + 1}, "stopped"),
    "a number that no process can have": ({"pid": 2**80}, "stopped"),
    "another host": ({"host": "elsewhere"}, "unknown"),
    "an earlier boot of this machine": ({**OTHER_BOOT, "machine": "a" * 8, "booted": 1}, "stopped"),
    "a machine of the same name": ({**OTHER_BOOT, "machine": "b" * 8, "booted": 1}, "unknown"),
    "a machine that is not recorded": ({**OTHER_BOOT, "machine": "", "booted": 1}, "unknown"),
    "a later boot of a copy of this machine": ({**OTHER_BOOT, "machine": "a" * 8, "booted": 1 << 40}, "unknown"),
    "a record without a system, of a number that no process has": ({"pid": 2**22 + 1, "system": ""}, "unknown"),
    "another namespace of this boot": ({"system": "1" * 8}, "unknown"),
    "a record without a start, of a number that is in use": ({"start": None}, "unknown"),
}


@pytest.mark.parametrize("name", OF_PROCESSES)
def test_only_the_very_process_is_called_running(
    half: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemotron_fp8._process.machine", lambda: "a" * 8)
    monkeypatch.setattr("nemotron_fp8._process.booted", lambda: 1000)
    fields, state = OF_PROCESSES[name]
    recorded(half, **fields)
    found = status_of(tmp_path / "out")
    assert (found.state, found.shards_done) == (state, 2)
    if state == "unknown":
        assert "cannot be known here" in found.advice
        assert found.idle_seconds is not None
        assert found.idle_seconds < HANG


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"pid": "1", "host": "a"}', b'{"pid": 1, "host": "a", "since": NaN}']
)
def test_a_lock_that_names_no_process(half: Path, tmp_path: Path, content: bytes) -> None:
    (half / "lock").write_bytes(content)
    found = status_of(tmp_path / "out")
    assert (found.state, found.process, found.shards_done) == ("unknown", None, 2)
    assert "its process is not recorded" in found.advice


def test_a_lock_that_is_held(half: Path, tmp_path: Path) -> None:
    """It is not asked for, so that neither waits for the other."""
    import fcntl

    with (half / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert status_of(tmp_path / "out").shards_done == 2


def test_a_journal_at_every_length(half: Path, tmp_path: Path) -> None:
    """A run is appending: a line that is not complete does not count yet."""
    path = half / "journal.jsonl"
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 97), len(whole) - 1, len(whole)):
        path.write_bytes(whole[:length])
        entries = lines_of(path)
        found = status_of(tmp_path / "out")
        assert found.shards_done == sum(entry["kind"] == "shard" for entry in entries or [])
        assert (found.shards_total is None) == (entries is None)
        assert path.read_bytes() == whole[:length]


def rewritten(half: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Write the journal anew with other entries, under checksums that fit."""
    path = half / "journal.jsonl"
    entries = [changed for entry in lines_of(path) or [] if (changed := change(entry)) is not None]
    path.unlink()
    journal = Journal.create(path, half / "new", entries[0])
    for entry in entries[1:]:
        journal.append(entry)
    journal.close()


def old(entry: dict[str, Any]) -> dict[str, Any] | None:
    """An entry as it was written before the journal had times."""
    return None if entry["kind"] == "run" else {k: v for k, v in entry.items() if k not in ("time", "from", "shards")}


def test_a_journal_without_times(source: Path, half: Path, tmp_path: Path) -> None:
    """Fields that it lacks are unknown, and the same command resumes from it."""
    rewritten(half, old)
    (half / "lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    found = status_of(tmp_path / "out")
    assert (found.state, found.shards_done, found.shards_total, found.bytes_total) == ("unknown", 2, SHARDS, None)
    assert (found.bytes_per_second, found.seconds_left) == (None, None)
    assert found.last == pytest.approx((half / "journal.jsonl").stat().st_mtime)
    assert quantize_repo(source, tmp_path / "out", threads=1).resumed == 2
    quantize_repo(source, tmp_path / "straight", threads=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_the_speed_is_that_of_the_newest_run(source: Path, half: Path, tmp_path: Path) -> None:
    """From the times of its entries; an earlier run and the pause after it do not count."""
    with pytest.raises(StoppedError):
        quantize_repo(source, tmp_path / "out", threads=1, progress=stop_at(NAMES[3]))
    times = iter([1000.0, 1010.0, 1020.0, 5000.0, 5004.0])
    rewritten(half, lambda entry: {**entry, "time": next(times)})
    found = status_of(tmp_path / "out")
    sizes = [entry["size"] for entry in lines_of(half / "journal.jsonl") or [] if entry["kind"] == "shard"]
    assert len(sizes) == 3
    assert found.seconds == 4.0
    assert found.bytes_per_second == found.recent_bytes_per_second == pytest.approx(sizes[2] / 4)
    assert found.bytes_left is not None
    assert found.seconds_left == pytest.approx(found.bytes_left / (sizes[2] / 4))


def test_pace() -> None:
    shards = [Finished(str(number), 100 * number, 10.0 + number**2) for number in range(1, 13)]
    pace = Pace.of(10.0, shards)
    assert pace.seconds == 144.0
    assert pace.bytes_per_second == pytest.approx(sum(100 * n for n in range(1, 13)) / 144)
    assert pace.recent == pytest.approx(sum(100 * n for n in range(5, 13)) / (144 - 16))
    assert pace.recent is not None
    assert pace.left(3, 1000, None) == pytest.approx(1000 / pace.recent)
    assert pace.left(3, 1000, 5.0) == pytest.approx(1000 / pace.recent - 5)
    assert pace.left(3, 1000, 1e6) == 0.0
    assert pace.left(16, None, None) == pytest.approx(16 / (8 / 128))
    back = [Finished("a", 1, 20.0), Finished("b", 1, 19.0)]  # a clock was set back
    for start, finished in ((None, shards), (10.0, []), (10.0, back), (10.0, [Finished("a", 1)])):
        assert Pace.of(start, finished) == Pace()
    assert Pace().left(1, 1, None) is None
    assert total_of(NAMES) == SHARDS
    assert total_of(["model.safetensors"]) is None
    assert total_of(["a-1-of-2.safetensors", "a-1-of-3.safetensors"]) is None


WRONG: dict[str, dict[str, Any]] = {
    "a time that is a text": {"time": "now"},
    "a time before all clocks": {"time": -1},
    "a time after all clocks": {"time": 1e300},
    "a name that leaves the folder": {"name": "../../x", "shards": {"../x": 1}},
    "a size that is a text": {"size": "1", "shards": {"a": "1"}},
    "a size below zero": {"size": -1, "shards": {"a": -1}},
    "shards that are a list": {"shards": [1], "kind": ["shard"]},
    "a source that is a list": {"from": [], "recoded": [[[]]]},
}


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("name", WRONG)
def test_a_hostile_journal(half: Path, tmp_path: Path, name: str, where: str) -> None:
    """Whole lines with right checksums, whose values are wrong."""
    wrong = WRONG[name]
    picked = {"first": "terms", "last": "shard"}[where]
    if where == "last" and name == "shards that are a list":
        wrong = {"stats": 3}
    if where == "last" and name == "a name that leaves the folder":
        wrong = {"name": 3}
    rewritten(half, lambda entry: {**entry, **wrong} if entry["kind"] == picked else entry)
    before = snapshot(tmp_path)
    with pytest.raises(DamagedJournalError, match=r"line \d is damaged"):
        status_of(tmp_path / "out")
    assert snapshot(tmp_path) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
KEYS = (
    "kind",
    "name",
    "size",
    "time",
    "sha256",
    "shards",
    "from",
    "saved",
    "side",
    "source",
    "recipe",
    "manifest",
    "kept",
)


@given(data=st.data())
def test_any_values_in_a_journal(half: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Under right checksums: a state, or an error of ours; and what is returned can be printed."""
    path = half / "journal.jsonl"
    if not (half / "kept").exists():
        (half / "kept").write_bytes(path.read_bytes())
    path.write_bytes((half / "kept").read_bytes())

    def change(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | data.draw(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2))

    rewritten(half, change)
    with suppress(NemotronFp8Error):
        found = status_of(tmp_path / "out")
        assert json.loads(json.dumps(found.as_dict()))["state"] in ("stopped", "unknown")
        assert all(isinstance(line, tuple) for line in rows(found))
        assert repr(found)


@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_in_a_lock(half: Path, tmp_path: Path, data: bytes) -> None:
    (half / "lock").write_bytes(data)
    assert status_of(tmp_path / "out").shards_done == 2


@given(
    fields=st.dictionaries(st.sampled_from(("pid", "host", "system", "boot", "start", "since", "ended", "error")), JSON)
)
def test_any_values_in_a_lock(half: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    (half / "lock").write_text(json.dumps(LockRecord.begun().entry() | fields))
    found = status_of(tmp_path / "out")
    assert found.shards_done == 2
    assert found.state in ("running", "stopped", "unknown")
    assert headline(found)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def listening(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [pipe, link, listening, folder, flipped])
def test_a_damaged_journal(half: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(half / "journal.jsonl")
    with pytest.raises(DamagedJournalError):
        status_of(tmp_path / "out")


def test_a_journal_that_is_too_large(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_BYTES", 100)
    with pytest.raises(DamagedJournalError, match="the limit is 100"):
        status_of(tmp_path / "out")


def test_in_place_without_a_journal(source: Path) -> None:
    """Shards may be replaced, and nothing says which."""
    path = source / ".nemotron_fp8" / "journal.jsonl"

    def stop(_progress: Progress) -> None:
        if any(entry["kind"] == "shard" for entry in lines_of(path) or []):
            raise StoppedError

    with pytest.raises(StoppedError):
        quantize_repo(source, None, in_place=True, threads=1, progress=stop)
    found = status_of(source)
    assert (found.kind, found.state, found.shards_done, found.shards_total) == ("in-place", "stopped", 1, SHARDS)
    path.unlink()
    with pytest.raises(DamagedJournalError, match="is missing"):
        status_of(source)


def test_a_working_folder_by_its_own_name(half: Path, tmp_path: Path) -> None:
    assert status_of(half).shards_done == status_of(tmp_path / "out").shards_done == 2


def test_what_a_resumed_run_will_find(half: Path, tmp_path: Path) -> None:
    (half / "out" / NAMES[0]).unlink()
    found = status_of(tmp_path / "out")
    assert found.shards_done == 2
    assert found.notices == ("1 finished shards are missing or have another size, and will be made again",)


def test_a_result_that_is_being_replaced(source: Path, tmp_path: Path) -> None:
    quantize_repo(source, tmp_path / "out", threads=1)
    with pytest.raises(StoppedError):
        quantize_repo(source, tmp_path / "other", threads=1, progress=stop_at(NAMES[1]))
    (tmp_path / "other.partial").rename(tmp_path / "out.partial")
    found = status_of(tmp_path / "out")
    assert (found.state, found.shards_done) == ("stopped", 1)
    assert found.notices == ("out holds another result until this one is published",)


def test_no_conversion(source: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", source, source / "config.json", tmp_path / "missing" / "below"):
        found = status_of(path)
        assert (found.state, found.kind, found.shards_done) == ("none", "", 0)
        assert found.advice


def test_a_result(source: Path, tmp_path: Path) -> None:
    quantize_repo(source, tmp_path / "out", threads=1)
    found = status_of(tmp_path / "out")
    assert (found.kind, found.state, found.shards_done, found.shards_total) == ("folder", "complete", SHARDS, SHARDS)
    assert found.bytes_done == sum((tmp_path / "out" / name).stat().st_size for name in NAMES)
    (tmp_path / "out" / NAMES[0]).write_bytes(b"")
    assert status_of(tmp_path / "out").notices
    (tmp_path / "out" / "nemotron_fp8.json").write_text("{")
    with pytest.raises(MalformedManifestError):
        status_of(tmp_path / "out")


def test_the_saved_state_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "state"
    hidden = torch.zeros(1, 2, 3)
    with SavedState(folder, "id") as state:
        found = status_of(folder)
        assert (found.kind, found.state, found.shards_done, found.shards_total) == ("evaluation", "running", 0, None)
        monkeypatch.setattr("nemotron_fp8.inference.state.now", lambda: state._begun + 20)
        state.save(hidden, Saved(2), 10)
        found = status_of(folder)
        assert (found.state, found.shards_done, found.shards_total, found.shards_left) == ("running", 2, 10, 8)
        assert found.seconds == pytest.approx(20)
    found = status_of(folder)
    assert (found.state, found.shards_done, found.process and found.process.pid) == ("stopped", 2, os.getpid())
    assert found.seconds_left == pytest.approx(80)
    path = folder / "out" / "state.json"
    for text in ("{", '{"schema": 2, "layers": -1}', '{"schema": 2, "layers": 1, "of": "x"}', '{"schema": 1}'):
        path.write_text(text)
        with pytest.raises(EvaluationStateError):
            status_of(folder)


@pytest.mark.parametrize("destination", [3, b"bytes", None, ""])
def test_wrong_arguments(destination: Any) -> None:
    with pytest.raises(NemotronFp8Error, match="destination is"):
        status_of(destination)


def test_the_record_is_json(half: Path, tmp_path: Path) -> None:
    found = status_of(tmp_path / "out")
    value = json.loads(json.dumps(found.as_dict()))
    assert value["shards_left"] == found.shards_left == 2
    assert value["process"]["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'{"sum":"0'])
def test_a_journal_without_an_entry_is_not_called_absent(half: Path, tmp_path: Path, content: bytes) -> None:
    (half / "journal.jsonl").write_bytes(content)
    (notice,) = status_of(tmp_path / "out").notices
    assert notice.startswith(f"the journal ({len(content)} bytes) has no complete entry")
    (half / "journal.jsonl").unlink()
    assert status_of(tmp_path / "out").notices == ("the journal does not exist yet",)


def test_a_time_in_the_future_makes_no_figures(half: Path, tmp_path: Path) -> None:
    """The clock of another machine may be wrong by years; one of a shared disk differs by seconds."""
    rewritten(half, lambda entry: {**entry, "time": time.time() + (1e8 if entry["kind"] == "shard" else -10)})
    found = status_of(tmp_path / "out")
    assert (found.bytes_per_second, found.recent_bytes_per_second, found.seconds_left) == (None, None, None)
    assert "a clock is wrong" in " ".join(found.notices)
    rewritten(half, lambda entry: {**entry, "time": time.time() + (5 if entry["kind"] == "shard" else -10)})
    assert status_of(tmp_path / "out").bytes_per_second


def again(half: Path, **fields: object) -> str:
    """The advice for a run that was killed, with other fields in its record."""
    entry = {**LockRecord.begun().entry(), "pid": 2**22 + 1, "command": "nemotron-fp8 quantize a b", **fields}
    (half / "lock").write_text(json.dumps(entry))
    found = status_of(half.with_name("out"))
    assert found.state == "stopped"
    return found.advice


def test_the_advised_command_is_complete_and_discards_nothing(half: Path) -> None:
    """Folder and variables are those of the run; an old record has none of them."""
    resume = "run the same command again to resume: "
    assert again(half) == f"{resume}nemotron-fp8 quantize a b"
    variables = {"NEMOTRON_FP8_GRANULARITY": "tensor", "NEMOTRON_FP8_EXCLUDE": "a b", "NEMOTRON_FP8_RESTART": "1"}
    settings = "NEMOTRON_FP8_GRANULARITY=tensor NEMOTRON_FP8_EXCLUDE='a b'"
    assert again(half, folder="/the place", variables=variables) == (
        f"{resume}cd '/the place' && {settings} nemotron-fp8 quantize a b"
    )
    assert again(half, folder=str(Path.cwd())) == f"{resume}nemotron-fp8 quantize a b"
    assert again(half, command="nemotron-fp8 quantize a b --restart -q") == (
        "run the same command again, without --restart, to resume: nemotron-fp8 quantize a b -q"
    )


@pytest.mark.parametrize(
    "fields",
    [
        *({"command": line} for line in ("rm -rf a", "nemotron-fp8 a; rm b", "nemotron-fp8 'a", "nemotron-fp8 $(a)")),
        *({"command": "", "variables": value} for value in (1, [], {"A": "b"}, {"NEMOTRON_FP8_A": 1})),
        {"command": "", "variables": {"NEMOTRON_FP8_A; rm b": "1"}},
    ],
)
def test_a_record_of_another_program_is_no_command(half: Path, fields: dict[str, object]) -> None:
    assert again(half, **fields) == "run the same command again to resume"


def test_a_recorded_secret_is_not_shown(half: Path) -> None:
    """Also not that of a record which an older version wrote."""
    secret = "canary/0123"
    shown = again(half, command=f"nemotron-fp8 quantize s3://key:{secret}@bucket/a b")
    assert shown.endswith("nemotron-fp8 quantize s3://...@bucket/a b")
    assert secret not in repr(status_of(half.with_name("out")).as_dict())
