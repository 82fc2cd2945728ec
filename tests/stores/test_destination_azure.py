"""A result in Azure Blob Storage, by its emulator; `make test-stores`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, status_of, verify_repo
from nemotron_fp8.errors.destination import OtherRunError
from nemotron_fp8.errors.store_results import OccupiedPrefixError
from nemotron_fp8.stores.address import parse_store
from nemotron_fp8.stores.client import StoreClient
from tests.store_server.others import Azurite
from tests.stores.test_destination import NAMES, StoppedError, stop_at
from tests.stores.writing import checkpoint_of, convert, files_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.stores
TARGET = "az://bucket/target"


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreClient]:
    """Client of an empty folder at Azurite."""
    with Azurite() as server:
        server.create("bucket")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield StoreClient(parse_store(TARGET))


def test_a_result_in_azure(azure: StoreClient, tmp_path: Path) -> None:
    """Interrupted, refused to another recipe, resumed, complete: the bytes of a folder."""
    source = checkpoint_of(tmp_path / "source", 4, {"vocab.txt": b"", "big.model": bytes(range(256)) * 40_000})
    convert(source, tmp_path / "local")
    with pytest.raises(StoppedError):
        convert(source, TARGET, progress=stop_at(NAMES[2]))
    assert status_of(TARGET).shards_done == 2
    with pytest.raises(OtherRunError):
        convert(source, TARGET, Recipe(granularity="tensor"))
    assert convert(source, TARGET).resumed == 2
    listing = azure.listing()
    assert {name: azure.read_small(file) for name, file in listing.files.items()} == files_of(tmp_path / "local")
    assert verify_repo(source, TARGET).ok
    assert convert(source, TARGET).unchanged
    with pytest.raises(OccupiedPrefixError):
        convert(source, TARGET, Recipe(granularity="tensor"))
    with pytest.raises(StoppedError):
        convert(source, f"{TARGET}2", Recipe(stats=True), progress=stop_at(NAMES[2]))
    assert convert(source, f"{TARGET}2", restart=True).resumed == 0
