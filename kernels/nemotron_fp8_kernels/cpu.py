"""CPU path: the compiled kernels where they can run, else torch; both return the bytes of the reference.

All functions are thread-safe. Compiled kernels and torch release the interpreter lock. Callers with their own threads
set ``torch.set_num_threads(1)``. docs/kernels.md reports the speed of both.

`nemotron_fp8_kernels.ops` documents arguments, results and errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import native, torch_cpu
from .error_sums import AT_A_TIME, ErrorSums, error_sums
from .errors import LayoutError
from .formats import (
    DEFAULT_BLOCK,
    EMPTY_AMAX,
    Granularity,
    Numerics,
    ScaleRounding,
    check_numerics,
    check_rounding,
    fitted,
    scale_shape,
)
from .grouping import partition
from .outputs import check_outputs
from .reference import (
    amax_values,
    best_of,
    check_amax,
    check_dequantize,
    check_input,
    check_many,
    check_out,
    group_amax_bits,
    scale_from_amax,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def amax_bits(
    w: torch.Tensor, granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK
) -> torch.Tensor:
    """Return amax bits without a float32 copy of ``w``."""
    check_input(w)
    check_layout(w)
    shape = scale_shape(w.shape, granularity, block)
    if w.numel() == 0:
        return torch.full(shape, EMPTY_AMAX).view(torch.int32)
    kernels = native.load()
    if kernels is None:
        return torch_cpu.amax_bits(w, granularity, block)
    found = torch.zeros(shape, dtype=torch.int32)
    rows = _matrix(w)
    kernels.amax(rows, _grid(rows, granularity, block), found)
    return found


def best_amax_bits(w: torch.Tensor) -> torch.Tensor:
    """Return the bits of `reference.best_amax_bits`; the candidates of a row are cast while it is in the cache.

    Raises:
        UnsupportedDtypeError, ShapeError: ``w`` is no matrix of a supported dtype.
        LayoutError: its rows are not dense.
    """
    check_input(w)
    check_layout(w)
    found, kernels = torch.empty(scale_shape(w.shape, "channel"), dtype=torch.int32), native.load()
    if not w.numel():
        return amax_bits(w, "channel")
    if kernels is not None:
        kernels.best_amax(w, found)
        return found
    height = max(1, AT_A_TIME // w.shape[1])
    for start in range(0, len(w), height):
        part = w[start : start + height]

        def noise_of(bits: torch.Tensor, part: torch.Tensor = part) -> torch.Tensor:
            return cast_and_measure(part, bits, "channel")[1].noise

        found[start : start + height] = best_of(amax_bits(part, "channel"), noise_of)
    return found


def quantize(
    w: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize: in one step with the compiled kernels, else amaxes of the whole tensor, then `quantize_with_amax`."""
    check_numerics(numerics, granularity)
    check_rounding(rounding, numerics)
    if numerics == "float32":
        q, bits, _ = quantize_finding_amax(w, granularity, block, rounding=rounding)
        return q, scale_from_amax(bits, rounding=rounding)[1]
    return quantize_with_amax(w, amax_bits(w, granularity, block), granularity, block, numerics)


