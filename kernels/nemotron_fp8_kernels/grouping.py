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
        is_cast: bool [tickets].
        amax_tiles: number of amax tickets of each group; the casts of the group wait for them.
    """

    work: torch.Tensor
    is_cast: torch.Tensor
    amax_tiles: list[int]


def order(tiles: Sequence[int], groups: Sequence[Sequence[int]], lead: int, l2_tiles: int) -> Order:
    """Order the tickets: amaxes of batch 0, then casts of batch b alternating with amaxes of batch b + 1.

    Between the amax and the cast of a tile, about one batch plus ``lead`` tiles are read. Casts and amaxes that
    alternate by tensor, not by tile, would need two batches.

    Args:
        tiles: number of tiles of each tensor.
        groups: tensors of each group. All amaxes of a group precede its casts.
        lead: amax tiles of the next batch that precede the first cast of a batch. Groups of fewer tiles form one
            batch, so that no cast waits for an amax that has just started.
        l2_tiles: tiles that fit in L2. A larger batch is cast from its end, which was read last.
    """
    batches: list[list[int]] = [[]]
    filled = 0
    for group, members in enumerate(groups):
        if filled >= lead and batches[-1]:
            batches.append([])
            filled = 0
        batches[-1].append(group)
        filled += sum(tiles[index] for index in members)
    amaxes = [_tiles_of([index for group in batch for index in groups[group]], tiles) for batch in batches]
    parts = [amaxes[0]]
    for number, amax in enumerate(amaxes):
        casts = amax + torch.tensor([1, 0], dtype=torch.int32)
        following = amaxes[number + 1] if number + 1 < len(amaxes) else amax[:0]
        if len(casts) > l2_tiles:
            casts = casts.flip(0)
        parts.append(_alternate(casts, following, lead))
    work = torch.cat(parts)
    return Order(work, work[:, 0] % 2 == 1, [sum(tiles[index] for index in members) for members in groups])


def _tiles_of(members: Sequence[int], tiles: Sequence[int]) -> torch.Tensor:
    rows = [
        torch.stack([torch.full((tiles[index],), 2 * index), torch.arange(tiles[index])], dim=1) for index in members
    ]
    return torch.cat(rows).to(torch.int32) if rows else torch.empty(0, 2, dtype=torch.int32)


def _alternate(casts: torch.Tensor, amaxes: torch.Tensor, lead: int) -> torch.Tensor:
    """Return ``lead`` amaxes, then the casts and the other amaxes, both evenly spread."""
    first, rest = amaxes[:lead], amaxes[lead:]
    at_cast = (torch.arange(len(casts), dtype=torch.float64) + 0.5) / max(1, len(casts))
    at_amax = (torch.arange(len(rest), dtype=torch.float64) + 0.5) / max(1, len(rest))
    by_place = torch.cat([at_cast, at_amax]).argsort(stable=True)
    return torch.cat([first, torch.cat([casts, rest])[by_place]])
