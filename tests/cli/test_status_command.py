"""``nemotron-fp8 status``: what a person and a script see."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo
from nemotron_fp8.cli.main import main
from nemotron_fp8.cli.status import headline, rows
from nemotron_fp8.destinations.status import RunProcess, Status
from tests.support.stops import SECOND, StoppedError, stop_at

if TYPE_CHECKING:
    from pathlib import Path


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, list[str]]:
    """Run the command here; return its exit code, stdout and the lines of stderr."""
    monkeypatch.setattr("sys.argv", ["nemotron-fp8", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_a_stopped_run(
    checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, destination, threads=1, progress=stop_at(SECOND))
    code, out, err = run(monkeypatch, capsys, "status", destination)
    assert (code, err) == (0, [])
    lines = out.splitlines()
    assert re.fullmatch(rf"{destination}: stopped \(process \d+ on \S+ has ended\)", lines[0])
    shown = {line[2:14].strip(): line[14:] for line in lines[1:]}
    assert shown["shards"] == "1 of 2 done, 1 left"
    assert re.fullmatch(r"[\d.]+ KiB of [\d.]+ KiB done, [\d.]+ KiB left", shown["bytes"])
    assert "granularity channel" in shown["recipe"]
    assert shown["source"] == str(checkpoint)
    assert shown["error"] == "StoppedError: "
    assert shown["next"] == "run the same command again to resume"
    assert re.fullmatch(r"\d+:\d\d ago, at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", shown["last entry"])
    code, out, err = run(monkeypatch, capsys, "status", destination, "--json")
    value = json.loads(out)
    assert (code, err, value["state"], value["shards_done"], value["shards_left"]) == (0, [], "stopped", 1, 1)


def test_the_advice_for_a_command_repeats_its_settings(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a relative name, with a variable of the environment, and with --restart, which would discard the work."""
    import nemotron_fp8.destinations.folder as module

    def fail(*_: object, **__: object) -> None:
        raise StoppedError

    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("NEMOTRON_FP8_GRANULARITY", "tensor")
    monkeypatch.setenv("NEMOTRON_FP8_TRACEBACK", "1")  # no option
    monkeypatch.setattr(module.FolderDestination, "publish", fail)
    with pytest.raises(StoppedError):
        run(monkeypatch, capsys, "quantize", checkpoint, "out", "--restart", "-q")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEMOTRON_FP8_GRANULARITY")
    _, out, _ = run(monkeypatch, capsys, "status", "place/out")
    (advice,) = [line[14:] for line in out.splitlines() if line.startswith("  next")]
    line = f"cd {tmp_path / 'place'} && NEMOTRON_FP8_GRANULARITY=tensor nemotron-fp8 quantize {checkpoint} out -q"
    assert advice == f"run the same command again, without --restart, to resume: {line}"


def test_a_damaged_journal_is_one_line(
    checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, destination, threads=1, progress=stop_at(SECOND))
    journal = destination.with_name("result.partial") / "journal.jsonl"
    journal.write_bytes(b"x" + journal.read_bytes())
    code, out, err = run(monkeypatch, capsys, "status", destination)
    assert (code, out) == (1, "")
    assert err == [f"error: {journal}: line 1 is damaged; discard it and start over with --restart (restart=True)"]


def test_no_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(monkeypatch, capsys, "status", tmp_path / "missing")
    assert (code, out.splitlines()[0]) == (0, f"{tmp_path / 'missing'}: no conversion")


@pytest.mark.parametrize(
    ("status", "first", "contained"),
    [
        (
            Status(
                "out", "folder", "running", RunProcess(7, "vm", 0.0), active=("a.safetensors",), seconds_left=3700.0
            ),
            "running, by process 7 on vm since 1970-01-01 00:00:00 UTC",
            [("now", "a.safetensors"), ("time left", "about 1:01:40")],
        ),
        (Status("out", "folder", "running", RunProcess(7, "vm", None, True)), "suspended, by process 7 on vm", []),
        (
            Status("out", "folder", "unknown", bytes_done=2048, bytes_total=4096, bytes_per_second=1024.0),
            "unfinished",
            [("bytes", "2.0 KiB of 4.0 KiB done, 2.0 KiB left"), ("speed", "1.0 KiB/s over this run")],
        ),
        (
            Status("out", "hub", "unknown", shards_done=3),
            "unfinished",
            [("shards", "3 done; how many there will be is not recorded")],
        ),
        (
            Status("s", "evaluation", "stopped", shards_done=3, shards_total=9, seconds_left=9.0),
            "stopped",
            [("layers", "3 of 9 done, 6 left"), ("time left", "about 0:09 once it is resumed")],
        ),
        (
            Status("out", "in-place", "running", measured=2, shards_total=5),
            "running",
            [("measured", "2 shards, before the first is replaced")],
        ),
    ],
)
def test_lines(status: Status, first: str, contained: list[tuple[str, str]]) -> None:
    assert headline(status) == first
    found = list(rows(status))
    for row in contained:
        assert row in found
