"""``gs://`` as a destination and a source: generations instead of entity tags in conditions."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo, verify_repo
from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.errors.stores import ChangedObjectError, StoreConflictError, StoreUploadError
from nemotron_fp8.stores.address import parse_store
from nemotron_fp8.stores.client import PART, StoreClient
from tests.store_server.google import GoogleServer
from tests.stores.conftest import QuickClock
from tests.stores.conversion import checkpoint, contents, seed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleServer]:
    with GoogleServer() as server:
        server.reset()
        server.create("bucket")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def test_conditional_writes(google: GoogleServer) -> None:
    client = StoreClient(parse_store("gs://bucket/model"), RetryPolicy(clock=QuickClock()))
    first = client.put_small("job", b"one", create=True)
    assert client.put_small("job", b"one", create=True) == first
    with pytest.raises(StoreConflictError):
        client.put_small("job", b"two", create=True)
    listed = client.listing().file("job")
    assert listed.version is None
    second = client.put_small("job", b"two", replacing=listed)
    for stale in (first, listed):
        with pytest.raises(StoreConflictError):
            client.put_small("job", b"three", replacing=stale)
    client.require_conditions("job")
    with pytest.raises(ChangedObjectError):
        client.read_small(first)
    assert client.head("job") == second
    client.delete(["job", "nothing"])
    assert not google.files("bucket")


def test_uploads(google: GoogleServer) -> None:
    client = StoreClient(parse_store("gs://bucket/model"), RetryPolicy(clock=QuickClock()))
    data = random.Random(2).randbytes(20 << 20)
    file = client.upload("big", len(data), iter((data[:PART], data[PART:])))
    assert client.read_small(file) == data
    with pytest.raises(StoreUploadError):
        client.upload("half", 3 * PART, iter((data[:PART], data[PART : 2 * PART])))
    assert list(google.files("bucket")) == ["model/big"]
    assert not google.unfinished("bucket")


def test_a_conversion_from_and_to_google(google: GoogleServer, tmp_path: Path) -> None:
    checkpoint(tmp_path / "source", shards=2)
    seed(google, tmp_path / "source")
    quantize_repo(tmp_path / "source", tmp_path / "wanted", device="cpu")
    quantize_repo("gs://bucket/nv/source", "gs://bucket/result", device="cpu")
    found = {name.removeprefix("result/"): data for name, data in google.files("bucket").items() if "result/" in name}
    assert found == contents(tmp_path / "wanted")
    assert verify_repo("gs://bucket/nv/source", "gs://bucket/result").ok
    assert quantize_repo("gs://bucket/nv/source", "gs://bucket/result", device="cpu").unchanged
