"""The decision for one tensor, and its role in the model."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Role: TypeAlias = Literal["linear", "module", "other"]
"""Role of a tensor: a linear weight of the decoder, a linear module outside it, or none of both."""


class TensorPlan(NamedTuple):
    """Decision for one tensor.

    Attributes:
        name, shard, dtype, shape: properties of the input tensor.
        quantize: True if the tensor is quantized.
        reason: reason for the decision.
        bytes_in: bytes in the source.
        bytes_out: bytes in the result, including the scale.
        role: a linear weight of the decoder, a linear module outside it, or another tensor.
        forced: True if the tensor is quantized although engines are not known to load it in FP8 (``--force-select``).
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    quantize: bool
    reason: str
    bytes_in: int
    bytes_out: int
    role: Role = "other"
    forced: bool = False
