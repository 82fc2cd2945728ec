"""Tickets of the grouped kernel, and the partition of tensors into groups that share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import SharedScaleError

if TYPE_CHECKING:
    from collections.abc import Sequence


def partition(count: int, shared: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """Return the groups of tensor indices in the order of their first members.

    Args:
        count: number of tensors.
        shared: groups that share a scale; every other tensor is a group of its own.

    Raises:
        SharedScaleError: a group is empty, or an index is out of range or occurs twice.
    """
    groups = [sorted(group) for group in shared or ()]
    seen: set[int] = set()
    for group in groups:
        if not group:
            raise SharedScaleError("a group is empty")
        for index in group:
            if not 0 <= index < count:
                raise SharedScaleError(f"index {index} is out of range for {count} tensors")
            if index in seen:
                raise SharedScaleError(f"tensor {index} occurs in two groups, or twice in one")
            seen.add(index)
    groups += [[index] for index in range(count) if index not in seen]
    return sorted(groups)


@dataclass(frozen=True)
class Order:
    """Tickets of one grouped launch.

    Attributes:
        work: int32 [tickets, 2]: 2 * tensor + (1 for a cast), tile.
        amax_tiles: number of amax tickets of each group; the casts of the group wait for them.
    """

    work: torch.Tensor
    amax_tiles: list[int]

    @property
    def is_cast(self) -> torch.Tensor:
        """Bool [tickets]."""
        return self.work[:, 0] % 2 == 1


def order(tiles: Sequence[int], groups: Sequence[Sequence[int]], lead: int, l2_tiles: int) -> Order:
    """Order the tickets: amaxes of batch 0, then casts of batch b alternating with amaxes of batch b + 1.

    Between the amax and the cast of a tile, about one batch plus ``lead`` tiles are read. Casts and amaxes that
    alternate by tensor, not by tile, would need two batches.

    The places of all tickets are computed together, without a loop over tensors, because the device waits for the
    order of a list of new sizes. ``tests/kernels/tickets.py`` specifies the same order by loops.

    Args:
        tiles: number of tiles of each tensor, at least 1.
        groups: tensors of each group. All amaxes of a group precede its casts.
        lead: amax tiles of the next batch that precede the first cast of a batch. Groups of fewer tiles form one
            batch, so that no cast waits for an amax that has just started.
        l2_tiles: tiles that fit in L2. A larger batch is cast from its end, which was read last.
    """
    amax_tiles = [sum(tiles[index] for index in group) for group in groups]
    size = torch.tensor(_batches(amax_tiles, lead))
    # Segment b of the tickets has the amaxes of batch b, and from 1 on the casts of batch b - 1.
    end = size.cumsum(0)
    begin = end - size
    segment = torch.cat([size.new_zeros(1), end + begin])
    # Amaxes that precede the casts of their segment, and amaxes that alternate with them.
    ahead = torch.cat([size[:1], size[1:].clamp(max=lead), size.new_zeros(1)])
    beside = torch.cat([size, size.new_zeros(1)]) - ahead

    count = sum(amax_tiles)
    place = torch.arange(count)
    batch = torch.arange(len(size)).repeat_interleave(size, output_size=count)

    def of_batch(values: torch.Tensor) -> torch.Tensor:
        return values.index_select(0, batch)

    # Cast i of c stands at (i + 1/2) / c of its segment, an amax likewise: so many of the others are in front of it.
    # A cast precedes an amax at the same place.
    i = place - of_batch(begin)
    c, a = size, beside[1:]
    from_end = size > l2_tiles
    at = torch.where(of_batch(from_end), of_batch(c - 1) - i, i) if bool(from_end.any()) else i
    before = torch.div(at * of_batch(2 * a) + of_batch(a + c - 1), of_batch(2 * c), rounding_mode="trunc")
    cast_place = of_batch(segment[1:] + ahead[1:]) + at + before
    c, a = torch.cat([size.new_zeros(1), size[:-1]]), beside[:-1]
    j = i - of_batch(ahead[:-1])
    before = torch.div(j * of_batch(2 * c) + of_batch(c + a), of_batch((2 * a).clamp(min=1)), rounding_mode="trunc")
    amax_place = of_batch(segment[:-1]) + i + torch.where(j < 0, 0, before)

    # A ticket is one word of 64 bits here, the tile in the upper half: 2 * member + (tile << 32).
    members = [index for group in groups for index in group]
    member, of_member = torch.tensor(members), torch.tensor([tiles[index] for index in members])
    begin = of_member.cumsum(0) - of_member
    amax = (place << 32) + (2 * member - (begin << 32)).repeat_interleave(of_member, output_size=count)
    work = torch.empty(2 * count, dtype=torch.int64)
    work.scatter_(0, amax_place, amax).scatter_(0, cast_place, amax + 1)
    return Order(work.view(torch.int32).view(-1, 2), amax_tiles)


def _batches(amax_tiles: Sequence[int], lead: int) -> list[int]:
    """Return the tiles of each batch: of as many groups as make up the lead."""
    sizes = [0]
    for tiles in amax_tiles:
        if sizes[-1] >= max(1, lead):
            sizes.append(0)
        sizes[-1] += tiles
    return sizes
