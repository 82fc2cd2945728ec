"""An accelerator that is only threads: copies, events and launches happen late, in order of their stream, on the CPU.

What it computes comes from the reference of the kernels. It accounts for every byte, fills fresh memory with
garbage, and fails where it is told to. Ring, threads, budget and failure handling around it are the real ones.
"""

from __future__ import annotations

import mmap
import random
import time
import weakref
from queue import SimpleQueue
from threading import Event as Flag
from threading import Lock, Thread
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.engines.cuda.device import HostBuffer
from nemotron_fp8_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nemotron_fp8.planning.number_format import Coverage, NumberFormat
    from nemotron_fp8.planning.recipe import Numerics

GARBAGE = 0xA5


class DeviceFailure(RuntimeError):  # noqa: N818  (named as what it stands for)
    """The error that a broken device raises."""


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.passed = Flag()

    def wait(self) -> None:
        if not self.passed.wait(60):
            self._device.overdue = True
            raise TimeoutError("an event that never comes")
        if self._device.broken:
            raise self._device.broken


class FakeStream:
    """A thread that does what it is given, in order, when it pleases."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="fake-stream", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (tensor_task := self._queue.get()) is not None:
            time.sleep(self._device.delay())
            try:
                tensor_task()
            except BaseException as error:
                self._device.broken = error  # as CUDA: asynchronous, and for good
            self._device.pending(-1)

    def _add(self, tensor_task: Callable[[], None]) -> None:
        self._device.pending(1)
        self._queue.put(tensor_task)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.dtype == source.dtype == torch.uint8
        assert target.shape == source.shape
        assert self._device.is_host(target) != self._device.is_host(source)
        stage = "download" if self._device.is_host(target) else "upload"

        def tensor_task() -> None:
            self._device.count(stage)
            half = target.numel() // 2  # not all at once: whoever looks too early sees a half
            target[:half].copy_(source[:half])
            time.sleep(self._device.delay())
            target[half:].copy_(source[half:])

        self._add(tensor_task)

    def launch(self, kernel: Callable[[], None]) -> None:
        self._device.count("launch")

        def tensor_task() -> None:
            self._device.count("kernel")
            kernel()

        self._add(tensor_task)

    def record(self) -> FakeEvent:
        event = FakeEvent(self._device)
        self._add(event.passed.set)
        return event

    def after(self, event: FakeEvent) -> None:  # type: ignore[override]  # the events of this device
        def tensor_task() -> None:
            if not event.passed.wait(60):
                self._device.overdue = True
                raise TimeoutError("a stream waits for an event that never comes")

        self._add(tensor_task)

    def drain(self) -> None:
        done = Flag()
        self._add(done.set)
        assert done.wait(60)

    def end(self) -> None:
        self._queue.put(None)
        self._thread.join()


class ReferenceKernels:
    def amax(self, w: torch.Tensor, bits: torch.Tensor, coverage: Coverage) -> None:
        torch.maximum(bits, reference.amax_bits(w, coverage.granularity, coverage.block), out=bits)

    def cast(
        self, w: torch.Tensor, bits: torch.Tensor, out: torch.Tensor, numbers: NumberFormat, numerics: Numerics
    ) -> None:
        cells = numbers.coverage
        q, _ = reference.quantize_with_amax(
            w, bits, cells.granularity, cells.block, numerics, rounding=numbers.scale_rounding
        )
        out.view(torch.uint8).copy_(q.view(torch.uint8))

    def quantize_many(
        self,
        weights: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        numbers: NumberFormat,
    ) -> None:
        for w, out, scale in zip(weights, outs, scales, strict=True):
            assert w.data_ptr() % 16 == out.data_ptr() % 16 == 0  # the grouped kernel's condition
            cells = numbers.coverage
            q, s = reference.quantize(w, cells.granularity, cells.block, rounding=numbers.scale_rounding)
            out.view(torch.uint8).copy_(q.view(torch.uint8))
            scale.copy_(s)


class FakeDevice:
    """A device.

    Args:
        seed: of the delays.
        slowest: longest delay of one operation, in seconds.
        free: bytes of memory.
        fail: stage and count: the stage fails at its so-manieth operation.
        slow: stage and seconds that each of its operations takes.
        stuck: stage and count: the stage stands still at its so-manieth operation, sets `reached`, and goes on when
            `released` is set.
    """

    def __init__(
        self,
        seed: int = 0,
        slowest: float = 0.0,
        free: int = 1 << 30,
        fail: tuple[str, int] | None = None,
        slow: tuple[str, float] = ("", 0.0),
        stuck: tuple[str, int] | None = None,
    ) -> None:
        self.name = "fake:0"
        self.kernels = ReferenceKernels()
        self.broken: BaseException | None = None
        self.host_now = self.host_peak = self.memory_now = self.memory_peak = 0
        self._random, self._slowest, self._free = random.Random(seed), slowest, free
        self._fail, self._slow, self._stuck = fail, slow, stuck
        self.reached, self.released = Flag(), Flag()
        self.overdue = False  # whether anyone waited in vain
        self.unfinished = 0
        self.counts: dict[str, int] = {}
        self._lock = Lock()
        self._host: list[tuple[int, int]] = []
        self._streams: list[FakeStream] = []

    def delay(self) -> float:
        return self._random.random() ** 4 * self._slowest

    def count(self, stage: str) -> None:
        with self._lock:
            n = self.counts[stage] = self.counts.get(stage, 0) + 1
        if self._fail == (stage, n):
            raise DeviceFailure(f"{stage} {n}")
        if self._stuck == (stage, n):
            self.reached.set()
            self.released.wait()
        if self._slow[0] == stage:
            time.sleep(self._slow[1])

    def pending(self, change: int) -> None:
        with self._lock:
            self.unfinished += change

    def is_host(self, tensor: torch.Tensor) -> bool:
        return any(begin <= tensor.data_ptr() < end for begin, end in self._host)

    def free_bytes(self) -> int:
        return self._free

    def host_buffer(self, nbytes: int) -> HostBuffer:
        data = memoryview(mmap.mmap(-1, nbytes))
        tensor = torch.frombuffer(data, dtype=torch.uint8).fill_(GARBAGE)
        self._host.append((tensor.data_ptr(), tensor.data_ptr() + nbytes))
        self.host_now += nbytes
        self.host_peak = max(self.host_peak, self.host_now)
        return HostBuffer(data, tensor)

    def memory(self, nbytes: int) -> torch.Tensor:
        # Aligned as a device's allocator aligns, and gone when the tensor is.
        area = torch.full((nbytes + 256,), GARBAGE, dtype=torch.uint8)
        start = -area.data_ptr() % 256
        tensor = area[start : start + nbytes]
        self.memory_now += nbytes
        self.memory_peak = max(self.memory_peak, self.memory_now)
        weakref.finalize(tensor, self._freed, nbytes)
        return tensor

    def _freed(self, nbytes: int) -> None:
        self.memory_now -= nbytes

    def stream(self) -> FakeStream:
        stream = FakeStream(self)
        self._streams.append(stream)
        return stream

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.drain()
        while self.unfinished:  # what signaled the end is itself an operation that ends
            time.sleep(0.001)
        if self.broken:
            raise self.broken

    def release(self) -> None:
        assert not self.unfinished, "host memory is freed that the device still copies to or from"
        self._host.clear()
        self.host_now = 0

    def end(self) -> None:
        for stream in self._streams:
            stream.end()
        self._streams.clear()
