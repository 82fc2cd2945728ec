"""Messages between the stages of a pipeline."""

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
    """A block of the slab for the groups of one load."""

    begin: int
    nbytes: int
    groups: int


@dataclass
class Group:
    """A scale group in the pipeline.

    Attributes:
        region: region of the group in the slab.
        block: block that contains the region.
        memory: bytes of the region.
        left: copies of amaxes and codes that are not written yet.
        scale_written: True once the scale of the group is written.
    """

    region: Region
    block: Block
    memory: torch.Tensor
    left: int
    scale_written: bool = False

    @property
    def bits(self) -> torch.Tensor:
        """Amaxes of the group on the device, int32."""
        count = 4 * prod(self.region.shape)
        return self.memory[:count].view(torch.int32).view(self.region.shape)


class Part(NamedTuple):
    """Codes of a tensor, or of a part of it, in an output slot."""

    view: TensorView
    group: str
    begin: int
    end: int
    out_at: int
    scale_at: int | None


class AmaxCopy(NamedTuple):
    """A copy of amaxes to the host."""

    group: Group
    slot: Slot
    arrived: Event


class CodesCopy(NamedTuple):
    """A copy of codes to the host."""

    parts: list[Part]
    slot: Slot
    arrived: Event


@dataclass
class Arrivals:
    """Loads that have been read, possibly out of order."""

    ready: dict[int, Slot | None] = field(default_factory=dict)
    drawn: int = 0
