"""The CUDA engine without CUDA: the production ring, threads, budgets and failures on a device made of threads."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nemotron_fp8.api import quantize_repo
from nemotron_fp8.checkpoint.dtypes import nbytes
from nemotron_fp8.destinations.folder_staging import FolderStaging
from nemotron_fp8.engines.cuda.device import CudaKernels
from nemotron_fp8.engines.cuda.engine import CudaEngine
from nemotron_fp8.engines.cuda.memory_plan import ring_plan
from nemotron_fp8.engines.devices import EngineSpec
from nemotron_fp8.errors import (
    BudgetError,
    DeviceError,
    NonFiniteError,
    NothingSelectedError,
    SourceReadError,
    UnrepresentableError,
)
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.sources.folder import read_folder
from nemotron_fp8.sources.reader import FolderOpener, Reader
from tests.support.fake_device import DeviceFailure, FakeDevice
from tests.support.random_weights import BIG, DTYPES, RECIPES, Tensors, contents, write
from tests.support.recipes import PUBLISHED, SHARED
from tests.support.run import NO_PROGRESS, InProcess, Job, make_shard

if TYPE_CHECKING:
    from nemotron_fp8.destinations.base import Sink
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.sources.reader import SourceFile


def run_on(
    source: Path,
    out: Path,
    recipe: Recipe,
    device: FakeDevice,
    host: int = 4 << 20,
    memory: int | None = None,
    threads: int = 4,
    opener: FolderOpener | None = None,
) -> list[ShardReceipt]:
    """Convert all shards with the engine on a fake device."""
    out.mkdir()
    plan = make_plan(read_folder(source), recipe, 64 << 20, 1)
    try:
        with CudaEngine(device, host, memory, threads) as engine:
            return [
                make_shard(shard_task, opener or FolderOpener(source), FolderStaging(out, digests=True), engine)
                for shard_task in plan.shard_tasks
            ]
    finally:
        device.end()


def run_on_cpu(source: Path, out: Path, recipe: Recipe) -> list[ShardReceipt]:
    out.mkdir()
    plan = make_plan(read_folder(source), recipe, 64 << 20, 1)
    jobs = (Job(shard_task, FolderOpener(source), FolderStaging(out, digests=True)) for shard_task in plan.shard_tasks)
    return list(InProcess(EngineSpec("cpu", 64 << 20)).run(jobs, NO_PROGRESS))


def flow_threads() -> list[str]:
    """Threads of the pipeline that still run."""
    kinds = ("read-", "upload", "cast", "write-", "digest")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(kinds)]


NAMES = [
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "self_attn.o_proj.weight",
    "input_layernorm.weight",
    "mlp.act.bias",
]


@st.composite
def checkpoints(draw: st.DrawFn) -> list[Tensors]:
    """A few layers over one to three shards: weights of all sizes a slot can meet, empty ones among them."""
    edges = st.sampled_from([0, 1, 7, 64, 128, 256, 300, 640])
    shards: list[Tensors] = [{} for _ in range(draw(st.integers(1, 3)))]
    for layer in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(list(DTYPES)))
        for name in NAMES:
            if draw(st.booleans()):
                shape = (draw(edges), draw(edges)) if "proj" in name else (draw(edges),)
                shards[draw(st.integers(0, len(shards) - 1))][f"model.layers.{layer}.{name}"] = (dtype, shape)
    shards = [shard for shard in shards if shard]
    assume(shards)
    return shards


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shards=checkpoints(),
    recipe=st.sampled_from(RECIPES),
    host=st.integers(1 << 20, 8 << 20),
    memory=st.one_of(st.none(), st.integers(1 << 20, 6 << 20)),
    threads=st.integers(1, 8),
    seed=st.integers(0, 1 << 30),
    infinite=st.booleans(),
)
def test_same_bytes_as_the_cpu(
    shards: list[Tensors], recipe: Recipe, host: int, memory: int | None, threads: int, seed: int, infinite: bool
) -> None:
    """Whatever the tensors, the recipe, the budgets, the threads and the timing."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        weights = [t for shard in shards for t, (_, s) in shard.items() if "proj" in t and 0 not in s]
        keep = infinite and weights and recipe.nonfinite == "keep"
        write(folder / "source", shards, seed, weights[seed % len(weights)] if keep else None)
        try:
            expected = run_on_cpu(folder / "source", folder / "cpu", recipe)
        except (NothingSelectedError, UnrepresentableError):
            assume(False)
        device = FakeDevice(seed, 0.002)
        try:
            receipts = run_on(folder / "source", folder / "fake", recipe, device, host, memory, threads)
        except BudgetError:
            assume(False)
        assert receipts == expected
        assert contents(folder / "fake") == contents(folder / "cpu")
        assert device.host_peak <= host
        assert memory is None or device.memory_peak <= memory
        assert not flow_threads()


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    write(folder / "source", BIG)
    run_on_cpu(folder / "source", folder / "expected", PUBLISHED)
    return folder


