"""Timing and JSON-lines records of the benchmarks, with machine, versions and commit."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, quartiles, number of samples."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        return cls(median, low, high, len(seconds))


def machine(device: str) -> dict[str, Any]:
    """Return processor or GPU and driver, versions and commit; no host names and no paths."""
    record: dict[str, Any] = {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchao": _version("torchao"),
        "commit": _commit(),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": properties.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    else:
        record["device"] = record["processor"]
    return record


class Recorder:
    """Writes one JSON line for each measurement, with the circumstances of the run, and prints it."""

    def __init__(self, path: Path, circumstances: dict[str, Any]) -> None:
        self.path, self.circumstances = path, circumstances
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def write(self, **fields: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields | self.circumstances, sort_keys=True) + "\n")
        print(" ".join(f"{key}={_short(value)}" for key, value in fields.items()), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def time_host(call: Callable[[], object], samples: int, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Measure the seconds of ``call``, after one warm-up call.

    ``clock`` is the wall clock; ``time.thread_time`` counts the processor time of the calling thread instead, which
    other load on the machine disturbs less.
    """
    call()
    seconds = []
    for _ in range(samples):
        start = clock()
        call()
        seconds.append(clock() - start)
    return Timing.of(seconds)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return ""
        return ran.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit:
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    return packed.commit()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.splitlines()[0].strip()
