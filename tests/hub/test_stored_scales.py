"""Scales from a calibration in a result on the Hub: the same files as in a folder, checked without a shard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from nemotron_fp8.planning.amaxes import Amaxes
from tests.hub.conversion import SOURCE, Options, checkpoint
from tests.support.amaxes import RUN
from tests.support.stops import StoppedError, stop_at

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub

STATIC = Recipe(format="modelopt", activations="static")
TARGET = "hf://me/target"
AMAXES = Amaxes({f"model.layers.{i}.mlp.up_proj": 1.0 + i for i in range(4)}, {}, {}, (RUN,))
LAST = "model-00004-of-00004.safetensors"


@pytest.fixture
def options(hub: Hub, client: HubClient, tmp_path: Path) -> Options:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    return Options(client, tmp_path / "work")


def test_from_hub_to_hub_as_from_folder_to_folder(hub: Hub, options: Options, tmp_path: Path) -> None:
    file = tmp_path / "amaxes.json"
    file.write_bytes(AMAXES.render())
    quantize_repo(str(SOURCE), TARGET, STATIC, "cpu", hub=options, amaxes=file)
    quantize_repo(tmp_path / "source", tmp_path / "result", STATIC, "cpu", amaxes=AMAXES)
    ours = {path.name: path.read_bytes() for path in (tmp_path / "result").iterdir() if path.name != "README.md"}
    there = hub.files("me/target")
    assert {name: there[name] for name in ours if name != "nemotron_fp8.json"} == {
        name: data for name, data in ours.items() if name != "nemotron_fp8.json"
    }
    assert there["nemotron_fp8.amaxes.json"] == AMAXES.render()
    assert verify_repo(None, TARGET, hub=options).ok
    assert verify_repo(str(SOURCE), TARGET, hub=options).ok


def test_another_result_in_its_place_leaves_no_scale_behind(hub: Hub, options: Options) -> None:
    """No amaxes, no figures, and no file that tells engines another layout; files of the user stay."""
    statistics = STATIC.model_copy(update={"stats": True})
    quantize_repo(str(SOURCE), TARGET, statistics, "cpu", hub=options, amaxes=AMAXES)
    about_weights = {"nemotron_fp8.amaxes.json", "nemotron_fp8.stats.json", "hf_quant_config.json"}
    assert about_weights <= hub.files("me/target").keys()
    hub.store.seed("me/target", {"notes.txt": b"mine"})
    quantize_repo(str(SOURCE), TARGET, Recipe(), "cpu", hub=options, overwrite=True)
    there = hub.files("me/target")
    assert not about_weights & there.keys()
    assert there["notes.txt"] == b"mine"
    found = verify_repo(str(SOURCE), TARGET, hub=options).problems
    assert {problem.tensor for problem in found} == {"notes.txt"}


def test_a_stopped_run_goes_on(hub: Hub, options: Options) -> None:
    with pytest.raises(StoppedError):
        quantize_repo(str(SOURCE), TARGET, STATIC, "cpu", progress=stop_at(LAST), hub=options, amaxes=AMAXES, threads=1)
    report = quantize_repo(str(SOURCE), TARGET, STATIC, "cpu", hub=options, amaxes=AMAXES, threads=1)
    assert report.resumed
    assert verify_repo(str(SOURCE), TARGET, hub=options).ok