@dataclass
class Counter:
    """Bytes read, by file."""

    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CountingOpener(FolderOpener):
    """Opens files that are read and never mapped, and counts."""

    root: Path
    counter: Counter
    fail_after: int = 1 << 60

    def open(self, file: str) -> SourceFile:
        opened = FolderOpener(self.root).open(file)
        counts = self.counter.counts

        class Counted:
            def window(self, offset: int, length: int) -> memoryview | None:
                return None

            def read_into(_, offset: int, buffer: memoryview) -> None:  # noqa: N805  (the outer self is meant)
                counts[file] = counts.get(file, 0) + len(buffer)
                if sum(counts.values()) > self.fail_after:
                    raise SourceReadError(file, "a broken disk")
                opened.read_into(offset, buffer)

            def release(self, offset: int, length: int) -> None:
                pass

            def close(self) -> None:
                opened.close()

        return Counted()


def data_bytes(shard: Tensors) -> int:
    return sum(nbytes(dtype, shape) for dtype, shape in shard.values())


def test_what_fits_the_device_is_read_once(big: Path, tmp_path: Path) -> None:
    counter = Counter()
    opener = CountingOpener(big / "source", counter)
    run_on(big / "source", tmp_path / "out", PUBLISHED, FakeDevice(1, 0.002), opener=opener)
    assert contents(tmp_path / "out") == contents(big / "expected")
    assert list(counter.counts.values()) == [data_bytes(shard) for shard in BIG]


def test_what_does_not_fit_is_read_twice(big: Path, tmp_path: Path) -> None:
    """A device of 5 MB holds no tensor of 8 MB: that one is streamed twice, the others once."""
    counter = Counter()
    opener, device = CountingOpener(big / "source", counter), FakeDevice(2, 0.002)
    run_on(big / "source", tmp_path / "out", PUBLISHED, device, 2 << 20, 5_000_000, opener=opener)
    assert contents(tmp_path / "out") == contents(big / "expected")
    assert device.memory_peak <= 5_000_000
    expected = [data_bytes(shard) for shard in BIG]
    expected[0] += nbytes(*BIG[0]["model.layers.0.mlp.down_proj.weight"])
    assert list(counter.counts.values()) == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_public_operations_are_called_as_they_want(big: Path, tmp_path: Path, recipe: Recipe) -> None:
    """The operations that the CUDA device calls accept CPU tensors too."""
    device = FakeDevice()
    device.kernels = CudaKernels()
    run_on_cpu(big / "source", tmp_path / "expected", recipe)
    run_on(big / "source", tmp_path / "out", recipe, device, 8 << 20, 24 << 20)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_budget_too_small_for_the_ring_is_refused_before_anything_is_made(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemotron_fp8.engines.devices.usable_cuda_devices", lambda: [0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = (
        ({"max_device_memory": "300KB"}, PUBLISHED, "up_proj"),
        ({"max_memory": "4MB"}, Recipe(format="fp8", granularity="block"), "down_proj"),
    )
    for options, recipe, tensor in asked:
        with pytest.raises(BudgetError, match=f"{tensor}.*raise {next(iter(options))}") as caught:
            quantize_repo(big / "source", tmp_path / "out", recipe, "cuda:0", **options)
        assert caught.value.needed > caught.value.budget
        assert not list(tmp_path.iterdir())
    with pytest.raises(DeviceError, match="cuda:0"):  # enough, but there is no such device
        quantize_repo(big / "source", tmp_path / "out", PUBLISHED, "cuda:0")


@pytest.mark.parametrize("stage", ["upload", "kernel", "download"])
def test_whatever_is_slow_is_waited_for(big: Path, tmp_path: Path, stage: str) -> None:
    """Every other stage is at once done with what it has, and must not go on with what it has not."""
    device = FakeDevice(slow=(stage, 0.03))
    run_on(big / "source", tmp_path / "out", PUBLISHED, device, 2 << 20, 5_000_000)
    assert contents(tmp_path / "out") == contents(big / "expected")


def test_a_scale_is_told_once_and_before_any_byte_of_its_tensors(big: Path) -> None:
    plan = make_plan(read_folder(big / "source"), SHARED, 64 << 20, 1)
    device = FakeDevice(8, 0.001)
    with CudaEngine(device, 2 << 20, 5_000_000, 8) as engine:
        for shard_task in plan.shard_tasks:
            told: list[str] = []
            home = {work.view.name: work.group for work in shard_task.tensor_tasks}

            def put_scale(group: str, scale: torch.Tensor, _row: int = 0, /, told: list[str] = told) -> bool:
                time.sleep(0.02)  # the codes are there by now
                assert scale.isfinite().all()
                told.append(group)
                return True

            def emit(
                name: str, begin: int, data: memoryview, told: list[str] = told, home: dict[str, str | None] = home
            ) -> None:
                group = home[name]
                assert group is None or group in told, f"{len(data)} bytes of {name} at {begin}"

            with Reader(FolderOpener(big / "source")) as reader:
                engine.convert(shard_task.tensor_tasks, shard_task, reader, put_scale, emit)
            assert sorted(told) == sorted(group.id for group in shard_task.groups)
    device.end()


