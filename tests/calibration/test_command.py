"""The command ``calibrate`` and its call, up to the model: arguments, the file to write, and merges."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from nemotron_fp8 import Amaxes, calibrate_repo
from nemotron_fp8.cli.exit import again
from nemotron_fp8.cli.main import cli
from nemotron_fp8.errors import AmaxesFileError, DestinationExistsError, RecipeError, WriteError
from nemotron_fp8.planning.amaxes import CalibrationRun, merge_amaxes, read_amaxes
from tests.support.amaxes import amaxes_of
from tests.support.decoders import decoder, write

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

RUN = CalibrationRun("m", "t.txt", "0" * 64, 16, 512, "0.1.0", "2.13.0", "5.23.0")
A = Amaxes({"a.q_proj": 3.5, "lm_head": 8.0}, {"a": 9.25}, {"a": 1.0}, (RUN,))
B = Amaxes({"a.q_proj": 4.5, "b.3.up": 1.0}, {"a": 2.0}, {"a": 3.0}, (RUN._replace(text="u.txt"),))


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["calibrate", *map(str, words)])


def written(folder: Path, **amaxes: Amaxes) -> list[Path]:
    paths = []
    for name, each in amaxes.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_bytes(each.render())
    return paths


def test_files_are_merged(tmp_path: Path) -> None:
    a, b = written(tmp_path, a=A, b=B)
    out = tmp_path / "out.json"
    done = run("--merge", a, b, out)
    assert done.exit_code == 0, done.output
    assert read_amaxes(out) == merge_amaxes([("a", A), ("b", B)])
    assert f"{out} written" in done.output
    assert "inputs of 3 modules, keys and values of 1 attention module\n" in done.output
    assert "2 files of 2 calibrations" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "out.json"]


def test_the_result_of_a_merge_may_be_one_of_its_files(tmp_path: Path) -> None:
    a, b = written(tmp_path, a=A, b=B)
    assert run("--merge", a, b, a).exit_code == 0
    assert read_amaxes(a) == merge_amaxes([("a", A), ("b", B)])


def test_a_merge_of_several_checkpoints_is_noted(tmp_path: Path) -> None:
    """A copy of a checkpoint can have another name, so that it is no error."""
    a, b = written(tmp_path, a=A, b=replace(B, runs=(RUN._replace(source="other"),)))
    said = "the calibrations are of m, other"
    assert said in run("--merge", a, b, tmp_path / "out.json").output
    assert said not in run("--merge", a, b, tmp_path / "out.json", "--quiet").output
    assert said not in run("--merge", a, a, tmp_path / "out.json").output


def test_a_merge_as_json(tmp_path: Path) -> None:
    a, b = written(tmp_path, a=A, b=B)
    done = run("--merge", a, b, tmp_path / "out.json", "--json")
    found = json.loads(done.output)
    assert (found["inputs"], found["k"], found["v"], found["merged"]) == (3, 1, 1, 2)
    assert found["tokens"] == 2 * 16 * 512
    assert found["sha256"] == read_amaxes(tmp_path / "out.json").sha256


def test_files_of_other_kinds_are_not_merged(tmp_path: Path) -> None:
    a, b = written(tmp_path, a=A, b=replace(B, factor=2.0))
    done = run("--merge", a, b, tmp_path / "out.json")
    assert isinstance(done.exception, AmaxesFileError)
    assert f"{b}: no usable amaxes: its factor is 2.0" in str(done.exception)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--merge", "a", "b"], "--merge needs two files of amaxes or more, and the file to write"),
        (["--merge", "a", "b", "c", "--text", "t"], "--text is about a calibration, and --merge runs none"),
        (["--merge", "a", "b", "c", "--percentile", "99"], "--percentile is about a calibration"),
        (["--merge", "a", "b", "c", "--factor", "1"], "--factor is about a calibration"),
        (["--merge", "a", "b", "c", "--revision", "x"], "--revision is about a calibration"),
        (["a"], "name the source SRC and the file AMAXES.json to write"),
        (["a", "b", "c"], "name the source SRC and the file AMAXES.json to write"),
        (["a", "b", "--sequences", "0"], "--sequences"),
        (["a", "b", "--percentile", "x"], "--percentile"),
    ],
)
def test_wrong_usage(words: list[str], problem: str, tmp_path: Path) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert problem in done.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"percentile": 49}, r"percentile \(--percentile\) is 49, not a number from 50 to 100"),
        ({"percentile": 101.5}, r"percentile \(--percentile\) is 101\.5"),
        ({"percentile": float("nan")}, r"percentile \(--percentile\) is nan"),
        ({"percentile": "99"}, r"percentile \(--percentile\) is '99'"),
        ({"percentile": True}, r"percentile \(--percentile\) is True"),
        ({"factor": 0}, r"factor \(--factor\) is 0, not a number from 0\.01 to 100"),
        ({"factor": float("inf")}, r"factor \(--factor\) is inf"),
        ({"factor": None}, r"factor \(--factor\) is None"),
        ({"text": "t", "tokens": "u"}, r"\(--text\) and tokens \(--tokens\) are both given"),
        ({"sequences": 0}, r"sequences \(--sequences\) is 0"),
        ({"length": 1}, r"length \(--length\) is 1"),
        ({"threads": 0}, "threads is 0"),
        ({"progress": 1}, "progress is 1"),
        ({"amaxes_file": ""}, "amaxes_file is ''"),
        ({"amaxes_file": 3}, "amaxes_file is 3"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """Found before the source is opened, and before transformers is imported."""
    with pytest.raises(RecipeError, match=problem):
        calibrate_repo(tmp_path / "none", **arguments)


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    """Found before the source is opened; ``--overwrite`` replaces it."""
    a, b = written(tmp_path, a=A, b=B)
    other = tmp_path / "config.json"
    other.write_text('{"model_type": "llama"}')
    with pytest.raises(DestinationExistsError, match=r"exists and is no file of amaxes; .* \(--overwrite\)"):
        calibrate_repo(tmp_path / "none", other)
    assert isinstance(run("--merge", a, b, other).exception, DestinationExistsError)
    assert other.read_text() == '{"model_type": "llama"}'
    assert run("--merge", a, b, other, "--overwrite").exit_code == 0
    assert read_amaxes(other) == merge_amaxes([("a", A), ("b", B)])


@pytest.mark.parametrize(
    ("place", "problem"), [("folder", "is a folder; name a file"), ("none/a.json", "no such folder; create it first")]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_that_is_no_file(place: str, problem: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=problem):
        calibrate_repo(tmp_path / "none", tmp_path / place, overwrite=overwrite)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """Its target is replaced; a link to nowhere is no file of amaxes."""
    a, b = written(tmp_path, a=A, b=B)
    link = tmp_path / "link.json"
    link.symlink_to("a.json")
    assert run("--merge", a, b, link).exit_code == 0
    assert link.is_symlink()
    assert read_amaxes(a) == merge_amaxes([("a", A), ("b", B)])
    lost = tmp_path / "lost.json"
    lost.symlink_to("nowhere.json")
    assert isinstance(run("--merge", a, b, lost).exception, DestinationExistsError)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_write_leaves_the_file_before(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    a, b = written(tmp_path, a=A, b=B)
    monkeypatch.setattr(os, call, fail)
    done = run("--merge", a, b, a)
    monkeypatch.undo()
    assert isinstance(done.exception, WriteError)
    assert "No space left" in str(done.exception)
    assert read_amaxes(a) == A
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for overwrite in (False, True):
        with pytest.raises(WriteError, match="is no regular file"):
            calibrate_repo(tmp_path / "none", tmp_path / "pipe", overwrite=overwrite)


def test_an_interrupted_calibration_is_resumed_by_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["nemotron-fp8", "calibrate", "SRC", "amaxes.json"])
    assert again() == "run the same command again to resume"


@pytest.mark.parametrize(("kv_cache", "cached"), [("none", 0), ("fp8", 4)])
def test_a_plan_counts_the_scales_and_names_the_calibrated_checkpoint(
    tmp_path: Path, kv_cache: str, cached: int
) -> None:
    source = write(tmp_path / "source", {"model_type": "llama"}, decoder())
    (tmp_path / "amaxes.json").write_bytes(amaxes_of(source).render())
    words = ["plan", source, "--activations", "static", "--kv-cache", kv_cache, "--amaxes", tmp_path / "amaxes.json"]
    done = CliRunner().invoke(cli, list(map(str, words)))
    said = f"scales   14 of activations and {cached} of the KV cache, from a calibration of tiny with 128 tokens"
    assert said in done.output.splitlines()


def test_a_folder_that_takes_no_file_is_known_before_the_calibration() -> None:
    """Merging checks the same; the message names the file, not a temporary one."""
    with pytest.raises(WriteError, match=r"^/proc/amaxes\.json: cannot be written: .*another folder$"):
        calibrate_repo("none", "/proc/amaxes.json")
