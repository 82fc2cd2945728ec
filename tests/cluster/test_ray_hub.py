"""From the Hub to the Hub over a real cluster: each worker fetches and uploads its own shards, the driver commits."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo
from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.conversion.workers.ray.cluster import Cluster
from nemotron_fp8.errors.cluster import NodeBlindError
from nemotron_fp8.errors.hub import TokenRejectedError
from nemotron_fp8.hub.client import HubClient
from tests.cluster.conftest import TOKEN_ENV
from tests.cluster.traps import Setting
from tests.hub.conversion import SOURCE, Options, checkpoint
from tests.hub.test_hub_to_hub import contents
from tests.hub_server.faults import Fault, Request
from tests.hub_server.fixtures import TOKEN, hub, server  # noqa: F401  (fixtures)
from tests.support.doubles import alive, wait_for, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8 import Progress, Report
    from tests.cluster.ray_cluster import RayCluster
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer

SHARDS = 6
NAMES = [f"model-{i:05d}-of-{SHARDS:05d}.safetensors" for i in range(1, SHARDS + 1)]
TARGET = "hf://me/target"


class Way:
    """The way from one repository to the other: with the cluster, and with this process alone."""

    def __init__(self, hub: Hub, server: HubServer, cluster: RayCluster, folder: Path) -> None:  # noqa: F811  (fixtures)
        self.hub, self.cluster, self.folder = hub, cluster, folder
        self.work = folder / "work"
        self.client = HubClient(TOKEN_ENV, server.endpoint, RetryPolicy(first=0.05), timeout=30)

    def convert(self, target: str = TARGET, progress: Callable[[Progress], None] | None = None) -> Report:
        """Over the cluster."""
        options = Options(self.client, self.work)
        cluster = self.cluster.address
        return quantize_repo(str(SOURCE), target, cluster=cluster, threads=1, hub=options, progress=progress)

    def alone(self, target: Path | str) -> dict[str, bytes]:
        """Convert the same commit in one process; return the files of the folder."""
        options = Options(self.client, self.folder / "alone")
        quantize_repo(str(SOURCE), target, device="cpu", threads=1, hub=options)
        return {path.name: path.read_bytes() for path in (self.folder / "local").iterdir()}

    def committed(self) -> list[str]:
        """The shards that were committed to the staging branch, once for each time."""
        repo = self.hub.store.find("me/target")
        paths = repo.folder.glob("commits/*.json") if repo is not None else ()
        titles = [json.loads(path.read_text())["title"] for path in paths]
        return [title.split()[1] for title in titles if title.startswith("Stage ")]

    def uploads(self) -> Counter[str]:
        """Return the number of uploads of each object, by its address."""
        return Counter(r.path for r in self.hub.log if r.method == "PUT" and r.path.startswith("/_upload/"))


@pytest.fixture
def way(
    cluster: RayCluster,
    second: int,
    hub: Hub,  # noqa: F811  (a fixture)
    server: HubServer,  # noqa: F811  (a fixture)
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Way:
    """Two nodes, a checkpoint of six shards on the Hub, and room for the result."""
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", SHARDS))
    return Way(hub, server, cluster, tmp_path)


def secrets_of(folder: Path) -> list[Path]:
    """The files under a folder that hold the token."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_hub_to_hub(way: Way, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Same bytes as one process's; every shard sent and committed once; the token nowhere but in the environment."""
    payloads: list[bytes] = []
    for name in ("submit", "submit_to"):
        real = getattr(Cluster, name)

        def spy(self: Cluster, where: object, call: str, payload: bytes, *more: object, _real: object = real) -> object:
            payloads.append(payload)
            return _real(self, where, call, payload, *more)  # type: ignore[operator]  # the method it stands for

        monkeypatch.setattr(Cluster, name, spy)
    with caplog.at_level(0):
        report = way.convert()
    assert report.tensors_quantized == SHARDS
    assert contents(way.hub) == way.alone(way.folder / "local")
    assert sorted(way.committed()) == NAMES
    assert list(way.work.iterdir()) == []
    assert way.hub.leaks() == []
    assert len(payloads) == 2 + SHARDS  # a look of each node, a task for each shard
    assert not [payload for payload in payloads if TOKEN.encode() in payload]
    assert {pickle.loads(payload).job.staging.client.token_env for payload in payloads} == {TOKEN_ENV}
    assert TOKEN not in caplog.text
    logs = way.cluster.folder / "session_latest" / "logs"
    assert any(logs.iterdir())
    assert secrets_of(logs) == []
    assert way.convert().unchanged


