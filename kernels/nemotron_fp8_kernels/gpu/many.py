"""Several tensors at once: the grouped kernel where it applies, the single-tensor kernels for the rest."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..cpu import check_layout
from ..errors import DeviceError
from ..formats import DEFAULT_BLOCK, EMPTY_AMAX, Granularity, Numerics
from ..grouping import order, partition
from ..reference import check_many, scale_from_amax
from . import configs, ops
from .grouped import grouped_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

ALIGNMENT = 16
"""Bytes: the grouped kernel loads and stores whole 16-byte vectors."""


def quantize_many(
    tensors: Sequence[torch.Tensor],
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    shared: Sequence[Sequence[int]] | None = None,
    two_launches: bool | None = None,
    config: configs.Config = configs.GROUPED,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As :func:`nemotron_fp8_kernels.reference.quantize_many`.

    At granularity ``tensor`` all dense, 16-byte-aligned tensors of a dtype go through one launch; groups
    with any other tensor, and the other granularities, through the single-tensor kernels.

    Args:
        two_launches: all amaxes in a first launch and all casts in a second, for a device that cannot run
            them together; None chooses so in the interpreter only. The bytes are the same.
        config: tile and warps of the grouped kernel.

    Raises:
        As the reference; LayoutError and DeviceNotSupportedError as :func:`.ops.amax_bits`; DeviceError for
        tensors on different devices.
    """
    check_many(tensors, granularity, numerics, shared)
    for w in tensors:
        check_layout(w)
        if w.device != tensors[0].device:
            raise DeviceError("tensors", w.device, tensors[0].device)
    if granularity != "tensor" or numerics == "original":
        return [ops.quantize(w, granularity, block, numerics) for w in tensors]
    if two_launches is None:
        two_launches = ops.INTERPRETED
    codes = [torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device) for w in tensors]
    groups = partition(len(tensors), shared)
    # A member without elements adds nothing to its group's amax and has nothing to cast.
    filled = [[index for index in group if tensors[index].numel()] for group in groups]
    scales: list[torch.Tensor | None] = [None] * len(groups)
    together: dict[torch.dtype, list[int]] = defaultdict(list)
    for number, members in enumerate(filled):
        if not members:
            empty = torch.full((), EMPTY_AMAX, device=tensors[groups[number][0]].device)
            scales[number] = scale_from_amax(empty)[1]
        elif all(_fits(tensors[index], tensors[members[0]].dtype) for index in members):
            together[tensors[members[0]].dtype].append(number)
        else:
            scales[number] = _one_by_one([tensors[i] for i in members], [codes[i] for i in members])
    for dtype, numbers in together.items():
        launched = _launch(tensors, codes, dtype, [filled[n] for n in numbers], two_launches, config)
        for number, value in zip(numbers, launched, strict=True):
            scales[number] = value
    found: dict[int, torch.Tensor] = {}
    for group, scale in zip(groups, scales, strict=True):
        assert scale is not None
        found |= dict.fromkeys(group, scale)
    return [(q, found[index]) for index, q in enumerate(codes)]


def _fits(w: torch.Tensor, dtype: torch.dtype) -> bool:
    return w.dtype == dtype and w.is_contiguous() and w.data_ptr() % ALIGNMENT == 0


def _one_by_one(tensors: Sequence[torch.Tensor], codes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cast the members of one group by the single-tensor kernels; returns their scale."""
    bits = torch.stack([ops.amax_bits(w) for w in tensors]).max()
    for w, q in zip(tensors, codes, strict=True):
        scale = ops.quantize_with_amax(w, bits, out=q)[1]
    return scale


def _launch(
    tensors: Sequence[torch.Tensor],
    codes: Sequence[torch.Tensor],
    dtype: torch.dtype,
    groups: Sequence[Sequence[int]],
    two_launches: bool,
    config: configs.Config,
) -> list[torch.Tensor]:
    """Run the grouped kernel over dense tensors of one dtype; returns each group's scale."""
    members = [index for group in groups for index in group]
    places = {index: place for place, index in enumerate(members)}
    sizes = tuple(tensors[index].numel() for index in members)
    device = tensors[members[0]].device
    work, is_cast, amax_tiles = _order(
        sizes,
        tuple(tuple(places[index] for index in group) for group in groups),
        dtype.itemsize,
        config.tile,
        device,
    )
    table = [
        (
            tensors[index].data_ptr(),
            codes[index].data_ptr(),
            tensors[index].numel(),
            number,
            amax_tiles[number],
        )
        for number, group in enumerate(groups)
        for index in group
    ]
    table_tensor = torch.tensor(table, dtype=torch.int64).to(device)
    # Ticket, arrivals and amaxes in one buffer, so that one memset clears them.
    state = torch.zeros(1 + 2 * len(groups), dtype=torch.int32, device=device)
    scales = torch.empty(len(groups), dtype=torch.float32, device=device)
    arrived, amax = state[1 : 1 + len(groups)], state[1 + len(groups) :]
    with ops.on_device(tensors[members[0]]):
        for part in (work[~is_cast], work[is_cast]) if two_launches else (work,):
            state[0].zero_()
            grouped_kernel[(len(part),)](
                table_tensor,
                part,
                state,
                arrived,
                amax,
                scales,
                DTYPE=TRITON_DTYPES[dtype],
                TILE=config.tile,
                num_warps=config.warps,
            )
    return list(scales.unbind())


@lru_cache(maxsize=64)
def _order(
    sizes: tuple[int, ...],
    groups: tuple[tuple[int, ...], ...],
    itemsize: int,
    tile: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tickets on the device, kept for the next list of the same sizes (a model's layers repeat)."""
    tiles = [triton.cdiv(size, tile) for size in sizes]
    found = order(tiles, groups, configs.LEAD // tile, configs.L2_BYTES // (tile * itemsize))
    return found.work.to(device), found.is_cast.to(device), found.amax_tiles
