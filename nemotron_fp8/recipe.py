"""What to quantise and how: the part of a conversion that a person decides."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from typing_extensions import Self

Granularity = Literal["tensor", "channel", "block"]
Numerics = Literal["float32", "original"]


class Recipe(BaseModel):
    """What to quantise and how. Frozen; unknown fields are refused.

    Attributes:
        granularity: what one scale covers: a whole ``tensor``.
        format: layout of names and config on disk; ``fp8`` is what vLLM and SGLang read as ``quant_method: fp8``.
        activations: how an engine treats activations: ``dynamic``, scaled while it runs.
        share_scales: one scale for the tensors that an engine fuses (q/k/v, gate/up).
        numerics: ``float32``, the arithmetic of `nemotron_fp8_kernels.reference`, or ``original``, that of the
            script on the model card of Nemotron-4-340B-Instruct-FP8, carried out in the tensor's own dtype.
        nonfinite: what to do about NaN and Inf: ``error``, or ``keep`` the tensor (and what is fused with it) as it is.
        select: regular expressions, searched in the full tensor name, that replace the default rule.
        ignore: regular expressions, searched in the full tensor name, of what stays; wins over ``select``.

    Raises:
        pydantic.ValidationError: a field is unknown or has a value that is not offered, or a pattern is no regular
            expression.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    granularity: Literal["tensor"] = "tensor"
    format: Literal["fp8"] = "fp8"
    activations: Literal["dynamic"] = "dynamic"
    share_scales: Literal[False] = False
    numerics: Numerics = "float32"
    nonfinite: Literal["error", "keep"] = "error"
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    @field_validator("select", "ignore")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _original_is_per_tensor(self) -> Self:
        if self.numerics == "original" and (self.granularity != "tensor" or self.share_scales):
            raise ValueError("numerics 'original' needs granularity 'tensor' and a scale for each tensor")
        return self
