"""Several worker processes: the same bytes, every failure told, nobody left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.api import plan_repo, quantize_repo
from nemotron_fp8.cli.demo import write_checkpoint
from nemotron_fp8.destinations.folder_staging import FolderStaging
from nemotron_fp8.engines.devices import EngineSpec, resolve_devices
from nemotron_fp8.errors import DeviceError, NonFiniteError, WorkerDiedError
from nemotron_fp8.sources.files import FolderOpener
from nemotron_fp8.sources.folder import inspect_path
from tests.support.doubles import HANG as HUNG
from tests.support.doubles import FailingStaging, HangingStaging, Watched, alive, wait_for
from tests.support.run import NO_PROGRESS, InProcess, Job, Processes

if TYPE_CHECKING:
    from nemotron_fp8.destinations.base import Staging

SPEC = EngineSpec("cpu", 64 << 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "source"
    write_checkpoint(folder)
    return folder


def jobs(source: Path, staging: Staging) -> list[Job]:
    return [Job(shard_task, FolderOpener(source), staging) for shard_task in plan_repo(source).shard_tasks]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def _standing() -> None:
    """Note what earlier tests have left for good, such as the server that processes are forked from."""
    STANDING.clear()
    STANDING.update(children())


STANDING: set[int] = set()


def children() -> set[int]:
    """Processes that this one has started in this test and that still run."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.add(int(entry.name))
    return found - STANDING


