"""The public operations: Triton for CUDA tensors, the CPU path for CPU tensors, the reference elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import cpu, reference
from .formats import DEFAULT_BLOCK, Granularity, Numerics
from .reference import check_out, scale_from_amax

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "amax",
    "amax_bits",
    "dequantize",
    "quantize",
    "quantize_many",
    "quantize_with_amax",
    "scale_from_amax",
]


def amax_bits(
    w: torch.Tensor, granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK
) -> torch.Tensor:
    """Largest absolute values as the int32 bits of float32; parts of one tensor combine by ``max``.

    Args:
        w: bf16, fp16 or fp32; dense of any shape, or 2-D with dense rows (2-D for ``channel`` and ``block``).
        granularity: what one amax covers: ``tensor``, ``channel`` (a row) or ``block``.
        block: rows and columns of a block.

    Returns:
        int32 of shape ``[]``, ``[N, 1]`` or ``[ceil(N / block[0]), ceil(K / block[1])]``. NaN anywhere gives
        0x7FC00000, else Inf gives 0x7F800000, so ``bits >= 0x7F800000`` says that a value is not finite. No
        elements give the bits of 16.0.

    Raises:
        UnsupportedDtypeError, ShapeError, GranularityError, LayoutError, DeviceNotSupportedError: see each
            class.
    """
    if w.device.type == "cuda":
        from .gpu import ops as gpu_ops

        return gpu_ops.amax_bits(w, granularity, block)
    if w.device.type == "cpu":
        return cpu.amax_bits(w, granularity, block)
    return reference.amax_bits(w, granularity, block)


def amax(w: torch.Tensor, granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK) -> torch.Tensor:
    """Largest absolute values, float32; see `amax_bits`."""
    return amax_bits(w, granularity, block).view(torch.float32)


def quantize(
    w: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to E4M3 with the scale that maps the largest absolute value to 448.

    The formula is that of `nemotron_fp8_kernels.reference`, and so are the bytes, on every device.

    Args:
        w: bf16, fp16 or fp32; dense of any shape, or 2-D with dense rows (2-D for ``channel`` and ``block``).
        granularity: what one scale covers.
        block: rows and columns of a block.
        numerics: ``float32``, or ``original`` (the original script's own rounding; granularity ``tensor``
            only).

    Returns:
        ``q``: float8_e4m3fn of ``w``'s shape, contiguous. ``scale``: float32 of shape ``[]``, ``[N, 1]`` or
        ``[ceil(N / block[0]), ceil(K / block[1])]``; it multiplies: ``w`` is about ``q * scale``. A NaN
        product becomes the code 0x7F.

    Raises:
        UnsupportedDtypeError, ShapeError, GranularityError, NumericsError, LayoutError: see each class.
        MultiplierOverflowError, DeviceNotSupportedError: see each class.
    """
    if w.device.type == "cuda":
        from .gpu import ops as gpu_ops

        return gpu_ops.quantize(w, granularity, block, numerics)
    if w.device.type == "cpu":
        return cpu.quantize(w, granularity, block, numerics)
    return reference.quantize(w, granularity, block, numerics)


def quantize_with_amax(
    w: torch.Tensor,
    amax: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with given amaxes, as for a slice of a larger tensor or for tensors that share a scale.

    Args:
        w: as for `quantize`. A slice for granularity ``block`` starts at a block's first row.
        amax: float32, or int32 bits of it, of the scale's shape, on ``w``'s device. Larger values saturate.
        granularity: as for `quantize`.
        block: as for `quantize`.
        numerics: as for `quantize`.
        out: float8_e4m3fn of ``w``'s shape to write to, dense or with dense rows; allocated if None.

    Returns:
        ``q`` (``out`` if given) and ``scale``, as `quantize`.

    Raises:
        UnsupportedDtypeError, ShapeError: as `quantize`, and for ``amax`` and ``out`` too.
        GranularityError, NumericsError, LayoutError: as `quantize`.
        MultiplierOverflowError, DeviceNotSupportedError: as `quantize`.
        DeviceError: ``amax`` or ``out`` is on another device than ``w``.
    """
    if w.device.type == "cuda":
        from .gpu import ops as gpu_ops

        return gpu_ops.quantize_with_amax(w, amax, granularity, block, numerics, out)
    if w.device.type == "cpu":
        return cpu.quantize_with_amax(w, amax, granularity, block, numerics, out)
    q, scale = reference.quantize_with_amax(w, amax, granularity, block, numerics)
    return (q, scale) if out is None else (check_out(out, w).copy_(q), scale)


def quantize_many(
    tensors: Sequence[torch.Tensor],
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    shared: Sequence[Sequence[int]] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Quantize several tensors of one device; on CUDA in one launch that reads most data from memory once.

    Args:
        tensors: as ``w`` of `quantize`, of any shapes and dtypes.
        granularity: as for `quantize`.
        block: as for `quantize`.
        numerics: as for `quantize`.
        shared: groups of indices into ``tensors`` that get one scale, from the largest amax among them (a
            member without elements adds nothing, unless all are). An index that is in no group is alone.

    Returns:
        ``(q, scale)`` of each tensor, as `quantize` gives them.

    Raises:
        UnsupportedDtypeError, ShapeError, NumericsError, LayoutError: as `quantize`.
        MultiplierOverflowError, DeviceNotSupportedError: as `quantize`.
        GranularityError: as `quantize`; also ``shared`` at another granularity than ``tensor`` or with numerics
            ``original``.
        SharedScaleError: groups overlap, are empty or out of range.
        DeviceError: the tensors are on different devices.
    """
    device = tensors[0].device.type if len(tensors) else "cpu"
    if device == "cuda":
        from .gpu import many

        return many.quantize_many(tensors, granularity, block, numerics, shared)
    if device == "cpu":
        return cpu.quantize_many(tensors, granularity, block, numerics, shared)
    return reference.quantize_many(tensors, granularity, block, numerics, shared)


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Restore weights: ``float32(q) * scale``, rounded to ``dtype``.

    Args:
        q: float8_e4m3fn, dense of any shape, or 2-D with dense rows.
        scale: float32 of the shape that `quantize` returns at this granularity.
        granularity: what one scale covers.
        block: rows and columns of a block.
        dtype: bf16, fp16 or fp32.

    Returns:
        ``dtype``, of ``q``'s shape, contiguous.

    Raises:
        UnsupportedDtypeError, ShapeError, GranularityError, LayoutError: see each class.
        DeviceError, DeviceNotSupportedError: see each class.
    """
    if q.device.type == "cuda":
        from .gpu import ops as gpu_ops

        return gpu_ops.dequantize(q, scale, granularity, block, dtype)
    if q.device.type == "cpu":
        return cpu.dequantize(q, scale, granularity, block, dtype)
    return reference.dequantize(q, scale, granularity, block, dtype)
