"""The specification of every operation, in plain torch; all other paths are compared to it as bytes.

In float32, with ``w`` converted first::

    amax  = max |w|, at least 1e-12 (16 for an empty tensor, row or block)
    mult  = 448 / amax                              IEEE division
    q     = e4m3(clamp(w * mult, -448, 448))        rounded to nearest, ties to even
    scale = 1 / mult                                IEEE division

This is the formula of the script that NVIDIA published with Nemotron-4-340B-Instruct-FP8, carried out in
float32. ``numerics="original"`` is the same script as torch executed it, in the tensor's own dtype.

NaN and Inf: an amax is NaN (bits ``0x7FC00000``) if any element is NaN, else Inf if any is Inf. The formula
is
carried through: every NaN product becomes the code ``0x7F`` whatever its sign, a NaN scale has the bits
``0x7FC00000``. Callers that must not write such tensors refuse them by their amax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .errors import DeviceError, GranularityError, MultiplierOverflowError, ShapeError, UnsupportedDtypeError
from .formats import (
    AMAX_FLOOR,
    DEFAULT_BLOCK,
    E4M3_MAX,
    EMPTY_AMAX,
    INF_BITS,
    NAN_BITS,
    NAN_CODE,
    Granularity,
    Numerics,
    check_granularity,
    check_numerics,
    scale_shape,
)
from .grouping import partition

if TYPE_CHECKING:
    from collections.abc import Sequence

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that can be quantized."""


def amax_bits(
    w: torch.Tensor, granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK
) -> torch.Tensor:
    """Largest absolute values as the int32 bits of float32: an integer maximum, so free of order and
    rounding.

    Args:
        w: bf16, fp16 or fp32, any shape (2-D for ``channel`` and ``block``).
        granularity: what one amax covers.
        block: rows and columns of a block.

    Returns:
        int32 of shape ``scale_shape(w.shape, granularity, block)``. Parts of one tensor combine by ``max``.
        NaN anywhere gives 0x7FC00000, else Inf gives 0x7F800000; no elements give the bits of 16.0.

    Raises:
        UnsupportedDtypeError, ShapeError, GranularityError: see each class.
    """
    check_input(w)
    shape = scale_shape(w.shape, granularity, block)
    if w.numel() == 0:
        return torch.full(shape, EMPTY_AMAX, device=w.device).view(torch.int32)
    # The sign is cleared as an integer: on some machines abs() would quieten or drop NaN payloads.
    bits = w.to(torch.float32).contiguous().view(torch.int32) & 0x7FFF_FFFF
    if granularity == "tensor":
        amax = bits.max()
    elif granularity == "channel":
        amax = bits.amax(dim=1, keepdim=True)
    else:
        rows, columns = shape
        padded = bits.new_zeros(rows * block[0], columns * block[1])
        padded[: w.shape[0], : w.shape[1]] = bits
        amax = padded.view(rows, block[0], columns, block[1]).amax(dim=(1, 3))
    return torch.where(amax > INF_BITS, NAN_BITS, amax).to(torch.int32)


def amax(w: torch.Tensor, granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK) -> torch.Tensor:
    """Largest absolute values, float32; see `amax_bits` for arguments, NaN, Inf and errors."""
    return amax_bits(w, granularity, block).view(torch.float32)


