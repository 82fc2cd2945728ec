"""FP8 (E4M3) quantization of weights: Triton kernels for Hopper, an exact CPU path, and their specification.

Imports are lazy: this module does not import torch, and the CPU path does not import triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ops import (
        amax,
        amax_bits,
        dequantize,
        quantize,
        quantize_many,
        quantize_with_amax,
        scale_from_amax,
    )

__all__ = [
    "amax",
    "amax_bits",
    "dequantize",
    "quantize",
    "quantize_many",
    "quantize_with_amax",
    "scale_from_amax",
]


def __getattr__(name: str) -> object:
    # Operations only: no submodule that has the name of an operation, such as `amax`, can hide it.
    if name in __all__:
        return getattr(import_module(".ops", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
