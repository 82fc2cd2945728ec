"""The cluster's runner on a cluster that is none: order, losses, progress, refusals. `tests/cluster` has real ones."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Barrier
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.cli.main import cli
from nemotron_fp8.conversion.progress import ConversionProgress
from nemotron_fp8.conversion.workers.ray import entry
from nemotron_fp8.conversion.workers.ray.cluster import connect, probe_port
from nemotron_fp8.conversion.workers.ray.pool import MAX_ATTEMPTS, RayPool
from nemotron_fp8.conversion.workers.ray.worker import NodeCheckFailed
from nemotron_fp8.destinations.folder_staging import AttemptStaging, FolderStaging
from nemotron_fp8.errors import NonFiniteError, RecipeError
from nemotron_fp8.errors.cluster import (
    ClusterUnreachableError,
    NoCapacityError,
    NodeBlindError,
    NodeVersionError,
    WorkerLostError,
)
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.sources.files import FolderOpener, identify
from nemotron_fp8.sources.folder import read_folder
from tests.support.checkpoints import contents, weight, write_checkpoint
from tests.support.fake_cluster import NEED, NODES, FakeCluster
from tests.support.run import NO_PROGRESS, SPEC, Job, carry, folder_of

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.progress import Progress

SHARDS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of different sizes."""
    shards = {
        f"model-{i:05d}-of-{SHARDS:05d}.safetensors": {
            f"model.layers.{i}.mlp.up_proj.weight": weight(16 * i, 16, seed=i),
            f"model.layers.{i}.norm.weight": weight(16, seed=i),
        }
        for i in range(1, SHARDS + 1)
    }
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "source", shards)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the result of one machine for the same source."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    quantize_repo(source, out, device="cpu")
    return contents(out)


def convert(cluster: FakeCluster, source: Path, out: Path, seen: list[Progress] | None = None) -> None:
    """Convert on a cluster, as `quantize_repo` does it."""
    plan = make_plan(read_folder(source), Recipe(), 1 << 28, 1)
    progress = ConversionProgress(plan.shard_tasks, None if seen is None else seen.append)
    with folder_of(plan, out, source) as to:
        carry(plan, FolderOpener(source, identify(source)), to, RayPool(cluster, SPEC, NEED), progress)


def jobs(source: Path, folder: Path) -> list[Job]:
    plan = make_plan(read_folder(source), Recipe(), 1 << 28, 1)
    return [
        Job(shard_task, FolderOpener(source), FolderStaging(folder, digests=True)) for shard_task in plan.shard_tasks
    ]


