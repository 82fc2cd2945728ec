"""Specification of every operation in plain torch; the tests compare all other paths with its bytes.

In float32, with ``w`` converted first::

    amax  = max |w|, at least 1e-12 (16 for an empty tensor, row or block)
    mult  = 448 / amax                              IEEE division
    q     = e4m3(clamp(w * mult, -448, 448))        rounded to nearest, ties to even
    scale = 1 / mult                                IEEE division

This is the formula of the script that NVIDIA published with Nemotron-4-340B-Instruct-FP8, evaluated in float32.
``numerics="original"`` evaluates the formula as that script did: by torch, in the dtype of the tensor.

``rounding`` makes a scale a power of two, ``scale = 2^e`` and ``mult = 2^-e``, before the cast::

    power-of-two    e = ceil(log2(max(amax, 1e-4) / 448))                    DeepGEMM
    mx              e = max(ceil(log2(amax / 448)), -127), or 0 without amax OCP Microscaling

The exponents are computed from the float32 bits of an amax ``m * 2^x``, ``1 <= m < 2``, without a logarithm: ``x - 8``,
or ``x - 7`` if ``m`` exceeds the 1.75 of 448. Then ``w * mult`` is exact unless it is subnormal, and is at most 448. A
block of zeros has the scale 2^-22 or 1.

`best_amax_bits` searches a better scale for each row. Its candidates are ``float32(amax * c)`` for the eight factors
``c`` of `CANDIDATES`. A candidate takes the place of the amax in the formula. The one with the least squared error of
the row (`ErrorSums.noise`) is chosen, and the smaller of two with the same error. No candidate is below the amax, so
that all values stay in range. Candidates beyond float32 are skipped. A row with NaN or Inf keeps its amax.

NaN and Inf: an amax is NaN (bits ``0x7FC00000``) if any element is NaN, else Inf if any is Inf. The formula without
rounding applies to these tensors, too, also for the other roundings: a NaN product of either sign becomes the code
``0x7F``, and a NaN scale has the bits ``0x7FC00000``. The amax lets callers reject non-finite tensors.

`nemotron_fp8_kernels.ops` documents arguments, results and errors. The reference accepts tensors with any strides.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .error_sums import error_sums
from .errors import DeviceError, GranularityError, MultiplierOverflowError, ShapeError, UnsupportedDtypeError
from .formats import (
    AMAX_FLOOR,
    CANDIDATES,
    DEFAULT_BLOCK,
    E4M3_MAX,
    EMPTY_AMAX,
    INF_BITS,
    LEAST_EXPONENTS,
    NAN_BITS,
    NAN_CODE,
    SCALE_1_MANTISSA,
    Granularity,
    Numerics,
    ScaleRounding,
    check_granularity,
    check_numerics,
    check_rounding,
    fitted,
    scale_shape,
)
from .grouping import partition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that the operations quantize from and dequantize to."""


def amax_bits(
    w: torch.Tensor, granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK
) -> torch.Tensor:
    """Return amax bits by an integer maximum, which neither the order of elements nor rounding affects."""
    check_input(w)
    shape = scale_shape(w.shape, granularity, block)
    if w.numel() == 0:
        return torch.full(shape, EMPTY_AMAX, device=w.device).view(torch.int32)
    # An integer mask clears the sign: on some machines, abs() changes NaN payloads.
    bits = w.to(torch.float32).contiguous().view(torch.int32) & 0x7FFF_FFFF
    if granularity == "tensor":
        amax = bits.max()
    elif granularity == "channel":
        amax = bits.amax(dim=1, keepdim=True)
    else:
        rows, columns = shape
        block = fitted(block, w.shape)
        padded = bits.new_zeros(rows * block[0], columns * block[1])
        padded[: w.shape[0], : w.shape[1]] = bits
        amax = padded.view(rows, block[0], columns, block[1]).amax(dim=(1, 3))
    return torch.where(amax > INF_BITS, NAN_BITS, amax).to(torch.int32)


def amax(w: torch.Tensor, granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK) -> torch.Tensor:
    """Return the largest absolute values as float32."""
    return amax_bits(w, granularity, block).view(torch.float32)


def best_amax_bits(w: torch.Tensor) -> torch.Tensor:
    """Return the bits of the candidate of every row of ``w`` with the least error: int32 ``[N, 1]``.

    ``w`` is a matrix on the CPU. Codes and scales of the result follow by `quantize_with_amax`.
    """

    def noise_of(bits: torch.Tensor) -> torch.Tensor:
        q, scale = quantize_with_amax(w, bits, "channel")
        return error_sums(w, q, scale_from_amax(bits)[0], scale, "channel").noise

    return best_of(amax_bits(w, "channel"), noise_of)


