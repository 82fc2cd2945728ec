"""``--log-json``, and the same events through the standard logging: stable names and fields, one object a line."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import NemotronFp8Error, quantize_repo, verify_repo
from nemotron_fp8.cli.json_log import line_of
from nemotron_fp8.cli.main import main
from nemotron_fp8.cli.progress_line import ProgressLine
from nemotron_fp8.events import EVENTS
from tests.support.stops import SECOND, StoppedError, stop_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8 import Progress

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr("sys.argv", ["nemotron-fp8", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def lines(text: str) -> list[dict[str, Any]]:
    """The objects of a log; every line has the same first keys, and a time in UTC."""
    found = [json.loads(line) for line in text.splitlines()]
    for each in found:
        assert list(each)[:4] == ["time", "level", "event", "text"]
        assert MOMENT.fullmatch(each["time"])
        at = datetime.fromisoformat(each["time"].replace("Z", "+00:00"))
        assert abs((datetime.now(timezone.utc) - at).total_seconds()) < 600
        assert each["event"].startswith("command.") or each["event"] == "run.progress" or each["event"] in EVENTS
    return found


def of(found: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [each for each in found if each["event"] == event]


def test_a_conversion(
    checkpoint: Path,
    destination: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every shard once, with its figures; the log is appended to, and stderr stays as it is."""
    log = tmp_path / "log.jsonl"
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, destination, threads=1, progress=stop_at(SECOND))
    assert run(monkeypatch, "quantize", checkpoint, destination, "--threads", 1, "--log-json", log) == 0
    assert "next:" in capfd.readouterr().err
    found = lines(log.read_text())
    (started,), (planned,), (finished,) = (of(found, f"run.{name}") for name in ("started", "planned", "finished"))
    assert (started["task"], started["source"], started["destination"]) == (
        "quantize",
        str(checkpoint),
        str(destination),
    )
    assert planned["shards"] == 2
    assert of(found, "shard.resumed")[0]["shard"] != SECOND
    (shard,) = of(found, "shard.finished")
    assert (shard["shard"], shard["bytes"]) == (SECOND, (destination / SECOND).stat().st_size)
    assert shard["seconds"] > 0
    assert shard["bytes_per_second"] == pytest.approx(shard["bytes"] / shard["seconds"], rel=0.5, abs=1e8)
    assert (finished["resumed"], finished["unchanged"]) == (1, False)
    assert finished["bytes_written"] == sum(path.stat().st_size for path in destination.iterdir())
    first, last = found[0], found[-1]
    assert (first["event"], first["pid"], first["host"]) == ("command.started", os.getpid(), socket.gethostname())
    assert first["command"].startswith(f"nemotron-fp8 quantize {checkpoint}")
    assert (last["event"], last["level"], last["exit"]) == ("command.ended", "info", 0)
    assert run(monkeypatch, "verify", checkpoint, destination, "--log-json", log, "-q") == 0
    both = lines(log.read_text())
    assert both[: len(found)] == found
    assert of(both[len(found) :], "run.started")[0]["task"] == "verify"
    assert logging.getLogger("nemotron_fp8").level == logging.NOTSET


def test_everything_on_stderr_is_json(
    checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Results stay on stdout. A failure is told once as an error of the command."""
    assert run(monkeypatch, "quantize", checkpoint, destination, "--log-json", "-", "-v") == 0
    out, err = capfd.readouterr()
    assert out.startswith(str(destination))
    assert of(lines(err), "command.ended")[0]["exit"] == 0
    assert run(monkeypatch, "quantize", checkpoint, destination, "--log-json", "-", "--granularity", "tensor") == 1
    out, err = capfd.readouterr()
    found = lines(err)
    assert out == ""
    (failed,), (error,), (ended,) = (of(found, name) for name in ("run.failed", "command.error", "command.ended"))
    assert (failed["error"], failed["level"]) == ("DestinationExistsError", "error")
    assert failed["text"] == error["text"] == ended["text"]
    assert ended["exit"] == 1
    assert run(monkeypatch, "verify", destination) == 0  # the next command prints as before
    assert not capfd.readouterr().out.startswith("{")


def test_a_variable_of_the_environment(
    checkpoint: Path, destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON_FP8_LOG_JSON", str(tmp_path / "log"))
    assert run(monkeypatch, "quantize", checkpoint, destination, "-q") == 0
    assert of(lines((tmp_path / "log").read_text()), "run.finished")


def test_a_log_that_cannot_be_opened(
    checkpoint: Path,
    destination: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "quantize", checkpoint, destination, "--log-json", tmp_path / "a" / "b") == 1
    said = "No such file or directory; choose another file for the log (--log-json)"
    assert capsys.readouterr().err == f"error: {tmp_path / 'a' / 'b'}: {said}\n"
    assert list(destination.parent.iterdir()) == []


def test_a_full_disk_ends_the_log_and_not_the_work(
    checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    assert run(monkeypatch, "quantize", checkpoint, destination, "--log-json", "/dev/full", "-q") == 0
    assert verify_repo(None, destination).ok


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, dict[str, Any]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.event, record.levelno, record.fields))  # type: ignore[attr-defined]  # what is tested


@pytest.fixture
def records() -> Iterator[Records]:
    handler, logger = Records(), logging.getLogger("nemotron_fp8")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


def test_a_library_user_gets_the_same_events(checkpoint: Path, destination: Path, records: Records) -> None:
    quantize_repo(str(checkpoint), destination=destination, threads=1)
    assert [event for event, _, _ in records.found] == [
        *("run.started", "run.planned", "shard.finished", "shard.finished"),
        "run.finished",
    ]
    assert records.found[0][2] == {"task": "quantize", "source": str(checkpoint), "destination": str(destination)}
    records.found.clear()
    assert verify_repo(None, destination).ok
    assert records.found[-1][0] == "run.finished"
    assert records.found[-1][2]["ok"] is True
    with pytest.raises(NemotronFp8Error):
        verify_repo(None, destination.with_name("missing"))
    event, level, fields = records.found[-1]
    assert (event, level, fields["task"]) == ("run.failed", logging.ERROR, "verify")
    assert {"error", "seconds", "text"} <= fields.keys()


def test_in_place(checkpoint: Path, records: Records) -> None:
    quantize_repo(checkpoint, None, in_place=True, threads=1)
    events = [event for event, _, _ in records.found]
    assert events.count("shard.measured") == events.count("shard.finished") == 2


def test_an_interruption(checkpoint: Path, destination: Path, records: Records) -> None:
    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_repo(checkpoint, destination, threads=1, progress=stop)
    event, level, fields = records.found[-1]
    assert (event, level, fields["task"]) == ("run.interrupted", logging.WARNING, "quantize")


def test_the_command_prints_no_event_twice(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    with ProgressLine(sys.stderr) as line, pytest.raises(NemotronFp8Error):
        quantize_repo(tmp_path / "missing", tmp_path / "out", progress=line.update)
    assert capsys.readouterr().err == ""


@given(
    text=st.text(),
    fields=st.dictionaries(st.text(), st.floats() | st.text() | st.integers() | st.none() | st.lists(st.floats())),
)
def test_every_line_is_one_object(text: str, fields: dict[str, Any]) -> None:
    """Whatever a field holds: one line of ASCII, strict JSON, and the first keys are those of the log."""
    line = line_of("run.notice", "INFO", text, fields, 1.5)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    found = json.loads(line, parse_constant=refuse)
    assert (found["time"], found["level"], found["event"]) == ("1970-01-01T00:00:01.500Z", "info", "run.notice")
