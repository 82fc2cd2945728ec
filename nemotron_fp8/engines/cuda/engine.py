"""Engine of one CUDA device: a pipeline for each pass over a shard, and buffers that are reused between shards."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8.engines.base import blank_amax, has_nonfinite, scale_of_group
from nemotron_fp8.engines.cpu import CpuEngine
from nemotron_fp8.engines.cuda.buffers import Buffers
from nemotron_fp8.engines.cuda.device import DEFAULT_SHARE
from nemotron_fp8.engines.cuda.memory_plan import ring_plan
from nemotron_fp8.engines.cuda.pipeline import Pipeline
from nemotron_fp8.engines.cuda.schedule import Phase, schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    import torch
    from typing_extensions import Self

    from nemotron_fp8.engines.base import Emit, PutErrors, PutScale
    from nemotron_fp8.engines.cuda.device import Device
    from nemotron_fp8.engines.cuda.memory_plan import RingPlan
    from nemotron_fp8.engines.cuda.schedule import Schedule
    from nemotron_fp8.planning.tasks import ShardTask, TensorTask
    from nemotron_fp8.sources.reader import Reader


SEARCHED_BYTES = 1 << 20
"""Most bytes of a slice in which a thread of the CPU searches best scales: they come on top of the ring's buffers."""


class CudaEngine:
    """Engine of one CUDA device. A context manager.

    The CPU searches best scales, which have no kernel, and the device casts with them.

    Args:
        device: the device.
        host_bytes: bytes of host buffers.
        device_bytes: bytes on the device; None for 80% of the free bytes.
        threads: threads of the worker.
        progress: called with finished input bytes, from any thread; bytes of a quantized tensor count twice, as on
            the CPU, which reads them twice.
    """

    measures_errors = False

    def __init__(
        self,
        device: Device,
        host_bytes: int,
        device_bytes: int | None,
        threads: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._device = device
        self._host_bytes = host_bytes
        self._device_bytes = int(device.free_bytes() * DEFAULT_SHARE) if device_bytes is None else device_bytes
        self._threads = threads
        self._progress = progress or (lambda _: None)
        self._buffers: Buffers | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free()

    def has_single_pass(self, shard_task: ShardTask, in_order: bool) -> bool:
        # The CPU measures errors, with known amaxes, dequantizes, and searches best scales.
        if shard_task.numbers.scale_choice != "amax":
            return False
        return not shard_task.recipe.stats and not any(task.decode for task in shard_task.tensor_tasks)

    def convert(
        self,
        tensor_tasks: Iterable[TensorTask],
        shard_task: ShardTask,
        reader: Reader,
        put_scale: PutScale,
        emit: Emit,
        put_errors: PutErrors | None = None,
    ) -> bool:
        tensor_tasks = list(tensor_tasks)
        groups = {group.id: group for group in shard_task.groups}

        def put_amax(group: str, amax: torch.Tensor, row: int = 0) -> bool:
            if shard_task.numbers.coverage.fine:  # of a tensor in another shard, or without elements
                return not has_nonfinite(amax)
            numerics, rounding = shard_task.recipe.numerics, shard_task.numbers.scale_rounding
            return put_scale(group, scale_of_group(groups[group], amax, numerics, rounding))

        return self._run(tensor_tasks, shard_task, reader, Phase.BOTH, put_amax, put_scale, emit, {})

    def amaxes(self, shard_task: ShardTask, reader: Reader) -> dict[str, torch.Tensor]:
        if shard_task.numbers.scale_choice != "amax":
            slicing = replace(shard_task.slicing, share=min(shard_task.slicing.share, SEARCHED_BYTES))
            return CpuEngine(self._progress).amaxes(replace(shard_task, slicing=slicing), reader)
        found: dict[str, torch.Tensor] = {}

        def put_amax(group: str, amax: torch.Tensor, row: int = 0) -> bool:
            found[group] = amax
            return True

        self._run((), shard_task, reader, Phase.AMAX, put_amax, _no_scale, _no_bytes, {})
        return found

    def cast(
        self,
        tensor_tasks: Iterable[TensorTask],
        shard_task: ShardTask,
        reader: Reader,
        amaxes: Mapping[str, torch.Tensor],
        emit: Emit,
        put_errors: PutErrors | None = None,
        put_scale: PutScale | None = None,
    ) -> None:
        tensor_tasks = list(tensor_tasks)
        decoded = [tensor_task for tensor_task in tensor_tasks if tensor_task.decode]
        if decoded:
            # Dequantization is disk-bound even on the CPU, so it has no CUDA implementation.
            CpuEngine(self._progress).cast(decoded, shard_task, reader, amaxes, emit)
            tensor_tasks = [tensor_task for tensor_task in tensor_tasks if not tensor_task.decode]
        if not tensor_tasks:
            return
        put_scale = put_scale or _no_scale
        self._run(tensor_tasks, shard_task, reader, Phase.CAST, _any_amax, put_scale, emit, amaxes)

    def _run(
        self,
        tensor_tasks: Iterable[TensorTask],
        shard_task: ShardTask,
        reader: Reader,
        phase: Phase,
        put_amax: PutScale,
        put_scale: PutScale,
        emit: Emit,
        amaxes: Mapping[str, torch.Tensor],
    ) -> bool:
        """Run one pass; return False if a scale was rejected."""
        plan = ring_plan([shard_task], self._host_bytes, self._device_bytes, self._threads)
        order = schedule(tensor_tasks, shard_task, plan, phase)
        coverage = shard_task.numbers.coverage
        for group in shard_task.groups:
            if group.id in order.empty and not put_amax(group.id, blank_amax(group, coverage)):
                return False
        buffers = self._have(plan, order)
        return Pipeline(
            self._device, buffers, order, shard_task, reader, put_amax, put_scale, emit, self._progress, amaxes
        ).run()

    def _have(self, plan: RingPlan, order: Schedule) -> Buffers:
        """Return the buffers of a plan; the buffers of the last pass are reused for the same plan."""
        if self._buffers is None or self._buffers.plan != plan:
            self._free()
            self._buffers = Buffers(self._device, plan)
        self._buffers.grow_slab(order.slab_bytes)
        return self._buffers

    def _free(self) -> None:
        self._buffers = None
        self._device.release()


def _any_amax(group: str, amax: torch.Tensor, row: int = 0) -> bool:
    return True


def _no_scale(group: str, scale: torch.Tensor, row: int = 0) -> bool:
    raise AssertionError(f"{group}: a scale in a pass that computes amaxes only")


def _no_bytes(name: str, begin: int, data: memoryview) -> None:
    raise AssertionError(f"{name}: {len(data)} bytes at {begin} in a pass that computes amaxes only")
