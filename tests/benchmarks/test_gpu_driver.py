"""Driver of the GPU run: a stage that hangs, crashes, floods or prints garbage leaves the results of the others."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import packed
from benchmarks.gpu import wheels
from benchmarks.gpu.__main__ import main, scratch_folder
from benchmarks.gpu.driver import Driver
from benchmarks.gpu.lines import LINES, MODE, NO_DEVICE, problems, read
from benchmarks.gpu.plan import Stage, stages
from benchmarks.gpu.run import Run
from benchmarks.gpu.stage import STEPS

FAKE = f"""
import json, os, signal, subprocess, sys, time
stage, job = sys.argv[1], (sys.argv[2:] or [""])[0]
pipe = int(os.environ[{LINES!r}])
def emit(**fields): os.write(pipe, (json.dumps(fields) + "\\n").encode())
if stage == "environment": emit(case="environment", torch="1.2", mode="x")
emit(check=stage + job, compared=1, different=0)
if stage == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if stage == "wait": time.sleep(60)
if stage == "crash": os.kill(os.getpid(), signal.SIGSEGV)
if stage == "child":
    # A child in another group keeps both pipes open.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(5)"], pass_fds=(pipe,), start_new_session=True)
if stage == "garbage":
    os.write(pipe, b"\\xff\\x00 no line\\n[1, 2]\\n" + json.dumps(dict(case=1)).encode() + b"\\n" + b"x" * 200_000)
if stage == "flood":
    for _ in range(200): os.write(1, b"y" * 65536)
if stage == "tests":
    for number in range(3): emit(check="t", test=str(number), outcome="failed" if number == 2 else "passed")
if stage == "nodevice": sys.exit({NO_DEVICE})
if stage == "cut": os.write(pipe, b'{{"case": "half')
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.driver.GRACE_SECONDS", 0.3)
    monkeypatch.setattr("benchmarks.gpu.driver.PIPE_SECONDS", 0.3)


def driver(folder: Path, limit: float = 60.0, cores: int = 4) -> Driver:
    return Driver(folder, limit, "dry", {}, cores, command=(sys.executable, "-S", "-c", FAKE))


def test_a_broken_stage_leaves_the_results_of_the_others(tmp_path: Path) -> None:
    """All at the same time; the circumstances of the first stage are in every later line."""
    names = ["hang", "crash", "child", "garbage", "flood", "tests", "cut"]
    broken = driver(tmp_path / "out", cores=8)
    limits = {name: 2.0 if name == "hang" else 30.0 for name in names}
    together = [Stage(name, limits[name], beside=name != "hang") for name in names]
    broken.run([Stage("environment", 30), *together, Stage("last", 60)])
    lines = read(tmp_path / "out" / "results.jsonl")
    assert lines == broken.results.lines
    for name in [*names, "last"]:
        own = [line for line in lines if line["stage"] == name]
        assert {"check": name, "compared": 1, "different": 0}.items() <= own[0].items()
        assert own[0]["torch"] == "1.2"
        assert any(line.get("case") == "exit" for line in own)
    codes = {line["stage"]: line["code"] for line in lines if line.get("case") == "exit"}
    assert codes["hang"] == -signal.SIGKILL
    assert codes["crash"] == -signal.SIGSEGV
    assert codes["child"] == codes["flood"] == codes["last"] == 0
    found = problems(lines, ["environment", *names, "last"])
    assert sorted(problem.partition(":")[0] for problem in found) == [
        "crash",
        "cut",
        "garbage",
        "hang",
        "hang",
        "tests",
    ]
    counts = [line for line in lines if line["stage"] == "tests" and "passed" in line]
    assert (counts[0]["passed"], counts[0]["failed"], counts[0]["skipped"]) == (2, 1, 0)
    log = (tmp_path / "out" / "log.txt").read_bytes()
    assert b"y\n...\ny" in log
    assert len(log) < 200_000


def test_no_stage_starts_without_time(tmp_path: Path) -> None:
    late = driver(tmp_path, limit=3.0)
    started = time.monotonic()
    late.run([Stage("hang", 60)])
    assert time.monotonic() - started < 2
    assert problems(late.results.lines, ["hang"]) == ["hang: no report"]