@given(fates=st.lists(st.sampled_from(["ok", "lost", "late", "ended", "dead"]), max_size=14))
@settings(max_examples=60)
def test_whatever_is_lost_the_bytes_are_the_same(
    fates: list[str], source: Path, wanted: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Same bytes, nothing left beside them, progress that only grows and ends at its total; or the run gives up
    over one shard, keeps what is finished, and a second run makes the others alone."""
    out = tmp_path_factory.mktemp("there") / "out"
    cluster = FakeCluster(fates)
    seen: list[Progress] = []
    try:
        convert(cluster, source, out, seen)
    except WorkerLostError as error:
        assert error.attempts == MAX_ATTEMPTS
        assert out.with_name("out.partial").is_dir()
        kept = {path.name for path in (out.with_name("out.partial") / "out").iterdir()}
        again = FakeCluster()
        convert(again, source, out)
        assert set(again.made) | kept == {name for name in wanted if name.endswith(".safetensors")}
        assert set(again.made).isdisjoint(kept)
    else:
        assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
        assert seen[-1].done == seen[-1].total
        # What goes up and down there is shown, until the shard is made or lost, whatever is told of it later.
        assert any(progress.transfers and progress.waiting == "5 s: no answer" for progress in seen)
        assert (seen[-1].transfers, seen[-1].waiting) == ((), "")
        assert sorted(set(cluster.made)) == sorted(name for name in wanted if name.endswith(".safetensors"))
        assert len(cluster.made) == SHARDS + cluster.late  # only what was lost is made again
    assert contents(out) == wanted
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_largest_first_and_never_all_at_once(source: Path, tmp_path: Path) -> None:
    cluster = FakeCluster(nodes=NODES[1:])
    list(RayPool(cluster, SPEC, NEED).run(jobs(source, tmp_path), NO_PROGRESS))
    assert cluster.made == [f"model-{i:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS, 0, -1)]
    assert cluster.most == 2


def test_a_shard_that_takes_every_worker_with_it(source: Path, tmp_path: Path) -> None:
    """The last attempt's loss is an error that names the shard; what others have left is removed."""
    cluster = FakeCluster(["dead"] * MAX_ATTEMPTS, nodes=NODES[1:])
    with pytest.raises(WorkerLostError, match="--max-memory") as caught:
        list(RayPool(cluster, SPEC, NEED).run(jobs(source, tmp_path)[:1], NO_PROGRESS))
    assert (caught.value.shard, caught.value.attempts) == (f"model-00001-of-{SHARDS:05d}.safetensors", MAX_ATTEMPTS)
    assert list(tmp_path.iterdir()) == []


def test_closing_early_kills_what_is_in_flight(source: Path, tmp_path: Path) -> None:
    cluster = FakeCluster()
    with closing(RayPool(cluster, SPEC, NEED).run(jobs(source, tmp_path), NO_PROGRESS)) as receipts:
        first = next(receipts)
    assert len(cluster.stopped) == SHARDS - 1
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_what_a_job_raises_arrives_and_is_not_tried_again(tmp_path: Path) -> None:
    bad = weight(16, 16)
    bad[3, 5] = float("nan")
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": {"model.layers.0.mlp.up_proj.weight": bad}})
    cluster = FakeCluster()
    with pytest.raises(NonFiniteError) as caught:
        convert(cluster, source, tmp_path / "out")
    assert caught.value.position == (3, 5)
    assert "worker.py" in str(caught.value.__cause__)
    assert len(cluster.made) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("answer", "found", "expected"),
    [
        (("differs", ("0.9", "0")), "0.9", "1.0"),
        (("differs", ("1.0", "ffff")), "1.0 with other code (ffff)", "1.0 (0123456789ab)"),
        (("missing", "ModuleNotFoundError: no"), "cannot be imported (ModuleNotFoundError: no)", "1.0"),
    ],
)
def test_a_node_with_other_code_is_named(
    answer: tuple[str, object], found: str, expected: str, source: Path, tmp_path: Path
) -> None:
    cluster = FakeCluster()
    cluster.answers["b"] = answer
    with pytest.raises(NodeVersionError, match="node b: ") as caught:
        convert(cluster, source, tmp_path / "out")
    assert (caught.value.found, caught.value.expected) == (found, expected)
    assert cluster.made == []


def test_a_node_that_joins_and_cannot_see_is_named(source: Path, tmp_path: Path) -> None:
    cluster = FakeCluster(nodes=NODES[:1])
    cluster.answers["b"] = ("done", NodeCheckFailed("source", "no such file"))
    with closing(RayPool(cluster, SPEC, NEED).run(jobs(source, tmp_path), NO_PROGRESS)) as receipts:
        next(receipts)
        cluster._nodes.append(NODES[1])
        with pytest.raises(NodeBlindError, match=r"node b: cannot reach the source \(no such file\)") as caught:
            list(receipts)
    assert caught.value.what == "source"


def test_all_nodes_probe_at_the_same_time(tmp_path: Path) -> None:
    """One probe is no obstacle to another, nor is what a probe that died has left; nothing stays."""
    staging = AttemptStaging(tmp_path / "attempt", digests=True)
    staging.folder.mkdir()
    (staging.folder / "probe").touch()
    together = Barrier(8)

    def check_node(_: int) -> None:
        together.wait()
        staging.probe()

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(check_node, range(8)))
    assert list(tmp_path.iterdir()) == [staging.folder]


