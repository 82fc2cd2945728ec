"""Versions, device, clocks and memory: the circumstances of every line."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from benchmarks.common import machine

if TYPE_CHECKING:
    from benchmarks.gpu.run import Run

NEEDED = ("numpy", "triton", "pydantic", "click", "yaml", "safetensors", "huggingface_hub", "pytest", "hypothesis")
OPTIONAL = ("torchao", "xdist")

QUERY = ("clocks.max.sm", "clocks.mem", "power.limit", "clocks.sm", "temperature.gpu")


def go(run: Run, _stage: str, _job: str) -> None:
    """Write the circumstances, and a line for each part that this machine lacks."""
    fields: dict[str, Any] = {"case": "environment", "mode": run.mode, "system": platform.release()}
    fields |= machine("cuda" if run.mode == "device" else "cpu")
    if run.mode == "device":
        fields |= _clocks() | {"clocks": "not locked"}
    fields["cores"] = os.cpu_count()
    fields["tmpfs_free_bytes"] = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0  # noqa: PTH112
    run.emit(**fields)
    for name in NEEDED + OPTIONAL:
        if importlib.util.find_spec(name) is None:
            run.emit(case="missing", package=name, needed=name in NEEDED)
    if run.mode == "until-launch":
        run.emit(case="stopped", step="environment", stopped="no CUDA device", compiled=[])


def _clocks() -> dict[str, Any]:
    """Return limits and present clocks, as nvidia-smi tells them; nothing is set."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        values = [float(value) for value in ran.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    names = ("sm_clock_limit_mhz", "memory_clock_mhz", "power_limit_w", "sm_clock_idle_mhz", "celsius")
    return {name: int(value) for name, value in zip(names, values, strict=False)}
