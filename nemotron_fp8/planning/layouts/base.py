"""The layout record and its registry.

A layout defines a quantized checkpoint on disk: names, shapes and dtypes of scales, the ``quantization_config``, and
the engines that load the result. Recipes, planners, documents and verification read the record.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from nemotron_fp8.checkpoint.dtypes import FLOAT8
from nemotron_fp8.checkpoint.json_text import same_json
from nemotron_fp8.planning.module_lists import ModuleList, Modules, matches_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.number_format import Granularity, NumberFormat


ENGINES = ("vLLM", "SGLang", "transformers")
"""Names of the engines of `Readers`."""

Activations: TypeAlias = Literal["dynamic", "static", "none"]
"""Treatment of activations by an engine: scaled and cast at run time, cast with a stored scale, or left in 16 bits."""


class Scheme(NamedTuple):
    """The choices of a recipe that decide its layout on disk."""

    granularity: Granularity
    activations: Activations


class Choice(NamedTuple):
    """A choice of a recipe beside its scheme that a ``quantization_config`` states.

    Attributes:
        field: field of the recipe.
        value: value of the field.
        entries: entries of ``quantization_config`` that state the choice.
        granularities: granularities at which the layout has the choice; empty for all.
        unread: engines that do not load a result with the choice, each with the reason and the way out; a text that
            follows the engine's name in a sentence.
        read_with: endings of names of tensors with which these engines load it after all.
        calibrated: True if only a result with scales of its own can have the choice.
    """

    field: str
    value: str
    entries: Mapping[str, Any]
    granularities: tuple[Granularity, ...] = ()
    unread: Mapping[str, str] = MappingProxyType({})
    read_with: tuple[str, ...] = ()
    calibrated: bool = False

    @property
    def is_stated(self) -> bool:
        """True if ``quantization_config`` shows the choice."""
        return bool(self.entries)


class Output(NamedTuple):
    """One tensor of an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def input_scale_of(weight: str) -> str:
    """Return the name of the stored scale of the inputs of a weight, in every layout."""
    return f"{weight.removesuffix('weight')}input_scale"


