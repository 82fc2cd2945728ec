"""Device names as people write them, and the engine of a device."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.engines.base import Engine


FORMS = "auto, cpu, cuda, cuda:N or a list like cuda:0,cuda:1"


def resolve_devices(text: str, usable: Callable[[], list[int]] | None = None) -> tuple[str, ...]:
    """Return the devices that a name stands for, one for each worker: ``("cpu",)`` or ``("cuda:0", ...)``.

    Args:
        text: ``auto`` (every CUDA device, or the CPU where there is none), ``cpu``, ``cuda`` (every CUDA
            device), ``cuda:N``, or a list with commas in between. ``cpu,cpu`` asks for two worker processes.
        usable: tells the numbers of the CUDA devices that the kernels run on; asked only where it matters.

    Raises:
        DeviceError: the text is not understood, names a device twice or two kinds of device, or a device is
            not there.
    """
    if not isinstance(text, str):
        raise DeviceError(repr(text), f"not a string; use {FORMS}")
    usable = usable or usable_cuda_devices
    names = [name.strip() for name in text.split(",")]
    if names == ["auto"]:
        return tuple(f"cuda:{i}" for i in usable()) or ("cpu",)
    if set(names) == {"cpu"}:
        return tuple(names)
    for name in names:
        if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name, re.ASCII):
            raise DeviceError(text, f"{name!r} is none of {FORMS}")
    if "cpu" in names:
        raise DeviceError(text, "CPU and CUDA together: choose one kind")
    there = usable()
    if names == ["cuda"]:
        if not there:
            raise DeviceError(text, "no CUDA device that the kernels run on here; use cpu")
        return tuple(f"cuda:{i}" for i in there)
    if "cuda" in names:
        raise DeviceError(text, "cuda stands for all CUDA devices; in a list, number them")
    numbers = [int(name.removeprefix("cuda:")) for name in names]
    for number in numbers:
        if number not in there:
            found = ", ".join(f"cuda:{i}" for i in there) or "none"
            raise DeviceError(text, f"no cuda:{number} that the kernels run on; there is {found}")
        if numbers.count(number) > 1:
            raise DeviceError(text, f"names cuda:{number} twice")
    return tuple(f"cuda:{number}" for number in numbers)


def usable_cuda_devices() -> list[int]:
    """Numbers of the CUDA devices whose E4M3 cast is known to be exact (compute capability 9.0 and later)."""
    import torch

    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return [i for i in range(count) if torch.cuda.get_device_capability(i) >= (9, 0)]


@contextmanager
def open_engine(spec: EngineSpec, progress: Callable[[int], None]) -> Iterator[Engine]:
    """Build the engine of a worker, and free what it holds at the end.

    Raises:
        DeviceError: there is no such device.
        BudgetError: its buffers do not fit the budget.
    """
    from nemotron_fp8.engines.cpu import CpuEngine

    if spec.device == "cpu":
        yield CpuEngine(progress)
        return
    from nemotron_fp8.engines.cuda.device import CudaDevice
    from nemotron_fp8.engines.cuda.engine import CudaEngine

    device = CudaDevice(spec.device)
    with CudaEngine(device, spec.host_bytes, spec.device_bytes, spec.threads, progress) as engine:
        yield engine


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a worker builds its engine from. Picklable; nothing is opened or allocated by it.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        host_bytes: bytes of host buffers that this worker may take, its share of ``--max-memory``.
        device_bytes: bytes that it may take on its device; None for the default share of what is free.
        threads: threads that it may keep busy.
    """

    device: str
    host_bytes: int
    device_bytes: int | None = None
    threads: int = 1
