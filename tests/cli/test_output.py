"""Output for people: progress line, notes, tables, and answers to misspelled words."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, plan_repo, quantize_repo
from nemotron_fp8.cli.demo import write_checkpoint as write_demo
from nemotron_fp8.cli.main import cli
from nemotron_fp8.cli.output import folded, show_notices, show_report
from nemotron_fp8.cli.progress_line import LIVE_SECONDS, PLAIN_SECONDS, ProgressLine, clock_time, describe
from nemotron_fp8.conversion.progress import ConversionProgress
from nemotron_fp8.conversion.report import Report
from nemotron_fp8.progress import Progress, ShardProgress, Transfer
from tests.support.fp8_sources import mixed

if TYPE_CHECKING:
    from pathlib import Path

TOTAL = 1000


class Terminal(io.StringIO):
    """A stream that claims to be a terminal; `shutil` takes its width from COLUMNS, because it has no descriptor."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def state(done: int, seconds: float, **more: object) -> Progress:
    values = {"total": TOTAL, "shard": "s", "source_bytes": 600, "seconds": seconds, **more}
    return Progress(done=done, **values)  # type: ignore[arg-type]


def drawn(columns: int, states: list[Progress], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the line on a terminal after each state, in order."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with ProgressLine(stream, clock=clock) as line:
        for each in states:
            clock.now = each.seconds
            line.update(each)
        shown = stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")  # nothing is left on the line
    return [part.removesuffix("\x1b[K") for part in shown.split("\r")[1:]]


names = st.sampled_from(
    ["model-00007-of-00096.safetensors", "model.safetensors", "x" * 200 + ".safetensors", "中" * 50]
)


@given(
    columns=st.integers(10, 200),
    done=st.integers(0, TOTAL),
    source=st.integers(0, 10**13),
    active=st.lists(st.tuples(names, st.integers(0, 9), st.integers(1, 9)), max_size=12),
)
@settings(max_examples=60)
def test_a_line_never_wraps(columns: int, done: int, source: int, active: list[tuple[str, int, int]]) -> None:
    """A column stays free at any width, and every character takes one column."""
    with pytest.MonkeyPatch.context() as patch:
        shards = tuple(ShardProgress(*each) for each in active)
        for text in drawn(columns, [state(done, 1.0, source_bytes=source, active=shards)], patch):
            assert len(text) < columns
            assert text.isascii()
            assert text.isprintable()


def test_a_line_says_bytes_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are those of the source; the rate is the recent one, without the shards of an earlier run."""
    active = (ShardProgress("model-00003-of-00009.safetensors", 1, 4),)
    mib = 1 << 20
    states = [
        Progress(400 * mib, 1000 * mib, "s", active, 500 * mib, 300 * mib, 10.0),
        Progress(600 * mib, 1000 * mib, "s", active, 500 * mib, 300 * mib, 20.0),
    ]
    first, second = drawn(130, states, monkeypatch)
    assert first == " 40%  200.0 MiB of 500.0 MiB  5.0 MiB/s  1:00 left  #3 25%"
    assert second == " 60%  300.0 MiB of 500.0 MiB  10.0 MiB/s  0:20 left  #3 25%"


def test_a_line_says_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    moving = (
        Transfer("download", "model-00003-of-00009.safetensors", 1, 4),
        Transfer("upload", "model.safetensors", 0, 0),
        Transfer("upload", "model-00002-of-00009.safetensors", None, 9),  # over Xet, which reports no bytes
    )
    told = "12 s: me/a-name-of-usual-length-FP8: the Hub answers 503"
    states = [state(300, 1.0, transfers=moving), state(300, 2.0, transfers=moving, waiting=told)]
    first, second = drawn(130, states, monkeypatch)
    assert first.endswith("down #3 25%  up model 0%  up #2")
    assert second.endswith("down #3 25%  up model 0%  up #2")
    # Whatever else goes on, a narrow terminal shows why nothing moves.
    assert f"retrying in {told}" in drawn(80, states, monkeypatch)[1]


def test_a_wait_is_told_at_once_and_once() -> None:
    """A new wait is printed at once, because the next line may be half an hour away; a repeated one is not."""
    stream, clock = io.StringIO(), Clock()
    with ProgressLine(stream, clock=clock) as line:
        for now, why in [(1.0, "a"), (2.0, "a"), (3.0, "b"), (4.0, ""), (5.0, "")]:
            clock.now = now
            line.update(state(300, now, waiting=why))
    assert [line.partition("retrying in ")[2][:1] for line in stream.getvalue().splitlines()] == ["a", "b"]


def test_the_time_before_the_first_byte_says_nothing_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of connecting and starting workers does not count; a later pause does."""
    states = [state(0, 1.0), state(0, 29.0), state(0, 30.0), state(100, 31.0), state(100, 40.0)]
    texts = drawn(120, states, monkeypatch)
    assert [("left" in text, "0:09 left" in text, "1:30 left" in text) for text in texts] == [
        (False, False, False),
        (False, False, False),
        (False, False, False),
        (True, True, False),
        (True, False, True),
    ]


def test_an_older_state_is_not_drawn_over_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of several threads arrive in any order."""
    assert len(drawn(80, [state(500, 5.0), state(700, 4.99)], monkeypatch)) == 1


def test_a_count_that_begins_anew_is_drawn() -> None:
    """The seconds restart with the count, for example when a shard is compared and then made."""
    stream, clock = io.StringIO(), Clock()
    with ProgressLine(stream, clock=clock) as line:
        for now, seconds, done in [(100.0, 100.0, 900), (200.0, 3.0, 30)]:
            clock.now = now
            line.update(state(done, seconds))
    assert [line[:4] for line in stream.getvalue().splitlines()] == [" 90%", "  3%"]


@pytest.mark.parametrize("live", [True, False])
def test_lines_are_rate_limited(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe gets whole lines, a terminal is redrawn; both respect their interval."""
    monkeypatch.setenv("TERM", "xterm")
    due = LIVE_SECONDS if live else PLAIN_SECONDS
    stream, clock = Terminal() if live else io.StringIO(), Clock()
    with ProgressLine(stream, clock=clock) as line:
        for i in range(1, 101):
            clock.now = i * due / 10
            line.update(state(i, clock.now))
    shown = stream.getvalue()
    if live:
        assert 8 <= shown.count("\r") - 1 <= 10
        assert "\n" not in shown
    else:
        assert 8 <= shown.count("\n") <= 10
        assert "\r" not in shown
        assert "\x1b" not in shown


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream, clock = Terminal(), Clock()
    with ProgressLine(stream, clock=clock) as line:
        clock.now = 100.0
        line.update(state(1, 100.0))
    assert re.fullmatch(r"[^\r\x1b]+\n", stream.getvalue())


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_warning_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]) -> None:
    """A warning replaces the drawn line; control characters are escaped; --quiet suppresses it."""
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = kind(), Clock()
    logger = logging.getLogger("nemotron_fp8")
    with ProgressLine(stream, clock=clock) as line:
        clock.now = 100.0
        line.update(state(1, 100.0))
        before = stream.getvalue()
        logger.info("a word for programs")
        logger.warning("%s: lost", "a\x1b[2J")
    clear = "\r\x1b[K" if kind is Terminal else ""
    assert stream.getvalue() == f"{before}{clear}note: a\\x1b[2J: lost\n{clear}"
    with ProgressLine(stream, quiet=True):
        logger.warning("nobody listens")
    assert "nobody" not in stream.getvalue()


