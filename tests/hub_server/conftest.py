"""Fixtures of the Hub server's own tests."""

from __future__ import annotations

from tests.hub_server.fixtures import api, hub, server, stranger

__all__ = ["api", "hub", "server", "stranger"]
