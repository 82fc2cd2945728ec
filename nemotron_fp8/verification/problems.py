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
    """Problem that verification found.

    Attributes:
        tensor: name of the tensor or of the file.
        problem: description.
    """

    tensor: str
    problem: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Tensor of the source and its counterpart in the result.

    Attributes:
        source: the tensor.
        result: its counterpart, of the same shape.
        scale: scale of an FP8 counterpart; None for an unquantized tensor.
        numbers: number format of an FP8 counterpart.
    """

    source: TensorView
    result: TensorView
    scale: TensorView | None
    numbers: NumberFormat = PER_TENSOR
