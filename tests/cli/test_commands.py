"""The command line: results on stdout, one ``error:`` line, exit codes, one JSON object with the documented keys."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from nemotron_fp8 import __version__
from nemotron_fp8.cli.main import main
from tests.support.breaks import BREAKS
from tests.support.checkpoints import (
    INDEX,
    ONE,
    contents,
    edit,
    model,
    read_tensors,
    shard_bytes,
    weight,
    write_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUANTIZE_KEYS = {
    "destination",
    "tensors_quantized",
    "tensors_kept",
    "bytes_read",
    "bytes_written",
    "seconds",
    "peak_resident_bytes",
    "unchanged",
    "resumed",
    "linear",
    "engines",
    "recoded",
}
PLAN_KEYS = {
    "quantize",
    "keep",
    "linear",
    "engines",
    "bytes_in",
    "bytes_out",
    "recoding",
    "stored_scales",
    "buffer_bytes",
    "disk_bytes",
    "peak_host_bytes",
    "peak_device_bytes",
    "fetched_bytes",
    "cache_bytes",
    "seconds",
}
PLAN_TENSOR_KEYS = {"name", "shard", "dtype", "shape", "bytes_in", "bytes_out", "reason"}
VERIFY_KEYS = {"ok", "engines", "problems", "tensors"}
VERIFY_TENSOR_KEYS = {"name", "sqnr_db", "max_abs_error", "clamped", "flushed_to_zero"}
READERS = ["vLLM", "SGLang", "transformers"]
FIRST = "model-00001-of-00002.safetensors"


class Outcome(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    def json(self) -> dict[str, Any]:
        """Return the one object on stdout, in strict JSON."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        assert len(self.out.splitlines()) == 1
        found: dict[str, Any] = json.loads(self.out, parse_constant=refuse)
        assert type(found) is dict
        return found


Run = "Callable[..., Outcome]"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nemotron-fp8", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        assert isinstance(code, int)
        found = capsys.readouterr()
        return Outcome(code, found.out, found.err)

    return call


def test_quantize_plan_verify_inspect_in_json(run: Callable[..., Outcome], checkpoint: Path, destination: Path) -> None:
    """Each command prints one object with exactly the documented keys; the objects agree with each other."""
    planned = run("plan", checkpoint, "--json")
    assert planned.code == 0
    plan = planned.json()
    assert plan.keys() == PLAN_KEYS
    assert all(t.keys() == PLAN_TENSOR_KEYS for t in plan["quantize"] + plan["keep"])
    assert not destination.exists()

    done = run("quantize", checkpoint, destination, "--json")
    assert (done.code, done.errors) == (0, [])
    report = done.json()
    assert report.keys() == QUANTIZE_KEYS
    assert report["destination"] == str(destination)
    assert report["tensors_quantized"] == len(plan["quantize"]) == 14
    assert report["tensors_kept"] == len(plan["keep"])
    assert report["bytes_written"] == plan["disk_bytes"] == sum(map(len, contents(destination).values()))
    assert report["peak_resident_bytes"] > plan["buffer_bytes"] > 0
    assert (report["unchanged"], report["resumed"]) == (False, 0)
    assert report["seconds"] > 0
    assert report["linear"] == plan["linear"]
    assert report["engines"] == plan["engines"]
    assert report["linear"]["share"] == 1.0
    assert [engine for engine, found in report["engines"].items() if found["reads"]] == READERS

    verified = run("verify", checkpoint, destination, "--json")
    assert verified.code == 0
    found = verified.json()
    assert found.keys() == VERIFY_KEYS
    assert found["ok"] is True
    assert found["problems"] == []
    assert found["engines"] == READERS
    assert {t["name"] for t in found["tensors"]} == {t["name"] for t in plan["quantize"]}
    assert all(t.keys() == VERIFY_TENSOR_KEYS for t in found["tensors"])

    listed = run("inspect", destination, "--json").json()
    tensors = {name: t for path in destination.glob("*.safetensors") for name, t in read_tensors(path).items()}
    assert {t["name"]: (t["shape"], t["bytes"]) for t in listed["tensors"]} == {
        name: (list(t.shape), t.nbytes) for name, t in tensors.items()
    }


