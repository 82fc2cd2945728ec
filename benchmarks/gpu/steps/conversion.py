"""A whole conversion from tmpfs to tmpfs, and the rates that bound it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.run import NoDeviceError
from benchmarks.measure import gpu_convert
from nemotron_fp8.errors import DeviceError

if TYPE_CHECKING:
    from benchmarks.gpu.run import Run

GIGABYTES, SHARDS = 8.0, 4


def go(run: Run, _stage: str, _job: str) -> None:
    """Measure the conversion in a folder of the memory file system, which is removed."""
    small = run.mode != "device"
    device = "cpu" if run.dry else "cuda:0"

    def write(**fields: Any) -> None:
        run.emit(**fields)

    scratch = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    with run.step("conversion"), tempfile.TemporaryDirectory(dir=scratch) as folder:
        try:
            gpu_convert.measure(
                write,
                Path(folder),
                device,
                gigabytes=0.02 if small else GIGABYTES,
                shards=2 if small else SHARDS,
                samples=1 if small else 3,
                hidden=256 if small else 4096,
            )
        except DeviceError as error:
            if run.mode == "until-launch" and not torch.cuda.is_available():
                raise NoDeviceError(f"no CUDA device: {error}") from error
            raise
