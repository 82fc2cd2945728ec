"""How long a conversion will take here, and what it will hold: from its plan and a short measurement.

A sample of the source is read, quantised and written to memory, in the slices and by the threads that the plan says.
What a disk takes to write is not measured: nothing is written. So the estimate comes with the rate that a disk must
keep up with.
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

from nemotron_fp8._utils import parse_bytes, share_out, usable_cores
from nemotron_fp8.engines.base import as_bytes, matrix, one_torch_thread
from nemotron_fp8.planning.layouts import BLOCK
from nemotron_fp8.sources.open import is_remote
from nemotron_fp8.sources.reader import Reader
from nemotron_fp8_kernels.cpu import amax_bits, quantize_with_amax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.tasks import Slicing, Work
    from nemotron_fp8.sources.base import Source


SAMPLE_BYTES = 96 << 20
"""Input bytes that are worked on: about a tenth of a second's work of a desktop's cores, or a few of a slow disk's."""
HASH_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a conversion on the CPU will take.

    Attributes:
        seconds: wall time to read, compute and hash, on a machine that does nothing else; a disk that writes slower
            than ``disk_rate`` takes longer.
        disk_rate: bytes of result a second in that time.
        peak_host_bytes: memory of the whole process at the most: what is resident without any buffer, and the buffers.
    """

    seconds: float
    disk_rate: float
    peak_host_bytes: int


def estimate_plan(plan: Plan, source: Source, sample: int = SAMPLE_BYTES) -> Estimate:
    """Measure this machine on a sample of the source.

    Args:
        plan: what will be done.
        source: what it is made from.
        sample: input bytes to work on at the most.

    Raises:
        SourceReadError, SourceChangedError: the source fails.
    """
    slicing = plan.units[0].slicing
    works = [work for unit in plan.units for work in unit.works]
    quantised = [work for work in works if work.group is not None]
    kept = [work for work in works if work.group is None]
    resident = resident_bytes()
    with Reader(source.opener) as reader, one_torch_thread(), _Memory() as memory:
        granularity = plan.recipe.granularity

        def quantise(job: tuple[Work, int, int]) -> None:
            work, begin, end = job
            size = work.view.itemsize
            with reader.elements(work.view, begin // size, end // size) as values:
                rows = matrix(values, work.view, granularity)
                bits = amax_bits(rows, granularity, BLOCK)
                del values, rows
            with reader.elements(work.view, begin // size, end // size) as values:
                codes, _ = quantize_with_amax(
                    matrix(values, work.view, granularity), bits, granularity, BLOCK, plan.recipe.numerics
                )
                del values
            memory.put(as_bytes(codes))

        def copy(job: tuple[Work, int, int]) -> None:
            work, begin, end = job
            with reader.raw(work.view, begin, end) as data:
                memory.put(data)

        seconds = _scaled(quantise, quantised, slicing, sample) + _scaled(copy, kept, slicing, sample // 4)
    if plan.recipe.stats:
        seconds += 0.0 if not quantised else _stats_seconds(plan, source, sample // 8)
    data = bytes(HASH_BYTES)
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    # The digest follows on a thread of its own, which takes its share of the cores.
    seconds += plan.bytes_out * (time.perf_counter() - started) / HASH_BYTES / slicing.workers
    return Estimate(seconds, plan.bytes_out / seconds if seconds else 0.0, resident + plan.buffer_bytes)


def _scaled(one: Callable[[tuple[Work, int, int]], None], works: list[Work], slicing: Slicing, sample: int) -> float:
    """Seconds for all bytes of tensors, measured on slices of the largest: those are most of the work."""
    total = sum(work.view.nbytes for work in works)
    if not total:
        return 0.0
    largest = sorted(works, key=lambda work: -work.view.nbytes)
    jobs = list(_within(largest, slicing, sample))
    one(jobs[0])  # threads, buffers and libraries start once, not once for each byte
    started = time.perf_counter()
    share_out(slicing.workers, jobs, one)
    return (time.perf_counter() - started) * total / sum(end - begin for _, begin, end in jobs)


def _within(works: list[Work], slicing: Slicing, sample: int) -> Iterator[tuple[Work, int, int]]:
    """Slices of these tensors until there are enough bytes; at least one."""
    taken = 0
    for work, (begin, end) in itertools.chain.from_iterable(
        ((work, part) for part in slicing.slices(work)) for work in works
    ):
        yield work, begin, end
        taken += end - begin
        if taken >= sample:
            return


def _stats_seconds(plan: Plan, source: Source, sample: int) -> float:
    """Seconds to measure the errors of all FP8 tensors, from those of a few shards' first tensors."""
    from nemotron_fp8.engines.base import blank_amax
    from nemotron_fp8.engines.error_stats import gather

    unit = next(unit for unit in plan.units if any(work.group for work in unit.works))
    groups = {group.id: group for group in unit.groups}
    smallest = sorted((w for w in unit.works if w.group is not None), key=lambda work: work.view.nbytes)
    chosen: list[Work] = []
    for work in smallest:
        if chosen and sum(w.view.nbytes for w in chosen) + work.view.nbytes > sample:
            break
        chosen.append(work)
    # Any finite amax costs the same.
    amaxes = {w.group: blank_amax(groups[w.group], plan.recipe.granularity) + (0x3F80_0000) for w in chosen if w.group}
    started = time.perf_counter()
    with Reader(source.opener) as reader:
        gather(unit, chosen, amaxes, reader, lambda _: None)
    total = sum(t.bytes_in for t in plan.tensors if t.quantise)
    return (time.perf_counter() - started) * total / sum(work.view.nbytes for work in chosen)