def test_plan_says_what_the_tensors_are(run: Callable[..., Outcome], checkpoint: Path) -> None:
    plan = run("plan", checkpoint, "--json", "--ignore", "o_proj").json()
    tensors = {name: (shard, t) for shard, held in model().items() for name, t in held.items()}
    for t in plan["quantize"] + plan["keep"]:
        shard, tensor = tensors[t["name"]]
        assert (t["shard"], t["shape"], t["dtype"]) == (shard, list(tensor.shape), "BF16")
    assert sorted(t["name"] for t in plan["keep"] if "o_proj" in t["name"]) == [
        f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)
    ]


def test_figures_that_are_not_finite_are_null(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """Zeros have no SQNR, exact codes an infinite one, the largest float32 an infinite error."""
    top = torch.full((1, 1), torch.finfo(torch.float32).max)
    tensors = {"zero": torch.zeros(2, 2), "exact": torch.full((1, 1), 448.0), "top": top, "usual": weight(4, 4)}
    source = write_checkpoint(tmp_path / "s", {ONE: {f"{n}.o_proj.weight": t for n, t in tensors.items()}})
    run("quantize", source, tmp_path / "d")
    found = run("verify", source, tmp_path / "d", "--json").json()
    assert found["ok"]
    figures = {t["name"].split(".")[0]: t["sqnr_db"] for t in found["tensors"]}
    assert figures["zero"] is None
    assert figures["exact"] is None
    assert 20 < figures["usual"] < 60
    assert run("verify", source, tmp_path / "d").code == 0


def test_people_get_words(run: Callable[..., Outcome], checkpoint: Path, destination: Path) -> None:
    """Without --json the commands print text: decisions, the report, the verification."""
    (checkpoint / "modeling_nemotron.py").write_text("evil")
    planned = run("plan", checkpoint)
    done = run("quantize", checkpoint, destination)
    verified = run("verify", checkpoint, destination)
    listed = run("inspect", checkpoint / FIRST)
    assert [o.code for o in (planned, done, verified, listed)] == [0, 0, 0, 0]
    for name in model()[FIRST]:
        assert name in planned.out
        assert name in listed.out
    assert "modeling_nemotron.py was not copied: code" in done.err
    assert "14 tensors quantized" in done.out
    assert "14 FP8 tensors compared" in verified.out
    again = run("quantize", checkpoint, destination)
    assert (again.code, again.errors) == (0, [])
    assert "already up to date" in again.out


def test_people_learn_what_stays_and_who_reads_the_result(
    run: Callable[..., Outcome], checkpoint: Path, destination: Path
) -> None:
    """The share of the linear weights, what is left and why, a warning below a half, and the engines."""
    published = ("--format", "fp8", "--granularity", "tensor", "--ignore", "mlp")
    planned = run("plan", checkpoint, *published)
    done = run("quantize", checkpoint, destination, *published)
    for outcome in (planned, done):
        assert outcome.code == 0
        assert "29% of the bytes of the decoder's linear weights become FP8\n" in outcome.out
        assert "  unquantized: mlp.gate_proj, " in outcome.out
        assert "(7.5 KiB: matches --ignore mlp)" in outcome.out
        assert "read by vLLM, SGLang; transformers: does not support this layout" in outcome.out
        assert "warning: only 29% of the bytes of the decoder's linear weights become FP8" in outcome.err
    tree = run("plan", checkpoint, *published, "--json").json()
    linear = tree["linear"]
    assert linear["share"] == linear["quantized_bytes"] / linear["linear_bytes"]
    ignored, head = linear["left"]
    assert (ignored["reason"], ignored["tensors"], ignored["bytes"]) == ("matches --ignore mlp", 6, 7680)
    assert ignored["names"] == ["mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]
    assert head["names"] == ["lm_head"]
    assert linear["linear_bytes"] - linear["quantized_bytes"] == ignored["bytes"]
    assert {engine: found["reads"] for engine, found in tree["engines"].items()} == {
        "vLLM": True,
        "SGLang": True,
        "transformers": False,
    }
    assert "list of unquantized modules: complete for vLLM, SGLang\n" in run("verify", checkpoint, destination).out
    whole = run("plan", checkpoint)
    assert "100% of the bytes of the decoder's linear weights become FP8\n" in whole.out
    assert "warning" not in whole.err


@pytest.mark.parametrize("case", BREAKS)
def test_bad_sources_print_one_error_line(
    run: Callable[..., Outcome], checkpoint: Path, destination: Path, case: str
) -> None:
    """Exit code 1, one line, nothing on stdout, no files left; the same with --json."""
    _, damage, _, says = BREAKS[case]
    damage(checkpoint)
    for extra in ([], ["--json"]):
        found = run("quantize", checkpoint, destination, *extra)
        assert (found.code, found.out) == (1, "")
        (line,) = found.errors
        assert re.search(says, line)
        assert "Traceback" not in found.err
        assert found.err.isascii() or "�" not in found.err
    assert not list(destination.parent.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-memory", "1KiB"],
        ["--max-memory", "much"],
        ["--device", "tpu"],
        ["--device", "cuda:99"],
        ["--select", "("],
        ["--select", "no such tensor"],
        ["--ignore", "."],
    ],
)
def test_bad_arguments_print_one_error_line(
    run: Callable[..., Outcome], checkpoint: Path, destination: Path, arguments: list[str]
) -> None:
    found = run("quantize", checkpoint, destination, *arguments)
    assert (found.code, found.out, len(found.errors)) == (1, "", 1)
    assert "Traceback" not in found.err
    assert not list(destination.parent.iterdir())


def test_the_budget_error_names_the_tensor_and_the_bytes(run: Callable[..., Outcome], checkpoint: Path) -> None:
    (line,) = run("plan", checkpoint, "--max-memory", "1000000").errors
    found = re.search(r"tensor '([^']+)': needs ([\d,]+) bytes of buffers, ([\d,]+) more than the budget", line)
    assert found
    assert found[1] in {name for held in model().values() for name in held}
    assert int(found[2].replace(",", "")) - int(found[3].replace(",", "")) == 1_000_000


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["quantize"],
        ["plan"],
        ["verify"],
        ["verify", "a", "b", "c"],
        ["plan", "a", "b"],
        ["quantize", "a", "b", "--numerics", "other"],
        ["quantize", "a", "b", "--nonfinite", "drop"],
        ["quantize", "a", "b", "--threads", "0"],
        ["plan", "a", "--overwrite"],
        ["inspect"],
        ["quantize", "a", "b", "--no-such-option"],
    ],
)
def test_wrong_usage_exits_2(run: Callable[..., Outcome], arguments: list[str]) -> None:
    found = run(*arguments)
    assert (found.code, found.out) == (2, "")
    if arguments:  # one line, with where to read more; without a command, the help
        assert found.errors == found.err.splitlines()
        assert len(found.errors) == 1
    assert "--help" in found.err


