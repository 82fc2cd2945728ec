"""quantize --dry-run with DST: what a run would meet there, without touching it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from nemotron_fp8 import quantize_repo
from nemotron_fp8.cli.main import cli
from nemotron_fp8.destinations.folder import FolderDestination
from nemotron_fp8.errors import DestinationExistsError
from tests.cli.test_wrong_inputs import everything

if TYPE_CHECKING:
    from pathlib import Path


def dry(source: Path, destination: Path, *words: str) -> Result:
    arguments = ["quantize", str(source), str(destination), "--dry-run", "--device", "cpu", *words]
    return CliRunner().invoke(cli, arguments)


def test_other_files_are_refused_as_by_a_run(checkpoint: Path, destination: Path) -> None:
    destination.mkdir()
    for name in ("a.txt", "b", "c", "d\n"):
        (destination / name).write_text("mine")
    done = dry(checkpoint, destination)
    assert done.exit_code == 1
    assert isinstance(done.exception, DestinationExistsError)
    assert f"{destination}: already holds other files ('a.txt', 'b', 'c' and 1 more)" in str(done.exception)
    with pytest.raises(DestinationExistsError) as caught:
        quantize_repo(checkpoint, destination)
    assert str(caught.value) == str(done.exception)
    replaced = dry(checkpoint, destination, "--overwrite")
    assert replaced.exit_code == 0
    assert "a run replaces them (--overwrite)" in replaced.stderr


def test_a_result_is_told_from_that_of_another_recipe(checkpoint: Path, destination: Path) -> None:
    assert "note: " not in dry(checkpoint, destination).stderr
    quantize_repo(checkpoint, destination)
    before = everything(destination.parent)
    same = dry(checkpoint, destination)
    assert same.exit_code == 0
    assert "already holds a result of the same recipe" in same.stderr
    other = dry(checkpoint, destination, "--granularity", "tensor")
    assert other.exit_code == 1
    assert "a result of quantize by nemotron_fp8" in str(other.exception)
    assert "its recipe differs: granularity is 'channel', yours 'tensor'; choose" in str(other.exception)
    assert everything(destination.parent) == before


def test_an_unfinished_run_is_resumed_or_is_another(
    checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderDestination, "publish", publish)
        with pytest.raises(KeyboardInterrupt):
            quantize_repo(checkpoint, destination)
    before = everything(destination.parent)
    same = dry(checkpoint, destination)
    assert "a run resumes it, with 2 of 2 shards finished" in same.stderr
    other = dry(checkpoint, destination, "--granularity", "tensor", "--json")
    assert json.loads(other.stdout)["linear"]["share"] == 1
    assert "its recipe differs: granularity is 'channel', yours 'tensor'; a run would be refused" in other.stderr
    assert "discards it (--restart)" in dry(checkpoint, destination, "--restart").stderr
    assert everything(destination.parent) == before
    refused = CliRunner().invoke(cli, ["quantize", str(checkpoint), str(destination), "--granularity", "tensor"])
    assert "its recipe differs: granularity is 'channel', yours 'tensor'" in str(refused.exception)