def test_a_request_to_end_leaves_the_results(tmp_path: Path) -> None:
    stopped = driver(tmp_path)
    timer = threading.Timer(0.7, stopped.stop)
    timer.start()
    started = time.monotonic()
    stopped.run([Stage("one", 60), Stage("wait", 60), Stage("last", 60)])
    timer.join()
    assert 0.7 <= time.monotonic() - started < 10
    assert stopped.results.lines == read(tmp_path / "results.jsonl")
    codes = {line["stage"]: line["code"] for line in stopped.results.lines if line.get("case") == "exit"}
    assert codes == {"one": 0, "wait": -signal.SIGTERM}
    assert [line["case"] for line in stopped.results.lines if line["stage"] == "last"] == ["skipped"]


def test_without_a_device_the_other_stages_do_not_start(tmp_path: Path) -> None:
    missing = driver(tmp_path)
    missing.run([Stage("nodevice", 60), Stage("last", 60)])
    assert {line["stage"] for line in missing.results.lines} == {"nodevice"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines that cannot be written are printed, and the run goes on."""
    for name in ("results.jsonl", "log.txt"):
        (tmp_path / name).symlink_to("/dev/full")
    full = driver(tmp_path)
    full.run([Stage("one", 60), Stage("two", 60)])
    printed = capsys.readouterr().out
    assert "results cannot be written" in printed
    assert "log cannot be written" in printed
    found = [json.loads(text) for text in printed.splitlines() if text.startswith("{")]
    assert found == full.results.lines
    assert {line["stage"] for line in found} == {"one", "two"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = driver(tmp_path / "file" / "out")
    blocked.run([Stage("one", 60)])
    assert problems(blocked.results.lines, ["one"]) == []


def test_every_stage_of_the_plan_has_a_module() -> None:
    folder = Path(main.__code__.co_filename).with_name("steps")
    for mode in ("device", "dry", "until-launch"):
        planned = stages(16, mode)
        assert [stage.name for stage in planned] == list(STEPS)
        assert all(stage.beside for stage in planned[2:]) == (mode != "device")
    assert {path.stem for path in folder.glob("*.py")} == set(STEPS.values())
    timed = [stage.seconds for stage in stages(16, "device") if not stage.beside]
    assert sum(timed) <= 540 + 40  # the first stage needs a few seconds of its 40


def test_missing_packages_are_unpacked_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that are there are left alone; a wheel that is none is told."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("no_such_package-1.0-py3-none-any.whl", "pytest-0.1-py3-none-any.whl"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(name.partition("-")[0] + ".py", "there = True")
    (folder / "no_such_wheel-1.0-py3-none-any.whl").write_text("no archive")
    assert [path.name.partition("-")[0] for path in wheels.missing(folder)] == ["no_such_package", "no_such_wheel"]
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert wheels.install(tmp_path / "site", folder) == tmp_path / "site"
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["no_such_package.py"]
    assert wheels.install(tmp_path / "none", tmp_path / "empty") is None


def test_temporary_files_go_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = tempfile.mkdtemp

    def full(prefix: str, dir: object) -> str:
        if dir != tmp_path:
            raise OSError("no space left on device")
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with scratch_folder(tmp_path) as folder:
        assert Path(folder).parent == tmp_path
    assert not Path(folder).exists()
    with pytest.raises(SystemExit, match="no space left"), scratch_folder(tmp_path / "none"):
        pass


def test_a_stage_without_its_packages_tells_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.gpu import stage
    from benchmarks.gpu.steps import tests

    monkeypatch.setenv(MODE, "dry")
    monkeypatch.setattr(Run, "prepare", lambda _run: None)
    monkeypatch.setattr(tests.importlib.util, "find_spec", lambda _name: None)
    stage.main(["tests-gpu"])
    assert json.loads(capsys.readouterr().out) == {"case": "missing", "package": "pytest", "needed": True}
    monkeypatch.setitem(stage.STEPS, "kernels", "no_such_module")
    with pytest.raises(ModuleNotFoundError):
        stage.main(["kernels"])
    assert "ModuleNotFoundError: No module named" in json.loads(capsys.readouterr().out)["error"]


def test_the_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "ROOT", tmp_path)
    monkeypatch.setattr(packed, "FOLDER", tmp_path / ".gpu")
    monkeypatch.setattr(packed, "RECORD", tmp_path / ".gpu" / "commit.json")
    assert packed.commit() == "unknown"
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "a.py"
    source.write_text("1")
    packed.write("0123456789ab")
    assert packed.commit() == "0123456789ab"
    source.write_text("2")
    assert packed.commit() == "0123456789ab+changes"
    packed.RECORD.write_text("[]")
    assert packed.commit() == "unknown"


def test_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import common

    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(packed, "commit", lambda: "0123456789ab")
    assert common.machine("cpu")["commit"] == "0123456789ab"
