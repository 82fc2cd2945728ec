"""Operations on CUDA tensors: checks, allocations and launches.

`nemotron_fp8_kernels.ops` documents arguments, results and errors.
"""

from __future__ import annotations

from contextlib import nullcontext
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

from .. import reference
from ..cpu import check_layout, output
from ..errors import DeviceNotSupportedError
from ..formats import (
    DEFAULT_BLOCK,
    EMPTY_AMAX,
    Granularity,
    Numerics,
    ScaleRounding,
    check_numerics,
    check_rounding,
    scale_shape,
)
from ..reference import check_amax, check_dequantize, check_input
from . import configs
from .amax import amax_kernel
from .blocks import blocks_kernel
from .cast import cast_kernel
from .common import VECTOR
from .dequant import dequant_kernel, dequant_rows_kernel
from .groups import groups_kernel
from .rows import rows_kernel

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

INTERPRETED = not isinstance(cast_kernel, triton.JITFunction)
"""True if TRITON_INTERPRET was set when the kernels were defined; they then run on CPU tensors."""


def amax_bits(
    w: torch.Tensor, granularity: Granularity = "tensor", block: tuple[int, int] = DEFAULT_BLOCK
) -> torch.Tensor:
    """Return amax bits from one launch, and for one amax of strided rows from a maximum over blocks."""
    check_input(w)
    check_layout(w)
    shape = scale_shape(w.shape, granularity, block)
    if w.numel() == 0:
        return torch.full(shape, EMPTY_AMAX, device=w.device).view(torch.int32)
    with on_device(w):
        if granularity == "tensor" and w.is_contiguous():
            found = torch.zeros((), dtype=torch.int32, device=w.device)
            launch_amax(w, found, pdl=False)
            return found
        if granularity == "channel":
            found = torch.empty(shape, dtype=torch.int32, device=w.device)
            _launch_rows(w, None, found, None, given=False)
            return found
        spans = DEFAULT_BLOCK if granularity == "tensor" else block
        found = torch.empty(scale_shape(w.shape, "block", spans), dtype=torch.int32, device=w.device)
        _launch_blocks(w, None, found, None, spans, given=False)
        # NaN has the largest bits of all, so the maximum over blocks keeps it.
        return found.max() if granularity == "tensor" else found


