from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.stores.address import parse_store
from nemotron_fp8.stores.client import StoreClient
from tests.store_server.fixtures import store  # noqa: F401  # a fixture
from tests.support.counts import counted, write_counts  # noqa: F401  # a fixture

if TYPE_CHECKING:
    import threading

    from tests.store_server.server import StoreServer


@dataclass
class QuickClock:
    """Clock whose time passes with every wait, of which only a moment is real."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float, cancel: threading.Event | None) -> None:
        self.time += seconds
        time.sleep(min(seconds, 0.03))


@pytest.fixture
def client(store: StoreServer) -> StoreClient:  # noqa: F811  # the fixture of this name
    """Client of ``s3://bucket/model``, for which half an hour of waits takes a second."""
    return StoreClient(parse_store("s3://bucket/model"), RetryPolicy(clock=QuickClock()), timeout=0.6)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write_counts(terminalreporter, "tests/stores")
