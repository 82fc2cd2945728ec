"""Reads from the Hub: the bytes are those of the listing, and every failure is a typed error."""

from __future__ import annotations

import hashlib
import pickle
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants

from nemotron_fp8.errors import NemotronFp8Error
from nemotron_fp8.errors.hub import (
    DigestError,
    DisabledRepoError,
    GatedRepoError,
    HubError,
    LocalDiskError,
    MissingFileError,
    MissingRepoError,
    MissingRevisionError,
    NoProgressError,
    OfflineError,
    RateLimitedError,
    TokenRejectedError,
    UnlistedFileError,
    UnusableAnswerError,
)
from tests.hub.conftest import TOKEN, our_client
from tests.hub_server.faults import KINDS

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub.conftest import QuickClock
    from tests.hub_server.faults import FaultKind
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer
    from tests.support.counts import Counted

SHARD = random.Random(1).randbytes(3_000_001)
CONFIG = b'{"model_type": "nemotron"}'


def seed(hub: Hub) -> str:
    return hub.store.seed("nv/source", {"model.safetensors": SHARD, "config.json": CONFIG, "empty.txt": b""})


def read(client: HubClient, path: str, start: int, stop: int) -> bytes:
    listing = client.listing("nv/source")
    buffer = bytearray(stop - start)

    def put(offset: int, data: bytes) -> None:
        buffer[offset - start : offset - start + len(data)] = data

    client.read_range(listing, path, start, stop, put)
    return bytes(buffer)


def test_a_listing_is_pinned(hub: Hub, client: HubClient) -> None:
    sha = seed(hub)
    listing = client.listing("nv/source")
    assert listing.sha == sha
    assert listing.file("model.safetensors").sha256 == hashlib.sha256(SHARD).hexdigest()
    hub.store.seed("nv/source", {"config.json": b"moved", "model.safetensors": b"moved"})
    assert client.read_small(listing, "config.json") == CONFIG
    buffer: list[bytes] = []
    client.read_range(listing, "model.safetensors", 5, 9, lambda _offset, data: buffer.append(data))
    assert b"".join(buffer) == SHARD[5:9]


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (1, 2_500_000), (3_000_000, 3_000_001), (7, 7)])
def test_ranges_of_objects_and_of_git_files(hub: Hub, client: HubClient, start: int, stop: int) -> None:
    seed(hub)
    assert read(client, "model.safetensors", start, stop) == SHARD[start:stop]
    assert read(client, "config.json", 2, 8) == CONFIG[2:8]
    assert hub.leaks() == []


def test_a_range_of_a_known_object_takes_one_request(hub: Hub, client: HubClient) -> None:
    seed(hub)
    read(client, "model.safetensors", 0, 8)
    before = len(hub.log)
    read(client, "model.safetensors", 8, 16)
    assert [request.path.split("/")[1] for request in hub.log[before:]] == ["api", "_cdn"]


