"""Estimate of time and memory for a conversion on this machine, from its plan and a short measurement.

A sample of the source is read, quantized and written to memory, in the slices and threads of the plan. Disk writes are
not measured, because nothing is written; the estimate contains the write rate that the disk must sustain instead.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch

from nemotron_fp8._utils import check_arguments, parallel_for, parse_bytes, usable_cores
from nemotron_fp8.engines.base import as_bytes, one_torch_thread, slice_amax
from nemotron_fp8.engines.cpu import CpuEngine
from nemotron_fp8.engines.error_stats import cast_slice
from nemotron_fp8.sources.files import is_ranged
from nemotron_fp8.sources.reader import TORCH_DTYPES, Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.tasks import Slicing, TensorTask
    from nemotron_fp8.sources.base import Source


SAMPLE_BYTES = 96 << 20
"""Input bytes of the sample: about 0.1 s of work on the cores of a desktop, a few seconds on a slow disk."""
SAMPLE_SLICES = 1024
"""Most slices of the sample: a checkpoint of 100,000 tiny tensors would be quantized as a whole to plan it."""
HASHED_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimate of a conversion on the CPU.

    Attributes:
        seconds: wall time to read, compute and hash on an idle machine; longer if the disk writes more slowly than
            ``disk_rate``.
        disk_rate: bytes of the result for each second of that time.
        peak_host_bytes: peak memory of the process: resident bytes without buffers, plus the buffers.
    """

    seconds: float
    disk_rate: float
    peak_host_bytes: int