def scale_from_amax(
    amax: torch.Tensor, numerics: Numerics = "float32", dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiplier and stored scale of given amaxes.

    Args:
        amax: float32, or int32 bits of it, any shape (``[]`` for ``original``).
        numerics: the formula.
        dtype: the weight's dtype, in which ``original`` computes.

    Returns:
        ``mult`` (float32; for ``original`` in ``dtype``) and ``scale`` (float32), of ``amax``'s shape.
        ``q * scale`` restores a weight.

    Raises:
        MultiplierOverflowError: ``original`` in fp16 with an amax up to 0.0068398.
        UnsupportedDtypeError, NumericsError, ShapeError: see each class.
    """
    check_numerics(numerics, "tensor")
    values = amax_values(amax)
    if numerics == "float32":
        # Tensor by tensor, and on one device: torch runs number / tensor as reciprocal * number, which
        # differs from IEEE division for 17% of all bf16 amaxes.
        mult = torch.full_like(values, E4M3_MAX) / values.clamp(min=AMAX_FLOOR)
        scale = torch.ones_like(mult) / mult
    else:
        if dtype not in INPUT_DTYPES:
            raise UnsupportedDtypeError("w", dtype, INPUT_DTYPES)
        if values.ndim:
            raise ShapeError("amax", values.shape, "numerics 'original' takes one amax, of shape []")
        mult = E4M3_MAX / values.to(dtype).clamp(min=AMAX_FLOOR)
        if dtype == torch.float16 and bool(mult.isinf()):
            raise MultiplierOverflowError(float(values))
        scale = mult.float().reciprocal()
    return mult, canonical_nan(scale)


def quantize(
    w: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to E4M3 with the scale that maps the largest absolute value to 448.

    Args:
        w: bf16, fp16 or fp32, any shape (2-D for ``channel`` and ``block``).
        granularity: what one scale covers.
        block: rows and columns of a block.
        numerics: the formula, see the module.

    Returns:
        ``q``, float8_e4m3fn of ``w``'s shape, contiguous; ``scale``, float32 of
        ``scale_shape(w.shape, granularity, block)``; ``w`` is about ``q * scale``.

    Raises:
        UnsupportedDtypeError, ShapeError, GranularityError, NumericsError, MultiplierOverflowError.
    """
    check_numerics(numerics, granularity)
    return quantize_with_amax(w, amax_bits(w, granularity, block), granularity, block, numerics)


def quantize_with_amax(
    w: torch.Tensor,
    amax: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with given amaxes, as for a slice of a tensor or for tensors that share a scale.

    Args:
        w: as for `quantize`.
        amax: float32, or int32 bits of it, of shape ``scale_shape(w.shape, granularity, block)``. Values
            beyond it saturate at 448.
        granularity, block, numerics: as for `quantize`.

    Returns:
        As `quantize`.

    Raises:
        As `quantize`; ShapeError also for an amax of another shape.
    """
    check_input(w)
    check_numerics(numerics, granularity)
    check_amax(amax, scale_shape(w.shape, granularity, block))
    mult, scale = scale_from_amax(amax, numerics, w.dtype)
    w32 = w.to(torch.float32)
    product = w * mult if numerics == "original" else w32 * expand(mult, w.shape, granularity, block)
    q = product.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).contiguous()
    codes = q.view(torch.uint8)
    codes[product.isnan()] = NAN_CODE
    return q, scale


def quantize_many(
    tensors: Sequence[torch.Tensor],
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    shared: Sequence[Sequence[int]] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Quantize several tensors, some of them with one scale in common.

    Args:
        tensors: as ``w`` of `quantize`, of any shapes and dtypes.
        granularity, block, numerics: as for `quantize`.
        shared: groups of indices into ``tensors``; a group's amax is the largest of its members (one without
            elements adds nothing, unless all are), and its members get the same scale. An index that is in no
            group is alone.

    Returns:
        ``(q, scale)`` of each tensor, as `quantize` gives them.

    Raises:
        As `quantize`; SharedScaleError for groups that overlap, are empty or out of range;
        GranularityError for ``shared`` at another granularity than ``tensor`` or with numerics ``original``.
    """
    check_many(tensors, granularity, numerics, shared)
    if granularity != "tensor":
        return [quantize(w, granularity, block, numerics) for w in tensors]
    bits = torch.empty(len(tensors), dtype=torch.int32)
    for group in partition(len(tensors), shared):
        bits[group] = group_amax_bits([amax_bits(tensors[index]) for index in group], group, tensors)
    return [quantize_with_amax(w, amax.to(w.device), numerics=numerics) for w, amax in zip(tensors, bits, strict=True)]


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Restore weights: ``float32(q) * scale``, then rounded to ``dtype``.

    Args:
        q: float8_e4m3fn, any shape (2-D for ``channel`` and ``block``).
        scale: float32 of ``scale_shape(q.shape, granularity, block)``.
        granularity, block: what one scale covers.
        dtype: bf16, fp16 or fp32.

    Returns:
        ``dtype``, of ``q``'s shape, contiguous. NaN codes and scales give a NaN whose bits are not specified.

    Raises:
        UnsupportedDtypeError, ShapeError, GranularityError: see each class.
    """
    check_dequantize(q, scale, granularity, block, dtype)
    return (q.to(torch.float32) * expand(scale, q.shape, granularity, block)).to(dtype).contiguous()


def expand(values: torch.Tensor, shape: torch.Size, granularity: Granularity, block: tuple[int, int]) -> torch.Tensor:
    """Per-scale ``values`` as a tensor that broadcasts against a weight of ``shape``."""
    if granularity != "block":
        return values
    by_row = values.repeat_interleave(block[0], dim=0)[: shape[0]]
    return by_row.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def canonical_nan(values: torch.Tensor) -> torch.Tensor:
    """float32 ``values`` with every NaN as ``0x7FC00000``, since its sign and payload vary by machine."""
    bits = values.contiguous().view(torch.int32)
    return torch.where(values.isnan(), NAN_BITS, bits).to(torch.int32).view(torch.float32)


def group_amax_bits(
    bits: Sequence[torch.Tensor], group: Sequence[int], tensors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Amax bits of a group from those of its members, passing over members without elements."""
    filled = [value for value, index in zip(bits, group, strict=True) if tensors[index].numel()]
    return torch.stack([value.cpu() for value in filled or bits]).max()


def check_many(
    tensors: Sequence[torch.Tensor],
    granularity: Granularity,
    numerics: Numerics,
    shared: Sequence[Sequence[int]] | None,
) -> None:
    """Refuse what `quantize` would refuse, and shared scales where there can be none."""
    check_granularity(granularity, DEFAULT_BLOCK)
    check_numerics(numerics, granularity)
    for w in tensors:
        check_input(w)
    if shared is not None and granularity != "tensor":
        raise GranularityError(granularity, "only scales of granularity 'tensor' can be shared")
    if shared is not None and numerics == "original":
        raise GranularityError(granularity, "numerics 'original' shares no scales; use numerics 'float32'")


def amax_values(amax: torch.Tensor) -> torch.Tensor:
    """Amaxes as float32, from float32 or its int32 bits."""
    if amax.dtype == torch.int32:
        return amax.view(torch.float32)
    if amax.dtype != torch.float32:
        raise UnsupportedDtypeError("amax", amax.dtype, (torch.float32, torch.int32))
    return amax


def check_input(w: torch.Tensor) -> None:
    """Refuse weights of another dtype than :data:`INPUT_DTYPES`."""
    if w.dtype not in INPUT_DTYPES:
        raise UnsupportedDtypeError("w", w.dtype, INPUT_DTYPES)


def check_amax(amax: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse amaxes of the wrong dtype, or of another shape than the scales."""
    amax_values(amax)
    if tuple(amax.shape) != shape:
        raise ShapeError("amax", amax.shape, f"this granularity takes {list(shape)}")


def check_out(out: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Refuse an output that does not fit ``w``, and return it."""
    if out.dtype != torch.float8_e4m3fn:
        raise UnsupportedDtypeError("out", out.dtype, (torch.float8_e4m3fn,))
    if out.shape != w.shape:
        raise ShapeError("out", out.shape, f"w has {list(w.shape)}")
    if out.device != w.device:
        raise DeviceError("out", out.device, w.device)
    return out


def check_dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """Refuse arguments of `dequantize` that do not fit each other."""
    if q.dtype != torch.float8_e4m3fn:
        raise UnsupportedDtypeError("q", q.dtype, (torch.float8_e4m3fn,))
    if scale.dtype != torch.float32:
        raise UnsupportedDtypeError("scale", scale.dtype, (torch.float32,))
    if dtype not in INPUT_DTYPES:
        raise UnsupportedDtypeError("dtype", dtype, INPUT_DTYPES)
    shape = scale_shape(q.shape, granularity, block)
    if tuple(scale.shape) != shape:
        raise ShapeError("scale", scale.shape, f"this granularity takes {list(shape)}")
