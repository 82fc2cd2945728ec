"""The public operations: Triton for CUDA tensors, the CPU path for CPU tensors, the reference elsewhere."""

from __future__ import annotations

from .reference import scale_from_amax

__all__ = [
    "amax",
    "amax_bits",
    "dequantize",
    "quantize",
    "quantize_many",
    "quantize_with_amax",
    "scale_from_amax",
]
