"""The recipe: the settings of a quantization, with their defaults and descriptions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from nemotron_fp8._utils import shortened
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.layouts import (
    Activations,
    Choice,
    Layout,
    Scheme,
    WeightFormat,
    layout_named,
    layout_names,
    layouts,
)
from nemotron_fp8.planning.number_format import E8M0, Granularity, ScaleChoice
from nemotron_fp8.planning.recipe_errors import by_name, invalid_fields, not_a_recipe
from nemotron_fp8.planning.recipe_file import fields_text, read_fields, refused

if TYPE_CHECKING:
    import os

Numerics = Literal["float32", "original"]
Selection = Literal["default", "nvidia"]
NonFiniteChoice = Literal["error", "keep"]
ScaleRoundingChoice = Literal["none", "power-of-two"]
ScaleDtype = Literal["float32", "e8m0"]
KVCache = Literal["none", "fp8"]


POWER_OF_TWO: ScaleRoundingChoice = "power-of-two"
NO_BEST_SCALES: dict[str, str] = {
    "tensor": "a better scale for a whole tensor gains next to nothing",
    "block": "scales of blocks are powers of two wherever engines have DeepGEMM",
    "mx": "all of its scales are powers of two",
}
"""Reasons why scales of other granularities than channel are not searched, by granularity."""


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
        description="Values that share one scale: a tensor, an output row (channel), a block (128x128), or 32 inputs of"
        " an output row (mx)."
        " With block and mx, weights whose sides do not divide by a block are left unquantized."
        " Default: the format's best, channel for compressed-tensors and modelopt, block for fp8, mx for mxfp8.",
    )
    format: str = Field(
        default="compressed-tensors",
        description="Layout on disk: names and shapes of scales, and the config of engines.",
    )
    activations: Activations = Field(
        default="dynamic",
        description="Activations at inference: scaled and cast to FP8 while the engine runs (dynamic), cast with the"
        " scales of a calibration (static, granularity tensor), or left in 16 bits (none: weight-only).",
    )
    scales: ScaleChoice = Field(
        default="amax",
        description="Scales of output rows: the largest absolute value becomes 448 (amax), or the best of eight scales"
        " from that one up, by the squared error of the row (best). best needs granularity channel.",
    )
    scale_rounding: ScaleRoundingChoice = Field(
        default="none",
        description="Scales as computed (none), or rounded up to a power of two before the cast (power-of-two), as"
        " engines with DeepGEMM otherwise round them again on loading."
        " Default: power-of-two for block and mx, none for the others.",
    )
    scale_dtype: ScaleDtype = Field(
        default="float32",
        description="Scales of blocks as stored: float32, which every engine reads, or the exponents of powers of two"
        " in one byte (e8m0). Default: e8m0 for mx, float32 for the others.",
    )
    kv_cache: KVCache = Field(
        default="none",
        description="KV cache at inference: as the engine decides (none), or declared FP8 (fp8), with the scales of a"
        " calibration if there is one, else 1.0.",
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

        def __init__(self, /, *values: Any, **fields: Any) -> None:
            if values:
                raise by_name(values[0], {name: choices_of(name) for name in type(self).model_fields})
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise invalid_fields(error, type(self).model_fields) from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Return the recipe of a YAML file of fields by name. A field that the file does not name has its default.

        Args:
            path: the file, for example one that ``nemotron-fp8 plan --save-recipe`` wrote.

        Raises:
            RecipeError: the file cannot be read, is no YAML mapping, names an unknown field or one field twice, or has
                an unsupported value. The message names the file and the field.
        """
        fields = read_fields(path, cls)
        try:
            return cls(**fields)
        except RecipeError as error:
            raise refused(path, error.problem, error.arguments) from None

    def to_yaml(self) -> str:
        """Return all fields as YAML, each below a comment with its description. `from_file` reads it again."""
        return fields_text(self)

    @property
    def layout(self) -> Layout:
        """Layout on disk."""
        return layout_named(self.format)

    @property
    def scheme(self) -> Scheme:
        """Granularity and treatment of activations, which decide the layout's config."""
        return Scheme(self.granularity, self.activations)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Choices beside the scheme that the layout's config states."""
        fields = (("scale_dtype", self.scale_dtype), ("kv_cache", self.kv_cache))
        found = (self.layout.choice(name, value, self.granularity) for name, value in fields)
        return tuple(choice for choice in found if choice is not None)

    @property
    def on_disk(self) -> tuple[str, ...]:
        """Values of the fields that ``quantization_config`` states."""
        return self.format, *self.scheme, *(choice.value for choice in self.choices if choice.is_stated)

    @property
    def needs_amaxes(self) -> str:
        """Field whose value needs the amaxes of a calibration; empty without one."""
        if self.activations == "static":
            return "activations"
        return next((choice.field for choice in self.choices if choice.calibrated), "")

    @property
    def weight_format(self) -> WeightFormat:
        """Format of a quantized weight on disk."""
        found = self.layout.weights[self.granularity]
        numbers = found.numbers
        if self.scale_rounding == "none":
            numbers = replace(numbers, scale_rounding="none")
        elif numbers.scale_rounding == "none":
            numbers = replace(numbers, scale_rounding="power-of-two")
        if self.scale_dtype == "e8m0" and numbers.scale.title != E8M0.title:
            numbers = replace(numbers, scale=E8M0)
        if self.scales != "amax":
            numbers = replace(numbers, scale_choice=self.scales)
        return replace(found, numbers=numbers)

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, given: Any) -> Any:
        """Fill in the defaults that depend on other fields: format, granularity, rounding and dtype of scales."""
        if not isinstance(given, dict):
            return given
        fields = dict(given)
        if fields.get("numerics") == "original":
            fields.setdefault("format", "fp8")
            fields.setdefault("granularity", "tensor")
        name = fields.setdefault("format", cls.model_fields["format"].default)
        if isinstance(name, str) and name in layout_names():
            layout = layout_named(name)
            best = "tensor" if fields.get("activations") == "static" else layout.best_granularity
            granularity = fields.setdefault("granularity", best)
            record = next((weight for key, weight in layout.weights.items() if key == granularity), None)
            if record is not None:
                fields.setdefault("scale_rounding", "none" if record.numbers.scale_rounding == "none" else POWER_OF_TWO)
                fields.setdefault("scale_dtype", "e8m0" if record.numbers.scale.title == E8M0.title else "float32")
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
        if self.numerics == "original" and self.scales != "amax":
            raise ValueError(
                "numerics 'original' computes scales as its script does; use scales 'amax', or numerics 'float32'"
            )
        if self.numerics == "original" and (self.granularity != "tensor" or self.share_scales):
            raise ValueError(
                "numerics 'original' supports one scale for each tensor only; use granularity 'tensor' without"
                " share_scales, or numerics 'float32'"
            )
        refusal = self.layout.refusal(self.scheme)
        if refusal is not None:
            raise ValueError(refusal)
        self._check_scales()
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
        return self

    def _check_scales(self) -> None:
        """Reject scales that no engine loads, and choices that the layout cannot state."""
        record = self.layout.weights[self.granularity].numbers
        if self.scales == "best" and self.granularity != "channel":
            raise ValueError(
                f"scales 'best' needs granularity 'channel': {NO_BEST_SCALES[self.granularity]}; use scales 'amax'"
            )
        if self.scale_rounding == "none" and record.scale_rounding == "mx":
            raise ValueError("granularity 'mx' stores powers of two only; use scale_rounding 'power-of-two'")
        if self.scale_rounding != "none" and self.granularity not in ("block", "mx"):
            raise ValueError(
                f"scale_rounding 'power-of-two' needs granularity 'block' or 'mx': with '{self.granularity}', engines"
                " keep scales as they are, and rounding costs accuracy"
            )
        if (self.scale_dtype == "e8m0") != (record.scale.title == E8M0.title):
            if self.scale_dtype == "float32":
                raise ValueError("granularity 'mx' stores scales as 'e8m0' only; use scale_dtype 'e8m0'")
            if self.layout.choice("scale_dtype", "e8m0", self.granularity) is None:
                raise ValueError(
                    f"no engine loads scales as 'e8m0' in format {self.format!r} with granularity"
                    f" '{self.granularity}'; use format 'fp8' with granularity 'block' and activations 'dynamic', or"
                    " scale_dtype 'float32'"
                )
            if self.scale_rounding == "none":
                raise ValueError("scale_dtype 'e8m0' holds powers of two only; use scale_rounding 'power-of-two'")
        if self.kv_cache != "none" and self.layout.choice("kv_cache", self.kv_cache, self.granularity) is None:
            raise ValueError(
                f"format {self.format!r} has no entry for an FP8 KV cache that all of its engines follow; pass the"
                " engine's own option (vLLM and SGLang: --kv-cache-dtype fp8_e4m3), or use format 'compressed-tensors'"
            )


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
            stated: dict[str, Any] = {choice.field: choice.value for choice in layout.choices_in(config, scheme)}
            return Recipe(format=layout.name, granularity=scheme.granularity, activations=scheme.activations, **stated)
    return None