def estimate_plan(plan: Plan, source: Source, sample: int = SAMPLE_BYTES) -> Estimate:
    """Return the estimate of a plan, from a measurement on a sample of the source.

    Args:
        plan: the plan.
        source: source of the plan.
        sample: maximum input bytes of the sample.

    Raises:
        SourceReadError, SourceChangedError: the source cannot be read.
    """
    slicing = plan.shard_tasks[0].slicing
    tensor_tasks = [tensor_task for shard_task in plan.shard_tasks for tensor_task in shard_task.tensor_tasks]
    quantized = [tensor_task for tensor_task in tensor_tasks if tensor_task.group is not None]
    copied = [tensor_task for tensor_task in tensor_tasks if tensor_task.group is None]
    resident = resident_bytes()
    with Reader(source.opener) as reader, one_torch_thread(), _Memory() as memory:
        numbers = plan.recipe.weight_format.numbers
        coverage, element = numbers.coverage, numbers.element.dtype

        def quantize(job: tuple[TensorTask, int, int]) -> None:
            tensor_task, begin, end = job
            size = tensor_task.view.itemsize
            with reader.elements(tensor_task.view, begin // size, end // size) as values:
                bits = slice_amax(values, tensor_task.view, coverage, numbers.scale_choice)
                del values
            with reader.elements(tensor_task.view, begin // size, end // size) as values:
                codes = torch.empty(values.numel(), dtype=TORCH_DTYPES[element])
                recipe = plan.recipe
                view, rounding = tensor_task.view, numbers.scale_rounding
                cast_slice(values, view, coverage, bits, recipe.numerics, codes, recipe.stats, rounding)
                del values
            memory.put(as_bytes(codes))

        def copy(job: tuple[TensorTask, int, int]) -> None:
            tensor_task, begin, end = job
            with reader.raw(tensor_task.view, begin, end) as data:
                memory.put(data)

        seconds = _scaled(quantize, quantized, slicing, sample) + _scaled(copy, copied, slicing, sample // 4)
    data = bytes(HASHED_BYTES)
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    # The digest has its own thread, which competes for the cores.
    seconds += plan.bytes_out * (time.perf_counter() - started) / HASHED_BYTES / slicing.workers
    return Estimate(seconds, plan.bytes_out / seconds if seconds else 0.0, resident + plan.buffer_bytes)


def _scaled(
    one: Callable[[tuple[TensorTask, int, int]], None], tensor_tasks: list[TensorTask], slicing: Slicing, sample: int
) -> float:
    """Return the seconds for all bytes of tensors, measured on slices of the largest tensors."""
    total = sum(tensor_task.view.nbytes for tensor_task in tensor_tasks)
    if not total:
        return 0.0
    largest = sorted(tensor_tasks, key=lambda tensor_task: -tensor_task.view.nbytes)
    jobs = list(_within(largest, slicing, sample))
    one(jobs[0])  # warm up threads, buffers and libraries
    started = time.perf_counter()
    parallel_for(slicing.workers, jobs, one)
    return (time.perf_counter() - started) * total / sum(end - begin for _, begin, end in jobs)


def _within(tensor_tasks: list[TensorTask], slicing: Slicing, sample: int) -> Iterator[tuple[TensorTask, int, int]]:
    """Yield slices of tensors, at least one, until ``sample`` bytes or `SAMPLE_SLICES` slices are reached."""
    taken = 0
    slices = itertools.chain.from_iterable(
        ((tensor_task, part) for part in slicing.slices(tensor_task)) for tensor_task in tensor_tasks
    )
    for tensor_task, (begin, end) in itertools.islice(slices, SAMPLE_SLICES):
        yield tensor_task, begin, end
        taken += end - begin
        if taken >= sample:
            return


class _Memory:
    """A file in memory: writing to it costs as much as writing to the page cache."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._end = 0
        self._fd = os.memfd_create("estimate") if hasattr(os, "memfd_create") else -1

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def put(self, data: memoryview) -> None:
        """Append bytes."""
        with self._lock:
            at, self._end = self._end, self._end + len(data)
        if self._fd >= 0:
            os.pwrite(self._fd, data, at)


def resident_bytes() -> int:
    """Return the resident bytes of this process, or the peak if the operating system reports only that."""
    from nemotron_fp8._utils import peak_resident_bytes

    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes() or 0


@dataclass(frozen=True, slots=True)
class Needs:
    """Resources of this machine that a conversion needs.

    Attributes:
        peak_host_bytes: peak memory of all processes; None if it was not measured.
        peak_device_bytes: peak memory on each CUDA device; 0 on the CPU; None if it depends on the free bytes.
        seconds: wall time on the CPU without disk writes; None if it was not measured.
        disk_rate: bytes per second that the disk must write for that time; None if it was not measured.
        devices: devices of the workers.
        fetched: bytes to download; 0 for a local source.
        twice: bytes of these that are fetched a second time, for tensors whose scale is known after a first pass only.
        by_range: True if bytes are fetched as they are read, and no file of the source is kept on a disk.
        cache: most bytes of downloaded shards on the disk at any one time; 0 for a local source.
    """

    peak_host_bytes: int | None
    peak_device_bytes: int | None
    seconds: float | None
    disk_rate: float | None
    devices: tuple[str, ...]
    fetched: int = 0
    cache: int = 0
    twice: int = 0
    by_range: bool = False


def twice_fetched(plan: Plan) -> int:
    """Return the bytes that a conversion into a folder on the CPU fetches a second time from a source without files.

    Rows with a scale of their own are converted as they arrive; a scale for a whole tensor needs a first pass over it.
    """
    engine = CpuEngine()
    return sum(
        member.nbytes
        for shard_task in plan.shard_tasks
        if not engine.has_single_pass(shard_task, in_order=False)
        for group in shard_task.groups
        for member in group.members
    )


def needs_of(
    plan: Plan,
    source: Source,
    device: str,
    max_memory: str,
    max_device_memory: str | None,
    threads: int | None,
    measure: bool,
) -> Needs:
    """Return the resources of this machine that a plan needs.

    Only a conversion of a local source on the CPU is measured: otherwise the transfer or a device determines the time.

    Args:
        plan: the plan.
        source: source of the plan.
        device: names of the devices, as in `nemotron_fp8.quantize_repo`.
        max_memory: host bytes of all workers together.
        max_device_memory: bytes on each CUDA device; None for the default share of the free bytes.
        threads: threads of all workers together; None for one on each core.
        measure: True to measure a sample of the source.

    Raises:
        DeviceError: a device is missing.
        RecipeError: ``max_device_memory`` is malformed.
        BudgetError: the buffers of a device do not fit the budgets.
        SourceError: the source cannot be read.
    """
    from nemotron_fp8.engines.devices import resolve_devices

    check_arguments(max_device_memory=max_device_memory)
    devices = resolve_devices(device)
    twice = twice_fetched(plan) if is_ranged(source.opener) and devices[0] == "cpu" else 0
    fetched = 0 if source.is_local else sum(shard.size for shard in plan.inventory.shards) + twice
    cache = source.prefetcher.disk_bytes(plan.shard_tasks, 0, len(devices))
    if devices[0] != "cpu":
        from nemotron_fp8.engines.cuda.memory_plan import ring_plan

        allowed = None if max_device_memory is None else parse_bytes(max_device_memory)
        host = parse_bytes(max_memory) // len(devices)
        cores = max(1, (threads or usable_cores()) // len(devices))
        ring = ring_plan(plan.shard_tasks, host, allowed or 1 << 62, cores)
        device_bytes = ring.device_bytes if allowed else None
        return Needs(None, device_bytes, None, None, devices, fetched, cache, by_range=is_ranged(source.opener))
    if not measure or not source.is_local:
        return Needs(None, 0, None, None, devices, fetched, cache, twice, is_ranged(source.opener))
    estimate = estimate_plan(plan, source)
    return Needs(estimate.peak_host_bytes, 0, estimate.seconds, estimate.disk_rate, devices)