def quantize(
    w: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    out: torch.Tensor | None = None,
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize: ``channel`` and ``block`` in one launch that reads ``w`` once, ``tensor`` in two.

    Args:
        out: as for `quantize_with_amax`; the public operation has no such argument.
    """
    check_numerics(numerics, granularity)
    check_rounding(rounding, numerics)
    if granularity != "tensor":
        return _quantize(w, None, granularity, block, numerics, out, rounding)
    check_input(w)
    check_layout(w)
    strided = not w.is_contiguous() or (out is not None and not out.is_contiguous())
    if numerics == "original" or w.numel() == 0 or strided:
        return _quantize(w, amax_bits(w), granularity, block, numerics, out, rounding)
    q = output(w, out)
    scale = torch.empty((), dtype=torch.float32, device=w.device)
    bits = torch.zeros((), dtype=torch.int32, device=w.device)
    with on_device(w):
        pdl = not INTERPRETED
        launch_amax(w, bits, pdl)
        launch_cast(w, q, bits, scale, original=False, pdl=pdl, rounding=rounding)
    return q, scale


def quantize_with_amax(
    w: torch.Tensor,
    amax: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    out: torch.Tensor | None = None,
    rounding: ScaleRounding = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with known amaxes in one launch."""
    check_numerics(numerics, granularity)
    check_rounding(rounding, numerics)
    check_amax(amax, w, scale_shape(w.shape, granularity, block))
    return _quantize(w, amax.contiguous(), granularity, block, numerics, out, rounding)


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Dequantize in one launch."""
    check_dequantize(q, scale, granularity, block, dtype)
    check_layout(q, "q")
    w = torch.empty(q.shape, dtype=dtype, device=q.device)
    if q.numel() == 0:
        return w
    scale = scale.contiguous()
    config = configs.DEQUANT
    with on_device(q):
        width = gcd(q.data_ptr(), VECTOR)
        if granularity == "tensor" and q.is_contiguous():
            grid = (triton.cdiv(q.numel(), config.tile),)
            edges = not _whole(q.data_ptr(), q.numel())
            dequant_kernel[grid](
                q, scale, w, q.numel(), TILE=config.tile, EDGES=edges, WIDTH=width, num_warps=config.warps
            )
            return w
        rows, columns = q.shape
        high, wide = 32, config.tile // 32
        across = triton.cdiv(columns, wide)
        sides = _sides(block, q.shape) if granularity == "block" else (1, 1)
        edges = not _whole(q.data_ptr(), columns, q.stride(0))
        # Scales of `tensor` and `channel` are those of blocks of 1 x 1; a step of 0 repeats a scale.
        down = {"tensor": 0, "channel": 1}.get(granularity, scale.shape[-1] if scale.ndim else 0)
        dequant_rows_kernel[(triton.cdiv(rows, high) * across,)](
            q,
            scale,
            w,
            rows,
            columns,
            q.stride(0),
            across,
            down,
            int(granularity == "block"),
            B0=sides[0],
            B1=sides[1],
            T0=high,
            T1=wide,
            LONG=columns > 1 << 30,
            # Rows of whole tiles of blocks have one scale, unless vectors begin at another place in each row.
            ROW_SCALE=granularity != "block" or (sides[1] % wide == 0 and not edges),
            EDGES=edges,
            WIDTH=gcd(width, q.stride(0) - columns),
            num_warps=config.warps,
        )
    return w


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the tensor's device is current.

    Raises:
        DeviceNotSupportedError: the device is older than Hopper.
    """
    if not tensor.is_cuda:
        return nullcontext()
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < (9, 0):
        raise DeviceNotSupportedError(capability)
    return torch.cuda.device(tensor.device)


class _Vectors(NamedTuple):
    """Division of rows into vectors, as common.py explains: arguments ``phase``, EDGES and WIDTH of the kernels."""

    edges: bool
    phase: int
    width: int


def _whole(*numbers: int) -> bool:
    """Return True if all addresses, sizes and strides are multiples of 16.

    The compiler then knows it from the arguments, so that a kernel needs no edges.
    """
    return all(number % 16 == 0 for number in numbers)


def _vectors(w: torch.Tensor, q: torch.Tensor | None, *sizes: int, w_stride: int = 0, q_stride: int = 0) -> _Vectors:
    """Divide rows of weights and codes into vectors.

    Args:
        w: weights.
        q: codes; None if the kernel stores none.
        sizes: numbers of adjacent elements, which must be multiples of 16 if there are to be no edges.
        w_stride: elements between the rows of the weights.
        q_stride: elements between the rows of the codes.
    """
    itemsize = w.element_size()
    q_address = 0 if q is None else q.data_ptr()
    if _whole(w.data_ptr(), q_address, w_stride, q_stride, *sizes):
        return _Vectors(False, 0, VECTOR)
    step = 16 // itemsize
    phase = w.data_ptr() // itemsize % step
    if q is None:
        return _Vectors(True, phase, VECTOR)
    # Two loads of float32 weights per vector: either may be the first.
    widths = {first: gcd(VECTOR, q_address - first, q_stride - w_stride) for first in range(phase, VECTOR, step)}
    best = max(widths, key=lambda first: widths[first])
    return _Vectors(True, best, widths[best])


def _sides(block: tuple[int, int], shape: torch.Size) -> tuple[int, int]:
    """Return the sides of a block as the kernels accept them: a side of more than 31 bits covers the tensor anyway."""
    high, wide = (
        side if side < 1 << 31 else triton.next_power_of_2(size) for side, size in zip(block, shape, strict=True)
    )
    return high, wide


def launch_amax(w: torch.Tensor, bits: torch.Tensor, pdl: bool, config: configs.Config | None = None) -> None:
    """Raise ``bits`` to the amax of a dense ``w``; they are int32, zero or the amax of an earlier part."""
    count = w.numel()
    config = config or configs.sized(configs.AMAX, count)
    vectors = _vectors(w, None, count)
    least, most = configs.KEPT_BYTES
    amax_kernel[(triton.cdiv(count, config.tile * config.tiles),)](
        w,
        bits,
        count,
        vectors.phase,
        TILE=config.tile,
        TILES=config.tiles,
        POLICY="evict_last" if least <= count * w.element_size() <= most else "evict_first",
        PDL=pdl,
        EDGES=vectors.edges,
        num_warps=config.warps,
    )


def launch_cast(
    w: torch.Tensor,
    q: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    original: bool,
    pdl: bool,
    config: configs.Config | None = None,
    rounding: ScaleRounding = "none",
) -> None:
    """Cast a dense ``w`` by ``factor``: int32 amax bits, or with ``original`` the float32 multiplier."""
    config = config or configs.sized(configs.CAST, w.numel())
    vectors = _vectors(w, q, w.numel())
    # With programmatic dependent launch, programs of the cast start while the last ones of the amax kernel finish.
    launch = {"launch_pdl": True} if pdl else {}
    cast_kernel[(triton.cdiv(w.numel(), config.tile),)](
        w,
        q,
        factor,
        scale,
        w.numel(),
        vectors.phase,
        TILE=config.tile,
        ORIGINAL=original,
        REVERSE=True,
        PDL=pdl,
        EDGES=vectors.edges,
        WIDTH=vectors.width,
        ROUNDING=rounding,
        num_warps=config.warps,
        **launch,
    )


def _quantize(
    w: torch.Tensor,
    amax: torch.Tensor | None,
    granularity: Granularity,
    block: tuple[int, int],
    numerics: Numerics,
    out: torch.Tensor | None,
    rounding: ScaleRounding,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize in one launch: with known amaxes, or at granularity ``channel`` and ``block`` also without."""
    check_input(w)
    check_layout(w)
    q = output(w, out)
    shape = scale_shape(w.shape, granularity, block)
    if w.numel() == 0:
        bits = amax if amax is not None else amax_bits(w, granularity, block)
        return q, reference.scale_from_amax(bits, numerics, w.dtype, rounding)[1]
    scale = torch.empty(shape, dtype=torch.float32, device=w.device)
    factor = amax.view(torch.int32) if amax is not None else None
    original = numerics == "original"
    if original and amax is not None:
        # One value: torch evaluates the formula as in the original script.
        mult, original_scale = reference.scale_from_amax(amax, numerics, w.dtype)
        factor = mult.float()
    with on_device(w):
        if granularity == "channel":
            _launch_rows(w, q, factor, scale, factor is not None, rounding)
        elif granularity == "block":
            _launch_blocks(w, q, factor, scale, block, factor is not None, rounding)
        elif w.is_contiguous() and q.is_contiguous():
            assert factor is not None
            launch_cast(w, q, factor, scale, original, pdl=False, rounding=rounding)
        else:
            _launch_blocks(w, q, factor, scale, DEFAULT_BLOCK, True, rounding, one=True, original=original)
    return q, original_scale if original else scale


def _launch_rows(
    w: torch.Tensor,
    q: torch.Tensor | None,
    bits: torch.Tensor | None,
    scale: torch.Tensor | None,
    given: bool,
    rounding: ScaleRounding = "none",
) -> None:
    rows, columns = w.shape
    plan = configs.rows_plan(columns, w.element_size())
    q_stride = q.stride(0) if q is not None else 0
    vectors = _vectors(w, q, columns, w_stride=w.stride(0), q_stride=q_stride)
    rows_kernel[(triton.cdiv(rows, plan.height),)](
        w,
        q,
        bits,
        scale,
        rows,
        columns,
        w.stride(0),
        q_stride,
        vectors.phase,
        ROWS=plan.height,
        TILE=plan.tile,
        PIECES=plan.pieces,
        HELD=plan.held,
        GIVEN=given,
        CAST=q is not None,
        EDGES=vectors.edges,
        WIDTH=vectors.width,
        ROUNDING=rounding,
        num_warps=plan.warps,
    )


def _launch_blocks(
    w: torch.Tensor,
    q: torch.Tensor | None,
    bits: torch.Tensor | None,
    scale: torch.Tensor | None,
    block: tuple[int, int],
    given: bool,
    rounding: ScaleRounding = "none",
    one: bool = False,
    original: bool = False,
) -> None:
    """Launch one program per block, or per many short groups; with ``one``, all blocks share one amax and scale."""
    rows, columns = w.shape
    if not one and _are_groups(w, q, block):
        _launch_groups(w, q, bits, scale, block[1], given, rounding)
        return
    down, across = scale_shape(w.shape, "block", block)
    block = _sides(block, w.shape)
    q_stride = q.stride(0) if q is not None else 0
    adjacent = columns if across == 1 else gcd(columns, block[1])
    vectors = _vectors(w, q, adjacent, w_stride=w.stride(0), q_stride=q_stride)
    height, width, warps = configs.block_tile(block, w.element_size(), vectors.edges)
    if block != (height, width):
        # Tiles of such a block are masked in any case.
        vectors = vectors._replace(edges=True)
    blocks_kernel[(down * across,)](
        w,
        q,
        bits,
        scale,
        rows,
        columns,
        w.stride(0),
        q_stride,
        across,
        0 if one else across,
        0 if one else 1,
        vectors.phase,
        B0=block[0],
        B1=block[1],
        T0=height,
        T1=width,
        GIVEN=given,
        CAST=q is not None,
        ORIGINAL=original,
        EDGES=vectors.edges,
        WIDTH=vectors.width,
        ROUNDING=rounding,
        num_warps=warps,
    )


def _are_groups(w: torch.Tensor, q: torch.Tensor | None, block: tuple[int, int]) -> bool:
    """Return True if the blocks of a tensor are groups of adjacent elements that `groups_kernel` can process."""
    least, most = configs.GROUP_SIDES
    if block[0] != 1 or not least <= block[1] <= most or block[1] & (block[1] - 1) or w.shape[1] % block[1]:
        return False
    return all(tensor.is_contiguous() and _whole(tensor.data_ptr()) for tensor in (w, q) if tensor is not None)


def _launch_groups(
    w: torch.Tensor,
    q: torch.Tensor | None,
    bits: torch.Tensor | None,
    scale: torch.Tensor | None,
    group: int,
    given: bool,
    rounding: ScaleRounding,
) -> None:
    tile, warps = configs.groups_tile(w.numel(), w.element_size())
    groups_kernel[(triton.cdiv(w.numel(), tile),)](
        w,
        q,
        bits,
        scale,
        w.numel() // group,
        GROUPS=tile // group,
        GROUP=group,
        GIVEN=given,
        CAST=q is not None,
        ROUNDING=rounding,
        num_warps=warps,
    )