def best_of(amax: torch.Tensor, noise_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the candidates of amaxes with the least noise, as bits of the same shape.

    Args:
        amax: int32 bits of float32, ``[N, 1]``.
        noise_of: returns the noise of every row, float64 ``[N]``, from candidates as ``amax``.
    """
    best, least = amax, noise_of(amax)
    for factor in CANDIDATES[1:]:
        larger = amax.view(torch.float32) * factor
        noise = noise_of(larger.view(torch.int32))
        better = (noise < least) & larger[:, 0].isfinite()
        best = torch.where(better[:, None], larger.view(torch.int32), best)
        least = torch.where(better, noise, least)
    return best


def scale_from_amax(
    amax: torch.Tensor,
    numerics: Numerics = "float32",
    dtype: torch.dtype = torch.float32,
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the multipliers and the stored scales of amaxes.

    Args:
        amax: float32, or the int32 bits of float32, of any shape (``[]`` for ``original``).
        numerics: ``float32`` or ``original``.
        dtype: dtype of the weight, in which ``original`` computes.
        rounding: rounding of the scales: ``none``, ``power-of-two`` or ``mx``.

    Returns:
        ``mult`` (float32; for ``original`` in ``dtype``) and ``scale`` (float32), of ``amax``'s shape. A weight
        is about ``q * scale``.

    Raises:
        UnsupportedDtypeError: ``amax`` is neither float32 nor int32, or ``original`` does not support ``dtype``.
        ShapeError: ``original`` with an ``amax`` of another shape than ``[]``.
        NumericsError: the numerics are unknown.
        RoundingError: the rounding is unknown, or not ``none`` with ``original``.
        MultiplierOverflowError: ``original`` in fp16 with an amax up to 0.0068398.
    """
    check_numerics(numerics, "tensor")
    check_rounding(rounding, numerics)
    values = amax_values(amax)
    if numerics == "float32":
        # Both operands are tensors on one device: torch computes number / tensor as reciprocal * number, which
        # differs from IEEE division for 17% of all bf16 amaxes.
        mult = torch.full_like(values, E4M3_MAX) / values.clamp(min=AMAX_FLOOR)
        if rounding != "none":
            mult = torch.where(values < math.inf, _power_of_two(values, rounding), mult)
        scale = torch.ones_like(mult) / mult
    else:
        if dtype not in INPUT_DTYPES:
            raise UnsupportedDtypeError("w", dtype, INPUT_DTYPES)
        if values.ndim:
            raise ShapeError("amax", values.shape, "numerics 'original' needs one amax of shape []")
        mult = E4M3_MAX / values.to(dtype).clamp(min=AMAX_FLOOR)
        if dtype == torch.float16 and bool(mult.isinf()):
            raise MultiplierOverflowError(float(values))
        scale = mult.float().reciprocal()
    return mult, canonical_nan(scale)


def _power_of_two(amax: torch.Tensor, rounding: ScaleRounding) -> torch.Tensor:
    """Return the multipliers ``2^-e`` of finite amaxes."""
    bits = amax.contiguous().view(torch.int32).clamp(min=0)
    exponent = (bits >> 23) - 127 - 8 + (bits & 0x7F_FFFF > SCALE_1_MANTISSA).int()
    exponent = exponent.clamp(min=LEAST_EXPONENTS[rounding])
    if rounding == "mx":
        exponent = torch.where(bits == 0, 0, exponent)
    return ((127 - exponent) << 23).to(torch.int32).view(torch.float32)


def quantize(
    w: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize in two steps: amaxes of the whole tensor, then `quantize_with_amax`."""
    check_numerics(numerics, granularity)
    check_rounding(rounding, numerics)
    return quantize_with_amax(w, amax_bits(w, granularity, block), granularity, block, numerics, rounding)


def quantize_with_amax(
    w: torch.Tensor,
    amax: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize by the formula of the module; ``q`` is always a new tensor."""
    check_input(w)
    check_numerics(numerics, granularity)
    check_amax(amax, w, scale_shape(w.shape, granularity, block))
    mult, scale = scale_from_amax(amax, numerics, w.dtype, rounding)
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
    out: Sequence[torch.Tensor] | None = None,
    rounding: ScaleRounding = "none",
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Quantize several tensors in turn, with one amax per group of ``shared``; the devices may differ."""
    from .outputs import check_outputs  # that module imports this one

    check_many(tensors, granularity, block, numerics, shared, rounding)
    groups = partition(len(tensors), shared)
    check_outputs(tensors, out)
    if granularity != "tensor":
        found = [quantize(w, granularity, block, numerics, rounding) for w in tensors]
    else:
        bits = torch.empty(len(tensors), dtype=torch.int32)
        for group in groups:
            bits[group] = group_amax_bits([amax_bits(tensors[index]) for index in group], group, tensors)
        found = [
            quantize_with_amax(w, amax.to(w.device), numerics=numerics, rounding=rounding)
            for w, amax in zip(tensors, bits, strict=True)
        ]
    if out is None:
        return found
    return [(target.copy_(q), scale) for target, (q, scale) in zip(out, found, strict=True)]


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Dequantize: multiply in float32, then round to ``dtype``."""
    check_dequantize(q, scale, granularity, block, dtype)
    return (q.to(torch.float32) * expand(scale, q.shape, granularity, block)).to(dtype).contiguous()


def expand(values: torch.Tensor, shape: torch.Size, granularity: Granularity, block: tuple[int, int]) -> torch.Tensor:
    """Return ``values``, one per scale, as a tensor that broadcasts against a weight of ``shape``."""
    if granularity != "block":
        return values
    rows, columns = fitted(block, shape)
    by_row = values.repeat_interleave(rows, dim=0)[: shape[0]]
    return by_row.repeat_interleave(columns, dim=1)[:, : shape[1]]


def canonical_nan(values: torch.Tensor) -> torch.Tensor:
    """Replace every NaN of float32 ``values`` by ``0x7FC00000``: its sign and payload depend on the machine."""
    bits = values.contiguous().view(torch.int32)
    return torch.where(values.isnan(), NAN_BITS, bits).to(torch.int32).view(torch.float32)


def group_amax_bits(
    bits: Sequence[torch.Tensor], group: Sequence[int], tensors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the largest amax bits of a group; ignore members without elements, unless all are empty."""
    filled = [value for value, index in zip(bits, group, strict=True) if tensors[index].numel()]
    return torch.stack([value.cpu() for value in filled or bits]).max()


def check_many(
    tensors: Sequence[torch.Tensor],
    granularity: Granularity,
    block: tuple[int, int],
    numerics: Numerics,
    shared: Sequence[Sequence[int]] | None,
    rounding: ScaleRounding = "none",
) -> None:
    """Reject arguments that `quantize` rejects, and shared scales that the options do not support."""
    check_granularity(granularity, block)
    check_numerics(numerics, granularity)
    check_rounding(rounding, numerics)
    for w in tensors:
        check_input(w)
        if w.device != tensors[0].device:
            raise DeviceError("tensors", w.device, tensors[0].device)
        if granularity != "tensor":
            scale_shape(w.shape, granularity, block)  # rejects shapes
    if shared is not None and granularity != "tensor":
        raise GranularityError(granularity, "tensors can share scales at granularity 'tensor' only")
    if shared is not None and numerics == "original":
        raise GranularityError(
            granularity, "numerics 'original' does not support shared scales; use numerics 'float32'"
        )


def amax_values(amax: torch.Tensor) -> torch.Tensor:
    """Return amaxes as float32, from float32 or its int32 bits."""
    if amax.dtype == torch.int32:
        return amax.view(torch.float32)
    if amax.dtype != torch.float32:
        raise UnsupportedDtypeError("amax", amax.dtype, (torch.float32, torch.int32))
    return amax


def check_input(w: torch.Tensor) -> None:
    """Reject weights of a dtype that is not in `INPUT_DTYPES`."""
    if w.dtype not in INPUT_DTYPES:
        raise UnsupportedDtypeError("w", w.dtype, INPUT_DTYPES)


def check_amax(amax: torch.Tensor, w: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Reject amaxes of the wrong dtype, of another shape than the scales, or on another device than ``w``."""
    amax_values(amax)
    if tuple(amax.shape) != shape:
        raise ShapeError("amax", amax.shape, f"this granularity needs {list(shape)}")
    if amax.device != w.device:
        raise DeviceError("amax", amax.device, w.device)


def check_out(out: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return ``out``; reject another dtype than float8_e4m3fn, and a shape or device other than those of ``w``."""
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
    """Reject dtypes that `dequantize` does not support, and scales of the wrong shape or on another device."""
    if q.dtype != torch.float8_e4m3fn:
        raise UnsupportedDtypeError("q", q.dtype, (torch.float8_e4m3fn,))
    if scale.dtype != torch.float32:
        raise UnsupportedDtypeError("scale", scale.dtype, (torch.float32,))
    if dtype not in INPUT_DTYPES:
        raise UnsupportedDtypeError("dtype", dtype, INPUT_DTYPES)
    shape = scale_shape(q.shape, granularity, block)
    if tuple(scale.shape) != shape:
        raise ShapeError("scale", scale.shape, f"this granularity needs {list(shape)}")
    if scale.device != q.device:
        raise DeviceError("scale", scale.device, q.device)
