"""A quantized source on the Hub, with scales in other shards than their weights: the bytes of a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8 import Recipe, verify_repo
from tests.hub.conversion import Options, convert
from tests.support.fp8_sources import mixed

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub


def test_the_result_is_that_of_a_folder(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    source, _ = mixed(tmp_path / "source")
    hub.store.seed("nv/source", {path.name: path.read_bytes() for path in source.iterdir()})
    recipe = Recipe(ignore=(r"layers\.1\.mlp",))
    report = convert(client, tmp_path / "work", recipe=recipe)
    assert (report.recoded.kept, report.tensors_dequantized) == (2, 1)
    folder = tmp_path / "fp8"
    convert(client, tmp_path / "work", str(source), str(folder), recipe=recipe)
    shards = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert {name: data for name, data in hub.files("me/target").items() if name in shards} == shards
    assert verify_repo(str(source), "hf://me/target", hub=Options(client, tmp_path / "work")).ok
    assert verify_repo("hf://nv/source", folder, hub=Options(client, tmp_path / "work")).ok
