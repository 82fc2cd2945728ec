"""An evaluation on a device that is late gives the figures of the CPU, and on one without memory an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import quantize_repo
from nemotron_fp8.errors import EvaluationBudgetError
from nemotron_fp8.evaluation.evaluate import evaluate_repo
from nemotron_fp8.inference import session
from tests.support.fake_device import FakeDevice

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engines


def figures(evaluation: Any) -> dict[str, Any]:
    found: dict[str, Any] = evaluation.to_json()
    return {key: value for key, value in found.items() if key not in ("seconds", "peak_resident_bytes", "device")}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    draw = torch.Generator().manual_seed(5)
    path.write_text(json.dumps(torch.randint(3, 500, (3, 32), generator=draw).tolist()))
    return path


@pytest.mark.parametrize("seed", range(3))
def test_on_a_device(seed: int, nemotron: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_repo(nemotron, tmp_path / "result")
    arguments: dict[str, Any] = {"tokens": tokens, "state_dir": tmp_path / "state"}
    expected = figures(evaluate_repo(nemotron, tmp_path / "result", device="cpu", **arguments))
    device = FakeDevice(seed, slowest=0.02)
    monkeypatch.setattr(session, "_device", lambda _: device)
    assert figures(evaluate_repo(nemotron, tmp_path / "result", **arguments)) == expected
    assert device.counts["upload"] == 8  # 4 layers of 2 checkpoints
    assert device.host_now == 0
    device.end()


def test_a_device_without_memory(nemotron: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(0, free=1 << 20)
    monkeypatch.setattr(session, "_device", lambda _: device)
    with pytest.raises(EvaluationBudgetError, match="layer on fake:0"):
        evaluate_repo(nemotron, nemotron, tokens=tokens, state_dir=tmp_path / "state")
    assert not (tmp_path / "state").exists()
    device.end()


@pytest.mark.parametrize("spill", [False, True])
def test_layers_and_hidden_states_in_files(spill: bool, nemotron: Path, tokens: Path, tmp_path: Path) -> None:
    """Within a budget below that of a layer, figures are those of a large one; below the rest, an error says so."""
    arguments: dict[str, Any] = {"tokens": tokens, "state_dir": tmp_path / "state", "device": "cpu"}
    expected = figures(evaluate_repo(nemotron, nemotron, **arguments))
    with pytest.raises(EvaluationBudgetError) as caught:
        evaluate_repo(nemotron, nemotron, max_memory=1, spill=spill, **arguments)
    error = caught.value
    assert not (tmp_path / "state").exists()
    assert figures(evaluate_repo(nemotron, nemotron, max_memory=error.needed, spill=spill, **arguments)) == expected
    with pytest.raises(EvaluationBudgetError, match="1 more than the budget"):
        evaluate_repo(nemotron, nemotron, max_memory=error.needed - 1, spill=spill, **arguments)
