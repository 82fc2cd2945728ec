"""Triton's interpreter casts incorrectly: the replacement in the test setup is necessary, and correct."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import convert

if TYPE_CHECKING:
    from types import ModuleType

HALF_STEPS = np.arange(0, 448, 0.001, dtype=np.float32)


def test_the_interpreters_own_cast_is_wrong() -> None:
    """The replacement is necessary: codes of numbers from 0 to 448 differ from round to nearest even."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    own = getattr(interpreter._convert_float, "replaced", interpreter._convert_float)
    codes = own(HALF_STEPS, tl.float32, tl.float8e4nv, ir.ROUNDING_MODE.RTNE)
    right = torch.from_numpy(HALF_STEPS).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.mean(codes != right) > 0.001


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_the_replacement_rounds_as_the_hardware(name: str) -> None:
    """All 65,536 inputs widen exactly and are cast as by torch, saturated, with NaN as 0x7F."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    inputs = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = inputs.view(torch.int16).numpy().view(np.uint16)
    wide = convert(bits, name, "fp32", None).view(np.float32)
    assert np.array_equal(wide, inputs.float().numpy(), equal_nan=True)
    codes = convert(wide, "fp32", "fp8e4nv", None)
    expected = inputs.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    expected[inputs.isnan()] = 0x7F
    assert np.array_equal(codes, expected.numpy())


def test_the_whole_path_is_correct_with_the_replacement(triton_ops: ModuleType) -> None:
    """A dense cast of numbers from 0 to 448 is correct with the replacement, or on the device."""
    from nemotron_fp8_kernels import reference

    w = torch.from_numpy(HALF_STEPS)
    moved = w if triton_ops.INTERPRETED else w.cuda()
    q, _ = triton_ops.quantize_with_amax(moved, torch.tensor(448.0, device=moved.device))
    expected = reference.quantize_with_amax(w, torch.tensor(448.0))[0]
    assert torch.equal(q.cpu().view(torch.uint8), expected.view(torch.uint8))
