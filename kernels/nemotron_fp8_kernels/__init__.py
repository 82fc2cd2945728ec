"""FP8 (E4M3) quantization of weights: Triton kernels for Hopper, an exact CPU path, and their specification.

Nothing is imported before it is used: neither torch by this module, nor triton by the CPU path.
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
    # Submodules are not served here (amax is an operation, although a module of kernels could bear its name).
    if name in __all__:
        return getattr(import_module(".ops", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
