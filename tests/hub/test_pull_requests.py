"""Results in pull requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.hub.conftest import our_client
from tests.hub.test_staging import NAMES, RESULT, SMALL, contents, convert, digest, put, staging

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.faults import FaultKind
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer


def test_a_pull_request(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    hub.store.create("nv/target")
    first = staging(client, "nv/target", pull_request=True)
    assert first.begin() == {}
    put(first, NAMES[0], tmp_path)
    second = staging(our_client(server), "nv/target", pull_request=True)
    assert set(second.begin()) == {NAMES[0]}
    published = convert(second, tmp_path)
    assert published.revision == "refs/pr/1"
    assert contents(hub, "nv/target", "refs/pr/1") == RESULT
    assert contents(hub, "nv/target") == {}
    assert convert(staging(client, "nv/target", pull_request=True), tmp_path) == published
    assert hub.store.repo("nv/target").meta["pulls"] == 1


@pytest.mark.parametrize("kind", ["answer_lost", "answer_lost_504"])
def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(
    hub: Hub, client: HubClient, tmp_path: Path, kind: FaultKind
) -> None:
    hub.store.create("nv/target")
    hub.faults.add(kind, path="/commit/main")
    published = convert(staging(client, "nv/target", pull_request=True), tmp_path)
    assert contents(hub, "nv/target", published.revision) == RESULT
    assert hub.store.repo("nv/target").meta["pulls"] == 1


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("kind", ["reset_before", "503", "answer_lost", "answer_lost_504"])
def test_starting_over_opens_another_whatever_happens_to_the_first_try(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, kind: FaultKind, complete: bool
) -> None:
    """An earlier run opened a pull request of the same job; a failed attempt must not adopt it."""
    hub.store.create("nv/target")
    first = staging(client, "nv/target", pull_request=True)
    if complete:
        convert(first, tmp_path)
    else:
        first.begin()
        put(first, NAMES[0], tmp_path)
    before = hub.files("nv/target", "refs/pr/1")
    hub.faults.add(kind, path="/commit/main")
    again = staging(our_client(server), "nv/target", pull_request=True, restart=True)
    assert again.begin() == {}
    assert again.published is None
    assert again.branch.ref == "refs/pr/2"
    for name in NAMES:
        put(again, name, tmp_path)
    again.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub, "nv/target", "refs/pr/2") == RESULT
    assert hub.files("nv/target", "refs/pr/1") == before
    assert hub.store.repo("nv/target").meta["pulls"] == 2
