"""The ways of the CPU path: each compiled library that this machine can run, and torch."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from nemotron_fp8_kernels.native import Native, libraries
from tools.compile_kernels import compiler

CPU_PATHS = [*libraries.levels(), "torch"]


@cache
def compiled(path: str) -> Native | None:
    """Return the library of an instruction set; None for torch. Skip the test if this machine cannot run it."""
    if path == "torch":
        return None
    if compiler() is None and not libraries.library(path).is_file():
        pytest.skip("no C compiler made the library")
    if path == "avx2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("the processor has no AVX2")
    return Native(libraries.library(path))
