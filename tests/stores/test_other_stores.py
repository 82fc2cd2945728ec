"""Azure and Google Cloud Storage, by their emulators; `make test-stores`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo, verify_repo
from nemotron_fp8.errors.stores import (
    ChangedObjectError,
    MissingBucketError,
    StoreConflictError,
    StoreDeniedError,
    StoreUploadError,
)
from nemotron_fp8.stores.address import parse_store
from nemotron_fp8.stores.client import PART, StoreClient
from tests.store_server.others import KEY, Azurite, FakeGcs
from tests.stores.conversion import checkpoint, contents

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.stores


@pytest.fixture(scope="module")
def azurite() -> Iterator[Azurite]:
    with Azurite() as server:
        server.create("bucket")
        yield server


@pytest.fixture(scope="module")
def gcs() -> Iterator[FakeGcs]:
    with FakeGcs() as server:
        server.create("bucket")
        yield server


@pytest.fixture
def azure(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> StoreClient:
    """Client of an empty folder at Azurite."""
    for name, value in azurite.environment().items():
        monkeypatch.setenv(name, value)
    client = StoreClient(parse_store("az://bucket/model"))
    client.delete(sorted(client.listing().files))
    return client


def test_conditional_writes_at_azure(azure: StoreClient) -> None:
    first = azure.put_small("job", b"one", create=True)
    assert azure.put_small("job", b"one", create=True) == first
    with pytest.raises(StoreConflictError):
        azure.put_small("job", b"two", create=True)
    listed = azure.listing().file("job")
    assert listed.etag == first.etag
    second = azure.put_small("job", b"two", replacing=listed)
    with pytest.raises(StoreConflictError):
        azure.put_small("job", b"three", replacing=first)
    assert azure.head("job") == second
    azure.require_conditions("job")
    with pytest.raises(ChangedObjectError):
        azure.read_small(first)
    azure.delete(["job", "nothing"])
    assert not azure.listing().files


def test_uploads_to_azure(azure: StoreClient) -> None:
    data = random.Random(2).randbytes(20 << 20)
    file = azure.upload("folder/big", len(data), iter((data[:PART], data[PART:])))
    assert azure.listing().file("folder/big").etag == file.etag
    assert azure.read_small(file) == data
    with pytest.raises(StoreUploadError):
        azure.upload("half", 3 * PART, iter((data[:PART], data[PART : 2 * PART])))
    assert azure.head("half") is None


def test_refusals_of_azure(azure: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingBucketError):
        StoreClient(parse_store("az://nowhere/model")).listing()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "AAAA" + KEY[4:])
    with pytest.raises(StoreDeniedError) as refused:
        StoreClient(parse_store("az://bucket/model")).listing()
    assert KEY[4:] not in str(refused.value)
    del azure


def test_a_conversion_from_azure(azure: StoreClient, tmp_path: Path) -> None:
    for name, data in checkpoint(tmp_path / "source").items():
        azure.put_small(name, data)
    quantize_repo(tmp_path / "source", tmp_path / "wanted", device="cpu")
    quantize_repo("az://bucket/model", tmp_path / "result", device="cpu")
    assert contents(tmp_path / "result") == contents(tmp_path / "wanted")
    assert verify_repo("az://bucket/model", tmp_path / "result").ok


def test_a_conversion_from_google(gcs: FakeGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in gcs.environment().items():
        monkeypatch.setenv(name, value)
    for name, data in checkpoint(tmp_path / "source").items():
        gcs.put("bucket", f"nv/source/{name}", data)
    quantize_repo(tmp_path / "source", tmp_path / "wanted", device="cpu")
    quantize_repo("gs://bucket/nv/source", tmp_path / "result", device="cpu")
    assert contents(tmp_path / "result") == contents(tmp_path / "wanted")
    assert verify_repo("gs://bucket/nv/source", tmp_path / "result").ok


def test_a_replaced_object_at_google(gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in gcs.environment().items():
        monkeypatch.setenv(name, value)
    gcs.put("bucket", "other/a", b"first")
    client = StoreClient(parse_store("gs://bucket/other"))
    file = client.listing().file("a")
    assert client.read_small(file) == b"first"
    gcs.put("bucket", "other/a", b"other")
    with pytest.raises(ChangedObjectError):
        client.read_small(file)