class StaticScales(NamedTuple):
    """Scales from a calibration on disk: of the inputs of a weight, and of an FP8 cache of keys and values.

    Attributes:
        shape: shape of every such scale, which is float32.
        of_projections: True if a scale of the cache has the name of the projection of keys or values, where the
            checkpoint has such a projection; False for that of the attention module.
        in_bfloat16: True if engines hold scales of the cache in bfloat16: they are rounded up to it.
    """

    shape: tuple[int, ...]
    of_projections: bool
    in_bfloat16: bool

    def input_scale_of(self, weight: str) -> Output:
        """Return the tensor with the scale of the inputs of a weight."""
        return Output(input_scale_of(weight), "F32", self.shape)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A quantized weight on disk: its numbers, and the tensor that holds its scales.

    Attributes:
        numbers: element type, scale type and coverage.
        scale_suffix: text after the weight's name in the name of its scale tensor.
        one_scale_shape: shape of the scale tensor if one scale covers the whole weight.
        scale_axes: dimensions of the scale tensor: an axis of the scales ``[rows, columns]``, or None for a dimension
            of 1; empty for the scales as they are.
    """

    numbers: NumberFormat
    scale_suffix: str = "_scale"
    one_scale_shape: tuple[int, ...] = ()
    scale_axes: tuple[int | None, ...] = ()

    def scale_of(self, view: TensorView) -> Output:
        """Return name, dtype and shape of the scale tensor of a weight ``[N, K]``."""
        scales = self.numbers.coverage.scale_shape(view.shape)
        shape = tuple(1 if axis is None else scales[axis] for axis in self.scale_axes) or scales or self.one_scale_shape
        return Output(view.name + self.scale_suffix, self.numbers.scale.dtype, shape)

    def with_block(self, block: tuple[int, int] | None) -> WeightFormat:
        """Return the same format with blocks of another size; None changes nothing."""
        if block is None:
            return self
        return replace(self, numbers=replace(self.numbers, coverage=replace(self.numbers.coverage, block=block)))

    def outputs(self, view: TensorView) -> tuple[Output, Output]:
        """Return the two tensors that a quantized weight becomes: elements and scales."""
        return Output(view.name, self.numbers.element.dtype, view.shape), self.scale_of(view)


@dataclass(frozen=True, slots=True)
class Readers:
    """Engines that load a layout, and their caveats.

    Attributes:
        vllm, sglang, transformers: True if the engine loads the layout.
        transformers_note: behavior of transformers; text that follows the name in a sentence.
        unread: other engines that do not load the layout, each with the reason and the way out; a text that follows the
            engine's name in a sentence.
        notice: caveat for the user; empty for none.
        no_routed_experts: reason why no engine loads the layout for routed experts, and the nearest layout that loads;
            empty if an engine loads it.
        unread_experts: engines that do not load the layout for routed experts, each with the reason and the way out; a
            text that follows the engine's name in a sentence.
    """

    vllm: bool
    sglang: bool
    transformers: bool
    transformers_note: str
    unread: Mapping[str, str] = field(default_factory=dict)
    notice: str = ""
    no_routed_experts: str = ""
    unread_experts: Mapping[str, str] = field(default_factory=dict)

    def by(self, engine: str) -> bool:
        """Return True if an engine of `ENGINES` loads the layout."""
        return {"vLLM": self.vllm, "SGLang": self.sglang, "transformers": self.transformers}[engine]


class ListReader(NamedTuple):
    """Reading of the list of unquantized modules in a ``quantization_config``, by engines.

    Attributes:
        engines: names of the engines.
        keys: keys that hold the list; the first non-empty one counts.
        matches: returns True if an entry matches the name of a module.
    """

    engines: tuple[str, ...]
    keys: tuple[str, ...]
    matches: Callable[[str, str], bool]

    def read(self, config: Mapping[str, Any]) -> ModuleList:
        """Return the list that these engines read in a ``quantization_config``."""
        return ModuleList(_names(config, self.keys), self.matches)


def _names(config: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    found: object = next((config[key] for key in keys if config.get(key)), [])
    return [str(name) for name in found] if isinstance(found, list) else []


@dataclass(frozen=True, eq=False)
class Layout:
    """A layout of quantized checkpoints.

    Attributes:
        name: value of `Recipe.format` and of ``--format``.
        weights: format of a quantized weight, by granularity.
        readers: engines that load the layout, by supported scheme.
        render_config: returns the ``quantization_config`` for a scheme and the linear modules.
        read_config: returns granularity and activations that a ``quantization_config`` describes; None for a config
            of another layout.
        unquantized_keys: keys of ``quantization_config`` that list unquantized modules.
        list_readers: how each engine reads these lists; empty for engines that compare whole names and read the first
            non-empty key.
        default_granularity: granularity of a recipe that names the layout alone: what most engines load, most exactly.
        refusals: reason and nearest alternative for a granularity or a treatment of activations that no engine loads.
        tags: tags of the model card.
        execution_scales: last names of tensors that scale activations or the KV cache; dequantizing drops them.
        block_path: keys that lead to rows and columns of a block in ``quantization_config``; empty if it has none.
        choices: further choices of a recipe that the layout can state, each with its entries of the config.
        beside: returns further files that state the quantization, each a JSON object by file name, from the
            ``quantization_config``.
        static: scales from a calibration; None for a layout that has none.
    """

    name: str
    weights: Mapping[Granularity, WeightFormat]
    readers: Mapping[Scheme, Readers]
    render_config: Callable[[Scheme, Modules], dict[str, Any]]
    read_config: Callable[[Mapping[str, Any]], tuple[object, object] | None]
    unquantized_keys: tuple[str, ...]
    refusals: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    execution_scales: frozenset[str] = frozenset()
    block_path: tuple[str, ...] = ()
    list_readers: tuple[ListReader, ...] = ()
    default_granularity: Granularity | None = None
    choices: tuple[Choice, ...] = ()
    beside: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=lambda _: {})
    static: StaticScales | None = None

    @property
    def best_granularity(self) -> Granularity:
        """Granularity of a recipe that names the layout alone."""
        return self.default_granularity or next(iter(self.readers)).granularity

    def readers_of_lists(self, scheme: Scheme) -> tuple[ListReader, ...]:
        """Return how the engines that load a scheme read the lists of unquantized modules."""
        loads = self.readers[scheme]
        found = self.list_readers or (ListReader(ENGINES, self.unquantized_keys, matches_exactly),)
        kept = (reader._replace(engines=tuple(e for e in reader.engines if loads.by(e))) for reader in found)
        return tuple(reader for reader in kept if reader.engines)

    def refusal(self, scheme: Scheme) -> str | None:
        """Return why the layout rejects a scheme, and the nearest alternative; None for a supported scheme."""
        if scheme in self.readers:
            return None
        # Most granularities that another layout has are refused there too with stored scales.
        for choice in sorted(scheme, key=lambda choice: choice != "static"):
            if choice in self.refusals:
                return self.refusals[choice]
        supported = ", ".join(f"'{granularity}' with '{activations}'" for granularity, activations in self.readers)
        return (
            f"format {self.name!r} does not store granularity '{scheme.granularity}' with activations"
            f" '{scheme.activations}'; use one of {supported}"
        )

    def scheme_of(self, config: Mapping[str, Any]) -> Scheme | None:
        """Return the supported scheme that a ``quantization_config`` describes; None for any other config."""
        found = self.read_config(config)
        return next((scheme for scheme in self.readers if scheme == found), None)

    def block_in(self, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """Return rows and columns of a block that a ``quantization_config`` states; None if it states none."""
        found: Any = config if self.block_path else None
        for key in self.block_path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, list) and len(found) == 2 and all(type(side) is int and side > 0 for side in found):
            return found[0], found[1]
        return None

    def unquantized_entries(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of a ``quantization_config`` that list unquantized modules."""
        return {key: config[key] for key in self.unquantized_keys if key in config}

    def choice(self, name: str, value: str, granularity: Granularity) -> Choice | None:
        """Return the record of a choice, by field and value; None if the layout cannot state it at a granularity."""
        found = (choice for choice in self.choices if (choice.field, choice.value) == (name, value))
        return next((c for c in found if not c.granularities or granularity in c.granularities), None)

    def config(self, scheme: Scheme, modules: Modules, chosen: Iterable[Choice] = ()) -> dict[str, Any]:
        """Return the ``quantization_config`` for a scheme, further choices and the linear modules."""
        config = self.render_config(scheme, modules)
        for choice in chosen:
            config |= choice.entries
        return config

    def choices_in(self, config: Mapping[str, Any], scheme: Scheme) -> tuple[Choice, ...]:
        """Return the further choices that a ``quantization_config`` of a scheme states."""
        return tuple(
            choice
            for choice in self.choices
            if choice.is_stated
            and (not choice.granularities or scheme.granularity in choice.granularities)
            and all(key in config and same_json(config[key], value) for key, value in choice.entries.items())
        )

    def describes(self, config: Mapping[str, Any], scheme: Scheme) -> bool:
        """Return True if a ``quantization_config`` is that of a scheme, whatever modules it lists."""
        lists = set(self.unquantized_keys)
        wanted = self.config(scheme, Modules(), self.choices_in(config, scheme))
        return same_json(
            {k: v for k, v in config.items() if k not in lists}, {k: v for k, v in wanted.items() if k not in lists}
        )


