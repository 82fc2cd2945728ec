"""Stacked experts of a result on the Hub come back under the names of their source, as its manifest records them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8 import dequantize_repo, verify_repo
from tests.conversion.test_stacked_experts import KINDS, check_same, held, products, source_of, stacked
from tests.hub.conversion import Options, convert
from tests.support.checkpoints import MANIFEST, ONE, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub


def test_stacks_come_back_from_a_result_on_the_hub(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """Also from a repository without the manifest: there, Qwen3 MoE keeps the single experts that engines load."""
    kind = KINDS["Qwen3 MoE"]
    source = write_checkpoint(tmp_path / "source", {ONE: source_of(kind, 256)}, config=kind.config)
    hub.store.seed("nv/source", {path.name: path.read_bytes() for path in source.iterdir()})
    convert(client, tmp_path / "work")
    options = Options(client, tmp_path / "work")
    files = hub.files("me/target")
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / ONE).write_bytes(files[ONE])
    plain = products(held(tmp_path / "fp8"))

    dequantize_repo("hf://me/target", tmp_path / "plain", hub=options)
    check_same(held(tmp_path / "plain"), stacked(kind, plain))
    assert verify_repo("hf://me/target", tmp_path / "plain", hub=options).ok

    hub.store.seed("nv/bare", {name: data for name, data in files.items() if name != MANIFEST})
    dequantize_repo("hf://nv/bare", tmp_path / "again", hub=options)
    check_same(held(tmp_path / "again"), plain)
