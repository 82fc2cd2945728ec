from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import huggingface_hub
import pytest

from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.hub.client import HubClient
from tests.hub_server.fixtures import TOKEN, api, hub, server, stranger  # noqa: F401  # fixtures

if TYPE_CHECKING:
    import threading

    from tests.hub_server.server import HubServer

Counted = Callable[[str, object], None]
COUNT = "counted: "


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


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Counted:
    """Function that takes a count of a test for the last lines of the run, from any of its processes."""

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
