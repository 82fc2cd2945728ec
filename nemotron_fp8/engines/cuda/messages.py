"""What the stages of a flow hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.engines.cuda.device import Event
    from nemotron_fp8.engines.cuda.ring import Slot
    from nemotron_fp8.engines.cuda.schedule import Region


@dataclass
class Block:
    """A piece of the slab that the groups of one load share."""

    begin: int
    nbytes: int
    groups: int


@dataclass
class Group:
    """A scale group on its way.

    Attributes:
        region: its place.
        block: the block that its place is in.
        memory: the bytes of its place.
        settled: whether its scale is told.
        left: notes and casts that are still to be written.
    """

    region: Region
    block: Block
    memory: torch.Tensor
    left: int
    settled: bool = False

    @property
    def bits(self) -> torch.Tensor:
        """Its amaxes on the device, int32."""
        count = 4 * prod(self.region.shape)
        return self.memory[:count].view(torch.int32).view(self.region.shape)


class Part(NamedTuple):
    """A tensor's codes in a down slot."""

    view: TensorView
    group: str
    begin: int
    end: int
    out_at: int
    scale_at: int | None


class AmaxCopy(NamedTuple):
    """Amaxes on their way to the host."""

    group: Group
    slot: Slot
    arrived: Event


class CodesCopy(NamedTuple):
    """Codes on their way to the host."""

    parts: list[Part]
    slot: Slot
    arrived: Event


@dataclass
class Arrivals:
    """Loads that have been read, which may be out of order."""

    ready: dict[int, Slot | None] = field(default_factory=dict)
    drawn: int = 0
