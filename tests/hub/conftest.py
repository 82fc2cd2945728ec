from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
from huggingface_hub import HfApi, close_session, constants

from nemotron_fp8.hub.client import HubClient
from nemotron_fp8.hub.retry import RetryPolicy
from tests.hub_server.hub import Hub
from tests.hub_server.server import HubServer

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from pathlib import Path

Counted = Callable[[str, object], None]
COUNT = "counted: "
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


@dataclass
class QuickClock:
    """Time that passes with every wait, of which only a moment is real."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float, stop: threading.Event | None) -> None:
        self.time += seconds
        time.sleep(min(seconds, 0.03))


def our_client(server: HubServer, timeout: float = 0.6) -> HubClient:
    return HubClient("TEST_HUB_TOKEN", server.endpoint, RetryPolicy(clock=QuickClock()), timeout)


@pytest.fixture
def client(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubClient:
    """Our client, as the user ``me``; half an hour of waiting takes it a second."""
    monkeypatch.setenv("TEST_HUB_TOKEN", TOKEN)
    return our_client(server)


@pytest.fixture
def api(server: HubServer) -> HfApi:
    return HfApi(endpoint=server.endpoint, token=TOKEN)


@pytest.fixture
def stranger(server: HubServer) -> HfApi:
    """The client of somebody without a token."""
    return HfApi(endpoint=server.endpoint, token=False)


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Counted:
    """Takes what a test has counted, for the last lines of the run; from any of its processes."""

    def count(what: str, number: object) -> None:
        request.node.user_properties.append((COUNT + what, str(number)))

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"huggingface_hub {huggingface_hub.__version__}")
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    for report in reports:
        for name, value in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
            if name.startswith(COUNT):
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {name.removeprefix(COUNT)}: {value}")
