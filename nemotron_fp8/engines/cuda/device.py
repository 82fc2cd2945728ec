"""An accelerator as the pipeline sees it: buffers, streams, events, kernels. And the one made of CUDA.

Everything behind this seam is a copy, an event or a launch. Tests put another device here, which does the same on
threads of its own; ring, threads, budget and failures are the real ones there too.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from nemotron_fp8.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nemotron_fp8.planning.number_format import Coverage
    from nemotron_fp8.planning.recipe import Numerics


DEFAULT_SHARE = 0.8
"""Part of the device's free memory that is taken where no budget is given."""


class HostBuffer(NamedTuple):
    """Page-locked host memory, twice the same bytes; begins at a page.

    Attributes:
        data: for the system.
        tensor: for copies; uint8, one-dimensional.
    """

    data: memoryview
    tensor: torch.Tensor


class Event(Protocol):
    """A point in a stream."""

    def wait(self) -> None:
        """Block the calling thread until everything before the point is done; raise what failed."""


class Stream(Protocol):
    """Work that the device does in order, while the host goes on. Any thread may add to it."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes between the host's pinned memory and the device's; uint8 of one length."""

    def launch(self, kernel: Callable[[], None]) -> None:
        """Launch what ``kernel`` launches."""

    def record(self) -> Event:
        """Return the point after everything added so far."""

    def after(self, event: Event) -> None:
        """Let what is added from now on wait for an event of another stream, on the device."""


class Kernels(Protocol):
    """What is computed. All tensors are on the device; results go where they are told to go."""

    def amax(self, w: torch.Tensor, bits: torch.Tensor, coverage: Coverage) -> None:
        """Raise ``bits`` (int32) to the amaxes of ``w``; ``[rows, columns]`` where scales belong to rows."""

    def cast(
        self, w: torch.Tensor, bits: torch.Tensor, out: torch.Tensor, coverage: Coverage, numerics: Numerics
    ) -> None:
        """Cast ``w`` with given amaxes into ``out``, 8-bit floats of the same shape."""

    def quantize_many(
        self,
        weights: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        coverage: Coverage,
    ) -> None:
        """Quantize each tensor by itself: codes into ``outs``, float32 scales into ``scales``."""


class Device(Protocol):
    """One accelerator."""

    name: str
    kernels: Kernels

    def free_bytes(self) -> int:
        """Bytes of its memory that nobody has taken."""

    def host_buffer(self, nbytes: int) -> HostBuffer:
        """Allocate page-locked host memory; of `close` it is freed."""

    def memory(self, nbytes: int) -> torch.Tensor:
        """Allocate device memory, uint8."""

    def stream(self) -> Stream:
        """Make a stream."""

    def synchronize(self) -> None:
        """Block until all streams are done."""

    def release(self) -> None:
        """Free all host buffers. Nothing may be using them."""


class CudaEvent:
    """An event of CUDA."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        """See `Event.wait`."""
        self.event.synchronize()


class CudaStream:
    """A stream of CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own gap

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Stream.copy`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def launch(self, kernel: Callable[[], None]) -> None:
        """See `Stream.launch`."""
        with torch.cuda.stream(self._stream):
            kernel()

    def record(self) -> CudaEvent:
        """See `Stream.record`. Waiting yields the processor: a spinning thread would take it from a reader."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's own gap
        event.record(self._stream)
        return CudaEvent(event)

    def after(self, event: Event) -> None:
        """See `Stream.after`."""
        if not isinstance(event, CudaEvent):
            raise TypeError(f"{type(event).__name__} is no event of CUDA")
        self._stream.wait_event(event.event)


class CudaKernels:
    """The Triton kernels, by their public operations."""

    def amax(self, w: torch.Tensor, bits: torch.Tensor, coverage: Coverage) -> None:
        """See `Kernels.amax`."""
        from nemotron_fp8_kernels import amax_bits

        torch.maximum(bits, amax_bits(w, coverage.granularity, coverage.block), out=bits)

    def cast(
        self, w: torch.Tensor, bits: torch.Tensor, out: torch.Tensor, coverage: Coverage, numerics: Numerics
    ) -> None:
        """See `Kernels.cast`."""
        from nemotron_fp8_kernels import quantize_with_amax

        quantize_with_amax(w, bits, coverage.granularity, coverage.block, numerics, out=out)

    def quantize_many(
        self,
        weights: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        coverage: Coverage,
    ) -> None:
        """See `Kernels.quantize_many`."""
        from nemotron_fp8_kernels import quantize_many

        pairs = quantize_many(list(weights), coverage.granularity, coverage.block)
        torch._foreach_copy_([out.view(torch.uint8) for out in outs], [q.view(torch.uint8) for q, _ in pairs])
        torch._foreach_copy_(list(scales), [scale for _, scale in pairs])


class CudaDevice:
    """A CUDA device by its number.

    Args:
        name: ``cuda:N``.

    Raises:
        DeviceError: it is not there.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernels: Kernels = CudaKernels()
        self._device = torch.device(name)
        self._pinned: list[mmap.mmap] = []
        if not torch.cuda.is_available():
            raise DeviceError(name, "no CUDA device here, or a torch without CUDA")
        try:
            # Current for this process: what does not name a device must not open a context on another.
            torch.cuda.set_device(self._device)
            torch.cuda.current_stream().synchronize()
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(name, " ".join(str(error).split())) from error

    def free_bytes(self) -> int:
        """See `Device.free_bytes`."""
        return torch.cuda.mem_get_info(self._device)[0]

    def host_buffer(self, nbytes: int) -> HostBuffer:
        """See `Device.host_buffer`.

        Mapped and registered, since torch's pinned allocator rounds up to a power of two, past any budget.
        """
        area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        data = memoryview(area)
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        code = int(_runtime().cudaHostRegister(tensor.data_ptr(), nbytes, 0))
        if code:
            raise DeviceError(self.name, f"refuses to page-lock {nbytes:,} bytes of host memory (CUDA error {code})")
        self._pinned.append(area)
        return HostBuffer(data, tensor)

    def memory(self, nbytes: int) -> torch.Tensor:
        """See `Device.memory`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def stream(self) -> CudaStream:
        """See `Device.stream`."""
        return CudaStream(self._device)

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        torch.cuda.synchronize(self._device)

    def release(self) -> None:
        """See `Device.release`."""
        areas, self._pinned = self._pinned, []
        for area in areas:
            with suppress(RuntimeError):  # a device that failed refuses everything; the process is ending then
                tensor = torch.frombuffer(area, dtype=torch.uint8)
                _runtime().cudaHostUnregister(tensor.data_ptr())
        torch.cuda.empty_cache()


def _runtime() -> Any:
    """CUDA's runtime library, as torch holds it."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own gap