def test_a_source_that_changed_since_is_seen_before_the_first_shard(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": {"a.up_proj.weight": weight(16, 16)}})
    identities = identify(source)
    (job,) = jobs(source, tmp_path)
    (source / "model.safetensors").touch()
    cluster = FakeCluster()
    late = Job(job.shard_task, FolderOpener(source, identities), job.staging)
    run = RayPool(cluster, SPEC, NEED).run([late], NO_PROGRESS)
    with pytest.raises(NodeBlindError, match="changed"):
        next(run)
    assert cluster.made == []


def test_no_node_is_left(source: Path, tmp_path: Path) -> None:
    cluster = FakeCluster()
    with closing(RayPool(cluster, SPEC, NEED).run(jobs(source, tmp_path), NO_PROGRESS)) as receipts:
        next(receipts)
        cluster._nodes.clear()
        with pytest.raises(NoCapacityError):
            list(receipts)


def test_the_code_that_nodes_get_needs_the_standard_library_alone() -> None:
    """It runs where this package is missing, so it must not import it; here it is even unable to."""
    script = "import runpy, sys; sys.modules['nemotron_fp8'] = None; print(runpy.run_path(sys.argv[1])['PACKAGES'])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, entry.__file__], capture_output=True, text=True, check=True
    )
    assert "nemotron_fp8" in done.stdout


def test_code_that_changes_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("__version__ = '7'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(entry, "PACKAGES", ("one", "two"))
    first = entry.identity()
    assert first[0] == "7"
    assert entry.identity() == first
    (tmp_path / "two" / "more.py").write_text("pass\n")
    assert entry.identity() != first


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_nobody_at_the_address(address: str) -> None:
    with pytest.raises(ClusterUnreachableError, match="no process listens") as caught:
        probe_port(address)
    assert caught.value.address == address


def test_no_cluster_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own words name an option that our command does not have; it was asked to take no folder of this process."""
    taken: list[list[str]] = []

    def init(*_: object, job_config: Any, **__: object) -> None:
        job_config._py_driver_sys_path = ["/here"]  # as Ray's own constructor does
        job_config._py_driver_sys_path.extend(["/here"])  # and as it does for a driver
        taken.append(job_config._py_driver_sys_path)
        raise ConnectionError("Could not find any running Ray instance. Please specify `--address`.")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, JobConfig=type("JobConfig", (), {}))
    for name in ("ray", "ray.util", "ray.util.scheduling_strategies", "ray.job_config"):
        monkeypatch.setitem(sys.modules, name, ray)  # type: ignore[arg-type]  # stands for a module
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ClusterUnreachableError, match="no cluster found from this machine") as caught,
        connect("auto"),
    ):
        pass
    assert "--address" not in str(caught.value)
    assert taken == [[]]


def test_no_such_host() -> None:
    with pytest.raises(ClusterUnreachableError, match="no such host"):
        probe_port("nobody.invalid:6379")


@pytest.mark.parametrize(
    "address", ["", "here", "ray://", "host:", ":1", "host:x", "host:٣", "http://host:8265", "ray://host/x:1"]
)
def test_no_address(address: str) -> None:
    with pytest.raises(ClusterUnreachableError, match="not an address"):
        probe_port(address)


def test_without_ray_the_message_says_what_to_install(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['ray'] = None; from nemotron_fp8.cli.main import main;"
        "sys.argv[1:] = ['quantize', *sys.argv[1:], '--ray']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: Ray cannot be imported")
    assert done.stderr.endswith("pip install 'nemotron_fp8[ray]'\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--ray", "SRC", "DST"], ["SRC", "--ray", "DST"]])
def test_a_folder_that_is_taken_for_the_address_is_named(arguments: list[str]) -> None:
    done = CliRunner().invoke(cli, ["quantize", *arguments])
    assert done.exit_code == 2
    assert f"took {arguments[arguments.index('--ray') + 1]!r} as its address: use --ray auto" in done.output


def test_in_place_is_for_one_machine(source: Path) -> None:
    with pytest.raises(RecipeError, match="in place"):
        quantize_repo(source, in_place=True, cluster="auto")