def test_verify_exits_1_and_lists_the_problems(
    run: Callable[..., Outcome], checkpoint: Path, destination: Path
) -> None:
    run("quantize", checkpoint, destination)
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    edit(destination / FIRST, {name: torch.tensor(1.0)})
    found = run("verify", checkpoint, destination, "--json")
    assert (found.code, len(found.errors)) == (1, 1)
    result = found.json()
    assert result["ok"] is False
    assert all(problem.keys() == {"tensor", "problem"} for problem in result["problems"])
    assert name in {problem["tensor"] for problem in result["problems"]}
    found = run("verify", checkpoint, destination)
    assert (found.code, len(found.errors)) == (1, 1)
    assert f"problem: {name}" in found.out


def test_a_tensor_kept_for_nan_is_reported(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """The note has the tensor, the number of values, the position of the first, and the fused tensors."""
    shards = model()
    spoiled = "model.layers.0.self_attn.k_proj.weight"
    shards[FIRST][spoiled][1, 2] = float("nan")
    source = write_checkpoint(tmp_path / "s", shards)
    refused = run("quantize", source, tmp_path / "d")
    assert refused.code == 1
    assert spoiled in refused.errors[0]
    done = run("quantize", source, tmp_path / "d", "--nonfinite", "keep", "--json")
    assert (done.code, done.json()["tensors_quantized"]) == (0, 11)
    assert f"{spoiled} is left unquantized: 1 values are NaN or Inf, the first at [1, 2]" in done.err
    for letter in "qv":
        assert spoiled.replace("k_proj", f"{letter}_proj") in done.err


def test_untrusted_names_cannot_control_the_terminal(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """Control characters in names of tensors and files never reach stdout or stderr."""
    evil = "\x1b[31m\x07\r\n\u202e"
    tensors = {f"{evil}.o_proj.weight": weight(4, 4), f"{evil}.q_proj.weight": weight(4, 4)}
    tensors |= {f"{evil}.k_proj.weight": weight(4, 4, 1), "fine.o_proj.weight": weight(4, 4)}
    source = write_checkpoint(tmp_path / "s", {ONE: tensors})
    (source / f"x{evil}.bin").write_bytes(b"")
    spoiled = dict(tensors)
    spoiled[f"{evil}.o_proj.weight"] = tensors["fine.o_proj.weight"] * float("nan")
    bad = write_checkpoint(tmp_path / "bad", {ONE: spoiled})
    stale = write_checkpoint(tmp_path / "stale", {ONE: tensors}, index=True)
    tree = json.loads((stale / INDEX).read_text())
    tree["weight_map"][f"{evil}gone"] = ONE
    (stale / INDEX).write_text(json.dumps(tree))
    old = write_checkpoint(tmp_path / "old", {ONE: {f"{evil}.weight": weight(4, 4, dtype=torch.float8_e4m3fn)}})
    outcomes = [
        run("plan", source),
        run("plan", source, "--json"),
        run("plan", source, "--select", "nothing_like_it"),
        run("quantize", source, tmp_path / "d", "--ignore", r"q_proj"),
        run("inspect", source),
        run("inspect", source / ONE),
        run("quantize", bad, tmp_path / "d2"),
        run("quantize", bad, tmp_path / "d2", "--nonfinite", "keep"),
        run("plan", stale),
        run("plan", old),
        run("plan", tmp_path / f"no{evil}"),
    ]
    (tmp_path / "d" / ONE).write_bytes(shard_bytes({f"{evil}more": weight(1)}))
    outcomes.append(run("verify", source, tmp_path / "d"))
    for outcome in outcomes:
        for text in (outcome.out, outcome.err):
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text), ascii(text)
        assert len(outcome.errors) <= 1


# ---- in a process of its own ----


def process(*arguments: object, **environment: str) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "nemotron_fp8", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_version_and_help_in_a_process() -> None:
    assert process("--version") == Outcome(0, f"nemotron-fp8, version {__version__}\n", "")
    found = process("--help")
    assert (found.code, found.err) == (0, "")
    for command in ("quantize", "plan", "verify", "inspect", "demo"):
        assert command in found.out


def test_a_refusal_in_a_process(tmp_path: Path) -> None:
    """The error line is all of stderr, and its names survive a terminal with ASCII only."""
    found = process("plan", tmp_path / "é", PYTHONIOENCODING="ascii")
    assert (found.code, found.out) == (1, "")
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1


def test_demo_in_a_process(tmp_path: Path) -> None:
    """The demo creates a checkpoint of several shards, quantizes and verifies it; a second run is rejected."""
    found = process("demo", tmp_path / "demo")
    assert (found.code, found.err.count("error:")) == (0, 0)
    assert "matches nemotron-tiny" in found.out
    assert len(list((tmp_path / "demo" / "nemotron-tiny-FP8").glob("*.safetensors"))) == 3
    refused = process("demo", tmp_path / "demo")
    assert (refused.code, len(refused.errors)) == (1, 1)


def test_torch_without_numpy_is_no_cause_for_a_warning(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No warning in this process or in a worker, with any PYTHONWARNINGS; other warnings are shown."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run("--version").code == 0
        warnings.warn("Failed to initialize NumPy: No module named 'numpy'", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]
    assert os.environ["PYTHONWARNINGS"] == "error,ignore:Failed to initialize NumPy"
    code = "import warnings; warnings.warn('Failed to initialize NumPy: none')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
