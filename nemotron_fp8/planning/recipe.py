"""The recipe: the settings of a quantization, with their defaults and descriptions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from nemotron_fp8._utils import shortened
from nemotron_fp8.planning.layouts import (
    Activations,
    Layout,
    Scheme,
    WeightFormat,
    layout_named,
    layout_names,
    layouts,
)
from nemotron_fp8.planning.number_format import Granularity  # noqa: TC001  (pydantic reads it at run time)
from nemotron_fp8.planning.recipe_errors import invalid_fields, not_a_recipe

Numerics = Literal["float32", "original"]
Selection = Literal["default", "nvidia"]
NonFiniteChoice = Literal["error", "keep"]


class Recipe(BaseModel):
    """Settings of a quantization. Frozen; unknown fields are rejected.

    The description of each field is also the help text of its option on the command line, and its row in docs/api.md
    and in the model card.

    Raises:
        RecipeError: a field is unknown or has an unsupported value, no engine loads the combination, or a pattern is
            not a regular expression.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    granularity: Granularity = Field(
        default="channel",
        description="Values that share one scale: a tensor, an output row (channel), or a block (128x128)."
        " With block, weights whose sides do not divide by a block are left unquantized."
        " Default: the format's best, channel for compressed-tensors, block for fp8.",
    )
    format: str = Field(
        default="compressed-tensors",
        description="Layout on disk: names and shapes of scales, and the config of engines.",
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
        " Nemotron-4-340B-Instruct-FP8 (original). original implies that script's layout, format fp8 with"
        " granularity tensor, and its rule, *_proj.weight.",
    )
    nonfinite: NonFiniteChoice = Field(
        default="error",
        description="NaN or Inf in a tensor: abort (error), or leave the tensor and those fused with it unquantized"
        " (keep).",
    )
    stats: bool = Field(
        default=False,
        description="Measure the error of every FP8 tensor, for nemotron_fp8.stats.json and the model card.",
    )
    selection: Selection = Field(
        default="default",
        description="Weights to quantize: every linear weight of the decoder (default), or NVIDIA's own choice for"
        " Nemotron 3 (nvidia), which leaves attention unquantized.",
    )
    select: tuple[str, ...] = Field(
        default=(), description="Regular expressions, searched in tensor names, that replace the default selection."
    )
    also_select: tuple[str, ...] = Field(
        default=(), description="Regular expressions, searched in tensor names, of weights to quantize as well."
    )
    force_select: bool = Field(
        default=False,
        description="Quantize what select and also_select name even where engines load it unquantized: routers,"
        " encoders, layers for multi-token prediction.",
    )
    ignore: tuple[str, ...] = Field(
        default=(),
        description="Regular expressions, searched in tensor names, of weights to leave unquantized, together with the"
        " weights fused with them. Takes precedence over select.",
    )

    if not TYPE_CHECKING:  # type checkers derive the constructor from the fields

        def __init__(self, /, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise invalid_fields(error, type(self).model_fields) from None

    @property
    def layout(self) -> Layout:
        """Layout on disk."""
        return layout_named(self.format)

    @property
    def scheme(self) -> Scheme:
        """Granularity and treatment of activations, which decide the layout's config."""
        return Scheme(self.granularity, self.activations)

    @property
    def weight_format(self) -> WeightFormat:
        """Format of a quantized weight on disk."""
        return self.layout.weights[self.granularity]

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, given: Any) -> Any:
        """Fill in the defaults that depend on other fields: format and granularity."""
        if not isinstance(given, dict):
            return given
        fields = dict(given)
        if fields.get("numerics") == "original":
            fields.setdefault("format", "fp8")
            fields.setdefault("granularity", "tensor")
        name = fields.setdefault("format", cls.model_fields["format"].default)
        if isinstance(name, str) and name in layout_names():
            fields.setdefault("granularity", layout_named(name).best_granularity)
        return fields

    @field_validator("format", mode="before")
    @classmethod
    def _is_registered(cls, name: object) -> object:
        if isinstance(name, str) and name in layout_names():
            return name
        *others, last = map(repr, layout_names())
        # The error of a Literal with these values.
        expected = f"{', '.join(others)} or {last}" if others else last
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})

    @field_validator("select", "also_select", "ignore")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{shortened(pattern)} is not a regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _is_loadable(self) -> Self:
        """Reject a recipe that no engine loads, and name the nearest alternative."""
        refusal = self.layout.refusal(self.scheme)
        if refusal is not None:
            raise ValueError(refusal)
        if self.numerics == "original" and self.selection != "default":
            raise ValueError("numerics 'original' has its own selection, *_proj.weight; use selection 'default'")
        if self.selection != "default" and self.select:
            raise ValueError(
                f"select replaces the selection {self.selection!r}; use also_select to add weights to it, or selection"
                " 'default'"
            )
        if self.force_select and not (self.select or self.also_select):
            raise ValueError("force_select needs patterns; name the weights with select or also_select")
        if self.share_scales and self.granularity != "tensor":
            raise ValueError(
                f"share_scales needs granularity 'tensor': with '{self.granularity}', engines keep the scales of fused"
                " tensors separate"
            )
        if self.numerics == "original" and (self.granularity != "tensor" or self.share_scales):
            raise ValueError(
                "numerics 'original' supports one scale for each tensor only; use granularity 'tensor' without"
                " share_scales, or numerics 'float32'"
            )
        return self


def choices_of(name: str) -> tuple[str, ...]:
    """Return the allowed values of a recipe field; empty for a flag or for free text."""
    if name == "format":
        return layout_names()
    annotation: Any = Recipe.model_fields[name].annotation
    return tuple(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ()


def as_recipe(value: object) -> Recipe:
    """Return the recipe that a caller passed, or the default recipe for None.

    Raises:
        RecipeError: the value is not a `Recipe`; the message contains an example.
    """
    if value is None:
        return Recipe()
    if isinstance(value, Recipe):
        return value
    raise not_a_recipe(value, {name: choices_of(name) for name in Recipe.model_fields})


def recipe_of(config: object) -> Recipe | None:
    """Return the recipe whose layout a ``quantization_config`` describes; None if no registered layout matches."""
    if not isinstance(config, dict):
        return None
    for layout in layouts():
        scheme = layout.scheme_of(config)
        if scheme is not None:
            return Recipe(format=layout.name, granularity=scheme.granularity, activations=scheme.activations)
    return None
