from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo
from tests.cluster.ray_cluster import RayCluster, free_ports
from tests.hub_server.fixtures import TOKEN
from tests.store_server.server import environment_of
from tests.support.checkpoints import contents, weight, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHARDS = 6
TOKEN_ENV = "TEST_HUB_TOKEN"
(STORE_PORT,) = free_ports(1)
"""Port of the object store of the tests; every node has its address and its credentials from the start."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here needs Ray and minutes."""
    for item in items:
        if "tests/cluster" in item.path.as_posix():
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """A head of one CPU; drivers in this process and its children have its token."""
    if find_spec("ray") is None:
        pytest.skip("needs the environment of `make test-cluster`")
    # Every node has the token of the tests' Hub, as `hf auth login` on every machine would give it.
    environment = {TOKEN_ENV: TOKEN, "HF_HUB_DISABLE_XET": "1", **environment_of(STORE_PORT)}
    with RayCluster(environment=environment) as cluster:
        os.environ.update(cluster.environment)  # before Ray is imported: it reads its token then
        yield cluster
    assert cluster.processes() == []


@pytest.fixture
def second(cluster: RayCluster) -> int:
    """A second node of one CPU, begun anew where a test has ended it; its number."""
    for node in cluster.nodes[1:]:
        if node.alive:
            return node.number
    return cluster.add().number


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 1 MB and a little more from one to the next."""
    shards = {
        f"model-{i:05d}-of-{SHARDS:05d}.safetensors": {
            f"model.layers.{i}.mlp.up_proj.weight": weight(1000 + 8 * i, 512, seed=i),
            f"model.layers.{i}.norm.weight": weight(512, seed=i),
        }
        for i in range(1, SHARDS + 1)
    }
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "source", shards, side={"LICENSE": b"free"})


@pytest.fixture(scope="session")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the result of one machine for the same source."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    quantize_repo(source, out, device="cpu")
    return contents(out)
