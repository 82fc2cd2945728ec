"""Real clusters, real losses: a head and a second node on one machine, killed in every way that they can be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

import nemotron_fp8
import nemotron_fp8_kernels
from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from nemotron_fp8.destinations.folder import FolderDestination
from nemotron_fp8.destinations.journal import Journal
from nemotron_fp8.errors import DeviceError, NonFiniteError
from nemotron_fp8.errors.cluster import (
    ClusterUnreachableError,
    NoCapacityError,
    NodeBlindError,
    NodeVersionError,
    WorkerLostError,
)
from tests.cluster.conftest import SHARDS
from tests.cluster.ray_cluster import ROOT
from tests.cluster.traps import Setting
from tests.support.amaxes import amaxes_of
from tests.support.checkpoints import contents, edit, read_tensors
from tests.support.doubles import alive, wait_for, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.progress import Progress
    from tests.cluster.ray_cluster import RayCluster

NAMES = [f"model-{i:05d}-of-{SHARDS:05d}.safetensors" for i in range(1, SHARDS + 1)]


def recorded(partial: Path) -> list[str]:
    """The shards in a journal, one for each line."""
    journal = Journal.open(partial / "journal.jsonl")
    assert journal is not None
    journal.close()
    return [str(entry["name"]) for entry in journal.of_kind("shard")]


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards in the journal of a run in this process, as it publishes."""
    lines: list[str] = []
    publish = FolderDestination.publish

    def look_first(self: FolderDestination, *arguments: object) -> None:
        self.wait()
        lines.extend(recorded(self._partial.path))
        publish(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FolderDestination, "publish", look_first)
    return lines


@pytest.mark.parametrize("way", ["address", "client_address"])
def test_same_bytes_as_one_machine(
    cluster: RayCluster, second: int, source: Path, wanted: dict[str, bytes], tmp_path: Path, way: str
) -> None:
    """As a driver of the cluster and through Ray's client: bytes, progress, and a second run that changes nothing."""
    seen: list[Progress] = []
    address = getattr(cluster, way)
    report = quantize_repo(source, tmp_path / "out", cluster=address, progress=seen.append, threads=1)
    assert contents(tmp_path / "out") == wanted
    assert report.tensors_quantized == SHARDS
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total
    assert quantize_repo(source, tmp_path / "out", cluster=address, threads=1).unchanged
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scales_of_a_calibration(cluster: RayCluster, second: int, source: Path, tmp_path: Path) -> None:
    """The nodes need neither the file of the amaxes nor transformers."""
    recipe = Recipe(format="modelopt", activations="static")
    file = tmp_path / "amaxes.json"
    file.write_bytes(amaxes_of(source).render())
    quantize_repo(source, tmp_path / "out", recipe, cluster=cluster.address, threads=1, amaxes=file)
    quantize_repo(source, tmp_path / "alone", recipe, amaxes=file)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert verify_repo(source, tmp_path / "out").ok