class _Memory:
    """A file in memory, to which writing costs what writing to the page cache costs."""

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
        """Write at the end."""
        with self._lock:
            at, self._end = self._end, self._end + len(data)
        if self._fd >= 0:
            os.pwrite(self._fd, data, at)


def resident_bytes() -> int:
    """Bytes that this process has resident now; the most that it has had where the system does not tell."""
    from nemotron_fp8._utils import peak_resident_bytes

    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes() or 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a conversion takes of this machine.

    Attributes:
        peak_host_bytes: memory of all its processes at the most; None where it was not measured.
        peak_device_bytes: memory on each CUDA device at the most; 0 on the CPU; None where that is up to what is
            free there.
        seconds: wall time on a CPU, the disk's writing apart; None where it was not measured.
        disk_rate: bytes a second that the disk must write for that; None likewise.
        devices: what computes.
        fetched: bytes that come from the Hub; 0 for a local source.
        cache: bytes that shards on their way from the Hub take on the disk at any one time; 0 likewise.
    """

    peak_host_bytes: int | None
    peak_device_bytes: int | None
    seconds: float | None
    disk_rate: float | None
    devices: tuple[str, ...]
    fetched: int = 0
    cache: int = 0


def needs_of(
    plan: Plan,
    source: str,
    device: str,
    max_memory: str,
    max_device_memory: str | None,
    threads: int | None,
    shard_size: str | None,
    measure: bool,
) -> Needs:
    """Work out what a plan takes of this machine; on the CPU by a short measurement, if that is wanted.

    Of a source on the Hub nothing is measured: a sample would have to be fetched, and the transfer decides.

    Raises:
        DeviceError: there is no such device.
        BudgetError: the budgets cannot hold the buffers of a device.
        SourceError: the source cannot be read.
    """
    from nemotron_fp8.engines.devices import resolve_devices

    devices = resolve_devices(device)
    fetched = cache = 0
    if is_remote(source):
        from nemotron_fp8.planning.tasks import files_of
        from nemotron_fp8.sources.hub_prefetch import space_needed

        sizes = {shard.name: shard.size for shard in plan.inventory.shards}
        fetched = sum(sizes.values())
        # A NeMo checkpoint's parts are fetched by range, and are no shards.
        units = [sum(sizes.get(name, 0) for name in files_of(unit)) for unit in plan.units]
        cache = space_needed(units, 0, len(devices))
    if devices[0] != "cpu":
        from nemotron_fp8.engines.cuda.memory_plan import ring_plan

        allowed = None if max_device_memory is None else parse_bytes(max_device_memory)
        host = parse_bytes(max_memory) // len(devices)
        cores = max(1, (threads or usable_cores()) // len(devices))
        ring = ring_plan(plan.units, host, allowed or 1 << 62, cores)
        return Needs(None, ring.device_bytes if allowed else None, None, None, devices, fetched, cache)
    if not measure or is_remote(source):
        return Needs(None, 0, None, None, devices, fetched, cache)
    from nemotron_fp8.sources.open import open_source

    estimate = estimate_plan(plan, open_source(source, shard_size))
    return Needs(estimate.peak_host_bytes, 0, estimate.seconds, estimate.disk_rate, devices)
