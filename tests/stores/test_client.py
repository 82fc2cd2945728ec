"""The client against a real server: listings, ranges, conditional writes and uploads."""

from __future__ import annotations

import pickle
import random
import re
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.errors.stores import (
    ChangedObjectError,
    MissingBucketError,
    MissingObjectError,
    StoreConflictError,
    StoreListingError,
    StoreUploadError,
    UnlistedObjectError,
)
from nemotron_fp8.stores.address import parse_store
from nemotron_fp8.stores.client import MAX_PARTS, PART, StoreClient, part_size
from tests.store_server.server import CANARIES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.store_server.server import StoreServer


def read(client: StoreClient, name: str, start: int = 0, stop: int | None = None) -> bytes:
    file = client.listing().file(name)
    stop = file.size if stop is None else stop
    buffer = bytearray(stop - start)

    def put(offset: int, data: bytes) -> None:
        buffer[offset - start : offset - start + len(data)] = data

    client.read_range(file, start, stop, put)
    return bytes(buffer)


def test_a_listing_has_the_files_of_its_folder_only(store: StoreServer, client: StoreClient) -> None:
    for key in ("model/a", "model/b/c", "model2/d", "other", "model/"):
        store.put("bucket", key, key.encode())
    listing = client.listing()
    assert sorted(listing.files) == ["a", "b/c"]
    assert listing.file("b/c").size == len("model/b/c")
    with pytest.raises(UnlistedObjectError, match="not in the listing"):
        listing.file("d")


def test_a_listing_of_many_pages(store: StoreServer, client: StoreClient) -> None:
    for number in range(2500):
        store.put("bucket", f"model/{number:05d}", b"")
    patient = StoreClient(client.address)
    assert len(patient.listing().files) == 2500
    assert [request.method for request in store.log] == ["GET"] * 3


def test_an_absent_folder_is_empty_and_an_absent_bucket_an_error(client: StoreClient) -> None:
    assert not client.listing().files
    with pytest.raises(MissingBucketError, match="there is no bucket 'nowhere'"):
        StoreClient(parse_store("s3://nowhere/model"), client.policy).listing()


@pytest.mark.parametrize("name", ["a//b", "../x", "./x", "a\x01b"])
def test_names_that_no_file_has_are_refused(store: StoreServer, client: StoreClient, name: str) -> None:
    store.put("bucket", f"model/{name}", b"x")
    with pytest.raises(StoreListingError, match="name the folder of one checkpoint"):
        client.listing()


def test_ranges(store: StoreServer, client: StoreClient) -> None:
    data = random.Random(1).randbytes(20 << 20)
    store.put("bucket", "model/big", data)
    assert read(client, "big") == data
    assert read(client, "big", 5, 12 << 20) == data[5 : 12 << 20]
    assert read(client, "big", 7, 8) == data[7:8]
    assert client.read_small(client.listing().file("big"), 10) == data[:11]


def test_a_replaced_file_is_an_error(store: StoreServer, client: StoreClient) -> None:
    store.put("bucket", "model/a", b"first")
    file = client.listing().file("a")
    store.put("bucket", "model/a", b"other")
    with pytest.raises(ChangedObjectError, match="'a' was replaced after it was listed"):
        client.read_small(file)
    store.remove("bucket", "model/a")
    with pytest.raises(MissingObjectError, match="'a' was deleted after it was listed"):
        client.read_small(file)


def test_conditional_writes(store: StoreServer, client: StoreClient) -> None:
    first = client.put_small("job", b"one", create=True)
    assert client.put_small("job", b"one", create=True) == first  # the same write again, as after a lost answer
    with pytest.raises(StoreConflictError, match="'job' was written by another run"):
        client.put_small("job", b"two", create=True)
    second = client.put_small("job", b"two", replacing=first)
    with pytest.raises(StoreConflictError):
        client.put_small("job", b"three", replacing=first)
    assert client.head("job") == second
    client.require_conditions("job")
    client.delete(["job", "nothing"])
    assert client.head("job") is None
    assert not store.files("bucket")


@pytest.mark.parametrize("kind", ["answer_lost", "answer_lost_504", "reset_before", "500", "503", "429", "hang"])
def test_a_write_whose_answer_is_lost_is_settled(store: StoreServer, client: StoreClient, kind: str) -> None:
    store.faults.add(kind, "PUT", seconds=1)  # type: ignore[arg-type]  # a fault of the store
    assert client.put_small("job", b"one", create=True).size == 3
    assert store.files("bucket") == {"model/job": b"one"}


def test_uploads(store: StoreServer, client: StoreClient) -> None:
    data = random.Random(2).randbytes(20 << 20)
    sent: list[int] = []
    pieces = (memoryview(data)[at : at + (3 << 20)] for at in range(0, len(data), 3 << 20))
    file = client.upload("big", len(data), pieces, sent.append)
    assert store.files("bucket", "model/") == {"big": data}
    assert sum(sent) == file.size == len(data)
    assert client.listing().file("big").etag == file.etag
    assert sum(request.method == "PUT" for request in store.log) == 3
    assert client.upload("none", 0, iter(())).size == 0


def test_an_upload_of_another_size_never_appears(store: StoreServer, client: StoreClient) -> None:
    part = b"x" * PART
    for size in (2 * PART - 1, 2 * PART + 1):
        with pytest.raises(StoreUploadError, match="bytes"):
            client.upload("big", size, iter((part, part)))
    assert not store.files("bucket")
    assert not store.unfinished("bucket")


def test_an_error_of_the_pieces_aborts_the_upload(store: StoreServer, client: StoreClient) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x" * PART
        yield b"x" * PART
        raise ZeroDivisionError("of the pieces")

    with pytest.raises(ZeroDivisionError, match="of the pieces"):
        client.upload("big", 3 * PART, pieces())
    assert not store.files("bucket")
    assert not store.unfinished("bucket")


def test_parts_suffice_for_every_size() -> None:
    for size in (0, 1, PART, MAX_PARTS * PART, MAX_PARTS * PART + 1, 5 << 40):
        assert -(-size // part_size(size)) <= MAX_PARTS


def test_a_pickled_client_holds_no_credentials(store: StoreServer, client: StoreClient) -> None:
    store.put("bucket", "model/a", b"x")
    client.listing()
    pickled = pickle.dumps(client)
    assert not [secret for secret in CANARIES if secret.encode() in pickled]
    assert list(pickle.loads(pickled).listing().files) == ["a"]
    assert not [secret for secret in CANARIES if re.search(re.escape(secret), repr(client))]
