"""The way to a real cluster: who is refused there, what the command says then, and what Ray may not take from it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.test_ray import MAIN, NAMES
from tests.cluster.traps import Setting
from tests.support.checkpoints import contents
from tests.support.doubles import alive, wait_for, wait_until
from tests.support.ends import BOUND

if TYPE_CHECKING:
    from tests.cluster.ray_cluster import RayCluster


def refused(source: Path, out: Path, address: str, **environment: str) -> str:
    """Return the last line on stderr of a rejected command; Ray's own code prints warnings before it."""
    command = [sys.executable, "-m", "nemotron_fp8", "quantize", source, out, "--quiet", "--ray", address]
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=120
    )
    assert time.monotonic() - began < 100  # Ray gives up after 20 to 35 s
    assert done.returncode == 1
    assert done.stdout == ""
    assert not out.exists()
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in done.stderr
    return lines[-1]


@pytest.mark.parametrize("way", ["address", "client_address"])
@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_TOKEN": "f" * 32}, {"RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}],
    ids=["another", "none", "not asked for"],
)
def test_without_the_token(
    cluster: RayCluster, source: Path, tmp_path: Path, way: str, environment: dict[str, str]
) -> None:
    """One line of ours at the end, which names the token among what may be missing."""
    address = getattr(cluster, way)
    said = refused(source, tmp_path / "out", address, HOME=str(tmp_path), **environment)
    assert said.startswith(f"error: Ray at '{address}': ")
    assert "RAY_AUTH_TOKEN" in said


@pytest.mark.parametrize(("way", "other"), [("address", "client_address"), ("client_address", "address")])
def test_the_port_of_the_other_way(cluster: RayCluster, source: Path, tmp_path: Path, way: str, other: str) -> None:
    """A client at the head's port and a driver at the clients' are told which ports are which."""
    scheme = "ray://" if way == "client_address" else ""
    address = f"{scheme}{getattr(cluster, other).removeprefix('ray://')}"
    said = refused(source, tmp_path / "out", address)
    assert said.startswith(f"error: Ray at '{address}': ")
    assert "--port of the head (6379)" in said
    assert "--ray-client-server-port (10001)" in said


@pytest.mark.parametrize("way", ["address", "client_address"])
def test_told_to_end(cluster: RayCluster, second: int, source: Path, tmp_path: Path, way: str) -> None:
    """SIGTERM in the middle of a shard ends the command as it does on one machine: Ray has a handler of its own."""
    trap = Setting(tmp_path, NAMES[0])
    arguments = ["quantize", source, tmp_path / "out", "--threads", "1", "--quiet", "--ray", getattr(cluster, way)]
    command = [sys.executable, "-c", MAIN, tmp_path, NAMES[0], "again", *arguments]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    worker = int(wait_for(trap.flag, process=driver))
    begun = time.monotonic()
    driver.terminate()
    said = "\nerror: terminated by SIGTERM; run the same command again to resume\n"
    assert driver.communicate(timeout=60) == ("", said)
    assert time.monotonic() - begun < BOUND
    assert driver.returncode == 143
    assert not list((tmp_path / "out.partial").glob("work-*"))
    wait_until(lambda: not alive(worker))


OURS = ("torch", "triton", "click", "safetensors", "huggingface_hub")
"""Modules that the package or torch may import."""
RAYS = ("pydantic", "numpy", "yaml", "colorama")
"""Modules that Ray's own code may import too, before any of ours runs."""
OTHERS = """
import sys
sys.path.remove("")  # for its own imports; what Ray tells the nodes of the folder stays the same
import ray
import nemotron_fp8

ray.init(sys.argv[1], log_to_driver=False)
nemotron_fp8.quantize_repo("source", "out", cluster=sys.argv[1], threads=1)
"""


@pytest.mark.parametrize("way", ["address", "client_address", "caller"])
def test_nothing_of_the_current_folder_is_imported(
    cluster: RayCluster, second: int, source: Path, wanted: dict[str, bytes], tmp_path: Path, way: str
) -> None:
    """The command in the folder of a stranger's checkpoint, with code under the names of known modules beside it; and
    a program that has connected to Ray by itself, for which Ray puts the folder first on the nodes' path."""
    (tmp_path / "source").symlink_to(source)
    for name in OURS if way == "caller" else (*OURS, *RAYS):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'a').write('{name}\\n')\n")
    if way == "caller":
        command = [sys.executable, "-c", OTHERS, cluster.address]
    else:
        script = Path(sys.executable).with_name("nemotron-fp8")
        command = [str(script), "quantize", "source", "out", "--threads", "1", "--ray", getattr(cluster, way)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    marker = tmp_path / "marker"
    assert not marker.exists(), marker.read_text()
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == wanted
