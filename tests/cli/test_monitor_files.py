"""Files for log and metrics that would harm another file are refused; failing ones are noted once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemotron_fp8.cli.main import main
from tests.support.checkpoints import contents


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["nemotron-fp8", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_files_that_are_refused(
    checkpoint: Path,
    destination: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is written: neither the file, nor a result, nor the other file of the command."""
    before = contents(checkpoint)
    (tmp_path / "link").symlink_to(checkpoint / "config.json")
    (tmp_path / "folder").symlink_to(checkpoint)
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "mine.prom").write_text("# HELP other_metric x\n")
    os.mkfifo(tmp_path / "pipe.prom")
    shard = next(checkpoint.glob("*.safetensors"))
    inside = "a source or destination of the command"
    for option, name, problem in (
        *(("--log-json", path, inside) for path in (shard, checkpoint / "config.json", checkpoint / "new")),
        *(("--log-json", tmp_path / name, inside) for name in ("link", "folder/new")),
        *(("--log-json", path, inside) for path in (destination, destination / "log", f"{destination}.partial/x")),
        *(("--metrics", path, inside) for path in (checkpoint / "m.prom", destination / "m.prom")),
        ("--log-json", tmp_path / "mine.txt", "exists and is no log of this command"),
        ("--metrics", tmp_path / "mine.prom", "exists and is no file of metrics of this command"),
        ("--metrics", tmp_path / "pipe.prom", "is a pipe or a device"),
    ):
        other = ("--log-json", tmp_path / "o") if option == "--metrics" else ("--metrics", tmp_path / "o.prom")
        assert run(monkeypatch, "quantize", checkpoint, destination, option, name, *other) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {name}: ")
        assert problem in line
        assert f"({option})" in line
    same = tmp_path / "s.prom"
    assert run(monkeypatch, "quantize", checkpoint, destination, "--log-json", same, "--metrics", same) == 1
    assert "name two files" in capsys.readouterr().err
    assert contents(checkpoint) == before
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / "pipe.prom").is_fifo()
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "o.prom").exists()
    assert not same.exists()
    assert not destination.exists()


def test_own_files_and_streams_are_taken(
    checkpoint: Path,
    destination: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    files = ("--log-json", tmp_path / "log", "--metrics", tmp_path / "m.prom")
    for _ in range(2):
        assert run(monkeypatch, "quantize", checkpoint, destination, "-q", *files) == 0
    assert (tmp_path / "log").read_text().count("command.started") == 2
    assert run(monkeypatch, "verify", destination, "-q", "--log-json", "/dev/stderr") == 0
    assert "command.ended" in capfd.readouterr().err


def test_a_log_that_fails_is_noted_once(
    checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    assert run(monkeypatch, "quantize", checkpoint, destination, "--log-json", "/dev/full") == 0
    noted = [line for line in capsys.readouterr().err.splitlines() if "the log ends here" in line]
    assert noted == ["note: /dev/full: the log ends here: No space left on device (--log-json)"]


def test_metrics_that_fail_are_noted_once(
    checkpoint: Path,
    destination: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import nemotron_fp8.cli.metrics as module

    def fail(_file: module.MetricsFile) -> None:
        if _file._figures.task:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.MetricsFile, "_write", fail)
    monkeypatch.setattr(module, "SECONDS", 0.01)
    assert run(monkeypatch, "quantize", checkpoint, destination, "--metrics", tmp_path / "m.prom") == 0
    noted = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert noted == [f"note: {tmp_path / 'm.prom'}: the metrics cannot be written: No space left on device (--metrics)"]