def test_same_result_whatever_the_number_of_workers(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    one = quantize_repo(source, tmp_path / "1", device="cpu", progress=lambda p: seen.append(p.done))
    most = seen[-1]
    seen.clear()
    devices = "cpu,cpu,cpu,cpu,cpu"  # for 3 shards
    many = quantize_repo(source, tmp_path / "5", device=devices, progress=lambda p: seen.append(p.done))
    assert contents(tmp_path / "5") == contents(tmp_path / "1")
    assert (many.tensors_quantized, many.bytes_written) == (one.tensors_quantized, one.bytes_written)
    assert seen == sorted(seen)
    assert seen[-1] == most  # progress of all workers adds up to the same
    assert quantize_repo(source, tmp_path / "1", device=devices).unchanged  # who made it does not show
    assert not children()


def test_a_job_is_picklable_and_runs_from_its_pickle(source: Path, tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    for job in jobs(source, FolderStaging(tmp_path / "staged", digests=True)):
        again = pickle.loads(pickle.dumps(job))
        assert again.shard_task == job.shard_task
        (receipt,) = InProcess(SPEC).run([again], NO_PROGRESS)
        assert (tmp_path / "staged" / receipt.name).stat().st_size == receipt.size


def test_largest_job_first(source: Path, tmp_path: Path) -> None:
    """One worker takes the jobs by size: the first receipt is of the largest shard."""
    all_jobs = jobs(source, FolderStaging(tmp_path, digests=False))
    order = [receipt.name for receipt in Processes([SPEC]).run(all_jobs, NO_PROGRESS)]
    assert order == [job.shard_task.name for job in sorted(all_jobs, key=lambda job: -job.nbytes)]


def test_an_error_of_ours_arrives_with_its_attributes(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "source"
    write_checkpoint(broken)
    shard = broken / "model-00002-of-00003.safetensors"
    (view,) = (v for v in inspect_path(shard)[0].views if v.name.endswith("2.mlp.up_proj.weight"))
    with shard.open("r+b") as file:
        file.seek(view.extents[0].offset + 2 * (256 + 3))
        file.write(b"\xc0\x7f")  # a bf16 NaN
    with pytest.raises(NonFiniteError) as caught:
        quantize_repo(broken, tmp_path / "out", device="cpu,cpu")
    assert (caught.value.tensor, caught.value.count, caught.value.position) == (view.name, 1, (1, 3))
    assert "worker" not in str(caught.value)
    assert not children()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_exception_stops_the_other_workers_and_says_where_it_was_raised(source: Path, tmp_path: Path) -> None:
    work = jobs(source, FailingStaging("model-00001-of-00003.safetensors", tmp_path / "flag"))
    with pytest.raises(RuntimeError, match=r"LocalError: [0-9]+ bytes refused") as caught:
        list(Processes([SPEC, SPEC]).run(work, NO_PROGRESS))
    assert "tests/support/doubles.py" in str(caught.value.__cause__)
    assert not children()
    assert not alive(int((tmp_path / "flag").read_text()))


def test_a_killed_worker_is_named(source: Path, tmp_path: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    (tmp_path / "staged").mkdir()
    work = jobs(source, HangingStaging(tmp_path / "staged", name, tmp_path / "flag"))
    killer = Thread(target=lambda: os.kill(int(wait_for(tmp_path / "flag")), signal.SIGKILL), daemon=True)
    killer.start()
    with pytest.raises(WorkerDiedError, match="killed by SIGKILL while it wrote") as caught:
        list(Processes([SPEC, SPEC]).run(work, NO_PROGRESS))
    killer.join()
    assert (caught.value.device, caught.value.shard, caught.value.exit_code) == ("cpu", name, -9)
    assert not children()


def test_closing_early_leaves_no_process(source: Path, tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    work = jobs(source, HangingStaging(tmp_path / "staged", "model-00003-of-00003.safetensors", tmp_path / "flag"))
    runs = Processes([SPEC, SPEC]).run(work, NO_PROGRESS)
    next(runs)
    assert children()
    runs.close()
    assert not children()


HANG = """
import sys
from pathlib import Path
from nemotron_fp8 import quantize_repo
from nemotron_fp8.destinations import folder
from tests.support.doubles import HangingStaging
source, destination, flag = sys.argv[1:]
staging = folder.FolderDestination.staging.fget
hang = lambda self: HangingStaging(staging(self).folder, "model-00002-of-00003.safetensors", Path(flag))
folder.FolderDestination.staging = property(hang)
quantize_repo(source, destination, device="cpu,cpu")
"""


def start(source: Path, tmp_path: Path) -> tuple[subprocess.Popen[str], Watched]:
    """A run in a group of its own whose second shard hangs for ever, and the worker that makes it."""
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", HANG, source, tmp_path / "out", tmp_path / "flag"],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, Watched(int(wait_for(tmp_path / "flag", process=process)))


def test_ctrl_c_stops_all_and_leaves_no_process(source: Path, tmp_path: Path) -> None:
    """That it ends at all shows that it does not wait for a worker, which would never end by itself."""
    process, worker = start(source, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=HUNG)
    assert process.returncode == -signal.SIGINT
    assert stderr.count("KeyboardInterrupt") == 1  # the parent's; workers keep silent
    assert not alive(worker.pid)  # at once: the parent has seen it end
    worker.wait()
    assert {path.name for path in tmp_path.iterdir()} <= {"flag", "out.partial"}


def test_workers_end_when_their_parent_is_killed(source: Path, tmp_path: Path) -> None:
    process, worker = start(source, tmp_path)
    process.kill()
    process.communicate(timeout=HUNG)
    worker.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"flag", "out.partial"}
    quantize_repo(source, tmp_path / "out", device="cpu")  # the next run finds its way
    assert {path.name for path in tmp_path.iterdir()} == {"flag", "out"}


def test_a_script_without_a_main_guard_may_use_several_workers(source: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from nemotron_fp8 import quantize_repo\n"
        "print(quantize_repo(sys.argv[1], sys.argv[2], device='cpu,cpu').tensors_quantized)\n"
    )
    path = os.pathsep.join(filter(None, sys.path))
    out = subprocess.run(
        [sys.executable, script, source, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout == "24\n"
    assert out.stderr == ""


@pytest.mark.parametrize(
    ("text", "there", "devices"),
    [
        ("auto", [], ("cpu",)),
        ("auto", [0, 1, 3], ("cuda:0", "cuda:1", "cuda:3")),
        ("cpu", [0], ("cpu",)),
        ("cpu,cpu", [0], ("cpu", "cpu")),
        ("cuda", [2, 3], ("cuda:2", "cuda:3")),
        ("cuda:1", [0, 1], ("cuda:1",)),
        ("cuda:1, cuda:0", [0, 1], ("cuda:1", "cuda:0")),
    ],
)
def test_device_names(text: str, there: list[int], devices: tuple[str, ...]) -> None:
    assert resolve_devices(text, lambda: there) == devices


@pytest.mark.parametrize(
    ("text", "there", "problem"),
    [
        ("", [0], "is not a device"),
        ("gpu", [0], "is not a device"),
        ("cuda:", [0], "is not a device"),
        ("cuda:-1", [0], "is not a device"),
        ("cuda:٣", [0, 3], "is not a device"),  # a digit, but not an ASCII one
        ("cuda:0,", [0], "is not a device"),
        ("auto,cpu", [0], "is not a device"),
        ("cpu,cuda:0", [0], "one kind"),
        ("cuda", [], "no CUDA device"),
        ("cuda,cuda:1", [0, 1], "number them"),
        ("cuda:2", [0, 1], "cuda:2 is missing .* devices: cuda:0, cuda:1"),
        ("cuda:0", [], "usable devices: none"),
        ("cuda:0,cuda:0", [0], "twice"),
    ],
)
def test_device_names_refused(text: str, there: list[int], problem: str) -> None:
    with pytest.raises(DeviceError, match=problem) as caught:
        resolve_devices(text, lambda: there)
    assert caught.value.device == text
