from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import huggingface_hub
import pytest

from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.hub.client import HubClient
from tests.hub_server.fixtures import TOKEN, api, hub, server, stranger  # noqa: F401  # fixtures
from tests.support.counts import counted, write_counts  # noqa: F401  # a fixture

if TYPE_CHECKING:
    import threading

    from tests.hub_server.server import HubServer


@dataclass
class QuickClock:
    """Clock whose time passes with every wait, of which only a moment is real."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float, cancel: threading.Event | None) -> None:
        self.time += seconds
        time.sleep(min(seconds, 0.03))


def our_client(hub_server: HubServer, timeout: float = 0.6) -> HubClient:
    return HubClient("TEST_HUB_TOKEN", hub_server.endpoint, RetryPolicy(clock=QuickClock()), timeout)


@pytest.fixture
def client(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubClient:  # noqa: F811  # the fixture of this name
    """Client of the user ``me``, for which half an hour of waits takes a second."""
    monkeypatch.setenv("TEST_HUB_TOKEN", TOKEN)
    return our_client(server)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"huggingface_hub {huggingface_hub.__version__}")
    write_counts(terminalreporter, "tests/hub")
