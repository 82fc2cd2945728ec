"""All GPU tests and benchmarks in one command: ``python3 -m benchmarks.gpu --out DIR``.

It needs no network and no git. Packages that the machine lacks are installed from ``.gpu/wheels`` for this run
alone (``python -m benchmarks.gpu.pack`` downloads them on a machine with a network). The results are ``results.jsonl``,
``log.txt`` and ``summary.txt`` in DIR; each figure is written at once, the most decisive first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import summary, wheels
from benchmarks.gpu.driver import ROOT, Driver
from benchmarks.gpu.lines import NO_DEVICE, problems
from benchmarks.gpu.plan import stages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


SURPLUS = 4
"""Processes beyond the number of cores that run at the same time on a device."""


@contextmanager
def scratch_folder(out: Path) -> Iterator[str]:
    """Make a folder for caches and packages, wherever there is room, and remove it."""
    problem: OSError | None = None
    for parent in (None, "/dev/shm", out):
        try:
            folder = tempfile.mkdtemp(prefix="nemotron-fp8-gpu-", dir=parent)
        except OSError as error:
            problem = error
            continue
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    raise SystemExit(f"no folder for temporary files: {problem}")


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; return 0 if every stage reported and nothing is wrong."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; created")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds of the whole run (default 540)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry", action="store_true", help="on the CPU, in Triton's interpreter, with small shapes")
    how.add_argument("--until-launch", action="store_true", help="without a device, up to the launch of each kernel")
    names = [stage.name for stage in stages(1, "device")]
    parser.add_argument("--only", action="append", choices=names, help="only this stage (repeatable)")
    parser.add_argument("--run", type=int, default=1, help="number of the run in the results (default 1)")
    options = parser.parse_args(arguments)
    mode = "dry" if options.dry else "until-launch" if options.until_launch else "device"
    cores = len(os.sched_getaffinity(0))
    wanted = {"environment", *(options.only or names)}
    chosen = [stage for stage in stages(cores, mode) if stage.name in wanted]

    with scratch_folder(options.out) as scratch:
        site = wheels.install(Path(scratch) / "site")
        paths = [*([str(site)] if site else []), str(ROOT), str(ROOT / "kernels")]
        environment = {
            "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRITON_CACHE_DIR": str(Path(scratch) / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "2",
        }
        # A few more processes than cores: those of the first stages wait for the device, too.
        processes = cores + SURPLUS if mode == "device" else cores
        driver = Driver(options.out, options.limit, mode, environment, processes, began, options.run)

        def stop(_number: int, _frame: FrameType | None) -> None:
            driver.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        driver.run(chosen)
    found = driver.results.lines
    expected = [stage.name for stage in chosen]
    page = summary.text(found, expected, options.until_launch)
    with suppress(OSError):
        print(page, end="", flush=True)
    try:
        (options.out / "summary.txt").write_text(page, encoding="utf-8")
    except OSError as error:
        print(f"summary cannot be written: {error}")
    if any(line.get("code") == NO_DEVICE for line in found):
        return NO_DEVICE
    return 1 if problems(found, expected, options.until_launch) else 0


if __name__ == "__main__":
    sys.exit(main())