def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = Terminal(), Clock()
    with ProgressLine(stream, quiet=True, clock=clock) as line:
        clock.now = 100.0
        line.update(state(1, 100.0))
    assert not stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (6.6, "0:07"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def test_nothing_to_do_is_all_done() -> None:
    assert describe(Progress(0, 0, ""), 0.0).startswith("100%")


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1 << 22)), max_size=30), st.booleans())
@settings(max_examples=25)
def test_a_tally_never_runs_over_and_ends_at_its_total(
    tmp_path_factory: pytest.TempPathFactory, told: list[tuple[int, int]], skip_first: bool
) -> None:
    """Done only grows, and is the total once every shard is finished."""
    from tests.support.checkpoints import model, write_checkpoint

    root = tmp_path_factory.getbasetemp() / "tally-source"
    if not root.exists():
        write_checkpoint(root, model())
    plan = plan_repo(root)
    states: list[Progress] = []
    tally = ConversionProgress(plan.shard_tasks, states.append, Clock())
    if skip_first:
        tally.skip(plan.shard_tasks[0].name)
    for which, count in told:
        tally.add(plan.shard_tasks[which].name, count)
    for shard_task in plan.shard_tasks:
        tally.finish(shard_task.name, 1)
    done = [each.done for each in states]
    assert done == sorted(done)
    assert states[-1].done == states[-1].total
    assert all(shard.done == shard.total for shard in states[-1].active)
    assert all(shard.done <= shard.total for each in states for shard in each.active)
    assert states[-1].skipped == (states[0].done if skip_first else 0)


