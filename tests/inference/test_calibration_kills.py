"""A calibration that is killed anywhere, in its saved state, its layers or its file, is resumed to the same bytes."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import calibrate_repo
from nemotron_fp8.planning.amaxes import parse_amaxes
from tests.inference.layer_by_layer import write_tokens
from tests.inference.test_evaluation_kills import Killed, forked, install

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, qwen3_moe: Path) -> Path:
    root = tmp_path_factory.mktemp("kills")
    found = write_tokens(
        root / "tokens.json", torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(5))
    )
    # In this process once, so that its forks have everything imported; one thread, because no thread survives a fork.
    torch.set_num_threads(1)
    calibrate_repo(qwen3_moe, tokens=found, device="cpu", state_dir=root / "state", threads=1)
    return found


class Runs:
    """Calibrations in processes of their own, of which some are killed."""

    def __init__(self, source: Path, tokens: Path, folder: Path, percentile: float | None) -> None:
        self._source, self._tokens, self._percentile = source, tokens, percentile
        self.state, self.out, self.count = folder / "state", folder / "here" / "amaxes.json", folder / "count.json"
        self.out.parent.mkdir()

    def run(self, at: int | None) -> int:
        """Run once, killed at an event if it is given; return how the process ended."""

        def calibrate() -> None:
            event = Killed(at)
            install(event)
            given = {"tokens": self._tokens, "state_dir": self.state, "percentile": self._percentile}
            calibrate_repo(self._source, self.out, device="cpu", threads=1, **given)
            self.count.write_text(json.dumps(event.count))

        return forked(calibrate)

    @property
    def events(self) -> int:
        """Events of the last run that was not killed."""
        return int(json.loads(self.count.read_text()))


@pytest.mark.parametrize("percentile", [None, 99.0])
def test_killed_at_every_point(percentile: float | None, qwen3_moe: Path, tokens: Path, tmp_path: Path) -> None:
    """The file is whole or not there, and nothing else remains."""
    runs = Runs(qwen3_moe, tokens, tmp_path, percentile)
    assert runs.run(None) == 0
    points, expected = runs.events, runs.out.read_bytes()
    assert parse_amaxes(expected, "a").percentile == percentile
    assert points > 30
    resumed = 0
    for at in range(1, points + 1, 1 if percentile is None else 5):
        runs.out.unlink()
        assert os.WTERMSIG(runs.run(at)) == signal.SIGKILL
        assert not runs.out.exists() or runs.out.read_bytes() == expected, at
        assert runs.run(None) == 0
        assert runs.out.read_bytes() == expected, at
        assert not runs.state.exists(), at
        assert [path.name for path in runs.out.parent.iterdir()] == [runs.out.name], at
        resumed += runs.events < points
    assert resumed > 0 if percentile else resumed > points // 2


def test_killed_again_and_again(qwen3_moe: Path, tokens: Path, tmp_path: Path) -> None:
    """Several kills of one calibration: each run does little more than a layer."""
    runs = Runs(qwen3_moe, tokens, tmp_path, None)
    assert runs.run(None) == 0
    expected = runs.out.read_bytes()
    runs.out.unlink()
    kills = 0
    while os.WIFSIGNALED(runs.run(27)):
        kills += 1
        assert kills < 30
    assert kills >= 2
    assert runs.out.read_bytes() == expected


def test_a_kill_leaves_the_file_before(qwen3_moe: Path, tokens: Path, tmp_path: Path) -> None:
    """A file of amaxes that is replaced is the old one or the new one."""
    runs = Runs(qwen3_moe, tokens, tmp_path, None)
    assert runs.run(None) == 0
    points, new = runs.events, runs.out.read_bytes()
    old = parse_amaxes(new, "a").times(2).render()
    found = set()
    for at in range(points - 30, points + 1):
        runs.out.write_bytes(old)
        assert os.WTERMSIG(runs.run(at)) == signal.SIGKILL
        found.add(runs.out.read_bytes())
        assert runs.run(None) == 0
    assert found == {old, new}
