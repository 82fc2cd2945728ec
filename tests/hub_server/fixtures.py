"""Fixtures that start a Hub server; the conftest of every folder that needs one imports them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import HfApi, close_session, constants

from tests.hub_server.hub import Hub
from tests.hub_server.server import HubServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "hf_canary0123456789"


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """A Hub on which ``TOKEN`` is the user ``me``."""
    hub = Hub(tmp_path / "hub")
    hub.store.add_token(TOKEN, "me")
    return hub


@pytest.fixture
def server(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub, served; the client in this process finds no token, no cache and no Xet of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # The client's own retries wait for a second and more.
    quick = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.03))})
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
    with HubServer(hub) as server:
        yield server
    close_session()  # and with it the time limit that a client of ours gave it


@pytest.fixture
def api(server: HubServer) -> HfApi:
    return HfApi(endpoint=server.endpoint, token=TOKEN)


@pytest.fixture
def stranger(server: HubServer) -> HfApi:
    """The client of somebody without a token."""
    return HfApi(endpoint=server.endpoint, token=False)
