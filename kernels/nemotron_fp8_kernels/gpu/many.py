"""Lists of tensors: the grouped kernel where it applies, the single-tensor kernels for all others."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import triton.language as tl

from ..cpu import check_layout
from ..formats import DEFAULT_BLOCK, EMPTY_AMAX, Granularity, Numerics, ScaleRounding
from ..grouping import order, partition
from ..outputs import check_outputs
from ..reference import check_many, scale_from_amax
from . import configs, ops
from .grouped import grouped_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

CODES = torch.float8_e4m3fn

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
    out: Sequence[torch.Tensor] | None = None,
    two_launches: bool = False,
    config: configs.Config = configs.GROUPED,
    rounding: ScaleRounding = "none",
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Quantize several tensors, most of them in one launch of the grouped kernel.

    At granularity ``tensor``, one launch processes all dense, 16-byte-aligned tensors of a dtype whose outputs are
    dense and aligned, too. The single-tensor kernels process the other granularities, groups with any other tensor,
    and groups of more than `configs.GROUPED_BYTES`. `nemotron_fp8_kernels.ops.quantize_many` documents the other
    arguments.

    Args:
        two_launches: launch all amaxes first and all casts second, so that no cast waits inside a launch. The bytes
            are the same.
        config: tile, tiles and warps of the grouped kernel.
    """
    check_many(tensors, granularity, block, numerics, shared, rounding)
    groups = partition(len(tensors), shared)
    for w in tensors:
        check_layout(w)
    check_outputs(tensors, out)
    if granularity != "tensor" or numerics == "original":
        outs: Sequence[torch.Tensor | None] = [None] * len(tensors) if out is None else out
        return [ops.quantize(w, granularity, block, numerics, q, rounding) for w, q in zip(tensors, outs, strict=True)]
    codes = out
    if codes is None:
        codes = [torch.empty_like(w, dtype=CODES, memory_format=torch.contiguous_format) for w in tensors]
    # Python costs microseconds per tensor, as many as the device needs for a small one: each property is read once.
    sizes = [w.numel() for w in tensors]
    fits = [
        w.is_contiguous() and q.is_contiguous() and (w.data_ptr() | q.data_ptr()) % ALIGNMENT == 0
        for w, q in zip(tensors, codes, strict=True)
    ]
    scales: list[torch.Tensor | None] = [None] * len(groups)
    together: dict[torch.dtype, list[tuple[int, list[int]]]] = defaultdict(list)
    for number, group in enumerate(groups):
        # A member without elements neither affects the amax of its group nor needs a cast.
        members = [index for index in group if sizes[index]]
        if not members:
            empty = torch.full((), EMPTY_AMAX, device=tensors[0].device)
            scales[number] = scale_from_amax(empty, rounding=rounding)[1]
            continue
        dtype = tensors[members[0]].dtype
        size = sum([sizes[index] for index in members]) * dtype.itemsize
        if size <= configs.GROUPED_BYTES and all(fits[i] and tensors[i].dtype == dtype for i in members):
            together[dtype].append((number, members))
        else:
            scales[number] = _one_by_one([tensors[i] for i in members], [codes[i] for i in members], rounding)
    for chosen in together.values():
        prepared = prepare(tensors, codes, [members for _, members in chosen], two_launches, config, rounding)
        prepared.run()
        for (number, _), value in zip(chosen, prepared.scales.unbind(), strict=True):
            scales[number] = value
    found: dict[int, torch.Tensor] = {}
    for group, scale in zip(groups, scales, strict=True):
        assert scale is not None
        for index in group:
            found[index] = scale
    return [(q, found[index]) for index, q in enumerate(codes)]


