"""Imports: no torch for the package, no triton for the CPU path."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import nemotron_fp8_kernels


def modules_after(code: str) -> set[str]:
    """Return the top-level modules of a fresh interpreter after ``code``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    return set(ran.stdout.split())


def test_the_package_imports_nothing() -> None:
    assert modules_after("import nemotron_fp8_kernels").isdisjoint({"torch", "triton", "numpy"})


def test_the_cpu_path_imports_no_triton() -> None:
    code = """
import torch, nemotron_fp8_kernels as k
w = torch.randn(4, 300_000).bfloat16()
for granularity in ("tensor", "channel", "block"):
    k.dequantize(*k.quantize(w, granularity), granularity)
k.quantize_with_amax(w, k.amax(w), numerics="original")
k.quantize_many([w, w], shared=[[0, 1]])
"""
    modules = modules_after(code)
    assert "torch" in modules
    assert "triton" not in modules


def test_public_names() -> None:
    assert set(dir(nemotron_fp8_kernels)) == set(nemotron_fp8_kernels.__all__)
    for name in nemotron_fp8_kernels.__all__:
        assert callable(getattr(nemotron_fp8_kernels, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        nemotron_fp8_kernels.no_such_name  # noqa: B018  (the access is what is tested)
