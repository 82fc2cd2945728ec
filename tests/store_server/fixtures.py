"""Fixtures: a served bucket, and a client whose environment leads to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.store_server.server import StoreServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUCKET = "bucket"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    """A server with an empty bucket ``bucket``; this process has its address and its credentials, and no others."""
    pytest.importorskip("moto", reason="needs moto[s3,server] of the test group")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("AWS_PROFILE", "AWS_ALLOW_HTTP", "AWS_ENDPOINT_URL_S3", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    with StoreServer() as server:
        server.reset()
        server.create(BUCKET)
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server
