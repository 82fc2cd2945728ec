"""quantize --calibrate: the bytes of two commands, one calibration however often the conversion is begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import verify_repo
from tests.support.checkpoints import INDEX, contents

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engines

WORDS = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
STATIC = ["--format", "modelopt", "--activations", "static", "--kv-cache", "fp8"]
AGAIN = "the amaxes of the calibration before are used"


def command(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command with a cache in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "nemotron_fp8", *map(str, words)],
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_command_does_what_two_do(smollm2: Path, tmp_path: Path) -> None:
    """A conversion that fails keeps the amaxes, the next one uses them, and the last one removes them."""
    (tmp_path / "words.txt").write_text(WORDS)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    first = [*STATIC, "--calibrate", tmp_path / "words.txt"]
    taken = command(tmp_path, "quantize", smollm2, tmp_path / "taken", *first)
    assert taken.returncode == 1
    assert "already holds other files" in taken.stderr
    assert not (tmp_path / "cache").exists()  # it was not calibrated
    failed = command(tmp_path, "quantize", smollm2, tmp_path / "one", *first, "--base-model", "foo")
    assert failed.returncode == 1
    assert "not the name of a model" in failed.stderr
    done = command(tmp_path, "quantize", smollm2, tmp_path / "one", *first)
    assert done.returncode == 0, done.stderr
    assert AGAIN in done.stderr
    assert not list((tmp_path / "cache").rglob("*.json"))
    two = command(tmp_path, "calibrate", smollm2, tmp_path / "amaxes.json", "--text", tmp_path / "words.txt")
    assert two.returncode == 0, two.stderr
    two = command(tmp_path, "quantize", smollm2, tmp_path / "two", *STATIC, "--amaxes", tmp_path / "amaxes.json")
    assert two.returncode == 0, two.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify_repo(smollm2, tmp_path / "one").problems == ()


def test_the_sample_of_the_calibration_can_be_chosen(smollm2: Path, tmp_path: Path) -> None:
    """Sequences and length, or token ids instead of a text; a dry run plans its scales without a calibration."""
    (tmp_path / "words.txt").write_text(WORDS)
    (tmp_path / "tokens.json").write_text(json.dumps([[(7 * i + j) % 4000 for j in range(24)] for i in range(3)]))
    text = [*STATIC, "--calibrate", tmp_path / "words.txt", "--sequences", "2", "--length", "32"]
    planned = command(tmp_path, "quantize", smollm2, *text, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert not (tmp_path / "cache").exists()
    made = command(tmp_path, "quantize", smollm2, tmp_path / "one", *text, "-v")
    assert made.returncode == 0, made.stderr
    scales = json.loads(planned.stdout)["stored_scales"]
    # A scale of the inputs of each quantized weight; the layout stores a copy of those that engines merge.
    assert scales == sum(
        "input_scale" in name for name in json.loads((tmp_path / "one" / INDEX).read_text())["weight_map"]
    )
    tokens = ["--tokens", tmp_path / "tokens.json"]
    for name, sample in (("words", ["--text", *text[-5:]]), ("tokens", tokens)):
        amaxes = tmp_path / f"{name}-amaxes.json"
        assert command(tmp_path, "calibrate", smollm2, amaxes, *sample).returncode == 0
        two = command(tmp_path, "quantize", smollm2, tmp_path / name, *STATIC, "--amaxes", amaxes)
        assert two.returncode == 0, two.stderr
    done = command(tmp_path, "quantize", smollm2, tmp_path / "two", *STATIC, *tokens)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "words")
    assert contents(tmp_path / "two") == contents(tmp_path / "tokens") != contents(tmp_path / "words")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "nothing uses them"),
        (["--activations", "static", "--format", "fp8", "--ignore", "."], "none of 272 tensors"),
        ([*STATIC, "--amaxes", "amaxes.json"], "pass one of them"),
        ([*STATIC, "--tokens", "tokens.json"], "pass one of them"),
    ],
)
def test_a_recipe_that_fails_is_known_before_the_calibration(
    smollm2: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    (tmp_path / "words.txt").write_text(WORDS)
    done = command(tmp_path, "quantize", smollm2, tmp_path / "x", "--calibrate", tmp_path / "words.txt", *options)
    assert done.returncode
    assert says in done.stderr
    assert "layer" not in done.stderr.lower().replace("linear layer", "")
    assert not (tmp_path / "cache").exists()
