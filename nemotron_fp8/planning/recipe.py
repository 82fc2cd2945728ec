"""The recipe: the settings of a quantization, with their defaults and descriptions."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

Granularity = Literal["tensor", "channel", "block"]
Numerics = Literal["float32", "original"]
Format = Literal["fp8", "compressed-tensors"]
Activations = Literal["dynamic", "none"]
NonFiniteChoice = Literal["error", "keep"]


class Recipe(BaseModel):
    """Settings of a quantization. Frozen; unknown fields are rejected.

    The description of each field is also the help text of its option on the command line, and its row in docs/api.md
    and in the model card.

    Raises:
        pydantic.ValidationError: a field is unknown or has a value that is not offered, or a pattern is no
            regular expression.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    granularity: Granularity = Field(
        default="tensor",
        description="Values that share one scale: a tensor, an output row (channel), or a block of 128x128."
        " With block, weights whose sides do not divide by 128 stay unquantized.",
    )
    format: Format = Field(
        default="fp8", description="Layout on disk: names and shapes of scales, and the config of engines."
    )
    activations: Activations = Field(
        default="dynamic",
        description="Activations at inference: scaled and cast to FP8 while the engine runs (dynamic), or left in 16"
        " bits (none: weight-only).",
    )
    share_scales: bool = Field(
        default=False,
        description="Share one scale, from the largest amax, among tensors that engines fuse (q/k/v, gate/up).",
    )
    numerics: Numerics = Field(
        default="float32",
        description="Arithmetic: float32, or the tensor's own dtype as in the script on the model card of"
        " Nemotron-4-340B-Instruct-FP8 (original).",
    )
    nonfinite: NonFiniteChoice = Field(
        default="error",
        description="NaN or Inf in a tensor: stop (error), or leave the tensor and those fused with it unquantized"
        " (keep).",
    )
    stats: bool = Field(
        default=False,
        description="Measure the error of every FP8 tensor, for nemotron_fp8.stats.json and the model card.",
    )
    select: tuple[str, ...] = Field(
        default=(), description="Regular expressions, searched in tensor names, that replace the default *_proj.weight."
    )
    ignore: tuple[str, ...] = Field(
        default=(),
        description="Regular expressions, searched in tensor names, of weights that stay unquantized together with"
        " those fused with them. Takes precedence over select.",
    )

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


def choices_of(name: str) -> tuple[str, ...]:
    """Return the values that a field of the recipe offers; empty for a flag or for free text."""
    annotation: Any = Recipe.model_fields[name].annotation
    return tuple(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ()
