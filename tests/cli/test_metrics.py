"""``--metrics``: a file that Prometheus reads, whole at every moment."""

from __future__ import annotations

import re
import stat
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import Progress
from nemotron_fp8.cli import metrics
from nemotron_fp8.cli.metrics import STATES, Figures, MetricsFile, render
from nemotron_fp8.events import emit, logger
from tests.cli.test_json_log import run

if TYPE_CHECKING:
    from pathlib import Path

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
SAMPLE = re.compile(r"([a-z0-9_]+)\{(.*)\} (\S+)")
UNITS = ("_bytes", "_seconds", "_total", "_info", "_state", "_shards", "_shards_finished", "_code")


def parsed(text: str) -> Samples:
    """Read the format with code of this test: HELP and TYPE before the samples of a name, no sample twice."""
    found: Samples = {}
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    known: dict[str, str] = {}
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            name, words = line.removeprefix("# HELP ").split(" ", 1)
            assert words
            assert name not in known
            assert name.endswith(UNITS)
            known[name] = ""
        elif line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split(" ")
            assert known[name] == ""
            assert kind == ("counter" if name.endswith("_total") else "gauge")
            known[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            assert name == list(known)[-1]
            assert LABEL.sub("", labels) == ""
            pairs = [(key, _plain(each)) for key, each in LABEL.findall(labels)]
            key = name.removeprefix("nemotron_fp8_"), frozenset(pairs)
            assert len(dict(pairs)) == len(pairs)
            assert key not in found
            found[key] = float(value)
    return found


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def figures(samples: Samples) -> dict[str, float]:
    """The samples without labels of their own, by name."""
    return {
        name: value for (name, labels), value in samples.items() if {key for key, _ in labels} == {"task", "target"}
    }


def state(samples: Samples) -> str:
    (found,) = [dict(labels)["state"] for (name, labels), value in samples.items() if name == "state" and value]
    return found


@given(
    task=st.text(),
    target=st.text(),
    shards=st.none() | st.integers(0, 10**6),
    done=st.integers(0, 2**70),
    code=st.none() | st.integers(0, 255),
    picked=st.sampled_from(STATES),
)
def test_the_format(task: str, target: str, shards: int | None, done: int, code: int | None, picked: str) -> None:
    """Every text can be a label; what UTF-8 cannot hold is replaced. The parser of Prometheus reads the same."""
    progress = Progress(done, 2 * done, "", source_bytes=done, seconds=2.5)
    text = render(Figures(task, target, shards, 3, 2, progress, picked, code), 1.0, 2.0)
    found = parsed(text)
    assert state(found) == picked
    assert figures(found)["retries_total"] == 2
    assert figures(found)["source_bytes"] == float(done)
    assert ("shards" in figures(found)) == (shards is not None)
    labels = dict(next(iter(found))[1])
    assert labels["target"] == target.encode("utf-8", "replace").decode()


@given(task=st.text(), target=st.text())
def test_the_parser_of_prometheus(task: str, target: str) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    text = render(
        Figures(task, target, 5, 3, 2, Progress(1, 2, "", source_bytes=9, seconds=1.0), "failed", 1), 1.0, 2.0
    )
    theirs = {
        (sample.name.removeprefix("nemotron_fp8_"), frozenset(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert theirs == parsed(text)


def test_a_conversion(checkpoint: Path, destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end: all shards, all bytes, and the exit code; no temporary file is left, and any user may read it."""
    path = tmp_path / "x.prom"
    assert run(monkeypatch, "quantize", checkpoint, destination, "-q", "--metrics", path) == 0
    found = parsed(path.read_text())
    assert state(found) == "succeeded"
    got = figures(found)
    assert (got["shards"], got["shards_finished"], got["exit_code"], got["left_seconds"]) == (2, 2, 0, 0)
    assert got["processed_bytes"] == got["source_bytes"] > 0
    assert got["start_time_seconds"] <= got["last_update_time_seconds"] <= time.time()
    assert dict(next(iter(found))[1]) | {"version": ""} == {
        "task": "quantize",
        "target": str(destination),
        "version": "",
    }
    assert [each.name for each in tmp_path.iterdir() if "prom" in each.name] == ["x.prom"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444
    assert run(monkeypatch, "quantize", tmp_path / "missing", destination, "-q", "--metrics", path) == 1
    found = parsed(path.read_text())
    assert (state(found), figures(found)["exit_code"]) == ("failed", 1)


def test_a_running_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written again and again; a reader never sees half of it."""
    monkeypatch.setattr(metrics, "SECONDS", 0.01)
    file = MetricsFile(str(tmp_path / "x.prom"))
    logger.addHandler(file)
    logger.setLevel("INFO")
    try:
        assert state(parsed((tmp_path / "x.prom").read_text())) == "running"
        emit("run.started", "", task="quantize", source="s", destination="d")
        emit("run.planned", "", shards=7)
        seen = set()
        end = time.monotonic() + 20
        for number in range(1, 8):
            emit("request.retried", "")
            emit("shard.finished", "")
            file.observe(Progress(number, 7, "", source_bytes=70, seconds=1.0))
            while ("shards_finished", number) not in seen and time.monotonic() < end:
                got = figures(parsed((tmp_path / "x.prom").read_text()))
                seen |= {
                    (key, got[key]) for key in ("shards_finished", "retries_total", "processed_bytes") if key in got
                }
        assert {("shards_finished", float(n)) for n in range(1, 8)} <= seen
        assert ("retries_total", 7.0) in seen
        file.end(143)
        assert state(parsed((tmp_path / "x.prom").read_text())) == "interrupted"
    finally:
        logger.removeHandler(file)
        logger.setLevel("NOTSET")
    threads = [each for each in threading.enumerate() if each.name == "metrics"]
    for each in threads:
        each.join(10)
        assert not each.is_alive()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.txt", "the collector of Prometheus reads files with the ending .prom (--metrics)"),
        ("a/x.prom", "No such file or directory; choose another file for the metrics (--metrics)"),
    ],
)
def test_a_file_that_cannot_be_written(
    checkpoint: Path,
    destination: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    said: str,
) -> None:
    assert run(monkeypatch, "quantize", checkpoint, destination, "--metrics", tmp_path / name) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / name}: {said}\n"
    assert list(destination.parent.iterdir()) == []
