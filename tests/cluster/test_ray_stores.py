"""From store to store over a real cluster: each node reads and writes the store itself, and no disk is shared."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo, verify_repo
from nemotron_fp8.conversion.workers.ray.cluster import Cluster
from nemotron_fp8.errors.cluster import NodeBlindError
from nemotron_fp8.stores.listing import JOB_FILE, RECORDS
from tests.cluster.conftest import STORE_PORT
from tests.cluster.traps import Setting
from tests.hub.conversion import checkpoint
from tests.store_server.server import CANARIES, StoreServer
from tests.support.doubles import alive, wait_for, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nemotron_fp8 import Progress, Report
    from tests.cluster.ray_cluster import RayCluster

SHARDS = 6
NAMES = [f"model-{i:05d}-of-{SHARDS:05d}.safetensors" for i in range(1, SHARDS + 1)]
SOURCE, TARGET = "s3://bucket/source", "s3://bucket/target"


class Way:
    """The way from one folder of a store to the other: with the cluster, and with this process alone."""

    def __init__(self, store: StoreServer, cluster: RayCluster, folder: Path) -> None:
        self.store, self.cluster, self.folder = store, cluster, folder

    def convert(self, target: str = TARGET, progress: Callable[[Progress], None] | None = None) -> Report:
        """Over the cluster."""
        return quantize_repo(SOURCE, target, cluster=self.cluster.address, threads=1, progress=progress)

    def alone(self) -> dict[str, bytes]:
        """Convert in one process; return the files of the folder."""
        quantize_repo(SOURCE, self.folder / "local", device="cpu", threads=1)
        return {path.name: path.read_bytes() for path in (self.folder / "local").iterdir()}

    def contents(self) -> dict[str, bytes]:
        return self.store.files("bucket", "target/")

    def uploads(self) -> Counter[str]:
        """Return the number of completed uploads of each shard."""
        return Counter(
            request.path.rpartition("/")[2]
            for request in self.store.log
            if request.method == "POST" and request.query.startswith("uploadId=") and request.status == 200
        )


@pytest.fixture
def way(cluster: RayCluster, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """Two nodes, and a checkpoint of six shards in a store."""
    pytest.importorskip("moto")
    with StoreServer(STORE_PORT) as store:
        store.reset()
        store.create("bucket")
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        for name, data in checkpoint(tmp_path / "source", SHARDS).items():
            store.put("bucket", f"source/{name}", data)
        yield Way(store, cluster, tmp_path)


def test_store_to_store(way: Way, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Same bytes as one process's; every shard sent once; credentials nowhere but in the environment."""
    payloads: list[bytes] = []
    for name in ("submit", "submit_to"):
        real = getattr(Cluster, name)

        def spy(self: Cluster, where: object, call: str, payload: bytes, *more: object, _real: object = real) -> object:
            payloads.append(payload)
            return _real(self, where, call, payload, *more)  # type: ignore[operator]  # the method it stands for

        monkeypatch.setattr(Cluster, name, spy)
    seen: list[Progress] = []
    with caplog.at_level(0):
        report = way.convert(progress=seen.append)
    assert report.tensors_quantized == SHARDS
    assert way.contents() == way.alone()
    assert way.uploads() == Counter(NAMES)
    assert way.store.unfinished("bucket") == []
    assert len(payloads) == 2 + SHARDS  # a look of each node, a task for each shard
    logs = way.cluster.folder / "session_latest" / "logs"
    written = [path.read_bytes() for path in logs.rglob("*") if path.is_file() and not path.is_symlink()]
    for canary in CANARIES:
        assert not [text for text in (*payloads, *written) if canary.encode() in text]
        assert canary not in caplog.text
    assert all(str(way.folder).encode() not in pickle.dumps(pickle.loads(payload)) for payload in payloads)
    assert verify_repo(SOURCE, TARGET).ok
    assert way.convert().unchanged


def test_nodes_without_the_folders_of_the_driver(way: Way) -> None:
    """A node in a mount name space of its own: nothing of the driver's folders is there, and no shard misses them."""
    hide = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(way.folder)]
    if subprocess.run([*hide, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount name spaces for this user here")
    node = way.cluster.add(prefix=hide)
    try:
        way.convert()
    finally:
        node.stop()
    assert way.contents() == way.alone()


def test_a_killed_worker(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an upload: that shard alone is made again, and the half of it is never seen."""
    trap = Setting(way.folder, NAMES[2])
    during: list[dict[str, bytes]] = []

    def kill() -> None:
        worker = int(wait_for(trap.flag))
        during.append(way.contents())
        os.kill(worker, signal.SIGKILL)

    with monkeypatch.context() as patch:
        trap.set(patch)
        killer = Thread(target=kill)
        killer.start()
        report = way.convert()
        killer.join()
    assert report.resumed == 0
    assert NAMES[2] not in during[0]
    assert sorted(trap.begun()) == sorted([*NAMES, NAMES[2]])
    assert way.uploads() == Counter(NAMES)
    assert way.contents() == way.alone()


def test_the_driver_is_killed_and_run_again(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run finds the receipts in the store, and makes the shard that is not there alone."""
    trap = Setting(way.folder, NAMES[0])
    call = "import sys; from tests.cluster.traps import quantize_store_trapped; quantize_store_trapped(*sys.argv[1:])"
    arguments = [way.cluster.address, SOURCE, TARGET, str(way.folder), NAMES[0]]
    driver = subprocess.Popen([sys.executable, "-c", call, *arguments], stderr=subprocess.PIPE, text=True)
    worker = int(wait_for(trap.flag, process=driver))
    receipts = {f"{RECORDS}/{name}.json" for name in NAMES[1:]}
    wait_until(lambda: receipts <= way.contents().keys())  # the other node makes all others
    driver.kill()
    driver.communicate()
    assert way.contents().keys() == {JOB_FILE, *receipts, *NAMES[1:]}
    wait_until(lambda: not alive(worker))
    again = Setting(way.folder / "again", "none")
    again.folder.mkdir()
    with monkeypatch.context() as patch:
        again.set(patch)
        report = way.convert()
    assert report.resumed == SHARDS - 1
    assert again.begun() == [NAMES[0]]
    assert way.uploads() == Counter(NAMES)
    assert way.contents() == way.alone()


def test_a_node_without_credentials_is_named(way: Way) -> None:
    node = way.cluster.add(environment={"AWS_SKIP_SIGNATURE": "true"})
    try:
        with pytest.raises(NodeBlindError, match="credentials in its own environment") as caught:
            way.convert()
    finally:
        node.stop()
    assert (caught.value.what, caught.value.in_store) == ("source", True)
    assert not set(NAMES) & way.contents().keys()
