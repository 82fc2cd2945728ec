"""A NeMo checkpoint in a repository: planned from small files, read through the opener of the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo
from nemotron_fp8.checkpoint.inventory import CARD, MANIFEST
from nemotron_fp8.errors.nemo import MissingChunkError
from nemotron_fp8.hub.address import Address
from nemotron_fp8.sources.hub import HubOpener
from nemotron_fp8.sources.nemo.remote import is_nemo_listing, read_nemo_listing
from tests.hub.conversion import convert
from tests.sources.nemo.test_name_mapping import assert_same, read_all
from tests.support.nemo_writer import Sizes, hf_tensors, write_nemo

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.sources.base import Source
    from tests.hub_server.hub import Hub

SOURCE = Address("nv/source")


def opened(client: HubClient, work: Path) -> Source:
    """Open the repository as a source."""
    listing = client.listing(SOURCE.repo)
    assert is_nemo_listing(listing.files)
    work.mkdir()
    return read_nemo_listing(client, listing, str(SOURCE), 10**9, HubOpener(client, listing, work))


def files_below(root: Path) -> dict[str, bytes]:
    """Return every file of a folder by its relative path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["layer", "output"])
def test_checkpoint_in_a_repository(hub: Hub, client: HubClient, tmp_path: Path, layout: str) -> None:
    sizes = Sizes(layers=1)
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "nemo", tensors, sizes, layout)
    hub.store.seed(SOURCE.repo, files_below(tmp_path / "nemo"))
    source = opened(client, tmp_path / "work")
    asked = {request.path for request in hub.log}
    assert not any(path.endswith(("/0", "/0.0", "/0.0.0")) for path in asked), "a chunk was fetched for the plan"
    assert_same(read_all(source), tensors)
    assert len(source.stamps) == len(files_below(tmp_path / "nemo")) + (".gitattributes" in source.stamps)


def test_missing_chunk_is_noticed_before_anything_is_fetched(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    sizes = Sizes(layers=1)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    (tmp_path / "nemo" / "model_weights" / "model.output_layer.weight" / "0.0").unlink()
    hub.store.seed(SOURCE.repo, files_below(tmp_path / "nemo"))
    with pytest.raises(MissingChunkError, match="output_layer"):
        opened(client, tmp_path / "work")


def test_conversion_of_a_checkpoint_in_a_repository(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """Through the public function: the chunks of a shard are prefetched, checked, and removed at the end."""
    sizes = Sizes(layers=1)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes, "layer")
    hub.store.seed(SOURCE.repo, files_below(tmp_path / "nemo"))
    report = convert(client, tmp_path / "work")
    local = quantize_repo(tmp_path / "nemo", tmp_path / "result", device="cpu", threads=1)
    assert report.left_out == local.left_out
    result = files_below(tmp_path / "result")
    there = hub.files("me/target")
    assert set(there) == {*result, ".gitattributes"}
    for name in result:
        if name not in (CARD, MANIFEST):  # these name the repository
            assert there[name] == result[name]
    assert list((tmp_path / "work").iterdir()) == []
