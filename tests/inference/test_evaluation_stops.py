"""SIGTERM ends an evaluation and a calibration within ten seconds; `status` shows their layers; both are resumed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import quantize_repo, status_of
from tests.support.doubles import wait_for
from tests.support.ends import MAIN, Command

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engines

COMPUTES = """
import sys, torch
from pathlib import Path
from nemotron_fp8.inference import layer_loop
from tests.support.doubles import announce
flag = Path(sys.argv.pop(1))
run_layer = layer_loop.LayerLoop._run_layer
def slow(self, hidden, number, *rest):
    if number == 2:
        announce(flag)
        matrix = torch.ones(3000, 3000)
        while True:
            matrix = matrix @ matrix
    return run_layer(self, hidden, number, *rest)
layer_loop.LayerLoop._run_layer = slow
"""
"""The third layer never comes to an end, in calls of torch."""
READS = """
import sys, time
from pathlib import Path
from nemotron_fp8.inference import weights
from tests.support.doubles import announce
flag = Path(sys.argv.pop(1))
fill = weights.Weights.fill
def slow(self, part, *rest):
    if ".2." in str(part):
        announce(flag)
        from nemotron_fp8._utils import parallel_for
        parallel_for(2, range(100_000), lambda _: time.sleep(0.01))
    return fill(self, part, *rest)
weights.Weights.fill = slow
"""
"""The weights of the third layer are read for ever, in several threads."""


@pytest.mark.parametrize("program", [COMPUTES, READS], ids=["computes", "reads"])
@pytest.mark.parametrize("what", ["evaluate", "calibrate"])
def test_a_run_layer_by_layer(nemotron: Path, tmp_path: Path, what: str, program: str) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(torch.randint(3, 500, (3, 32), generator=torch.Generator().manual_seed(5)).tolist()))
    other = tmp_path / ("result" if what == "evaluate" else "amaxes.json")
    if what == "evaluate":
        quantize_repo(nemotron, other)
    state = tmp_path / "state"
    words = (what, nemotron, other, "--tokens", tokens, "--state-dir", state, "--device", "cpu", "-q", "--json")
    flag = tmp_path / "flag"
    command = Command.start(flag, *words, program=program + MAIN)
    wait_for(flag, process=command.process)
    found = status_of(state)
    assert (found.kind, found.state) == ("evaluation", "running")
    layers = found.shards_done
    assert (layers, found.shards_total) == (2, 4)
    command.end()
    found = status_of(state)
    assert (found.state, found.shards_done, found.error) == ("stopped", layers, "interrupted")
    again = Command.start(*words)
    _, err = again.process.communicate(timeout=300)
    assert again.process.returncode == 0, err
    assert not state.exists()
