"""Tests of the repository on the device, divided among processes; a line after each test."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from benchmarks.common import ROOT
from benchmarks.gpu.lines import LINES
from benchmarks.gpu.shard import COLLECT, SHARE, TITLE

if TYPE_CHECKING:
    from benchmarks.gpu.run import Run

KERNELS, PIPELINE = "tests/kernels, compiled", "tests/gpu"
"""Names of both suites in the lines."""

SUITES = {"tests-kernels": KERNELS, "tests-gpu": PIPELINE}

DRY = {KERNELS: ["tests/kernels/test_errors.py", "-k", "shape"], PIPELINE: ["tests/gpu"]}
"""Tests of a dry run: the others need minutes in the interpreter."""


def go(run: Run, stage: str, share: str) -> None:
    """Run one share of the tests of a stage, as ``number/count``, or all, in a pytest process.

    The tests that are marked `gpu` are a part of tests/kernels only: there every test runs the compiled kernels.
    """
    suite = SUITES[stage]
    if importlib.util.find_spec("pytest") is None:
        run.emit(case="missing", package="pytest", needed=True)
        return
    chosen = DRY[suite] if run.dry else [suite.partition(",")[0]]
    environment = dict(os.environ) | {TITLE: suite, SHARE: share or "0/1"}
    if run.mode != "dry":
        environment["NEMOTRON_FP8_TEST_GPU"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.shard", *chosen]
    if run.mode == "until-launch":
        environment[COLLECT] = "1"
        command.append("--collect-only")
    descriptor = os.environ.get(LINES)
    passed = () if descriptor is None else (int(descriptor),)
    ran = subprocess.run(command, cwd=ROOT, env=environment, check=False, pass_fds=passed)
    # 1: tests failed, which their lines tell; 5: no test was chosen.
    if ran.returncode not in (0, 1, 5):
        run.emit(error=f"pytest ended with status {ran.returncode}", step=suite)
