"""Stages of the run in their order: the most decisive first, so that a run that is cut off is worth something."""

from __future__ import annotations

from dataclasses import dataclass, replace

CORES_KEPT = 2
"""Cores that no share of the tests is planned for."""


@dataclass(frozen=True)
class Stage:
    """A stage: processes that run at the same time, each with the same limit.

    Attributes:
        name: name, also of the module in `benchmarks.gpu.stage.STEPS`.
        seconds: limit of a process.
        jobs: argument of each process.
        beside: True to run beside the stage before; nothing is timed then.
    """

    name: str
    seconds: float
    jobs: tuple[str, ...] = ("",)
    beside: bool = False


def stages(cores: int, mode: str) -> list[Stage]:
    """Return the stages for a machine with so many cores, for a mode of `benchmarks.gpu.run`.

    The limits add up to 540 s. Bytes, tests and compilations share the device; all other stages have it alone.
    """
    shares = max(1, min(8, cores - CORES_KEPT))
    bytes_jobs = [f"{name}:{half}" for name in ("bfloat16", "float16", "float32") for half in (0, 1)]
    bytes_jobs += ["lists", "graphs"]
    tests_jobs = [f"{number}/{shares}" for number in range(shares)]
    granularities = ["channel", "block", "tensor"]
    if mode == "dry":
        bytes_jobs, tests_jobs, granularities = [""], ["0/1"], ["channel"]
    planned = [
        Stage("environment", 40),
        Stage("bytes", 115, tuple(bytes_jobs)),
        Stage("tests-kernels", 115, tuple(tests_jobs), beside=True),
        Stage("inductor", 115, tuple(granularities), beside=True),
        Stage("kernels", 100),
        Stage("lists", 60),
        Stage("peers", 60),
        Stage("sweep", 80),
        Stage("conversion", 75),
        Stage("tests-gpu", 50),
    ]
    # Without a device nothing is timed: all stages after the first share the processors.
    return planned if mode == "device" else [*planned[:2], *(replace(stage, beside=True) for stage in planned[2:])]
