"""Order of the tickets of the grouped kernel by loops: the specification of `nemotron_fp8_kernels.grouping.order`."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Ticket = tuple[int, int]
"""2 * tensor + (1 for a cast), tile."""


def specified(tiles: Sequence[int], groups: Sequence[Sequence[int]], lead: int, l2_tiles: int) -> list[Ticket]:
    """Return the tickets; arguments are those of `order`."""
    batches: list[list[Ticket]] = []
    for group in groups:
        if not batches or len(batches[-1]) >= max(1, lead):
            batches.append([])
        batches[-1] += [(2 * index, tile) for index in group for tile in range(tiles[index])]
    tickets = list(batches[0])
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        casts = [(which + 1, tile) for which, tile in batch]
        if len(casts) > l2_tiles:
            casts.reverse()
        tickets += following[:lead]
        # Both spread evenly over the interval from 0 to 1; a cast precedes an amax at the same place.
        placed = [(Fraction(2 * i + 1, 2 * len(casts)), 0, ticket) for i, ticket in enumerate(casts)]
        rest = following[lead:]
        placed += [(Fraction(2 * i + 1, 2 * len(rest)), 1, ticket) for i, ticket in enumerate(rest)]
        tickets += [ticket for _, _, ticket in sorted(placed, key=lambda entry: entry[:2])]
    return tickets
