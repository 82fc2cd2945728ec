"""Evaluations and calibrations draw a bar, and their results are values like all others."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import tqdm

from nemotron_fp8 import calibrate_repo, evaluate_repo, quantize_repo
from nemotron_fp8.errors import SampleError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engines


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a short run on the CPU."""
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps([[5 + (i * i + s) % 400 for i in range(24)] for s in range(3)]), encoding="utf-8")
    return {"tokens": tokens, "device": "cpu", "state_dir": tmp_path / "state", "progress": True}


def test_bars_name_the_layers(
    nemotron: Path, tmp_path: Path, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_repo(nemotron, tmp_path / "d")
    evaluation = evaluate_repo(nemotron, tmp_path / "d", **arguments)
    shown = capsys.readouterr().err
    assert "evaluate, layer 1 of 4: " in shown
    assert "evaluate, output layer: 100%" in shown.rpartition("\r")[2]
    amaxes = calibrate_repo(nemotron, **arguments)
    assert "calibrate, layer 4 of 4: 100%" in capsys.readouterr().err.rpartition("\r")[2]
    assert not tqdm.tqdm._instances
    for value in (evaluation, amaxes):
        assert pickle.loads(pickle.dumps(value)) == value
        assert len(repr(value)) < 500
        assert "torch" in value._repr_html_()  # type: ignore[attr-defined]  # notebooks call it


def test_an_error_closes_the_bar(nemotron: Path, arguments: dict[str, Any]) -> None:
    arguments["tokens"].write_text("[[1]]")
    with pytest.raises(SampleError):
        calibrate_repo(nemotron, **arguments)
    assert not tqdm.tqdm._instances