def test_a_download_is_whole_checked_and_leaves_nothing_else(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    seed(hub)
    listing = client.listing("nv/source")
    seen: list[int] = []
    for name, content in (("model.safetensors", SHARD), ("empty.txt", b""), ("config.json", CONFIG)):
        client.download(listing, name, tmp_path / name, seen.append)
        assert (tmp_path / name).read_bytes() == content
    assert sum(seen) == len(SHARD) + len(CONFIG)
    folder = {path.name for path in tmp_path.iterdir()} - {"hub"}
    assert folder == {"model.safetensors", "empty.txt", "config.json"}
    assert hub.leaks() == []


def test_a_name_outside_the_listing_is_refused_before_any_request(hub: Hub, client: HubClient) -> None:
    seed(hub)
    hub.store.seed("nv/other", {"model.safetensors": b"secret"})
    listing = client.listing("nv/source")
    before = len(hub.log)
    for name in ("../../../other/resolve/main/model.safetensors", "/etc/passwd", "no.safetensors", "", "."):
        with pytest.raises(UnlistedFileError):
            client.read_small(listing, name)
    assert len(hub.log) == before


def test_an_old_address_is_renewed(hub: Hub, client: HubClient) -> None:
    seed(hub)
    hub.signer.lifetime = 0.2
    read(client, "model.safetensors", 0, 8)
    time.sleep(0.3)
    assert read(client, "model.safetensors", 8, 16) == SHARD[8:16]
    assert 403 in [request.status for request in hub.log]


def test_a_client_survives_pickling_without_its_token(hub: Hub, client: HubClient) -> None:
    seed(hub)
    frozen = pickle.dumps(client)
    assert TOKEN.encode() not in frozen
    assert pickle.loads(frozen).listing("nv/source").sha == client.listing("nv/source").sha


# -- refusals that no retry helps -------------------------------------------------------------------------


def test_missing_private_and_gated(hub: Hub, client: HubClient, monkeypatch: pytest.MonkeyPatch) -> None:
    seed(hub)
    hub.store.create("nv/private", private=True)
    for name in ("nv/private", "nv/missing"):
        with pytest.raises(MissingRepoError, match="owner of the token has access"):
            client.listing(name)
    with pytest.raises(MissingRevisionError):
        client.listing("nv/source", "nowhere")
    listing = client.listing("nv/source")
    hub.set_gated("nv/source")
    with pytest.raises(GatedRepoError, match="request access"):
        client.read_small(listing, "config.json")
    monkeypatch.delenv("TEST_HUB_TOKEN")
    with pytest.raises(MissingRepoError, match="log in"):
        client.listing("nv/private")
    with pytest.raises(GatedRepoError, match="log in"):
        client.read_small(listing, "config.json")
    hub.set_disabled("nv/source")
    with pytest.raises(DisabledRepoError):
        client.listing("nv/source")


def test_a_revoked_token(hub: Hub, client: HubClient) -> None:
    seed(hub)
    listing = client.listing("nv/source")
    hub.store.revoke(TOKEN)
    with pytest.raises(TokenRejectedError, match="new one"):
        client.read_small(listing, "config.json")


def test_a_commit_that_went_and_an_object_that_went(hub: Hub, client: HubClient) -> None:
    seed(hub)
    listing = client.listing("nv/source")
    hub.collect("nv/source", listing.file("model.safetensors").sha256 or "")
    with pytest.raises(UnusableAnswerError, match="404"):
        client.read_range(listing, "model.safetensors", 0, 8, lambda _offset, _data: None)
    (hub.store.repo("nv/source").folder / "commits" / f"{listing.sha}.json").unlink()
    with pytest.raises(MissingRevisionError):
        client.read_small(listing, "config.json")


def test_a_file_that_the_server_does_not_find(hub: Hub, client: HubClient) -> None:
    seed(hub)
    listing = client.listing("nv/source")
    (hub.store.repo("nv/source").folder / "commits" / f"{listing.sha}.json").write_text(
        '{"parent": null, "title": "", "message": "", "date": "", "author": "", "tree": {}}'
    )
    with pytest.raises(MissingFileError):
        client.read_small(listing, "config.json")


def test_offline_is_an_error_at_once(hub: Hub, client: HubClient, monkeypatch: pytest.MonkeyPatch) -> None:
    seed(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
        client.listing("nv/source")
    assert hub.log == []


def test_each_wait_is_reported(hub: Hub, client: HubClient) -> None:
    seed(hub)
    on_wait: list[tuple[str, float]] = []
    client = client.with_options(on_wait=lambda reason, seconds: on_wait.append((reason, seconds)))
    hub.faults.add("503")
    hub.faults.add("429_retry_after", seconds=4)
    client.listing("nv/source")
    assert [reason for reason, _ in on_wait] == [f"nv/source: the Hub answers {status}" for status in (503, 429)]
    assert on_wait[1][1] == 5


# -- limits -----------------------------------------------------------------------------------------------


def test_the_wait_is_the_one_that_the_server_asks_for(hub: Hub, client: HubClient) -> None:
    seed(hub)
    clock: QuickClock = client.policy.clock  # type: ignore[assignment]  # the fixture's
    hub.faults.add("429_ratelimit", seconds=55)
    hub.faults.add("429_retry_after", seconds=7)
    client.listing("nv/source")
    assert clock.time == 55 + 1 + 7 + 1


def test_a_wait_beyond_patience_is_an_error_at_once(hub: Hub, client: HubClient) -> None:
    seed(hub)
    hub.faults.add("429_ratelimit", seconds=86_400)
    with pytest.raises(RateLimitedError) as limited:
        client.listing("nv/source")
    assert limited.value.wait == 86_400
    assert len(hub.log) == 1


def test_half_an_hour_without_progress_is_an_error(hub: Hub, client: HubClient) -> None:
    seed(hub)
    clock: QuickClock = client.policy.clock  # type: ignore[assignment]  # the fixture's
    hub.faults.add("503", times=None)
    with pytest.raises(NoProgressError, match="503"):
        client.listing("nv/source")
    assert 1740 <= clock.time <= 1800


def test_progress_resets_the_half_hour(hub: Hub, client: HubClient) -> None:
    """A transfer that breaks every few hundred kB, for more than half an hour in total, succeeds."""
    hub.store.seed("nv/source", {"model.safetensors": SHARD * 4})
    client = client.with_options(policy=replace(client.policy, first=1000.0, longest=1000.0))
    hub.faults.add("early_end", path="/_cdn/", times=5)
    assert read(client, "model.safetensors", 0, 4 * len(SHARD)) == SHARD * 4
    assert client.policy.clock.now() > 1800


def test_a_full_disk_is_an_error_and_leaves_no_part(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    seed(hub)
    listing = client.listing("nv/source")
    with pytest.raises(LocalDiskError, match="free space"):
        client.read_range(listing, "model.safetensors", 0, 8, full_disk)
    with pytest.raises(LocalDiskError):
        client.download(listing, "config.json", tmp_path / "nowhere" / "config.json")


def full_disk(_offset: int, _data: bytes) -> None:
    raise OSError(28, "No space left on device")


def test_content_that_stays_wrong_is_an_error(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    seed(hub)
    listing = client.listing("nv/source")
    hub.faults.add("corrupt", path="/_cdn/|config", times=None)
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(DigestError):
            client.download(listing, name, tmp_path / name)
        with pytest.raises(DigestError):
            client.read_small(listing, name)
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}


# -- every fault at every request -------------------------------------------------------------------------


def survive(hub: Hub, server: HubServer, folder: Path, kind: FaultKind, where: int) -> None:
    """Check that the bytes are identical, or that the error is typed, without a token, and a second run succeeds."""
    client = our_client(server)
    seed(hub)
    hub.log.clear()
    hub.faults.add(kind, skip=where, seconds=1.0 if kind.startswith("hang") else 0.2)

    def everything(client: HubClient) -> None:
        listing = client.listing("nv/source")
        assert read(client, "model.safetensors", 100, 2_000_000) == SHARD[100:2_000_000]
        client.download(listing, "model.safetensors", folder / "model.safetensors")
        assert client.read_small(listing, "config.json") == CONFIG

    try:
        everything(client)
    except NemotronFp8Error as error:
        assert isinstance(error, HubError)
        # A listing with one bit changed names another digest, and is found out by that.
        assert kind in ("401", "403", "413", "expired_url") or (kind == "corrupt" and where < 2)
        assert_no_token(error)
        everything(our_client(server))
    except AssertionError:
        assert kind == "corrupt"  # a range alone has no digest
        everything(our_client(server))
    assert (folder / "model.safetensors").read_bytes() == SHARD
    assert len([request for request in hub.log if request.fault]) == 1
    assert hub.leaks() == []


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_every_request(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, kind: FaultKind, counted: Counted
) -> None:
    for where in range(6):
        survive(hub, server, tmp_path, kind, where)
    counted("faults", 6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_a_request(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, kind: FaultKind
) -> None:
    survive(hub, server, tmp_path, kind, KINDS.index(kind) % 6)


def assert_no_token(error: BaseException | None) -> None:
    """Check that neither the error nor its causes contain a token or a signature."""
    while error is not None:
        for text in (str(error), repr(error), repr(vars(error))):
            assert TOKEN not in text
            assert "signature=" not in text
        assert not hasattr(error, "request")
        error = error.__cause__ or error.__context__
