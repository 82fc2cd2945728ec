"""SIGTERM while the Hub does not answer: the command ends within ten seconds, and the job is resumed."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.hub.conftest import TOKEN
from tests.hub.conversion import checkpoint, convert, wanted
from tests.hub.test_hub_to_hub import contents
from tests.support.doubles import wait_until
from tests.support.ends import Command

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.faults import FaultKind
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer

SECONDS = 60.0
"""Time for which the Hub hangs: far longer than the end of the command may take."""
SLOW = pytest.mark.faults

PLACES: dict[str, tuple[FaultKind, str, str, int]] = {
    "the list of the source": ("hang", "GET", "/api/models/nv/source", 0),
    "the header of a shard": ("hang", "GET", "/resolve/|/_cdn/", 2),
    "the body of a download": ("hang_body", "GET", "/_cdn/", 6),
    "an upload": ("hang", "PUT", "", 1),
    "a commit": ("hang", "POST", "/commit/", 2),
    "the answer of a commit": ("hang_body", "POST", "/commit/", 1),
    "a wait of a retry": ("503", "POST", "/commit/", 2),
}


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, marks=() if place in ("an upload", "the body of a download") else SLOW, id=place)
        for place in PLACES
    ],
)
def test_a_hub_that_hangs(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, place: str) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    result = wanted(client, tmp_path)
    kind, method, path, skip = PLACES[place]
    rule = hub.faults.add(kind, method, path, skip=skip, times=None, seconds=SECONDS)
    environment = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "MY_TOKEN": TOKEN,
    }
    words = ("quantize", "hf://nv/source", "hf://me/target", "--token-env", "MY_TOKEN", "-q")
    command = Command.start(*words, env=environment)
    wait_until(lambda: rule.hits > 0 or command.process.poll() is not None, 60)
    time.sleep(0.3)
    command.end(signal.SIGTERM)
    left = tmp_path / "home" / "nemotron_fp8"
    assert not left.exists() or list(left.iterdir()) == []
    assert contents(hub) == {} if hub.store.find("me/target") else True
    hub.faults.clear()
    convert(client, tmp_path / "work")
    assert contents(hub) == result
