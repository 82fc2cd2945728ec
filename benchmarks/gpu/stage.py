"""One stage of the run, in a process of its own: ``python -m benchmarks.gpu.stage STAGE [JOB]``.

The driver starts it with the mode and a pipe for lines in the environment; by hand it prints its lines.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from benchmarks.gpu.lines import MODE, NO_DEVICE

STEPS = {
    "environment": "environment",
    "bytes": "checks",
    "tests-kernels": "tests",
    "inductor": "compilation",
    "kernels": "kernels",
    "lists": "lists",
    "peers": "peers",
    "sweep": "sweep",
    "conversion": "conversion",
    "tests-gpu": "tests",
}
"""Module of each stage. Only that module is imported, so that a missing package ends the stages that need it alone."""


def main(arguments: list[str]) -> None:
    """Prepare the mode and go through the steps of the stage."""
    stage, job = arguments[0], (arguments[1:] or [""])[0]
    if os.environ.get(MODE) == "dry":
        os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is first imported
    from benchmarks.gpu.run import NoDeviceError, Run

    run = Run()
    try:
        run.prepare()
    except NoDeviceError as error:
        run.emit(error=str(error))
        raise SystemExit(NO_DEVICE) from error
    try:
        import_module(f"benchmarks.gpu.steps.{STEPS[stage]}").go(run, stage, job)
    except Exception as error:
        run.emit(error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", step=stage)
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
