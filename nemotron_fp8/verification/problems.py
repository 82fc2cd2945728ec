"""Problems that verification finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.planning.number_format import PER_TENSOR

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.number_format import NumberFormat


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
        numbers: number format of an FP8 counterpart.
    """

    source: TensorView
    result: TensorView
    scale: TensorView | None
    numbers: NumberFormat = PER_TENSOR
