"""Problems that verification finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.recipe import Granularity


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        tensor: the tensor, or the file, that it is about.
        problem: what is wrong.
    """

    tensor: str
    problem: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the source and what stands for it in the result.

    Attributes:
        source: the tensor.
        result: its counterpart, of the same shape.
        scale: the scale of an FP8 counterpart; None where the tensor was kept.
        granularity: what one scale covers.
    """

    source: TensorView
    result: TensorView
    scale: TensorView | None
    granularity: Granularity = "tensor"
