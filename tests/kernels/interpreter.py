"""Correct float conversion for Triton's interpreter, whose own conversion loses carries (triton issue 8322).

The replacement follows the hardware: it rounds to nearest even. To E4M3 it also saturates at 448 and converts every
NaN to 0x7F, as ``cvt.rn.satfinite.e4m3x2.f32`` does. Comparisons as bytes therefore remain exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

TORCH = {
    "fp8e4nv": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
INTEGERS = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}


def install() -> None:
    """Replace the conversion of the interpreter; with triton 3.6 also that of scalars to Python integers.

    triton 3.6 converts arrays of one element, which numpy refuses from 2.4 on; triton 3.7 removes the dimension first.
    """
    import triton
    from triton.runtime import interpreter

    if interpreter._convert_float is convert:
        return
    convert.replaced = interpreter._convert_float  # type: ignore[attr-defined]
    interpreter._convert_float = convert
    if triton.__version__.startswith("3.6."):
        patch = interpreter._patch_lang_tensor

        def patch_index(tensor: Any, *scope: Any) -> None:
            patch(tensor, *scope)
            tensor.__index__ = lambda self: int(self.handle.data.squeeze())

        interpreter._patch_lang_tensor = patch_index


def convert(data: NDArray[Any], source: object, target: object, _rounding: object) -> NDArray[Any]:
    """Replace ``triton.runtime.interpreter._convert_float``: convert bits to unsigned bits."""
    source_dtype, target_dtype = TORCH[str(source)], TORCH[str(target)]
    numpy_int, _ = INTEGERS[source_dtype.itemsize]
    # A copy, because a zero-dimensional or read-only array has no torch view.
    values = torch.from_numpy(np.array(data).reshape(-1).view(numpy_int)).view(source_dtype).float()
    nan = values.isnan()
    if target_dtype == torch.float8_e4m3fn:
        values = values.clamp(-448.0, 448.0)
    bits = values.to(target_dtype).view(INTEGERS[target_dtype.itemsize][1])
    if target_dtype == torch.float8_e4m3fn:
        bits[nan] = 0x7F
    unsigned = np.dtype(f"u{target_dtype.itemsize}")
    return bits.numpy().view(unsigned).reshape(np.shape(data))
