"""The cast to an FP8 cache of keys and values as GPUs do it, before kernels that truncate: vLLM's for CPUs do.

Nothing of vLLM is imported here, so that the tests can hold it against the formats.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0


def nudged(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Return bfloat16 values whose quotients by a scale are truncated to the codes nearest to those of other values.

    A nearest code times its scale, and one or two units in the last place more: quotients are above the code, and far
    below the next one.
    """
    codes = (values.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    exact = codes.float() * scale
    bits = exact.view(torch.int32)
    upper = ((bits + 0x1FFFF) & ~0xFFFF).view(torch.float32)
    return torch.where(exact == 0, exact, upper).bfloat16()
