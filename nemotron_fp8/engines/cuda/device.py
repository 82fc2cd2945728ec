"""Interface of an accelerator (buffers, streams, events, kernels), and its implementation with CUDA.

The interface has copies, events and launches only. Tests implement it with threads, to test ring, budgets and failures
of the real pipeline without a GPU.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from nemotron_fp8.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nemotron_fp8.planning.number_format import Coverage, NumberFormat
    from nemotron_fp8.planning.recipe import Numerics


DEFAULT_SHARE = 0.8
"""Share of the device's free memory that is used if there is no budget."""


class HostBuffer(NamedTuple):
    """Page-locked and page-aligned host memory.

    Attributes:
        data: the memory, for reads and writes.
        tensor: the same memory, for copies: uint8, one-dimensional.
    """

    data: memoryview
    tensor: torch.Tensor


class Event(Protocol):
    """A point in a stream."""

    def wait(self) -> None:
        """Block the calling thread until the stream has reached this point; raise an error of the device."""


class Stream(Protocol):
    """Work that the device does in order and asynchronously. Any thread may add work."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes between pinned memory and device memory: uint8 tensors of the same length."""

    def launch(self, kernel: Callable[[], None]) -> None:
        """Call ``kernel``, so that its launches go to this stream."""

    def record(self) -> Event:
        """Return the point after all work so far."""

    def after(self, event: Event) -> None:
        """Make later work of this stream wait for an event of another stream, on the device."""


class Kernels(Protocol):
    """Kernels of the device. All tensors are on the device, and results go into given tensors."""

    def amax(self, w: torch.Tensor, bits: torch.Tensor, coverage: Coverage) -> None:
        """Raise ``bits`` (int32) to the amaxes of ``w``; ``[rows, columns]`` if scales belong to rows."""

    def cast(
        self, w: torch.Tensor, bits: torch.Tensor, out: torch.Tensor, numbers: NumberFormat, numerics: Numerics
    ) -> None:
        """Cast ``w`` with given amaxes into ``out``: 8-bit floats of the same shape."""

    def quantize_many(
        self,
        weights: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        numbers: NumberFormat,
    ) -> None:
        """Quantize each tensor with its own scales: codes into ``outs``, float32 scales into ``scales``."""


class Device(Protocol):
    """One accelerator."""

    name: str
    kernels: Kernels

    def free_bytes(self) -> int:
        """Return the free bytes of the device's memory."""

    def host_buffer(self, nbytes: int) -> HostBuffer:
        """Allocate page-locked host memory; `release` frees it."""

    def memory(self, nbytes: int) -> torch.Tensor:
        """Allocate device memory, uint8."""

    def stream(self) -> Stream:
        """Create a stream."""

    def synchronize(self) -> None:
        """Block until all streams are done."""

    def release(self) -> None:
        """Free all host buffers; none may be in use."""


class CudaEvent:
    """A CUDA event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class CudaStream:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch lacks the annotation

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def launch(self, kernel: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            kernel()

    def record(self) -> CudaEvent:
        # Blocking events yield the processor: a spinning thread would take it from a reader.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch lacks the annotation
        event.record(self._stream)
        return CudaEvent(event)

    def after(self, event: Event) -> None:
        if not isinstance(event, CudaEvent):
            raise TypeError(f"{type(event).__name__} is not a CUDA event")
        self._stream.wait_event(event.event)


class CudaKernels:
    """The Triton kernels, through their public functions."""

    def amax(self, w: torch.Tensor, bits: torch.Tensor, coverage: Coverage) -> None:
        from nemotron_fp8_kernels import amax_bits

        torch.maximum(bits, amax_bits(w, coverage.granularity, coverage.block), out=bits)

    def cast(
        self, w: torch.Tensor, bits: torch.Tensor, out: torch.Tensor, numbers: NumberFormat, numerics: Numerics
    ) -> None:
        from nemotron_fp8_kernels import quantize_with_amax

        cells, rounding = numbers.coverage, numbers.scale_rounding
        quantize_with_amax(w, bits, cells.granularity, cells.block, numerics, out=out, rounding=rounding)

    def quantize_many(
        self,
        weights: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        numbers: NumberFormat,
    ) -> None:
        from nemotron_fp8_kernels import quantize_many

        cells, rounding = numbers.coverage, numbers.scale_rounding
        pairs = quantize_many(weights, cells.granularity, cells.block, out=outs, rounding=rounding)
        torch._foreach_copy_(list(scales), [scale for _, scale in pairs])


class CudaDevice:
    """A CUDA device.

    Args:
        name: ``cuda:N``.

    Raises:
        DeviceError: the device is missing.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernels: Kernels = CudaKernels()
        self._device = torch.device(name)
        self._pinned: list[mmap.mmap] = []
        if not torch.cuda.is_available():
            raise DeviceError(name, "no CUDA device on this machine, or a PyTorch without CUDA; use cpu")
        try:
            # Set the current device of the process, so that a call without a device opens no context on another device.
            torch.cuda.set_device(self._device)
            torch.cuda.current_stream().synchronize()
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(name, " ".join(str(error).split())) from error

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def host_buffer(self, nbytes: int) -> HostBuffer:
        # Mapped and registered here, because torch's pinned allocator rounds up to a power of two, beyond the budget.
        area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        data = memoryview(area)
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        code = int(_runtime().cudaHostRegister(tensor.data_ptr(), nbytes, 0))
        if code:
            raise DeviceError(
                self.name,
                f"cannot page-lock {nbytes:,} bytes of host memory (CUDA error {code}); lower max_memory"
                " (--max-memory)",
            )
        self._pinned.append(area)
        return HostBuffer(data, tensor)

    def memory(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def stream(self) -> CudaStream:
        return CudaStream(self._device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def release(self) -> None:
        areas, self._pinned = self._pinned, []
        for area in areas:
            with suppress(RuntimeError):  # a failed device rejects every call, and the process ends
                tensor = torch.frombuffer(area, dtype=torch.uint8)
                _runtime().cudaHostUnregister(tensor.data_ptr())
        torch.cuda.empty_cache()


def _runtime() -> Any:
    """Return the CUDA runtime library that torch has loaded."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch lacks the annotation
