"""Startup time of the command line: ``python -m benchmarks.measure.start [--samples N]``.

Every sample is a new process. The target is less than 0.3 s for ``--help`` on a quiet machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.common import RESULTS, Recorder, machine, time_host

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import nemotron_fp8": ("-c", "import nemotron_fp8"),
    "nemotron-fp8 --help": ("-m", "nemotron_fp8", "--help"),
    "nemotron-fp8 quantize --help": ("-m", "nemotron_fp8", "quantize", "--help"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "start-cpu.jsonl")
    options = parser.parse_args()
    record = Recorder(options.out, machine("cpu"))
    for name, arguments in COMMANDS.items():
        command = [sys.executable, *arguments]
        run = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        timing = time_host(run, options.samples)
        fields = {"seconds": timing.median, "seconds_low": timing.low, "seconds_high": timing.high}
        record.write(command=name, samples=timing.samples, **fields)


if __name__ == "__main__":
    main()
