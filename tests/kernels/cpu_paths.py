"""The ways of the CPU path, each compiled library that this machine can run and torch; a comparison of results."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from compile_kernels import compile_kernels, compiler
from nemotron_fp8_kernels.native import Native, libraries

CPU_PATHS = [*libraries.levels(), "torch"]


@cache
def compiled(path: str) -> Native | None:
    """Return the library of an instruction set; None for torch. Skip the test if this machine cannot run it."""
    if path == "torch":
        return None
    if not libraries.library(path).is_file():  # no build has made it, or its source has changed since
        if compiler() is None:
            pytest.skip("there is no C compiler")
        compile_kernels()
    if path == "avx2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("the processor has no AVX2")
    return Native(libraries.library(path))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare all bits but those of NaN."""
    kind = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()].view(kind), b[~b.isnan()].view(kind))
