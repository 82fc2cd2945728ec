"""Quiet commands, verbose commands, and what may follow a command."""

from __future__ import annotations

import io
import itertools
import json
import re
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner, Result

from nemotron_fp8.cli.main import cli
from nemotron_fp8.cli.next_steps import after_calibrate, after_evaluate, after_quantize
from nemotron_fp8.cli.progress_line import ProgressLine
from nemotron_fp8.conversion.report import Report
from nemotron_fp8.planning.amaxes import Amaxes
from nemotron_fp8.planning.engine_support import EngineSupport
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.progress import Progress
from tests.docs.commands import check
from tests.support.checkpoints import edit, edit_json

if TYPE_CHECKING:
    from pathlib import Path

FIRST = "model-00001-of-00002.safetensors"


def run(*words: object, **variables: str) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)), env=variables)


@pytest.fixture
def made(checkpoint: Path, destination: Path) -> Path:
    assert run("quantize", checkpoint, destination, "-q").exit_code == 0
    return destination


# ---- quiet ----


def test_a_quiet_success_prints_nothing(checkpoint: Path, destination: Path, tmp_path: Path) -> None:
    """Neither on stdout nor on stderr, also with notes, notices and a page."""
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    page = tmp_path / "page.html"
    for words in (
        ["plan", checkpoint],
        ["quantize", checkpoint, destination, "--dry-run"],
        ["quantize", checkpoint, destination],
        ["quantize", checkpoint, destination],  # up to date
        ["verify", checkpoint, destination],
        ["verify", destination],
        ["report", destination, "--source", checkpoint, "--html", page],
        ["compare", destination, destination],
        ["dequantize", destination, tmp_path / "bf16"],
    ):
        done = run(*words, "-q")
        assert (done.exit_code, done.stdout, done.stderr) == (0, "", ""), words
    assert page.exists()


def test_a_quiet_command_still_prints_json_and_errors(checkpoint: Path, made: Path) -> None:
    done = run("verify", checkpoint, made, "-q", "--json")
    assert json.loads(done.stdout)["ok"] is True
    assert done.stderr == ""
    edit(made / FIRST, {"model.layers.0.self_attn.o_proj.weight_scale": torch.tensor(1.0)})
    done = run("verify", checkpoint, made, "-q")
    assert done.exit_code == 1
    assert "problem: model.layers.0.self_attn.o_proj.weight_scale" in done.stdout
    assert "problems found" in done.stderr or "problem found" in done.stderr
    assert "OK" not in done.stdout


# ---- verbose ----


def test_a_verbose_command_tells_what_is_done(checkpoint: Path, destination: Path) -> None:
    """Shards with size, seconds and speed, on stderr; the result on stdout is the usual one."""
    done = run("quantize", checkpoint, destination, "-v")
    assert done.exit_code == 0
    assert re.search(rf"^note: {re.escape(FIRST)}: finished, [\d.]+ KiB", done.stderr, re.MULTILINE)
    assert re.search(r"^note: .*: 2 shards, \d+ tensors, .* become ", done.stderr, re.MULTILINE)
    assert "finished" not in done.stdout
    verified = run("verify", checkpoint, destination, "-v")
    assert re.search(r"^note: digests: [\d.]+ KiB in [\d.]+ s", verified.stderr, re.MULTILINE)
    assert re.search(r"^note: values: [\d.]+ KiB in [\d.]+ s", verified.stderr, re.MULTILINE)
    usual = run("verify", checkpoint, destination)
    assert usual.stdout == verified.stdout
    assert "note:" not in usual.stderr


@pytest.mark.parametrize("restarts", [True, False])
def test_a_stage_has_its_own_bytes_and_time(restarts: bool) -> None:
    """Of a verification, whose counts restart with each stage, and of an evaluation, whose counts go on."""
    stream = io.StringIO()
    with ProgressLine(stream, verbose=True, clock=itertools.count().__next__) as line:
        for number in range(3):
            for share in (0.0, 0.5, 1.0):
                units = share if restarts else number + share
                done, seconds = int(units * (4 << 20)), 2.0 * units
                total = (4 << 20) * (1 if restarts else 3)
                line.update(Progress(done, total, "", source_bytes=total, seconds=seconds, stage=f"stage {number}"))
    told = [text for text in stream.getvalue().splitlines() if text.startswith("note: ")]
    assert told == [f"note: stage {number}: 4.0 MiB in 2.00 s, 2.0 MiB/s" for number in range(3)]


def test_a_verbose_conversion_in_place_tells_its_shards(checkpoint: Path) -> None:
    done = run("quantize", checkpoint, "--in-place", "-v")
    assert done.exit_code == 0
    assert done.stderr.count(": finished, ") == 2


def test_quiet_and_verbose_exclude_each_other(checkpoint: Path) -> None:
    done = run("verify", checkpoint, "-q", "-v")
    assert done.exit_code == 2
    assert "--quiet and --verbose exclude each other" in done.output


def test_the_command_line_decides_how_loud_a_command_is(checkpoint: Path, made: Path) -> None:
    loud = run("verify", made, "-v", NEMOTRON_FP8_QUIET="1")
    assert "OK" in loud.stdout
    assert "digests:" in loud.stderr
    still = run("verify", made, "-q", NEMOTRON_FP8_VERBOSE="1")
    assert still.output == ""