def test_the_library_prints_nothing_and_logs(
    checkpoint: Path, destination: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Events go to the logger ``nemotron_fp8``."""
    with caplog.at_level(logging.INFO, logger="nemotron_fp8"):
        quantize_repo(checkpoint, destination, Recipe(stats=True))
    assert capfd.readouterr() == ("", "")
    for shard in destination.glob("*.safetensors"):
        assert any(shard.name in record.getMessage() for record in caplog.records)


def test_eighty_columns_of_a_real_terminal(checkpoint: Path, destination: Path) -> None:
    """On a pseudo-terminal of 80 columns no progress line is longer; the result goes to stdout only."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = (
        "import nemotron_fp8.cli.progress_line as p, sys; p.LIVE_SECONDS = 0.0; sys.argv[0] = 'nemotron-fp8';"
        "from nemotron_fp8.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "quantize", str(checkpoint), str(destination), "--stats"]
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 1 << 16)
        except OSError:  # Linux reports a closed peer as an error
            break
        if not data:
            break
        shown += data
    os.close(ours)
    out = process.communicate()[0].decode()
    assert process.returncode == 0
    assert str(destination) in out
    lines = re.sub(r"\x1b\[K", "", shown.decode()).split("\r")
    assert any("%" in line for line in lines)
    assert all(len(line.strip("\n")) < 80 for line in lines if "%" in line)


# ---- misspelled words ----


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["quantze", "a", "b"], "'quantize'"),
        (["verfy", "a"], "'verify'"),
        (["quantize", "a", "b", "--formt", "fp8"], "'--format'"),
        (["quantize", "a", "b", "--format", "fp-8"], "'fp8'"),
        (["quantize", "a", "b", "--format", "compressed_tensors"], "'compressed-tensors'"),
        (["quantize", "a", "b", "--granularity", "chanel"], "'channel'"),
        (["quantize", "a", "b", "--numerics", "Float-32"], "'float32'"),
        (["quantize", "a", "b", "--nonfinite", "kep"], "'keep'"),
        (["plan", "a", "--activations", "dinamic"], "'dynamic'"),
        (["dequantize", "a", "b", "--dtype", "bfloat"], "'bfloat16'"),
    ],
)
def test_a_misspelled_word_names_the_nearest(words: list[str], nearest: str) -> None:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert re.search(r"did you mean|possible options", done.output, re.IGNORECASE)
    assert nearest.strip("'") in done.output.split("ean", 1)[-1]


def test_a_word_like_none_names_none() -> None:
    done = CliRunner().invoke(cli, ["xyzzy"])
    assert done.exit_code == 2
    assert "Did you mean" not in done.output


def test_plan_tells_why_and_what_it_takes(checkpoint: Path) -> None:
    """A plan prints reasons, bytes before and after, memory, disk and time, and writes nothing."""
    before = sorted(checkpoint.parent.rglob("*"))
    done = CliRunner().invoke(cli, ["plan", str(checkpoint), "--ignore", "layers.0"])
    assert done.exit_code == 0
    for word in ("before", "after", "linear", "engines", "disk", "memory", "time"):
        assert word in done.stdout
    for word in ("matches --ignore layers.0", "a linear weight", "read by vLLM, SGLang, transformers"):
        assert word in done.stdout
    assert sorted(checkpoint.parent.rglob("*")) == before


def test_plan_and_report_tell_what_happens_to_a_quantized_source(tmp_path: Path) -> None:
    source, _ = mixed(tmp_path / "source")
    options = [str(source), "--granularity", "block", "--ignore", "layers.1.mlp"]
    done = CliRunner().invoke(cli, ["plan", *options])
    assert done.exit_code == 0
    assert "1 weights keep their codes where their scales are powers of two, 1 are quantized again" in done.stdout
    assert "1 are dequantized" in done.stdout
    assert "FP8 in the source" in done.stdout
    done = CliRunner().invoke(cli, ["quantize", options[0], str(tmp_path / "fp8"), *options[1:], "--json"])
    report = json.loads(done.stdout)
    assert (report["tensors_quantized"], report["tensors_dequantized"]) == (2, 1)
    assert report["recoded"] == {"kept": 0, "exact": 0, "rounded": 2, "changed": report["recoded"]["changed"]}
    assert report["recoded"]["changed"] > 0
    assert "rounded once more in 2" in done.stderr


@given(st.lists(st.text("abc-/.", min_size=1, max_size=120), min_size=1, max_size=40), st.integers(0, 4))
@settings(max_examples=100)
def test_a_terminal_gets_lines_folded_between_words(words: list[str], indent: int) -> None:
    """Words stay whole, only one long word exceeds the width, the indent is kept; a pipe gets one line."""
    text = " " * indent + " ".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        lines = folded(text, Terminal()).split("\n")
    assert " ".join(lines).split() == words
    assert all(len(line) < 80 or len(line.split()) == 1 for line in lines)
    assert len(lines[0]) - len(lines[0].lstrip()) == indent or not lines[0].strip()
    assert folded(text, io.StringIO()) == text


