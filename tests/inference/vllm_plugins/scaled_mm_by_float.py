"""The arithmetic of ``torch._scaled_mm`` in float32, for processors on which that is slower than a model can bear.

Nothing of vLLM is imported here, so that the tests can hold it against torch's own.
"""

from __future__ import annotations

import torch


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """Multiply FP8 codes ``a`` [M, K] and ``b`` [K, N] with their scales, and add ``bias`` [N].

    The scales are one value each, or [M, 1] and [1, N]. ``use_fast_accum`` says how precisely a GPU may add.
    """
    if scale_result is not None:
        message = "a scale of the result is not covered here"
        raise NotImplementedError(message)
    product = (a.float() @ b.float()) * scale_a * scale_b
    if bias is not None:
        product = product + bias
    return product.to(out_dtype or a.dtype)


def needs_it() -> bool:
    """Return True on processors with AMX, where torch multiplies FP8 a hundred times slower than bf16."""
    return torch.cpu._is_amx_tile_supported()
