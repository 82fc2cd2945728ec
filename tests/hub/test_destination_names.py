"""Names of destinations: a misspelled address is no folder, and only branches and pull requests accept commits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.errors import WriteError
from nemotron_fp8.errors.hub import AddressError, MissingRevisionError, NoBranchError
from nemotron_fp8.hub.address import Address, parse_target
from tests.hub.conversion import checkpoint, convert

if TYPE_CHECKING:
    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub


@pytest.mark.parametrize(
    "text", ["hf:/me/x", "hf:me/x", "HF://me/x", "Hf:/me/x", "https://huggingface.co/me/x", "http:/me", "s4://me/x"]
)
def test_what_is_almost_an_address_is_no_folder(
    client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    checkpoint(tmp_path / "source", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AddressError, match="hf://owner/name"):
        convert(client, tmp_path / "work", str(tmp_path / "source"), text)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "hub"}


@pytest.mark.parametrize("text", ["me/x", "./hf:/me/x", "/tmp/a:/b", "a:b", "results 3: fp8", "C:/x"])
def test_other_names_are_folders(text: str) -> None:
    assert parse_target(text) is None


@pytest.mark.parametrize("revision", ["refs/heads/main", "refs/tags/v1", "refs/pr/x", "refs/pr/1/x", "0123456789" * 4])
def test_what_cannot_be_written_to_is_no_destination(revision: str) -> None:
    with pytest.raises(AddressError, match="accepts no commits"):
        parse_target(f"hf://me/x@{revision}")


@pytest.mark.parametrize("revision", ["refs/pr/1", "main", "fp8", "release/1.0", "refs", "0123456789"])
def test_what_can_be_written_to(revision: str) -> None:
    assert parse_target(f"hf://me/x@{revision}") == Address("me/x", revision)


@pytest.mark.parametrize("pull_request", [False, True])
def test_a_tag_is_refused_before_any_work(hub: Hub, client: HubClient, tmp_path: Path, pull_request: bool) -> None:
    checkpoint(tmp_path / "source", 1)
    repo = hub.store.create("me/target")
    repo.set_ref("refs/tags/v1", repo.resolve("main").id)
    before = dict(hub.store.repo("me/target").refs)
    with pytest.raises(NoBranchError, match="'v1' is a tag"):
        convert(client, tmp_path / "work", str(tmp_path / "source"), "hf://me/target@v1", pull_request=pull_request)
    assert hub.store.repo("me/target").refs == before


def test_a_pull_request_that_is_not_there_is_not_made_as_a_branch(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    checkpoint(tmp_path / "source", 1)
    hub.store.create("me/target")
    with pytest.raises(MissingRevisionError, match="refs/pr/7"):
        convert(client, tmp_path / "work", str(tmp_path / "source"), "hf://me/target@refs/pr/7")
    assert list(hub.store.repo("me/target").refs) == ["refs/heads/main"]


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/x", "/proc/x"])
def test_a_cache_folder_that_cannot_be(hub: Hub, client: HubClient, tmp_path: Path, folder: str) -> None:
    checkpoint(tmp_path / "source", 1)
    with pytest.raises(WriteError, match="--cache-dir"):
        convert(client, Path(folder), str(tmp_path / "source"))
    assert not hub.log
