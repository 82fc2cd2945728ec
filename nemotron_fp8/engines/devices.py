"""Names of devices, and the engine of a device."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8._utils import shortened
from nemotron_fp8.checkpoint.tensor_view import E2M1
from nemotron_fp8.errors import DeviceError, RecipeError
from nemotron_fp8.planning.number_format import E4M3, E8M0, E8M0_BYTES, FLOAT32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nemotron_fp8.engines.base import Engine
    from nemotron_fp8.planning.number_format import NumberFormat
    from nemotron_fp8.planning.tasks import ShardTask


COMPUTED = frozenset(
    (E4M3.dtype, E4M3.max, scale.dtype, rounding)
    for scale, roundings in (
        (FLOAT32, ("none", "power-of-two", "mx")),
        (E8M0, ("power-of-two", "mx")),
        (E8M0_BYTES, ("power-of-two", "mx")),
    )
    for rounding in roundings
)
"""Number formats of the kernels: elements and their maximum, scales and their rounding."""
DEQUANTIZED = frozenset({*(element for element, *_ in COMPUTED), E2M1})
"""Elements that are dequantized, with scales of any float dtype; those of 4 bits as E4M3 of the same values."""
FORMS = "auto, cpu, cuda, cuda:N or a list like cuda:0,cuda:1"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Description of a worker's engine. Picklable; nothing is opened or allocated yet.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        host_bytes: bytes of host buffers for this worker, its share of ``--max-memory``.
        device_bytes: bytes on the device; None for the default share of the free bytes.
        threads: threads of this worker.
    """

    device: str
    host_bytes: int
    device_bytes: int | None = None
    threads: int = 1


def check_number_formats(shard_tasks: Sequence[ShardTask]) -> None:
    """Check that the kernels compute what all shards need.

    Raises:
        RecipeError: no kernel computes a number format, or dequantizes a type of elements.
    """
    for numbers in {shard_task.numbers for shard_task in shard_tasks}:
        check_numbers(numbers)
    tasks = (task for shard_task in shard_tasks for task in shard_task.tensor_tasks)
    decoded = {task.view.encoding.elements for task in tasks if task.view.encoding is not None}
    if decoded - DEQUANTIZED:
        raise RecipeError(f"no kernel dequantizes {min(decoded - DEQUANTIZED)}, only {', '.join(sorted(DEQUANTIZED))}")


def check_numbers(numbers: NumberFormat) -> None:
    """Raise RecipeError if no kernel computes a number format."""
    element, scale, rounding = numbers.element, numbers.scale, numbers.scale_rounding
    if (element.dtype, element.max, scale.dtype, rounding) not in COMPUTED:
        raise RecipeError(
            f"no kernel computes {element.title} with {scale.title} scales"
            f" (largest element {element.max:g}, rounding of scales {rounding!r})"
        )
    if numbers.scale_choice != "amax" and (numbers.coverage.granularity != "channel" or rounding != "none"):
        raise RecipeError(
            f"no kernel searches scales for each {numbers.coverage.title} with rounding {rounding!r}, only for each"
            " output row without rounding"
        )


def check_engine(spec: EngineSpec, shard_tasks: Sequence[ShardTask]) -> None:
    """Check an engine against all shards, before the first shard is made.

    Raises:
        RecipeError: no kernel computes the number format, or dequantizes the elements.
        BudgetError: the buffers do not fit.
    """
    check_number_formats(shard_tasks)
    if spec.device != "cpu":
        from nemotron_fp8.engines.cuda.memory_plan import ring_plan

        # Only the worker can measure the free memory of its device.
        ring_plan(shard_tasks, spec.host_bytes, spec.device_bytes or sys.maxsize, spec.threads)


def resolve_devices(text: str, usable: Callable[[], list[int]] | None = None) -> tuple[str, ...]:
    """Return the device of each worker: ``("cpu",)`` or ``("cuda:0", ...)``.

    Args:
        text: ``auto`` (every CUDA device, else the CPU), ``cpu``, ``cuda`` (every CUDA device), ``cuda:N``, or a list
            separated by commas. ``cpu,cpu`` means two worker processes.
        usable: returns the numbers of the CUDA devices that the kernels support; called only if needed.

    Raises:
        DeviceError: the text is malformed, lists a device twice or two kinds of device, or a device is missing.
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
        if name != "cpu" and not re.fullmatch(r"cuda(:\d{1,4})?", name, re.ASCII):
            raise DeviceError(text, f"{shortened(name)} is not a device; use {FORMS}")
    if "cpu" in names:
        raise DeviceError(text, "CPU and CUDA devices cannot be combined; choose one kind")
    there = usable()
    if names == ["cuda"]:
        if not there:
            raise DeviceError(text, "no CUDA device with compute capability 9.0 or later on this machine; use cpu")
        return tuple(f"cuda:{i}" for i in there)
    if "cuda" in names:
        raise DeviceError(text, "cuda means all CUDA devices; in a list, number them (cuda:0,cuda:1)")
    numbers = [int(name.removeprefix("cuda:")) for name in names]
    for number in numbers:
        if number not in there:
            found = ", ".join(f"cuda:{i}" for i in there) or "none"
            raise DeviceError(
                text, f"cuda:{number} is missing or below compute capability 9.0; usable devices: {found}"
            )
        if numbers.count(number) > 1:
            raise DeviceError(text, f"cuda:{number} is listed twice; list each device once")
    return tuple(f"cuda:{number}" for number in numbers)


def usable_cuda_devices() -> list[int]:
    """Return the numbers of the CUDA devices with an exact E4M3 cast (compute capability 9.0 and later)."""
    import torch

    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return [i for i in range(count) if torch.cuda.get_device_capability(i) >= (9, 0)]


@contextmanager
def open_engine(spec: EngineSpec, progress: Callable[[int], None]) -> Iterator[Engine]:
    """Open the engine of a worker; its buffers are freed when the context ends.

    Raises:
        DeviceError: the device is missing.
        BudgetError: the engine's buffers do not fit the budget.
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
