"""The way to a real cluster: who is refused there, and what the command says then."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cluster.ray_cluster import RayCluster


def refused(source: Path, out: Path, address: str, **environment: str) -> str:
    """What the command says on stderr where it is refused, and that at once."""
    command = [sys.executable, "-m", "nemotron_fp8", "quantize", source, out, "--quiet", "--ray", address]
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=120
    )
    assert time.monotonic() - began < 20  # Ray itself asks for 20 s and more, after the second that it is imported in
    assert done.returncode == 1
    assert done.stdout == ""
    assert not out.exists()
    return done.stderr


@pytest.mark.parametrize("way", ["address", "client_address"])
@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_TOKEN": "f" * 32}, {"RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}],
    ids=["another", "none", "not asked for"],
)
def test_without_the_token(
    cluster: RayCluster, source: Path, tmp_path: Path, way: str, environment: dict[str, str]
) -> None:
    """One line, which names the token and not the cluster as what is missing."""
    address = getattr(cluster, way)
    said = refused(source, tmp_path / "out", address, HOME=str(tmp_path), **environment)
    assert said.startswith(f"error: Ray at '{address}': wants a token")
    assert said.count("\n") == 1
    assert "RAY_AUTH_TOKEN" in said


@pytest.mark.parametrize(("way", "other"), [("address", "client_address"), ("client_address", "address")])
def test_the_port_of_the_other_way(cluster: RayCluster, source: Path, tmp_path: Path, way: str, other: str) -> None:
    """A client at the head's port and a driver at the clients' are told which ports are which."""
    scheme = "ray://" if way == "client_address" else ""
    address = f"{scheme}{getattr(cluster, other).removeprefix('ray://')}"
    said = refused(source, tmp_path / "out", address)
    assert said.startswith(f"error: Ray at '{address}': is the port of another service")
    assert said.count("\n") == 1