# ---- what may follow ----


def steps(stderr: str) -> list[str]:
    """Commands of the block, without their remarks."""
    lines = stderr.partition("next:\n")[2].splitlines()
    assert all(line.startswith("  ") for line in lines)
    return [line.strip().partition("  # ")[0] for line in lines]


def test_a_quantization_says_what_may_follow(checkpoint: Path, tmp_path: Path) -> None:
    """With the names of the call, on stderr; the commands of this library parse, the first one works."""
    destination = tmp_path / "my result"
    done = run("quantize", checkpoint, destination)
    assert "next:" not in done.stdout
    quoted = shlex.quote(str(destination))
    assert steps(done.stderr) == [
        f"nemotron-fp8 verify {checkpoint} {quoted}",
        f"vllm serve {quoted}",
        f"python -m sglang.launch_server --model-path {quoted}",
        f"# in Python: AutoModelForCausalLM.from_pretrained({str(destination)!r})",
        f"nemotron-fp8 evaluate {checkpoint} {quoted}",
    ]
    verified = run(*shlex.split(steps(done.stderr)[0])[1:])
    assert verified.exit_code == 0
    assert f"vllm serve {quoted}" in steps(verified.stderr)
    assert any("--html report.html" in step for step in steps(verified.stderr))
    for step in steps(done.stderr) + steps(verified.stderr):
        if step.startswith("nemotron-fp8"):
            check(shlex.split(step))


def test_only_engines_that_read_the_result_are_named(checkpoint: Path, destination: Path) -> None:
    """transformers does not read this layout, and code of the model needs consent."""
    (checkpoint / "modeling_x.py").write_text("")
    edit_json(checkpoint / "config.json", auto_map={"AutoConfig": "modeling_x.X"})
    done = run("quantize", checkpoint, destination, "--format", "fp8", "--granularity", "tensor", "--kv-cache", "none")
    assert f"vllm serve {destination} --trust-remote-code" in steps(done.stderr)
    assert "from_pretrained" not in done.stderr
    verified = run("verify", checkpoint, destination)
    assert "from_pretrained" not in verified.stderr
    assert f"vllm serve {destination} --trust-remote-code" in steps(verified.stderr)


@pytest.mark.parametrize("option", ["--json", "-q"])
def test_programs_and_quiet_commands_get_no_advice(checkpoint: Path, destination: Path, option: str) -> None:
    for words in (["quantize", checkpoint, destination], ["verify", checkpoint, destination]):
        assert "next:" not in run(*words, option).output


def test_in_place_dequantize_and_the_hub(
    checkpoint: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = run("dequantize", made, tmp_path / "bf16")
    assert f"nemotron-fp8 verify {made} {tmp_path / 'bf16'}" in steps(back.stderr)
    in_place = run("quantize", checkpoint, "--in-place")
    assert steps(in_place.stderr)[:2] == [f"nemotron-fp8 verify {checkpoint}", f"vllm serve {checkpoint}"]
    assert "evaluate" not in in_place.stderr
    report = Report("hf://me/x@refs/pr/1", 1, 1, 1, 1, 1.0, None, False, 0, (), (), ())
    found = report_with(report, vLLM="", transformers="")
    after_quantize("hf://a/b", "hf://me/x", Recipe(format="fp8"), found)
    after_quantize("SRC", "s3://bucket/x", Recipe(), replace(found, destination="s3://bucket/x"))
    hub, store = capsys.readouterr().err.split("next:\n")[1:]
    assert "  vllm serve me/x --revision refs/pr/1\n" in hub
    assert "from_pretrained('me/x', revision='refs/pr/1')" in hub
    assert "vllm" not in store


def test_an_fp8_cache_of_a_layout_without_an_entry_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_with(Report("DST", 1, 1, 1, 1, 1.0, None, False, 0, (), (), ()), vLLM="with care")
    recipe = Recipe(format="fp8", activations="static", kv_cache="fp8")
    after_quantize("SRC", "some/DST", recipe, report)
    assert "  vllm serve some/DST --kv-cache-dtype fp8_e4m3  # with care\n" in capsys.readouterr().err


def test_evaluation_and_calibration_say_what_may_follow(capsys: pytest.CaptureFixture[str]) -> None:
    after_evaluate("SRC", ("A", "B"), None)
    after_calibrate("SRC", "my amaxes.json", Amaxes({"x": 1.0}, {"k": 1.0}, {"k": 1.0}, ()))
    evaluated, calibrated = capsys.readouterr().err.split("next:\n")[1:]
    assert "  nemotron-fp8 evaluate SRC A B --html page.html" in evaluated
    assert "  nemotron-fp8 card A --evaluation evaluation.json" in evaluated
    assert "  nemotron-fp8 compare A B --source SRC" in evaluated
    assert calibrated == (
        "  nemotron-fp8 quantize SRC DST --activations static --amaxes 'my amaxes.json' --kv-cache fp8\n"
    )
    for line in (evaluated + calibrated).splitlines():
        check(shlex.split(line.partition("  # ")[0].partition(" > ")[0]))


def report_with(report: Report, **engines: str) -> Report:
    return replace(report, engines=tuple(EngineSupport(name, True, note) for name, note in engines.items()))
