"""An evaluation that is killed anywhere, in its saved state or its computation, is resumed to the same figures."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, _filesystem, calibrate_repo, quantize_repo
from nemotron_fp8.destinations import file_sink
from nemotron_fp8.evaluation.evaluate import evaluate_repo
from nemotron_fp8.inference import layer_loop, state
from tests.inference.test_evaluation_device import figures

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engines

CALLS = ("open", "fdopen", "write", "fsync", "rename", "close")
"""System calls of the saved state that are counted."""


class Killed:
    """Counts events, and kills the process at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def install(event: Killed) -> None:
    """Count the system calls of the saved state, and the forwards of layers."""

    class Counted:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            if name not in CALLS:
                return real

            def call(*args: Any, **kwargs: Any) -> Any:
                event()
                return real(*args, **kwargs)

            return call

    for module in (state, file_sink, _filesystem):
        module.os = Counted()  # type: ignore[assignment]  # in a process of its own
    run_layer = layer_loop.LayerLoop._run_layer

    def counted(self: Any, *args: Any) -> None:
        event()
        run_layer(self, *args)

    layer_loop.LayerLoop._run_layer = counted  # type: ignore[method-assign]  # in a process of its own


def forked(work: Callable[[], object]) -> int:
    """Do work in a fork of this process, which has imported everything; return how it ended."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, nemotron: Path) -> tuple[Path, Path, Path]:
    """The model, a result with stored scales of which some values clip, and tokens."""
    root = tmp_path_factory.mktemp("kills")
    draw = torch.Generator().manual_seed(5)
    tokens = root / "tokens.json"
    tokens.write_text(json.dumps(torch.randint(3, 500, (3, 32), generator=draw).tolist()))
    amaxes = calibrate_repo(nemotron, tokens=tokens, factor=0.5, device="cpu", state_dir=root / "state", threads=1)
    quantize_repo(nemotron, root / "result", Recipe(activations="static", kv_cache="fp8"), amaxes=amaxes)
    # In this process once, so that its forks have everything imported; one thread, because no thread survives a fork.
    torch.set_num_threads(1)
    evaluate_repo(nemotron, root / "result", tokens=tokens, device="cpu", state_dir=root / "state", threads=1)
    return nemotron, root / "result", tokens


def test_killed_at_every_point(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, result, tokens = pair
    folder, out = tmp_path / "state", tmp_path / "figures.json"

    def run(at: int | None) -> None:
        event = Killed(at)
        install(event)
        evaluation = evaluate_repo(source, result, tokens=tokens, device="cpu", state_dir=folder, threads=1)
        out.write_text(json.dumps([event.count, figures(evaluation)]))

    assert forked(lambda: run(None)) == 0
    points, expected = json.loads(out.read_text())
    assert points > 40
    assert expected["results"][0]["clipped_values"] > 0
    assert not folder.exists()
    resumed = 0
    for at in range(1, points + 1):
        out.unlink(missing_ok=True)
        assert os.WTERMSIG(forked(lambda at=at: run(at))) == signal.SIGKILL
        assert not out.exists()
        assert forked(lambda: run(None)) == 0
        count, found = json.loads(out.read_text())
        assert found == expected, at
        assert not folder.exists(), at
        resumed += count < points
    assert resumed > points // 2


def test_killed_again_and_again(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Several kills of one evaluation: each run does little more than a layer."""
    source, result, tokens = pair
    folder, out = tmp_path / "state", tmp_path / "figures.json"

    def run(at: int | None) -> None:
        install(Killed(at))
        evaluation = evaluate_repo(source, result, tokens=tokens, device="cpu", state_dir=folder, threads=1)
        out.write_text(json.dumps(figures(evaluation)))

    assert forked(lambda: run(None)) == 0
    expected = json.loads(out.read_text())
    out.unlink()
    kills = 0
    while os.WIFSIGNALED(forked(lambda: run(33))):
        kills += 1
        assert kills < 30
    assert kills >= 3
    assert json.loads(out.read_text()) == expected
