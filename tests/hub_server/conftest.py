"""Fixtures of the Hub server's own tests: those of the Hub's tests."""

from tests.hub.conftest import api, hub, server, stranger

__all__ = ["api", "hub", "server", "stranger"]
