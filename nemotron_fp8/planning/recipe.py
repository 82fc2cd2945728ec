"""What to quantize and how: the part of a conversion that a person decides."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from typing_extensions import Self

Granularity = Literal["tensor", "channel", "block"]
Numerics = Literal["float32", "original"]
Format = Literal["fp8", "compressed-tensors"]
Activations = Literal["dynamic", "none"]


class Recipe(BaseModel):
    """What to quantize and how. Frozen; unknown fields are refused.

    Attributes:
        granularity: what one scale covers: a whole ``tensor``, a ``channel`` (an output row), or a ``block`` of
            128 x 128; ``block`` leaves weights whose dimensions do not divide by 128 as they are.
        format: layout of names and config on disk: ``fp8``, what vLLM and SGLang read as ``quant_method: fp8``,
            or ``compressed-tensors``.
        activations: how an engine treats activations: ``dynamic``, scaled and cast while it runs, or ``none``,
            left in 16 bits (weight only).
        share_scales: one scale for the tensors that an engine fuses (q/k/v, gate/up), from their largest amax.
        numerics: ``float32``, the arithmetic of `nemotron_fp8_kernels.reference`, or ``original``, that of
            the script on the model card of Nemotron-4-340B-Instruct-FP8, carried out in the tensor's own
            dtype.
        nonfinite: what to do about NaN and Inf: ``error``, or ``keep`` the tensor (and what is fused with it)
            as it is.
        stats: whether to measure the errors of every FP8 tensor and put them beside the result
            (``nemotron_fp8.stats.json``, and in short into its model card).
        select: regular expressions, searched in the full tensor name, that replace the default rule.
        ignore: regular expressions, searched in the full tensor name, of what stays; wins over ``select``.

    Raises:
        pydantic.ValidationError: a field is unknown or has a value that is not offered, or a pattern is no
            regular expression.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    granularity: Granularity = "tensor"
    format: Format = "fp8"
    activations: Activations = "dynamic"
    share_scales: bool = False
    numerics: Numerics = "float32"
    nonfinite: Literal["error", "keep"] = "error"
    stats: bool = False
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
    def _is_loadable(self) -> Self:
        """Refuse what no engine loads, and name the nearest that one does."""
        if self.format == "fp8" and self.granularity == "channel":
            raise ValueError(
                "format 'fp8' has no scales per channel in any engine;"
                " use format 'compressed-tensors' with granularity 'channel'"
            )
        if self.format == "fp8" and self.activations == "none":
            raise ValueError(
                "format 'fp8' always scales activations; for weights only use format 'compressed-tensors'"
                " with activations 'none'"
            )
        if self.share_scales and self.granularity != "tensor":
            raise ValueError(
                f"share_scales needs granularity 'tensor': with '{self.granularity}' no two tensors have a"
                " scale in common that engines would merge"
            )
        if self.numerics == "original" and (self.granularity != "tensor" or self.share_scales):
            raise ValueError(
                "numerics 'original' knows one scale for each tensor only; use granularity 'tensor' without"
                " share_scales, or numerics 'float32'"
            )
        return self
