"""The public operations: Triton for CUDA tensors, the CPU path for CPU tensors, the reference elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import cpu, reference
from .formats import DEFAULT_BLOCK, Granularity, Numerics
from .grouping import quantize_many_by
from .reference import scale_from_amax

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = [
    "amax",
    "amax_bits",
    "dequantize",
    "quantize",
    "quantize_many",
    "quantize_with_amax",
    "scale_from_amax",
]
