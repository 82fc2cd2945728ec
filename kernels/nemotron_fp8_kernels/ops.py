"""Public operations: Triton for CUDA tensors, the CPU path for CPU tensors, the reference for other devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import cpu, reference
from .formats import DEFAULT_BLOCK, Granularity, Numerics, ScaleRounding
from .outputs import check_outputs
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
    """Return the largest absolute values as the int32 bits of float32.

    The amaxes of the parts of a tensor combine by ``max``.

    Args:
        w: bf16, fp16 or fp32; dense of any shape, or 2-D with dense rows (2-D for ``channel`` and ``block``).
        granularity: elements that share one amax: ``tensor``, ``channel`` (a row) or ``block``.
        block: rows and columns of a block.

    Returns:
        int32 of shape ``[]``, ``[N, 1]`` or ``[ceil(N / block[0]), ceil(K / block[1])]``. The bits are
        0x7FC00000 if any element is NaN, else 0x7F800000 if any is Inf: ``bits >= 0x7F800000`` finds
        non-finite elements. Without elements, the bits are those of 16.0.

    Raises:
        UnsupportedDtypeError: ``w`` has another dtype.
        ShapeError: ``w`` is not 2-D at granularity ``channel`` or ``block``.
        GranularityError: the granularity is unknown, or the block is not two positive sizes.
        LayoutError: ``w`` is neither dense nor 2-D with dense rows.
        DeviceNotSupportedError: ``w`` is on a CUDA device older than Hopper.
    """
    if w.device.type == "cuda":
        from .gpu import ops as gpu_ops

        return gpu_ops.amax_bits(w, granularity, block)
    if w.device.type == "cpu":
        return cpu.amax_bits(w, granularity, block)
    return reference.amax_bits(w, granularity, block)


def amax(w: torch.Tensor, granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK) -> torch.Tensor:
    """Return the largest absolute values as float32; arguments and errors are those of `amax_bits`."""
    return amax_bits(w, granularity, block).view(torch.float32)


def quantize(
    w: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to E4M3 with the scale that maps the largest absolute value to 448, or a power of two above it.

    `nemotron_fp8_kernels.reference` specifies the formula. Every device returns the bytes of the reference.

    Args:
        w: bf16, fp16 or fp32; dense of any shape, or 2-D with dense rows (2-D for ``channel`` and ``block``).
        granularity: elements that share one scale: ``tensor``, ``channel`` (a row) or ``block``.
        block: rows and columns of a block.
        numerics: ``float32``, or ``original`` (rounding of the original script; granularity ``tensor`` only).
        rounding: ``none``; or the rule by which a scale is rounded up to a power of two before the cast:
            ``power-of-two`` (DeepGEMM's, at least 2^-22) or ``mx`` (OCP Microscaling's, whose blocks are (1, 32)).

    Returns:
        ``q``: float8_e4m3fn of ``w``'s shape, contiguous. ``scale``: float32 of shape ``[]``, ``[N, 1]`` or
        ``[ceil(N / block[0]), ceil(K / block[1])]``. The scale is a factor: ``w`` is about ``q * scale``. A
        NaN product becomes the code 0x7F.

    Raises:
        UnsupportedDtypeError: ``w`` has another dtype.
        ShapeError: ``w`` is not 2-D at granularity ``channel`` or ``block``.
        GranularityError: the granularity is unknown, the block is not two positive sizes, or the numerics
            ``original`` do not support the granularity.
        NumericsError: the numerics are unknown.
        RoundingError: the rounding is unknown, or not ``none`` with numerics ``original``.
        LayoutError: ``w`` is neither dense nor 2-D with dense rows.
        MultiplierOverflowError: ``original`` in fp16 with an amax up to 0.0068398.
        DeviceNotSupportedError: ``w`` is on a CUDA device older than Hopper.
    """
    if w.device.type == "cuda":
        from .gpu import ops as gpu_ops

        return gpu_ops.quantize(w, granularity, block, numerics, rounding=rounding)
    if w.device.type == "cpu":
        return cpu.quantize(w, granularity, block, numerics, rounding)
    return reference.quantize(w, granularity, block, numerics, rounding)


