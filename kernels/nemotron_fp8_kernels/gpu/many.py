"""Lists of tensors: the grouped kernel where it applies, the single-tensor kernels for all others."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
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
"""Alignment of tensors for the grouped kernel in bytes: it loads and stores whole 16-byte vectors."""

TICKET_WORDS = 64
"""Words reserved for the ticket counter, so that its cache line holds no amax that programs wait for."""


def quantize_many(
    tensors: Sequence[torch.Tensor],
    granularity: Granularity = "tensor",
    block: tuple[int, int] = DEFAULT_BLOCK,
    numerics: Numerics = "float32",
    shared: Sequence[Sequence[int]] | None = None,
    two_launches: bool = False,
    config: configs.Config = configs.GROUPED,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Quantize several tensors, most of them in one launch of the grouped kernel.

    At granularity ``tensor``, one launch processes all dense, 16-byte-aligned tensors of a dtype. The single-tensor
    kernels process the other granularities, groups with any other tensor, and groups of more than
    `configs.GROUPED_BYTES`. `nemotron_fp8_kernels.ops.quantize_many` documents the other arguments.

    Args:
        two_launches: launch all amaxes first and all casts second, so that no cast waits inside a launch. The bytes
            are the same.
        config: tile, tiles and warps of the grouped kernel.
    """
    check_many(tensors, granularity, numerics, shared)
    for w in tensors:
        check_layout(w)
        if w.device != tensors[0].device:
            raise DeviceError("tensors", w.device, tensors[0].device)
    if granularity != "tensor" or numerics == "original":
        return [ops.quantize(w, granularity, block, numerics) for w in tensors]
    codes = [torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device) for w in tensors]
    groups = partition(len(tensors), shared)
    # A member without elements neither affects the amax of its group nor needs a cast.
    filled = [[index for index in group if tensors[index].numel()] for group in groups]
    scales: list[torch.Tensor | None] = [None] * len(groups)
    together: dict[torch.dtype, list[int]] = defaultdict(list)
    for number, members in enumerate(filled):
        if not members:
            empty = torch.full((), EMPTY_AMAX, device=tensors[groups[number][0]].device)
            scales[number] = scale_from_amax(empty)[1]
        elif _fit([tensors[index] for index in members]):
            together[tensors[members[0]].dtype].append(number)
        else:
            scales[number] = _one_by_one([tensors[i] for i in members], [codes[i] for i in members])
    for numbers in together.values():
        prepared = prepare(tensors, codes, [filled[number] for number in numbers], two_launches, config)
        prepared.run()
        for number, value in zip(numbers, prepared.scales.unbind(), strict=True):
            scales[number] = value
    found: dict[int, torch.Tensor] = {}
    for group, scale in zip(groups, scales, strict=True):
        assert scale is not None
        found |= dict.fromkeys(group, scale)
    return [(q, found[index]) for index, q in enumerate(codes)]


def _fit(members: Sequence[torch.Tensor]) -> bool:
    """Return True if the grouped kernel supports a group with these members."""
    dtype = members[0].dtype
    return sum(w.numel() for w in members) * dtype.itemsize <= configs.GROUPED_BYTES and all(
        w.dtype == dtype and w.is_contiguous() and w.data_ptr() % ALIGNMENT == 0 for w in members
    )


