"""Values of scales and their stored form: floating-point numbers, or the exponents of powers of two (E8M0).

Source: OCP Microscaling Formats (MX), section 5.4.1: a byte ``u`` is 2^(u - 127), and 255 is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nemotron_fp8.planning.number_format import ScaleType


FLOATS: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""torch dtypes of floating-point scales, by safetensors name."""
EXPONENTS = frozenset({"F8_E8M0", "U8"})
"""Dtypes of scales that are exponents: E8M0, also in tensors of bytes."""
STORED: dict[str, torch.dtype] = {**FLOATS, **dict.fromkeys(EXPONENTS, torch.uint8)}
"""torch dtypes in which scales are read and written, by safetensors name; exponents are bytes."""

_MANTISSA_BITS = 23
_LEAST, _NAN = 0x0040_0000, 0x7FC0_0000
"""float32 bits of 2^-127, which is subnormal, and of NaN."""


def unpack_scales(raw: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the values of stored scales.

    Args:
        raw: scales as stored, in the dtype of `STORED`, of any shape.
        dtype: safetensors name: ``F32``, ``F16``, ``BF16``, ``F8_E8M0``, or ``U8`` for E8M0 in bytes.

    Returns:
        float32, in the same shape. Every value is exact; the exponent 255 is NaN.

    Raises:
        KeyError: scales of this dtype are unknown.
    """
    if STORED[dtype] is not torch.uint8:
        return raw.to(torch.float32)
    exponents = raw.view(torch.uint8).to(torch.int32)
    bits = exponents << _MANTISSA_BITS
    bits[exponents == 0] = _LEAST
    bits[exponents == 0xFF] = _NAN
    return bits.view(torch.float32)


def pack_scales(scale: torch.Tensor, scale_type: ScaleType) -> torch.Tensor:
    """Return scales as they are stored.

    Args:
        scale: float32, of any shape; for E8M0, powers of two from 2^-127 to 2^127.
        scale_type: type of the stored scales.

    Returns:
        Scales in the dtype of `STORED`, in the same shape. E8M0 is bytes: NaN and infinity become 255.

    Raises:
        KeyError: scales of this type are unknown.
    """
    stored = STORED[scale_type.dtype]
    if stored is not torch.uint8:
        return scale.to(stored)
    return (scale.contiguous().view(torch.int32) >> _MANTISSA_BITS & 0xFF).to(torch.uint8)


def are_powers_of_two(scale: torch.Tensor) -> bool:
    """Return True if all scales are powers of two that E8M0 holds, from 2^-127 on.

    Args:
        scale: float32, positive and finite.
    """
    bits = scale.contiguous().view(torch.int32)
    return bool(((bits & ((1 << _MANTISSA_BITS) - 1) == 0) | (bits == _LEAST)).all())
