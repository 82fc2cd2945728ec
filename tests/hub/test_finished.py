"""A finished job is recognized under later commits, and if another run finished it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.errors.hub import HoldsWeightsError
from tests.hub.conftest import our_client
from tests.hub.test_staging import NAMES, RESULT, SMALL, branches, contents, convert, digest, put, staging

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.faults import Request
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer


def test_a_finished_job_is_found_finished(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    first = convert(staging(client), tmp_path)
    writes = len([request for request in hub.log if request.method == "PUT"])
    assert convert(staging(client), tmp_path) == first
    assert len([request for request in hub.log if request.method == "PUT"]) == writes


def test_a_finished_job_is_found_under_later_commits(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """The commits fill several pages of the history, and a page may link to another host."""
    hub.page_size = 2
    first = convert(staging(client), tmp_path)
    for number in range(7):
        hub.store.seed("me/target", {"notes.txt": str(number).encode()})
    before = len(hub.log)
    again = staging(client)
    assert again.begin() == {}
    assert again.published is not None
    assert again.published.commit == hub.store.repo("me/target").resolve("main").id != first.commit
    pages = [request for request in hub.log[before:] if "/commits/" in request.path]
    assert [request.query for request in pages] == ["", "cursor=2", "cursor=4", "cursor=6"]
    assert hub.leaks() == []


def test_the_search_for_a_finished_job_has_an_end(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemotron_fp8.destinations.hub.branch_state.MAX_PAGES", 2)
    hub.page_size = 2
    convert(staging(client), tmp_path)
    for number in range(7):
        hub.store.seed("me/target", {"notes.txt": str(number).encode()})
    before = len(hub.log)
    with pytest.raises(HoldsWeightsError):
        staging(client).begin()
    assert sum("/commits/" in request.path for request in hub.log[before:]) == 2


def test_the_token_stays_on_the_hub_while_pages_are_turned(
    hub: Hub, client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror's responses link to the mirrored address: only the path counts, never the host."""
    hub.store.create("me/target")
    for number in range(3):
        hub.store.seed("me/target", {"notes.txt": str(number).encode()})
    hub.page_size = 2
    monkeypatch.setattr(type(hub), "endpoint", property(lambda hub: f"http://localhost:{hub.port}"))
    branch = staging(client).branch
    assert [title for _, title, _ in branch.history("main", 9)] == ["seed", "seed", "seed", "initial commit"]
    assert {request.host for request in hub.log} == {"127.0.0.1"}


def test_a_branch_that_was_left_after_the_end_is_cleared_away(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    """A run that began before the publication created its branch afterwards and was stopped: nothing is left to do."""
    late = staging(our_client(server))
    original = late.branch.create

    def create(branch: str, start: str) -> None:
        convert(staging(client), tmp_path)
        original(branch, start)

    late.branch.create = create  # type: ignore[method-assign]  # to let another run come in between
    late.begin()
    assert branches(hub) != ["main"]
    hub.store.seed("me/target", {"README.md": b"# edited since\n"})
    again = staging(client)
    assert again.begin() == {}
    assert again.published is not None
    assert branches(hub) == ["main"]
    assert contents(hub) == {**RESULT, "README.md": b"# edited since\n"}


def test_who_loses_the_race_to_publish_ends_well(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    """The other run publishes and deletes the branch just before this one reads it."""
    first = staging(client)
    first.begin()
    for name in NAMES:
        put(first, name, tmp_path)
    second = staging(our_client(server))
    assert set(second.begin()) == set(NAMES)

    def publish(_request: Request) -> None:
        if hub.log[-1].path.endswith(second.branch.ref):
            hub.before = None
            first.publish({name: digest(name) for name in NAMES}, SMALL)

    hub.before = publish
    published = second.publish({name: digest(name) for name in NAMES}, SMALL)
    assert hub.before is None
    assert published == first.published
    assert contents(hub) == RESULT