def _one_by_one(tensors: Sequence[torch.Tensor], codes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Quantize the members of a group by the single-tensor kernels, and return their scale."""
    if len(tensors) == 1:
        return ops.quantize(tensors[0], out=codes[0])[1]
    bits = torch.stack([ops.amax_bits(w) for w in tensors]).max()
    for w, q in zip(tensors, codes, strict=True):
        scale = ops.quantize_with_amax(w, bits, out=q)[1]
    return scale


@dataclass(frozen=True)
class Prepared:
    """Grouped launch with its tables on the device; it may run repeatedly, also in a CUDA graph.

    Attributes:
        parts: tickets of each launch, int32 [tickets, 2]: one launch, or one of amaxes and one of casts.
        table: ``tensors_ptr`` of `grouped_kernel`, int64 [tensors, 8].
        state: int32: the ticket counter and, from `TICKET_WORDS` on, amaxes of groups, then of chunks.
        scales: float32 [groups], written by a run.
        dtype: dtype of the weights.
        config: tile, tiles and warps.
        held: tensors whose addresses are in the table.
    """

    parts: tuple[torch.Tensor, ...]
    table: torch.Tensor
    state: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype
    config: configs.Config
    held: tuple[torch.Tensor, ...]

    def run(self) -> None:
        """Queue a fill and the launch on the current stream of the tensors' device.

        Runs must not overlap on different streams: all runs share the ticket counter and the amaxes.
        """
        found = self.state[TICKET_WORDS:]
        with ops.on_device(self.state):
            self.state.fill_(-1)
            for number, part in enumerate(self.parts):
                if number:
                    self.state[0].fill_(-1)
                grouped_kernel[(min(_programs(self.state.device), len(part)),)](
                    self.table,
                    part,
                    len(part),
                    self.state,
                    found,
                    found[len(self.scales) :],
                    self.scales,
                    DTYPE=TRITON_DTYPES[self.dtype],
                    TILE=self.config.tile,
                    TILES=self.config.tiles,
                    THREADS=32 * self.config.warps,
                    num_warps=self.config.warps,
                )


def prepare(
    tensors: Sequence[torch.Tensor],
    codes: Sequence[torch.Tensor],
    groups: Sequence[Sequence[int]],
    two_launches: bool = False,
    config: configs.Config = configs.GROUPED,
) -> Prepared:
    """Return a grouped launch with its tables on the device.

    Args:
        tensors: weights; the members of ``groups`` are non-empty, dense, 16-byte-aligned, of one dtype, and on one
            device.
        codes: outputs of `Prepared.run`, float8_e4m3fn, with the same shapes, density and alignment.
        groups: indices into both; the members of a group share one scale.
        two_launches: as for `quantize_many`.
        config: as for `quantize_many`.
    """
    members = [index for group in groups for index in group]
    places = {index: place for place, index in enumerate(members)}
    sizes = tuple(tensors[index].numel() for index in members)
    device, dtype = tensors[members[0]].device, tensors[members[0]].dtype
    by_place = tuple(tuple(places[index] for index in group) for group in groups)
    chunk = config.tile * config.tiles
    work, is_cast, counts = _order(sizes, by_place, dtype.itemsize, chunk, device)
    rows = []
    slot = 0
    for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
        first = slot
        for index in group:
            w, q = tensors[index], codes[index]
            rows.append([w.data_ptr(), q.data_ptr(), w.numel(), number, first, count, slot, 0])
            slot += triton.cdiv(w.numel(), chunk)
    return Prepared(
        parts=(work[~is_cast], work[is_cast]) if two_launches else (work,),
        table=_upload(torch.tensor(rows, dtype=torch.int64), device),
        state=torch.empty(TICKET_WORDS + len(groups) + slot, dtype=torch.int32, device=device),
        scales=torch.empty(len(groups), dtype=torch.float32, device=device),
        dtype=dtype,
        config=config,
        held=(*(tensors[index] for index in members), *(codes[index] for index in members)),
    )


def _programs(device: torch.device) -> int:
    """Return the number of programs of a launch; one in the interpreter, whose first program takes every ticket."""
    if device.type != "cuda":
        return 1
    return configs.PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a table to the device asynchronously, in the order of its current stream."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(maxsize=64)
def _order(
    sizes: tuple[int, ...],
    groups: tuple[tuple[int, ...], ...],
    itemsize: int,
    chunk: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return the tickets on the device, cached for lists of the same sizes, which a model's layers repeat."""
    chunks = [triton.cdiv(size, chunk) for size in sizes]
    found = order(chunks, groups, configs.LEAD // chunk, configs.L2_BYTES // (chunk * itemsize))
    # A blocking copy: the next user of the tickets may be another stream.
    return found.work.to(device), found.is_cast.to(device), found.amax_tiles
