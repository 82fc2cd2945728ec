"""A correct float conversion for Triton's interpreter, whose own loses carries (triton issue 8322).

The hardware's rules are put in its place: round to nearest even; to E4M3 also saturate at 448 and turn
every NaN into 0x7F, as ``cvt.rn.satfinite.e4m3x2.f32`` does. Comparisons then stay exact.
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


def convert(data: NDArray[Any], source: object, target: object, _rounding: object) -> NDArray[Any]:
    """Stand-in for ``triton.runtime.interpreter._convert_float``: bits in, unsigned bits out."""
    source_dtype, target_dtype = TORCH[str(source)], TORCH[str(target)]
    numpy_int, _ = INTEGERS[source_dtype.itemsize]
    # Copied: a zero-dimensional or read-only array has no torch view.
    values = torch.from_numpy(np.array(data).reshape(-1).view(numpy_int)).view(source_dtype).float()
    nan = values.isnan()
    if target_dtype == torch.float8_e4m3fn:
        values = values.clamp(-448.0, 448.0)
    bits = values.to(target_dtype).view(INTEGERS[target_dtype.itemsize][1])
    if target_dtype == torch.float8_e4m3fn:
        bits[nan] = 0x7F
    unsigned = np.dtype(f"u{target_dtype.itemsize}")
    return bits.numpy().view(unsigned).reshape(np.shape(data))