_layouts: dict[str, Layout] = {}


def register_layout(layout: Layout) -> None:
    """Register a layout for recipes, planners, documents and verification.

    Raises:
        ValueError: the record has no name or no readers, a layout of this name is registered, a scheme has a
            granularity without a weight format, or a weight format has no suffix for its scales or an empty block.
    """
    if not layout.name or not layout.readers:
        raise ValueError(f"layout {layout.name!r} has no name, or no readers")
    if layout.name in _layouts:
        raise ValueError(f"a layout {layout.name!r} is already registered")
    for granularity, weight in layout.weights.items():
        coverage = weight.numbers.coverage
        if not weight.scale_suffix or min(coverage.block) < 1:
            raise ValueError(
                f"layout {layout.name!r}, granularity {granularity!r}: scale suffix {weight.scale_suffix!r}, block"
                f" {coverage.block}; the suffix needs a character, the block a row and a column"
            )
    for scheme in layout.readers:
        if scheme.granularity not in layout.weights:
            raise ValueError(f"layout {layout.name!r} has no weight format for granularity {scheme.granularity!r}")
    _layouts[layout.name] = layout


def unregister_layout(name: str) -> None:
    """Remove a registered layout."""
    del _layouts[name]


def layouts() -> tuple[Layout, ...]:
    """Return all registered layouts, in the order of registration."""
    return tuple(_layouts.values())


def layout_names() -> tuple[str, ...]:
    """Return the names of all registered layouts."""
    return tuple(_layouts)


def layout_named(name: str) -> Layout:
    """Return a registered layout.

    Raises:
        KeyError: no layout of this name is registered.
    """
    return _layouts[name]


def _weight_formats() -> list[WeightFormat]:
    return [weight for layout in _layouts.values() for weight in layout.weights.values()]


def scale_suffixes() -> tuple[str, ...]:
    """Return the suffixes of scale tensors of all layouts, each once."""
    return tuple(dict.fromkeys(weight.scale_suffix for weight in _weight_formats()))


def one_scale_shapes() -> frozenset[tuple[int, ...]]:
    """Return the shapes of a scale tensor that covers a whole weight, in any layout."""
    return frozenset(weight.one_scale_shape for weight in _weight_formats())


def stored_formats(config: object) -> list[WeightFormat]:
    """Return the formats that the quantized weights of a checkpoint may have.

    Args:
        config: the checkpoint's ``quantization_config``; any value, since it comes from outside.

    Returns:
        The format that the config describes. Where no layout recognizes the config, the formats of all layouts with
        8-bit floating-point elements: other dtypes hold other things too. Blocks have the size that the config states.
    """
    described: Mapping[str, Any] = config if isinstance(config, dict) else {}
    for layout in _layouts.values():
        found = layout.read_config(described)
        for granularity, weight in layout.weights.items():
            if found is not None and found[0] == granularity:  # any value, so it may have no hash
                return [weight.with_block(layout.block_in(described))]
    stated = next((block for layout in _layouts.values() if (block := layout.block_in(described))), None)
    return [weight.with_block(stated) for weight in _weight_formats() if weight.numbers.element.dtype in FLOAT8]


def quantized_dtypes(config: object) -> frozenset[str]:
    """Return the safetensors names of the elements of quantized weights in a checkpoint; ``config`` as above."""
    return frozenset(weight.numbers.element.dtype for weight in stored_formats(config))


def execution_scales() -> frozenset[str]:
    """Return the last names of tensors that scale activations or the KV cache, in any layout."""
    return frozenset[str]().union(*(layout.execution_scales for layout in _layouts.values()))
