"""A job that is refused at its start leaves the Hub as it was: nothing made, nothing moved, nothing removed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import Recipe, _filesystem
from nemotron_fp8.checkpoint.inventory import CARD
from nemotron_fp8.errors.hub import (
    CardRefusedError,
    DestinationMovedError,
    HoldsWeightsError,
    LocalDiskError,
    MissingRepoError,
    MissingRevisionError,
    PublicRepoError,
    TokenRejectedError,
)
from tests.hub.conftest import TOKEN
from tests.hub.conversion import checkpoint, convert, wanted
from tests.hub.test_hub_to_hub import contents, stop_at_upload
from tests.hub_server.faults import KINDS

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.errors import NemotronFp8Error
    from nemotron_fp8.hub.client import HubClient
    from tests.hub.conftest import QuickClock
    from tests.hub_server.faults import FaultKind, Request
    from tests.hub_server.hub import Hub

OLD = {"model.safetensors": b"old weights"}
BAD_CARD = b"---\nlicense: nonsense\n---\n"
VALIDATE = "/api/validate-yaml"


def state(hub: Hub) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """Return every repository with its refs and settings; unreferenced commits and objects do not count."""
    names = [path.name.replace("--", "/") for path in (hub.store.root / "repos").iterdir()]
    return {name: (dict(hub.store.repo(name).refs), dict(hub.store.repo(name).meta)) for name in names}


def refused(
    hub: Hub, client: HubClient, work: Path, error: type[NemotronFp8Error], target: str = "hf://me/target", **how: Any
) -> NemotronFp8Error:
    """Check that a conversion is refused with this error and changes nothing."""
    before, first = state(hub), len(hub.log)
    with pytest.raises(error) as caught:
        convert(client, work, target=target, **how)
    assert state(hub) == before
    changing = [f"{r.method} {r.path}" for r in hub.log[first:] if r.method not in ("GET", "HEAD")]
    assert set(changing) <= {f"POST {VALIDATE}"}
    assert list(work.iterdir()) == []
    return caught.value


@pytest.fixture
def source(hub: Hub, tmp_path: Path) -> dict[str, bytes]:
    files = checkpoint(tmp_path / "source", 3)
    hub.store.seed("nv/source", files)
    return files


@pytest.fixture
def staged(source: dict[str, bytes], hub: Hub, client: HubClient, tmp_path: Path) -> str:
    """Staging branch of a job that was stopped with one or two shards on it."""
    stop_at_upload(hub, 3)
    with pytest.raises(TokenRejectedError):
        convert(client, tmp_path / "work")
    hub.store.add_token(TOKEN, "me")
    (branch,) = (ref for ref in hub.store.repo("me/target").refs if "fp8-staging" in ref)
    return branch


# -- a branch that is not there yet -------------------------------------------------------------------------


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("private", [False, True])
def test_a_new_branch_of_what_holds_weights(hub: Hub, client: HubClient, tmp_path: Path, private: bool) -> None:
    hub.store.create("me/target", private=private)
    hub.store.seed("me/target", OLD)
    work = tmp_path / "work"
    refused(hub, client, work, HoldsWeightsError, "hf://me/target@fp8", private=private)
    convert(client, work, target="hf://me/target@fp8", overwrite=True)
    assert contents(hub) == OLD
    assert contents(hub, revision="fp8") == wanted(client, tmp_path)


@pytest.mark.usefixtures("source")
def test_a_new_branch_of_what_is_public(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.create("me/target")
    refused(hub, client, tmp_path / "work", PublicRepoError, "hf://me/target@fp8", private=True)


def test_a_new_branch_and_a_card_that_the_hub_refuses(
    hub: Hub, client: HubClient, tmp_path: Path, source: dict[str, bytes]
) -> None:
    hub.store.create("me/target")
    hub.store.seed("nv/source", {**source, CARD: BAD_CARD})
    refused(hub, client, tmp_path / "work", CardRefusedError, "hf://me/target@fp8")


def test_a_new_branch_of_a_finished_result_is_that_result(
    hub: Hub, client: HubClient, tmp_path: Path, source: dict[str, bytes]
) -> None:
    convert(client, tmp_path / "work")
    assert convert(client, tmp_path / "work", target="hf://me/target@other").unchanged
    assert contents(hub, revision="other") == contents(hub)


def test_a_branch_that_somebody_else_makes_at_the_same_moment(
    hub: Hub, client: HubClient, tmp_path: Path, source: dict[str, bytes]
) -> None:
    hub.store.create("me/target")

    def make(request: Request) -> None:
        if request.path.endswith("/branch/fp8"):
            hub.before = None
            repo = hub.store.repo("me/target")
            repo.set_ref("refs/heads/fp8", repo.resolve("main").id)
            hub.store.seed("me/target", OLD, "fp8")

    hub.before = make
    with pytest.raises(DestinationMovedError):
        convert(client, tmp_path / "work", target="hf://me/target@fp8")
    assert hub.before is None
    assert contents(hub, revision="fp8") == OLD
    assert set(hub.store.repo("me/target").refs) == {"refs/heads/main", "refs/heads/fp8"}
    refused(hub, client, tmp_path / "work", HoldsWeightsError, "hf://me/target@fp8")


def test_a_branch_that_goes_while_a_job_is_stopped(
    hub: Hub, client: HubClient, tmp_path: Path, source: dict[str, bytes]
) -> None:
    """The staging branch remains; main moved meanwhile, so the branch is not created from it again."""
    stop_at_upload(hub, 3)
    with pytest.raises(TokenRejectedError):
        convert(client, tmp_path / "work", target="hf://me/target@fp8")
    hub.store.add_token(TOKEN, "me")
    hub.delete_branch("me/target", "fp8")
    hub.store.seed("me/target", {"notes.txt": b"mine"})
    refused(hub, client, tmp_path / "work", DestinationMovedError, "hf://me/target@fp8")
    convert(client, tmp_path / "work", target="hf://me/target@fp8", overwrite=True)
    assert contents(hub, revision="fp8") == {**wanted(client, tmp_path), "notes.txt": b"mine"}


# -- starting over ------------------------------------------------------------------------------------------


def test_a_refusal_comes_before_what_was_staged_is_discarded(
    hub: Hub, client: HubClient, tmp_path: Path, staged: str
) -> None:
    work = tmp_path / "work"
    assert len(hub.files("me/target", staged)) > 1
    refused(hub, client, work, PublicRepoError, restart=True, private=True)
    hub.store.seed("me/target", OLD)
    refused(hub, client, work, HoldsWeightsError, restart=True)
    convert(client, work, restart=True, overwrite=True)
    assert contents(hub) == wanted(client, tmp_path)
    assert set(hub.store.repo("me/target").refs) == {"refs/heads/main"}


def test_restart_begins_from_nothing(hub: Hub, client: HubClient, tmp_path: Path, staged: str) -> None:
    first = len(hub.log)
    report = convert(client, tmp_path / "work", restart=True)
    assert report.resumed == 0
    deleted = [r.path for r in hub.log[first:] if r.method == "DELETE"]
    assert deleted == [f"/api/models/me/target/branch/{staged.removeprefix('refs/heads/')}"] * 2
    assert contents(hub) == wanted(client, tmp_path)


def test_restart_of_a_published_job_removes_the_staging_branch(
    hub: Hub, client: HubClient, tmp_path: Path, source: dict[str, bytes]
) -> None:
    convert(client, tmp_path / "work")
    repo = hub.store.repo("me/target")
    mark = re.search(r"\[job (\w+)\]", repo.resolve("main").message)
    assert mark
    repo.set_ref(f"refs/heads/fp8-staging-{mark[1]}", repo.resolve("main").id)
    assert convert(client, tmp_path / "work", restart=True).unchanged
    assert set(repo.refs) == {"refs/heads/main"}


# -- a repository that is not there yet -----------------------------------------------------------------------


@pytest.mark.usefixtures("source")
def test_a_pull_request_needs_a_repository(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    work = tmp_path / "work"
    refused(hub, client, work, MissingRepoError, "hf://me/target@refs/pr/1")
    refused(hub, client, work, MissingRepoError, pull_request=True)
    hub.store.create("me/target")
    refused(hub, client, work, MissingRevisionError, "hf://me/target@refs/pr/1")


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("local", [False, True])
def test_a_disk_without_room(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    monkeypatch.setattr(_filesystem.os, "statvfs", lambda _: type("Full", (), {"f_bavail": 1, "f_frsize": 4096})())
    how = {"source": str(tmp_path / "source")} if local else {}
    refused(hub, client, tmp_path / "work", LocalDiskError, **how)


# -- cards --------------------------------------------------------------------------------------------------


def test_a_refused_card_is_known_before_any_shard_is_read(
    hub: Hub, client: HubClient, tmp_path: Path, source: dict[str, bytes]
) -> None:
    hub.store.seed("nv/source", {**source, CARD: BAD_CARD})
    hub.store.create("me/there")
    for target in ("hf://me/target", "hf://me/there"):
        for pull_request in (False, True)[: 1 + (target == "hf://me/there")]:
            first = len(hub.log)
            refused(hub, client, tmp_path / "work", CardRefusedError, target, pull_request=pull_request)
            asked = [request.path for request in hub.log[first:]]
            assert asked.count(VALIDATE) == 1
            assert sum(path.startswith("/_cdn/") for path in asked) == 3  # the headers


def test_a_refused_card_stops_a_resumed_job(hub: Hub, client: HubClient, tmp_path: Path, staged: str) -> None:
    """The Hub's rules for cards may have changed meanwhile."""
    assert staged
    hub.cards_refused = True
    refused(hub, client, tmp_path / "work", CardRefusedError)
    hub.cards_refused = False
    assert convert(client, tmp_path / "work").resumed


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_verdict_the_job_begins_after_one_try(
    hub: Hub, client: HubClient, tmp_path: Path, kind: FaultKind
) -> None:
    checkpoint(tmp_path / "source", 1)
    hub.faults.add(kind, path=VALIDATE, seconds=1.0 if kind.startswith("hang") else 0.2)
    convert(client, tmp_path / "work", str(tmp_path / "source"))
    asked = [request.path for request in hub.log]
    assert asked.count(VALIDATE) == 2  # one try, and the client's own as the job ends
    assert CARD in contents(hub)
    clock: QuickClock = client.policy.clock  # type: ignore[assignment]  # the fixture's
    assert clock.time == 0 or kind == "refused"  # nothing is waited for, unless the port stays closed


def test_without_a_verdict_the_last_commit_validates(
    hub: Hub, client: HubClient, tmp_path: Path, source: dict[str, bytes]
) -> None:
    hub.store.seed("nv/source", {**source, CARD: BAD_CARD})
    hub.faults.add("503", path=VALIDATE)
    with pytest.raises(CardRefusedError, match="must be one of"):
        convert(client, tmp_path / "work")
    assert contents(hub) == {}


def test_the_card_of_the_result_is_validated(
    hub: Hub, client: HubClient, tmp_path: Path, source: dict[str, bytes]
) -> None:
    """The front matter is that of the result, not of the source, both at the start and at the end."""
    hub.store.seed("nv/source", {**source, CARD: b"---\nlicense: mit\ntags: [x]\n---\n# text\n"})
    convert(client, tmp_path / "work", recipe=Recipe(stats=True))
    first, last = hub.cards
    assert last.startswith(first)
    assert first.endswith("---\n")
    assert "base_model: nv/source" in first