def test_tables_and_results_fit_80_columns(tmp_path: Path) -> None:
    """Every command that prints a table, on the demo's model."""
    write_demo(tmp_path / "s")
    quantize_repo(tmp_path / "s", tmp_path / "a", Recipe(stats=True))
    quantize_repo(tmp_path / "s", tmp_path / "b", Recipe(granularity="block", stats=True))
    for words in (["plan", "s"], ["inspect", "a"], ["report", "a"], ["compare", "a", "b"], ["verify", "s", "a"]):
        done = CliRunner().invoke(cli, [words[0], *(str(tmp_path / word) for word in words[1:])])
        assert done.exit_code == 0, done.output
        lines = [line for line in done.stdout.splitlines() if str(tmp_path) not in line]
        assert len(lines) >= 3
        assert [line for line in lines if len(line) > 79] == []


def test_what_is_so_in_every_layer_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Notices that differ only in numbers are printed once, with their count; others are not merged."""
    show_notices([*(f"layers.{i}.qkv: {i + 64} by 256 stays" for i in range(96)), "another", "layers.0.mlp stays"])
    assert capsys.readouterr().err.splitlines() == [
        "note: layers.0.qkv: 64 by 256 stays (95 more like it)",
        "note: another",
        "note: layers.0.mlp stays",
    ]


@pytest.mark.parametrize("command", ["", *sorted(cli.commands)])
def test_help_fits_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(cli, [*command.split(), "--help"]).output
    assert "Usage:" in shown
    assert max(map(len, shown.splitlines())) <= 80


# ---- dry runs and rates ----


def test_a_dry_run_is_a_plan(checkpoint: Path, destination: Path) -> None:
    """The same text and the same JSON, whatever else quantize is told; nothing is written."""
    before = sorted(checkpoint.parent.rglob("*"))
    recipe = ["--granularity", "tensor", "--ignore", "o_proj", "--device", "cpu"]
    others = ["--overwrite", "--restart", "--no-digests", "--base-model", "a/b", "--ray", "auto"]

    def invoke(*words: object) -> object:
        done = CliRunner().invoke(cli, list(map(str, words)))
        assert done.exit_code == 0, done.output
        if "--json" in words:
            tree = json.loads(done.stdout)
            assert tree.pop("seconds") > 0
            assert tree.pop("peak_host_bytes") > 0  # as the seconds, a measurement of this process
            return tree
        lines = done.stdout.splitlines()
        assert [line.split(" ")[0] for line in lines[-3:]] == ["memory", "time", ""]
        return lines[:-3]

    planned = invoke("plan", checkpoint, *recipe)
    assert planned == invoke("quantize", checkpoint, destination, "--dry-run", *recipe, *others)
    assert planned == invoke("quantize", checkpoint, "--dry-run", *recipe)
    assert planned == invoke("quantize", checkpoint, "--in-place", "--dry-run", *recipe)
    assert invoke("plan", checkpoint, "--json") == invoke("quantize", checkpoint, destination, "--dry-run", "--json")
    assert sorted(checkpoint.parent.rglob("*")) == before


def test_a_dry_run_with_a_calibration_counts_its_scales(checkpoint: Path, tmp_path: Path) -> None:
    """It does not calibrate, and says that scales of keys and values are not counted."""
    words = tmp_path / "words.txt"
    words.write_text("words")
    options = ["--activations", "static", "--kv-cache", "fp8", "--calibrate", str(words), "--dry-run"]
    done = CliRunner().invoke(cli, ["quantize", str(checkpoint), *options])
    assert done.exit_code == 0, done.output
    assert "scales   14 of activations, from the calibration that precedes" in done.stdout
    wrong = CliRunner().invoke(cli, ["quantize", str(checkpoint), "--calibrate", str(words), "--dry-run"])
    assert wrong.exit_code == 1
    assert "nothing uses them" in str(wrong.exception)
    alone = CliRunner().invoke(cli, ["quantize", str(checkpoint), "DST", "--sequences", "2"])
    assert alone.exit_code == 2
    assert "--sequences and --length need --calibrate or --tokens" in alone.output


@pytest.mark.parametrize(
    ("total", "work", "text"),
    [
        (4.0, 1.0, "in 4.0 s (3.0 s to start, then 2.0 MiB/s read)"),
        (4.0, 3.9, "in 4.0 s (512.0 KiB/s read)"),  # the start is not worth a word
        (4.0, 0.0, "in 4.0 s (512.0 KiB/s read)"),  # unknown
        (0.0, 0.0, "in 0.0 s (0 B/s read)"),
    ],
)
def test_the_rate_leaves_out_the_start(
    capsys: pytest.CaptureFixture[str], total: float, work: float, text: str
) -> None:
    """Loading torch takes longer than a small conversion."""
    show_report(Report("DST", 1, 1, 2 << 20, 1, total, None, False, 0, (), (), ()), False, seconds=work)
    assert text in capsys.readouterr().out