def test_the_command_from_another_folder(
    cluster: RayCluster, second: int, source: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """Paths relative to the driver reach the nodes all the same."""
    command = [sys.executable, "-m", "nemotron_fp8", "quantize", source.name, os.path.relpath(tmp_path, source.parent)]
    command[-1] += "/out"
    command += ["--threads", "1", "--json", "--ray", cluster.address]
    done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"note: connecting to Ray at {cluster.address}" in done.stderr.splitlines()
    assert json.loads(done.stdout)["tensors_quantized"] == SHARDS
    assert contents(tmp_path / "out") == wanted


def test_a_killed_worker(
    cluster: RayCluster,
    second: int,
    source: Path,
    wanted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    journal: list[str],
) -> None:
    """SIGKILL in the middle of a shard: that shard is begun again, no other; the dead one's file is no obstacle."""
    trap = Setting(tmp_path, NAMES[2])
    trap.set(monkeypatch)
    killer = Thread(target=lambda: os.kill(int(wait_for(trap.flag)), signal.SIGKILL))
    killer.start()
    report = quantize_repo(source, tmp_path / "out", cluster=cluster.address, threads=1)
    killer.join()
    assert contents(tmp_path / "out") == wanted
    assert report.resumed == 0
    assert sorted(trap.begun()) == sorted([*NAMES, NAMES[2]])
    assert sorted(journal) == NAMES


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_the_second_node_goes(
    cluster: RayCluster,
    second: int,
    source: Path,
    wanted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    journal: list[str],
    end: str,
) -> None:
    """Stopped by its owner or gone at once, in the middle of a shard: the head makes the rest."""
    trap = Setting(tmp_path, node=str(second))
    trap.set(monkeypatch)

    def go() -> None:
        wait_for(trap.flag)
        getattr(cluster.nodes[second], end)()

    ender = Thread(target=go)
    ender.start()
    quantize_repo(source, tmp_path / "out", cluster=cluster.address, threads=1)
    ender.join()
    assert not alive(int(trap.flag.read_text()))
    assert contents(tmp_path / "out") == wanted
    begun = trap.begun()
    assert len(begun) == SHARDS + 1
    assert sorted(set(begun)) == NAMES == sorted(journal)


def test_the_driver_is_killed_and_run_again(
    cluster: RayCluster,
    second: int,
    source: Path,
    wanted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second run takes over what the first had recorded, file by file, and begins the one shard that is left."""
    out, trap, again = tmp_path / "out", Setting(tmp_path, NAMES[0]), Setting(tmp_path / "again", "none")
    call = "import sys; from tests.cluster.traps import quantize_trapped; quantize_trapped(*sys.argv[1:])"
    command = [sys.executable, "-c", call, cluster.address, source, out, tmp_path, NAMES[0]]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    worker = int(wait_for(trap.flag, process=driver))
    # The smallest shard is the last: the other node has made all others when nothing more is recorded.
    partial = tmp_path / "out.partial"
    wait_until(lambda: len(recorded(partial)) == SHARDS - 1)
    inodes = {name: (partial / "out" / name).stat().st_ino for name in recorded(partial)}
    driver.kill()
    driver.communicate()
    assert not out.exists()
    wait_until(lambda: not alive(worker))
    again.folder.mkdir()
    again.set(monkeypatch)
    report = quantize_repo(source, out, cluster=cluster.address, threads=1)
    assert report.resumed == len(inodes) == SHARDS - 1
    assert again.begun() == [NAMES[0]]
    assert contents(out) == wanted
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes
    assert not partial.exists()


def test_a_shard_that_no_worker_survives(
    cluster: RayCluster,
    second: int,
    source: Path,
    wanted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run gives up over it, says so, and keeps what is finished."""
    trap = Setting(tmp_path, NAMES[0], again=True)
    stop: list[bool] = []

    def kill_all() -> None:
        while not stop:
            if trap.flag.exists():
                pid = int(trap.flag.read_text())
                trap.flag.unlink()
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    killer = Thread(target=kill_all)
    killer.start()
    with monkeypatch.context() as patch:
        trap.set(patch)
        with pytest.raises(WorkerLostError) as caught:
            quantize_repo(source, tmp_path / "out", cluster=cluster.address, threads=1)
    stop.append(True)
    killer.join()
    assert (caught.value.shard, caught.value.attempts) == (NAMES[0], 4)
    assert trap.begun().count(NAMES[0]) == 4
    report = quantize_repo(source, tmp_path / "out", cluster=cluster.address, threads=1)
    assert report.resumed == SHARDS - 1
    assert contents(tmp_path / "out") == wanted


def test_an_error_of_ours_arrives_as_what_it_is(cluster: RayCluster, second: int, source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "source"
    shutil.copytree(source, broken)
    name = "model.layers.3.mlp.up_proj.weight"
    weight = read_tensors(broken / NAMES[2])[name]
    weight[7, 9] = float("inf")
    edit(broken / NAMES[2], {name: weight})
    with pytest.raises(NonFiniteError) as caught:
        quantize_repo(broken, tmp_path / "out", cluster=cluster.address, threads=1)
    assert (caught.value.tensor, caught.value.position) == (name, (7, 9))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MAIN = "import sys; from tests.cluster.traps import main_trapped; main_trapped(*sys.argv[1:])"


@pytest.mark.parametrize("way", ["address", "client_address"])
def test_ctrl_c_and_again(
    cluster: RayCluster, second: int, source: Path, wanted: dict[str, bytes], tmp_path: Path, way: str
) -> None:
    """In the middle of a shard: one line, no task is left at work, nothing of it on the disk; then it is carried on."""
    trap = Setting(tmp_path, NAMES[0])
    arguments = ["quantize", source, tmp_path / "out", "--threads", "1", "--json", "--quiet"]
    arguments += ["--ray", getattr(cluster, way)]
    command = [sys.executable, "-c", MAIN, tmp_path, NAMES[0], "again", *arguments]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    worker = int(wait_for(trap.flag, process=driver))
    partial = tmp_path / "out.partial"
    wait_until(lambda: bool(recorded(partial)))
    began = time.monotonic()
    driver.send_signal(signal.SIGINT)
    # An empty line first, so that a terminal's ^C stands alone.
    assert driver.communicate(timeout=60) == ("", "\nerror: interrupted; run the same command again to resume\n")
    assert driver.returncode == 130
    assert time.monotonic() - began < 30
    assert not list(partial.glob("work-*"))
    wait_until(lambda: not alive(worker))
    kept = len(recorded(partial))
    arguments.remove("--quiet")
    once_more = [sys.executable, "-m", "nemotron_fp8", *arguments]
    done = subprocess.run(once_more, capture_output=True, text=True, check=True)
    assert f"note: resumed with {kept} shard" in done.stderr
    assert json.loads(done.stdout)["tensors_quantized"] == SHARDS
    assert contents(tmp_path / "out") == wanted


def test_a_killed_worker_is_not_heard_of_where_results_go(
    cluster: RayCluster, second: int, source: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """Ray tells of it on stdout, if it is let."""
    trap = Setting(tmp_path, NAMES[0])
    arguments = ["quantize", source, tmp_path / "out", "--threads", "1", "--json", "--ray", cluster.address]
    command = [sys.executable, "-c", MAIN, tmp_path, NAMES[0], "once", *arguments]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.kill(int(wait_for(trap.flag, process=driver)), signal.SIGKILL)
    stdout, stderr = driver.communicate()
    assert json.loads(stdout)["tensors_quantized"] == SHARDS
    assert "raylet" not in stderr
    (note,) = (line for line in stderr.splitlines() if NAMES[0] in line)
    assert note.startswith(f"note: {NAMES[0]}: the worker was lost, and the shard is restarted (WorkerCrashedError")
    assert trap.begun().count(NAMES[0]) == 2
    assert contents(tmp_path / "out") == wanted


BLIND = [("source", "source"), ("destination", "there")]


@pytest.mark.parametrize(("what", "hidden"), BLIND, ids=[what for what, _ in BLIND])
def test_a_node_that_cannot_see_is_named_before_the_first_shard(
    cluster: RayCluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, hidden: str
) -> None:
    """A node in a mount name space of its own, where an empty file system hides the folder."""
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "there").mkdir()
    hide = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path / hidden)]
    if subprocess.run([*hide, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount name spaces for this user here")
    trap = Setting(tmp_path)
    trap.set(monkeypatch)
    node = cluster.add(prefix=hide)
    try:
        with pytest.raises(NodeBlindError) as caught:
            quantize_repo(tmp_path / "source", tmp_path / "there" / "out", cluster=cluster.address, threads=1)
    finally:
        node.stop()
    assert caught.value.what == what
    assert not trap.flag.exists()


def other(tmp_path: Path, change: Callable[[Path], None]) -> dict[str, str]:
    """The environment of a node that imports a changed copy of the package."""
    for package in (nemotron_fp8, nemotron_fp8_kernels):
        folder = Path(str(package.__file__)).parent
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    change(tmp_path / "nemotron_fp8")
    return {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("_version.py", f'__version__ = "{nemotron_fp8.__version__}"', '__version__ = "0.0.1"', "0.0.1"),
        ("__init__.py", "__all__", "# another checkout\n__all__", "with other code"),
        ("__init__.py", "__all__", "import no_such_package\n__all__", "No module named 'no_such_package'"),
    ],
    ids=["version", "code", "broken"],
)
def test_a_node_with_another_version_is_named(
    cluster: RayCluster,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    old: str,
    new: str,
    found: str,
) -> None:
    """Also where the driver's current folder is a checkout of its own version: no node imports that."""
    monkeypatch.chdir(ROOT)

    def change(package: Path) -> None:
        path = package / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    node = cluster.add(environment=other(tmp_path / "site", change))
    try:
        with pytest.raises(NodeVersionError, match=found):
            quantize_repo(source, tmp_path / "out", cluster=cluster.address, threads=1)
    finally:
        node.stop()


def test_what_a_cluster_cannot_do(cluster: RayCluster, source: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no node of the cluster has a GPU"):
        quantize_repo(source, tmp_path / "out", device="cuda", cluster=cluster.address)
    with pytest.raises(DeviceError, match="Ray assigns the devices"):
        quantize_repo(source, tmp_path / "out", device="cuda:1", cluster=cluster.address)
    with pytest.raises(NoCapacityError, match="--threads"):
        quantize_repo(source, tmp_path / "out", threads=64, cluster=cluster.address)
    assert list(tmp_path.iterdir()) == []


def test_nobody_at_the_address(source: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ClusterUnreachableError, match="no process listens"):
        quantize_repo(source, tmp_path / "out", cluster="ray://127.0.0.1:1")
    assert time.monotonic() - began < 10
    assert list(tmp_path.iterdir()) == []