def quantize_with_amax(
    w: torch.Tensor,
    amax: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    out: torch.Tensor | None = None,
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with known amaxes: a slice of a larger tensor, or a tensor that shares a scale with others.

    Args:
        w: as for `quantize`. At granularity ``block``, a slice starts at the first row of a block.
        amax: float32, or the int32 bits of float32, of the scale's shape, on ``w``'s device. Elements above the
            amax saturate at 448.
        granularity: as for `quantize`.
        block: as for `quantize`.
        numerics: as for `quantize`.
        out: float8_e4m3fn of ``w``'s shape to write to, dense or with dense rows, in other memory than ``w``;
            allocated if None.
        rounding: as for `quantize`.

    Returns:
        ``q`` (``out`` if given) and ``scale``, as from `quantize`.

    Raises:
        UnsupportedDtypeError, ShapeError: as for `quantize`, and for ``amax`` and ``out``.
        LayoutError: as for `quantize`, and for ``out``.
        GranularityError, NumericsError, RoundingError: as for `quantize`.
        MultiplierOverflowError, DeviceNotSupportedError: as for `quantize`.
        DeviceError: ``amax`` or ``out`` is on another device than ``w``.
        OutputsError: ``out`` overlaps with ``w``, or with itself.
    """
    if out is not None:
        check_outputs([w], [out])
    if w.device.type == "cuda":
        from .gpu import ops as gpu_ops

        return gpu_ops.quantize_with_amax(w, amax, granularity, block, numerics, out, rounding)
    if w.device.type == "cpu":
        return cpu.quantize_with_amax(w, amax, granularity, block, numerics, out, rounding)
    q, scale = reference.quantize_with_amax(w, amax, granularity, block, numerics, rounding)
    return (q, scale) if out is None else (check_out(out, w).copy_(q), scale)


def quantize_many(
    tensors: Sequence[torch.Tensor],
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    shared: Sequence[Sequence[int]] | None = None,
    out: Sequence[torch.Tensor] | None = None,
    rounding: ScaleRounding = "none",
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Quantize several tensors on one device. On CUDA, one launch reads most of the data from memory once.

    Args:
        tensors: as ``w`` of `quantize`, of any shapes and dtypes.
        granularity: as for `quantize`.
        block: as for `quantize`.
        numerics: as for `quantize`.
        shared: groups of indices into ``tensors``. The members of a group share one scale, from their largest
            amax. Members without elements are ignored, unless all members are empty. A tensor outside all groups
            has its own scale.
        out: float8_e4m3fn tensors to write to, one per tensor, of the same shapes, dense or with dense rows. They
            share no memory with each other or with ``tensors``. Allocated if None.
        rounding: as for `quantize`.

    Returns:
        ``(q, scale)`` of each tensor, as from `quantize`; ``q`` is the tensor of ``out`` if given.

    No output is written before the checks. `MultiplierOverflowError` depends on the values: it can come after outputs
    of other tensors have been written.

    Raises:
        UnsupportedDtypeError, ShapeError, NumericsError, RoundingError, LayoutError: as for `quantize`.
        MultiplierOverflowError, DeviceNotSupportedError: as for `quantize`.
        GranularityError: as for `quantize`; also for ``shared`` at a granularity other than ``tensor`` or with
            numerics ``original``.
        SharedScaleError: groups overlap, are empty, or contain an index out of range.
        DeviceError: the tensors, or a tensor and its output, are on different devices.
        OutputsError: ``out`` has another length than ``tensors``, or its memory overlaps.
    """
    device = tensors[0].device.type if len(tensors) else "cpu"
    if device == "cuda":
        from .gpu import many

        return many.quantize_many(tensors, granularity, block, numerics, shared, out, rounding=rounding)
    if device == "cpu":
        return cpu.quantize_many(tensors, granularity, block, numerics, shared, out, rounding)
    return reference.quantize_many(tensors, granularity, block, numerics, shared, out, rounding)


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Dequantize: ``float32(q) * scale``, rounded to ``dtype``.

    Args:
        q: float8_e4m3fn, dense of any shape, or 2-D with dense rows.
        scale: float32 of the shape that `quantize` returns at this granularity.
        granularity: elements that share one scale.
        block: rows and columns of a block.
        dtype: bf16, fp16 or fp32.

    Returns:
        ``dtype``, of ``q``'s shape, contiguous. NaN codes and NaN scales become NaN with unspecified bits.

    Raises:
        UnsupportedDtypeError: ``q`` is not float8_e4m3fn, ``scale`` is not float32, or ``dtype`` is another dtype.
        ShapeError: ``scale`` has another shape, or ``q`` is not 2-D at granularity ``channel`` or ``block``.
        GranularityError: the granularity is unknown, or the block is not two positive sizes.
        LayoutError: ``q`` is neither dense nor 2-D with dense rows.
        DeviceError: ``scale`` is on another device than ``q``.
        DeviceNotSupportedError: ``q`` is on a CUDA device older than Hopper.
    """
    if q.device.type == "cuda":
        from .gpu import ops as gpu_ops

        return gpu_ops.dequantize(q, scale, granularity, block, dtype)
    if q.device.type == "cpu":
        return cpu.dequantize(q, scale, granularity, block, dtype)
    return reference.dequantize(q, scale, granularity, block, dtype)