def quantize_with_amax(
    w: torch.Tensor,
    amax: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    out: torch.Tensor | None = None,
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with known amaxes."""
    q = cast(w, amax, granularity, block, numerics, out, rounding)
    return q, scale_from_amax(amax, numerics, w.dtype, rounding)[1]


def scales(amax: torch.Tensor, rounding: ScaleRounding = "none") -> torch.Tensor:
    """Return the scales of amaxes as `scale_from_amax` does in float32, where there are many of them."""
    kernels = native.load()
    if kernels is None:
        return scale_from_amax(amax, rounding=rounding)[1]
    check_rounding(rounding, "float32")
    bits = _bits(amax_values(amax))
    found = torch.empty(bits.shape, dtype=torch.float32)
    kernels.scales(bits, found, rounding)
    return found


def cast(
    w: torch.Tensor,
    amax: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    out: torch.Tensor | None = None,
    rounding: ScaleRounding = "none",
) -> torch.Tensor:
    """Quantize with known amaxes as `quantize_with_amax` does, and return the codes only."""
    _check_cast(w, amax, granularity, block, numerics, rounding)
    q, kernels = output(w, out), native.load()
    if kernels is None or numerics != "float32":
        mult = scale_from_amax(amax, numerics, w.dtype, rounding)[0]
        look_up = torch_cpu.look_up if kernels is None else kernels.look_up
        torch_cpu.cast(w, q, mult, granularity, block, numerics, look_up)
    elif w.numel():
        rows = _matrix(w)
        kernels.cast(rows, _grid(rows, granularity, block), rounding, _bits(amax), q.view(rows.shape))
    return q


def cast_and_measure(
    w: torch.Tensor,
    amax: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    out: torch.Tensor | None = None,
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, ErrorSums]:
    """Quantize as `cast` does, and return the error sums of the rows, too; a tensor that is no matrix is one row."""
    kernels = native.load()
    if kernels is None or numerics != "float32" or not w.numel():
        q = cast(w, amax, granularity, block, numerics, out, rounding)
        mult, scale = scale_from_amax(amax, numerics, w.dtype, rounding)
        return q, error_sums(_matrix(w), _matrix(q), mult, scale, granularity, block)
    _check_cast(w, amax, granularity, block, numerics, rounding)
    rows = _matrix(w)
    q, sums = output(w, out), native.RowSums(rows.shape[0])
    kernels.measure(rows, _grid(rows, granularity, block), rounding, _bits(amax), q.view(rows.shape), sums)
    return q, sums.error_sums()


def quantize_finding_amax(
    w: torch.Tensor,
    granularity: Granularity = "channel",
    block: tuple[int, int] = DEFAULT_BLOCK,
    out: torch.Tensor | None = None,
    measure: bool = False,
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor, ErrorSums | None]:
    """Quantize as `quantize` does in float32, and return codes and amax bits.

    If scales belong to rows, ``w`` is read once from memory. With ``measure``, the error sums are returned as by
    `cast_and_measure`.
    """
    check_rounding(rounding)
    check_input(w)
    check_layout(w)
    shape = scale_shape(w.shape, granularity, block)
    kernels = native.load()
    if kernels is None or not w.numel():
        bits = amax_bits(w, granularity, block)
        if measure:
            q, errors = cast_and_measure(w, bits, granularity, block, out=out, rounding=rounding)
            return q, bits, errors
        return cast(w, bits, granularity, block, out=out, rounding=rounding), bits, None
    q, bits = output(w, out), torch.zeros(shape, dtype=torch.int32)
    rows = _matrix(w)
    sums = native.RowSums(rows.shape[0]) if measure else None
    kernels.quantize(rows, _grid(rows, granularity, block), rounding, bits, q.view(rows.shape), sums)
    return q, bits, None if sums is None else sums.error_sums()


def quantize_many(
    tensors: Sequence[torch.Tensor],
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    shared: Sequence[Sequence[int]] | None = None,
    out: Sequence[torch.Tensor] | None = None,
    rounding: ScaleRounding = "none",
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Quantize several tensors in turn, with one amax per group of ``shared``."""
    check_many(tensors, granularity, block, numerics, shared, rounding)
    groups = partition(len(tensors), shared)
    for w in tensors:
        check_layout(w)
    check_outputs(tensors, out)
    outs: Sequence[torch.Tensor | None] = [None] * len(tensors) if out is None else out
    if granularity != "tensor":
        amaxes = (amax_bits(w, granularity, block) for w in tensors)
        return [
            quantize_with_amax(w, amax, granularity, block, numerics, q, rounding)
            for w, amax, q in zip(tensors, amaxes, outs, strict=True)
        ]
    bits = torch.empty(len(tensors), dtype=torch.int32)
    for group in groups:
        bits[group] = group_amax_bits([amax_bits(tensors[index]) for index in group], group, tensors)
    return [
        quantize_with_amax(w, amax, numerics=numerics, out=q, rounding=rounding)
        for w, amax, q in zip(tensors, bits, outs, strict=True)
    ]


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Dequantize a tensor."""
    check_dequantize(q, scale, granularity, block, dtype)
    check_layout(q, "q")
    w = torch.empty(q.shape, dtype=dtype)
    kernels = native.load()
    if kernels is None:
        torch_cpu.dequantize(q, scale, w, granularity, block)
    elif w.numel():
        rows = _matrix(q)
        kernels.decode(rows, _grid(rows, granularity, block), scale.contiguous(), w.view(rows.shape))
    return w


def check_layout(tensor: torch.Tensor, argument: str = "w") -> None:
    """Reject tensors that are neither dense in row-major order nor 2-D with dense rows.

    Raises:
        LayoutError: the strides are not supported.
    """
    if tensor.is_contiguous() or (tensor.ndim == 2 and tensor.stride(1) == 1):
        return
    raise LayoutError(argument, tensor.shape, tensor.stride())


def output(w: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Return the tensor for the codes of ``w``: ``out`` if it fits, else a new one.

    Raises:
        UnsupportedDtypeError, ShapeError, DeviceError: ``out`` does not fit ``w``.
        LayoutError: the strides of ``out`` are not supported.
    """
    q = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device) if out is None else check_out(out, w)
    check_layout(q, "out")
    return q


def _check_cast(
    w: torch.Tensor,
    amax: torch.Tensor,
    granularity: Granularity,
    block: tuple[int, int],
    numerics: Numerics,
    rounding: ScaleRounding,
) -> None:
    """Check the arguments of a cast."""
    check_input(w)
    check_layout(w)
    check_numerics(numerics, granularity)
    check_rounding(rounding, numerics)
    check_amax(amax, w, scale_shape(w.shape, granularity, block))


def _bits(amax: torch.Tensor) -> torch.Tensor:
    """Return amaxes as contiguous int32 bits of float32."""
    return amax.contiguous().view(torch.int32)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a matrix with dense rows: itself, or one row if it is not 2-D."""
    return tensor if tensor.ndim == 2 else tensor.view(1, -1)


def _grid(rows: torch.Tensor, granularity: Granularity, block: tuple[int, int]) -> tuple[int, int, int]:
    """Return rows and columns under a scale of a matrix, and scales in a row."""
    height, width = rows.shape
    if granularity == "tensor":
        return height, width, 1
    if granularity == "channel":
        return 1, width, 1
    return (*fitted(block, rows.shape), -(-width // block[1]))  # C has 64 bits for a side