def _one_by_one(
    tensors: Sequence[torch.Tensor], codes: Sequence[torch.Tensor], rounding: ScaleRounding
) -> torch.Tensor:
    """Quantize the members of a group by the single-tensor kernels, and return their scale."""
    if len(tensors) == 1 and codes[0].is_contiguous():
        return ops.quantize(tensors[0], out=codes[0], rounding=rounding)[1]
    bits = torch.stack([ops.amax_bits(w) for w in tensors]).max()
    for w, q in zip(tensors, codes, strict=True):
        scale = ops.quantize_with_amax(w, bits, out=q, rounding=rounding)[1]
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
        rounding: rounding of the scales.
        held: tensors whose addresses are in the table.
    """

    parts: tuple[torch.Tensor, ...]
    table: torch.Tensor
    state: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype
    config: configs.Config
    rounding: ScaleRounding
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
                    ROUNDING=self.rounding,
                    num_warps=self.config.warps,
                )


def prepare(
    tensors: Sequence[torch.Tensor],
    codes: Sequence[torch.Tensor],
    groups: Sequence[Sequence[int]],
    two_launches: bool = False,
    config: configs.Config = configs.GROUPED,
    rounding: ScaleRounding = "none",
) -> Prepared:
    """Return a grouped launch with its tables on the device.

    Args:
        tensors: weights; the members of ``groups`` are non-empty, dense, 16-byte-aligned, of one dtype, and on one
            device.
        codes: outputs of `Prepared.run`, float8_e4m3fn, with the same shapes, density and alignment.
        groups: indices into both; the members of a group share one scale.
        two_launches: as for `quantize_many`.
        config: as for `quantize_many`.
        rounding: as for `quantize_many`.
    """
    weights = [tensors[index] for group in groups for index in group]
    outputs = [codes[index] for group in groups for index in group]
    device, dtype = weights[0].device, weights[0].dtype
    sizes = tuple(w.numel() for w in weights)
    plan = _plan(sizes, tuple(map(len, groups)), dtype.itemsize, config.tile * config.tiles, device)
    # Two long lists convert faster than many short ones.
    table = torch.empty(len(weights), 8, dtype=torch.int64, pin_memory=device.type == "cuda").copy_(plan.rows)
    table[:, 0] = torch.tensor([w.data_ptr() for w in weights])
    table[:, 1] = torch.tensor([q.data_ptr() for q in outputs])
    work = plan.work
    if device.type == "cuda":
        # The tickets may have been copied on another stream, whose allocator must not reuse their memory too early.
        work.record_stream(torch.cuda.current_stream(device))
        table = table.to(device, non_blocking=True)
    is_cast = work[:, 0] % 2 == 1 if two_launches else None
    return Prepared(
        parts=(work,) if is_cast is None else (work[~is_cast], work[is_cast]),
        table=table,
        state=torch.empty(TICKET_WORDS + len(groups) + plan.slots, dtype=torch.int32, device=device),
        scales=torch.empty(len(groups), dtype=torch.float32, device=device),
        dtype=dtype,
        config=config,
        rounding=rounding,
        held=(*weights, *outputs),
    )


def _programs(device: torch.device) -> int:
    """Return the number of programs of a launch; one in the interpreter, whose first program takes every ticket."""
    if device.type != "cuda":
        return 1
    return configs.PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _Plan:
    """Tables of a launch that depend on sizes only.

    Attributes:
        work: tickets on the device, int32 [tickets, 2].
        rows: ``tensors_ptr`` of `grouped_kernel` without addresses, int64 [tensors, 8] on the host.
        slots: number of chunks.
    """

    work: torch.Tensor
    rows: torch.Tensor
    slots: int


@lru_cache(maxsize=64)
def _plan(sizes: tuple[int, ...], members: tuple[int, ...], itemsize: int, chunk: int, device: torch.device) -> _Plan:
    """Return the tables of a list; cached, because the layers of a model repeat the sizes.

    Args:
        sizes: elements of the tensors, group after group.
        members: number of tensors of each group.
    """
    chunks = [-(-size // chunk) for size in sizes]
    ends = list(accumulate(chunks))
    lasts = list(accumulate(members))
    groups = [range(last - count, last) for last, count in zip(lasts, members, strict=True)]
    found = order(chunks, groups, configs.LEAD // chunk, configs.L2_BYTES // (chunk * itemsize))
    of_group = torch.tensor(found.amax_tiles)
    first = of_group.cumsum(0) - of_group
    number = torch.arange(len(members)).repeat_interleave(torch.tensor(members))
    slot = torch.tensor(ends) - torch.tensor(chunks)
    zero = torch.zeros_like(slot)
    columns = [zero, zero, torch.tensor(sizes), number, first[number], of_group[number], slot, zero]
    # A blocking copy: the next user of the tickets may be another stream.
    return _Plan(found.work.to(device), torch.stack(columns, dim=1), ends[-1])