def test_small_tensors_share_a_launch(big: Path, tmp_path: Path) -> None:
    """40 experts of 32 KiB: fewer launches than tensors."""
    device = FakeDevice()
    run_on(big / "source", tmp_path / "out", PUBLISHED, device, 8 << 20)
    assert device.counts["launch"] < 30


@pytest.mark.parametrize("stage", ["upload", "launch", "kernel", "download"])
@pytest.mark.parametrize("at", [1, 5])
def test_a_failing_device_stops_everything(big: Path, tmp_path: Path, stage: str, at: int) -> None:
    device = FakeDevice(3, 0.002, fail=(stage, at))
    with pytest.raises(DeviceFailure, match=f"^{stage} {at}$"):
        run_on(big / "source", tmp_path / "out", PUBLISHED, device)
    assert not device.overdue
    assert not flow_threads()
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("after", [0, 3_000_000])
def test_a_failing_source_stops_everything(big: Path, tmp_path: Path, after: int) -> None:
    opener = CountingOpener(big / "source", Counter(), after)
    with pytest.raises(SourceReadError, match="a broken disk"):
        run_on(big / "source", tmp_path / "out", PUBLISHED, FakeDevice(4, 0.002), opener=opener)
    assert not flow_threads()
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_failing_destination_stops_everything(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    numbers = itertools.count()
    put = FolderStaging.stage

    def stage(self: FolderStaging, name: str, size: int) -> Sink:
        sink = put(self, name, size)
        write_at = sink.write_at

        def failing(offset: int, data: memoryview) -> None:
            if next(numbers) == at:
                raise OSError(28, "No space left on device")
            write_at(offset, data)

        monkeypatch.setattr(sink, "write_at", failing)
        return sink

    monkeypatch.setattr(FolderStaging, "stage", stage)
    with pytest.raises(OSError, match="No space left"):
        run_on(big / "source", tmp_path / "out", PUBLISHED, FakeDevice(5, 0.002))
    assert not flow_threads()
    assert not contents(tmp_path / "out")


def test_infinity_is_found_whatever_way_a_tensor_goes(tmp_path: Path) -> None:
    for number, name in enumerate(["1.experts.7.up_proj", "0.self_attn.q_proj", "0.mlp.down_proj"]):
        source, tensor = tmp_path / f"source{number}", f"model.layers.{name}.weight"
        write(source, BIG, 0, tensor)
        with pytest.raises(NonFiniteError) as caught:
            run_on(source, tmp_path / str(number), PUBLISHED, FakeDevice(6, 0.001), 2 << 20, 5_000_000)
        assert (caught.value.tensor, caught.value.count) == (tensor, 1)
        assert not flow_threads()


def test_ctrl_c_stops_everything(big: Path, tmp_path: Path) -> None:
    """The signal meets the main thread while the device stands still and all wait for it."""
    device = FakeDevice(7, stuck=("kernel", 2))

    def interrupt(*_: object) -> None:
        device.released.set()  # not before: the run could end first
        raise KeyboardInterrupt

    def send() -> None:
        device.reached.wait()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        threading.Thread(target=send, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run_on(big / "source", tmp_path / "out", PUBLISHED, device)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not device.overdue
    assert not flow_threads()
    assert not contents(tmp_path / "out")


def test_buffers_are_kept_from_unit_to_unit(big: Path, tmp_path: Path) -> None:
    device = FakeDevice()
    run_on(big / "source", tmp_path / "out", PUBLISHED, device, 4 << 20)
    plan = make_plan(read_folder(big / "source"), PUBLISHED, 64 << 20, 1)
    (ring,) = {ring_plan([shard_task], 4 << 20, 800 << 20, 4) for shard_task in plan.shard_tasks}
    assert device.host_peak == ring.host_bytes


def test_the_cpu_searches_best_scales_and_the_device_casts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes, statistics and budgets of a device, whose kernel of amaxes is not called."""
    write(tmp_path / "source", BIG)
    for recipe in (Recipe(scales="best"), Recipe(scales="best", stats=True)):
        name = f"stats-{recipe.stats}"
        device = FakeDevice(3)
        monkeypatch.delattr(type(device.kernels), "amax", raising=False)
        receipts = run_on(tmp_path / "source", tmp_path / f"fake-{name}", recipe, device, 12 << 20, 24 << 20)
        assert receipts == run_on_cpu(tmp_path / "source", tmp_path / f"cpu-{name}", recipe)
        assert contents(tmp_path / f"fake-{name}") == contents(tmp_path / f"cpu-{name}")
        assert device.host_peak <= 12 << 20
        assert device.memory_peak <= 24 << 20
        assert device.counts["kernel"] > 0