def test_what_goes_down_and_up_elsewhere_is_shown(way: Way) -> None:
    """Each shard's download and upload while it lasts, and what a node waits for; nothing of it at the end."""
    asked: list[str] = []
    seen: list[Progress] = []

    def slow(request: Request) -> Fault | None:
        """Each download once its header was read for the plan, each upload; one of them fails at first."""
        if request.path.startswith("/_cdn/nv/source") and re.fullmatch(r"bytes=0-\d{5}", request.range or ""):
            asked.append(request.path)
            if len(asked) <= SHARDS:
                return None
            if len(asked) == SHARDS + 1:
                return Fault("503")
            wait_until(lambda: bool(seen))  # it takes seconds until anything is heard of the nodes
            time.sleep(1.5)
        elif request.method == "PUT":
            time.sleep(1.5)
        return None

    way.hub.before = slow
    way.convert(progress=seen.append)
    for direction in ("download", "upload"):
        shown = {each.name for progress in seen for each in progress.transfers if each.direction == direction}
        assert shown == set(NAMES)
    assert any("503" in progress.waiting for progress in seen)
    assert any(len(progress.transfers) > 1 for progress in seen)  # two nodes at the same time
    assert (seen[-1].transfers, seen[-1].waiting) == ((), "")
    assert seen[-1].done == seen[-1].total


def test_a_killed_worker(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a shard: that shard alone is fetched, made and sent again."""
    trap = Setting(way.folder, NAMES[2])
    with monkeypatch.context() as patch:
        trap.set(patch)
        killer = Thread(target=lambda: os.kill(int(wait_for(trap.flag)), signal.SIGKILL))
        killer.start()
        report = way.convert()
        killer.join()
    assert report.resumed == 0
    assert sorted(trap.begun()) == sorted([*NAMES, NAMES[2]])
    assert sorted(way.committed()) == NAMES
    assert set(way.uploads().values()) == {1}
    assert contents(way.hub) == way.alone(way.folder / "local")


def test_a_run_that_ends_early_is_carried_on(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is revoked after three commits; the second run makes the other shards alone."""

    def revoke(request: Request) -> None:
        if len(way.committed()) == 3:
            way.hub.after = None
            way.hub.store.revoke(TOKEN)

    way.hub.after = revoke
    with pytest.raises(TokenRejectedError):
        way.convert()
    assert contents(way.hub) == {}
    done = way.committed()
    way.hub.store.add_token(TOKEN, "me")
    trap = Setting(way.folder, "none")
    with monkeypatch.context() as patch:
        trap.set(patch)
        report = way.convert()
    assert report.resumed == 3
    assert sorted(trap.begun()) == sorted(set(NAMES) - set(done))
    assert sorted(way.committed()) == NAMES
    assert contents(way.hub) == way.alone(way.folder / "local")


def test_the_driver_is_killed_and_run_again(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run finds what was committed on the staging branch, and makes the shard that is not there alone."""
    trap = Setting(way.folder, NAMES[0])
    call = "import sys; from tests.cluster.traps import quantize_hub_trapped; quantize_hub_trapped(*sys.argv[1:])"
    arguments = [way.cluster.address, way.client.endpoint, TARGET, str(way.folder), NAMES[0]]
    driver = subprocess.Popen([sys.executable, "-c", call, *arguments], stderr=subprocess.PIPE, text=True)
    worker = int(wait_for(trap.flag, process=driver))
    wait_until(lambda: len(way.committed()) == SHARDS - 1)  # the other node makes all others
    driver.kill()
    driver.communicate()
    assert contents(way.hub) == {}
    wait_until(lambda: not alive(worker))
    again = Setting(way.folder / "again", "none")
    again.folder.mkdir()
    with monkeypatch.context() as patch:
        again.set(patch)
        report = way.convert()
    assert report.resumed == SHARDS - 1
    assert again.begun() == [NAMES[0]]
    assert sorted(way.committed()) == NAMES
    assert set(way.uploads().values()) == {1}
    assert contents(way.hub) == way.alone(way.folder / "local")
    assert list(way.work.iterdir()) == []  # what the killed worker has left there too


def test_from_the_hub_to_a_shared_folder(way: Way) -> None:
    way.convert(str(way.folder / "out"))
    out = {path.name: path.read_bytes() for path in (way.folder / "out").iterdir()}
    assert out == way.alone(way.folder / "local")


def test_a_node_without_the_token_is_named(way: Way) -> None:
    way.hub.set_private("nv/source")
    way.hub.store.repo("nv/source").set_meta(allowed=["me"])
    node = way.cluster.add(environment={TOKEN_ENV: ""})
    try:
        with pytest.raises(NodeBlindError, match="--token-env") as caught:
            way.convert()
    finally:
        node.stop()
    assert (caught.value.what, caught.value.on_hub) == ("source", True)
