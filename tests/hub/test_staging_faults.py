"""Every fault at every request of a job: main is empty or complete, and the first or the second run succeeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants

from nemotron_fp8.errors import NemotronFp8Error
from nemotron_fp8.errors.hub import HubError
from tests.hub.conftest import our_client
from tests.hub.test_client import assert_no_token
from tests.hub.test_staging import NAMES, RESULT, branches, contents, convert, staging
from tests.hub_server.faults import KINDS

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.faults import FaultKind
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer
    from tests.support.counts import Counted

REQUESTS = 36
"""Requests of one undisturbed run; the test below keeps it right."""


def test_the_number_of_requests(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    convert(staging(client), tmp_path)
    assert len(hub.log) == REQUESTS


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_every_request_of_a_job(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, kind: FaultKind, counted: Counted
) -> None:
    counted("faults", survive(hub, server, tmp_path, kind, range(REQUESTS)))


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_requests_of_a_job_in_parts(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, kind: FaultKind, counted: Counted
) -> None:
    hub.part_size = 64_000
    counted("faults", survive(hub, server, tmp_path, kind, range(KINDS.index(kind) % 2, REQUESTS, 2)))


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_requests_of_a_job_over_xet(
    hub: Hub,
    server: HubServer,
    client: HubClient,
    tmp_path: Path,
    kind: FaultKind,
    monkeypatch: pytest.MonkeyPatch,
    counted: Counted,
) -> None:
    hub.xet_enabled = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    counted("faults", survive(hub, server, tmp_path, kind, range(KINDS.index(kind) % 3, 30, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_some_requests_of_a_job(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, kind: FaultKind
) -> None:
    """Every request gets one of the faults; the long tests above cover all of them."""
    survive(hub, server, tmp_path, kind, range(KINDS.index(kind), REQUESTS, len(KINDS)))


def survive(hub: Hub, server: HubServer, tmp_path: Path, kind: FaultKind, positions: range) -> int:
    """Check that main is empty or complete at every commit, and that the job or its second run succeeds."""
    for where in positions:
        repo = f"me/target-{where}"
        hub.log.clear()
        hub.faults.clear()
        rule = hub.faults.add(kind, skip=where, seconds=1.0 if kind.startswith("hang") else 0.1)
        try:
            convert(staging(our_client(server), repo), tmp_path)
        except NemotronFp8Error as error:
            assert isinstance(error, HubError), where
            assert_no_token(error)
            assert kind in ("401", "403", "413", "expired_url", "corrupt"), (where, error)
            convert(staging(our_client(server), repo), tmp_path)
        assert rule.hits == 1
        assert contents(hub, repo) == RESULT, where
        assert branches(hub, repo) == ["main"], where
        for commit in hub.store.repo(repo).history("main"):
            weights = {path for path in commit.tree if path.endswith(".safetensors")}
            assert weights in (set(), set(NAMES))
    assert hub.leaks() == []
    return len(positions)
