"""Evidence about a checkpoint, for the rules that select tensors: from names, shapes and config.json alone."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nemotron_fp8.planning.engine_support import Heads
from nemotron_fp8.planning.families.base import EVERYWHERE, MAYBE_LINEAR, PROJECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.families import Family


LAYER = re.compile(r"^(?P<stem>(?:[^.]+\.)*?)(?P<number>\d+)\.")
"""The first number in a name: that of a layer."""
DECODER_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
FEED_FORWARD = re.compile(r"(^|\.)\w*(mlp|moe|ffn|feed_forward|expert)\w*\.")
MAX_DEPTH = 8
"""Most levels of sub-configs that are looked into; published configs have three."""
_EXPERTS = re.compile(r"(num|n)_\w*experts?|num_experts|moe_num_experts", re.IGNORECASE)
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_ENCODER_CONFIGS = re.compile(
    r"vision|visual|audio|image|speech|encoder|qformer|perceiver|codec|talker|vq|depth"
    r"|projector|adapt[eo]r|connector|aligner|resampler|merger"
)


class Evidence:
    """Evidence about the tensors of a checkpoint, from names, shapes and config.json.

    Args:
        views: all tensors of a source.
        family: model family of the source.
        config: config.json; None without one.
    """

    def __init__(self, views: Sequence[TensorView], family: Family, config: Mapping[str, Any] | None) -> None:
        self._views, self._family, self._config = views, family, config or {}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {view.name: view.shape for view in self._views}

    @cached_property
    def has_table(self) -> bool:
        """True if the checkpoint holds a lookup table, by its name or by a row for each word of the vocabulary."""
        rules = self._family.embeddings
        return any(
            len(view.shape) == 2 and (self.is_vocabulary(view) or any(rule.matches(view.name) for rule in rules))
            for view in self._views
        )

    def is_vocabulary(self, view: TensorView) -> bool:
        """Return True for a matrix outside the layers with a row for each word: a lookup table or an output layer."""
        return view.shape[0] in self.vocabularies and LAYER.match(view.name) is None

    @cached_property
    def _layers(self) -> frozenset[str]:
        """Starts of the names of repeated layers: those with a norm or a bias, or a projection."""
        found = set()
        for view in self._views:
            if (len(view.shape) == 1 or view.name.endswith(PROJECTIONS)) and (layer := LAYER.match(view.name)):
                found.add(layer.group())
        return frozenset(found)

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Names of the modules that hold the decoder's layers and its lookup table; empty if none is sure.

        The layers beside a table with a row for each word are those of the decoder, if they are as many as the config
        states: a checkpoint may hold encoders of any name, with layers of their own.
        """
        tables = {
            view.name.removesuffix(".weight").rpartition(".")[0]
            for view in self._views
            if len(view.shape) == 2 and self.is_vocabulary(view)
        }
        numbers: defaultdict[str, set[str]] = defaultdict(set)
        for view in self._views:
            if found := LAYER.match(view.name):
                numbers[found.group("stem")].add(found.group("number"))
        holders = {stem: stem.rstrip(".").rpartition(".")[0] for stem in numbers}
        return frozenset(
            holder
            for stem, holder in holders.items()
            if holder in tables and self.layer_count is not None and len(numbers[stem]) >= self.layer_count
        )

    def is_beside_the_decoder(self, name: str) -> bool:
        """Return True for a tensor of repeated layers that are surely not the decoder's."""
        found = LAYER.match(name) if self._decoders else None
        return found is not None and found.group("stem").rstrip(".").rpartition(".")[0] not in self._decoders

    def is_repeated(self, name: str) -> bool:
        """Return True for a tensor of a repeated layer that has a norm, a bias or a projection."""
        layer = LAYER.match(name)
        return layer is not None and layer.group() in self._layers

    def is_in_layer(self, name: str) -> bool:
        """Return True for a tensor of such a layer in a model that has a lookup table."""
        return self.is_repeated(name) and self.has_table

    @cached_property
    def _decoder_configs(self) -> list[Mapping[str, Any]]:
        return list(decoder_configs(self._config))

    @cached_property
    def expert_counts(self) -> frozenset[int]:
        """Numbers of experts in the config: the number of rows of a router."""
        return frozenset(
            value
            for config in self._decoder_configs
            for key, value in config.items()
            if type(value) is int and value > 1 and _EXPERTS.fullmatch(key)
        )

    @cached_property
    def vocabularies(self) -> frozenset[int]:
        """Sizes of vocabularies: the number of rows of a lookup table and of an output layer.

        They are in the config; without them, the largest table by its name tells.
        """
        stated = frozenset(
            value
            for config in self._decoder_configs
            for key, value in config.items()
            if type(value) is int and value > 1 and key in ("vocab_size", "n_vocab", "padded_vocab_size")
        )
        if stated:
            return stated
        tables = [rule for rule in self._family.embeddings if rule is not MAYBE_LINEAR]
        rows = (
            view.shape[0]
            for view in self._views
            if len(view.shape) == 2
            and view.shape[0] > view.shape[1]
            and any(rule.matches(view.name) for rule in tables)
        )
        return frozenset({max(rows, default=0)} - {0})

    @cached_property
    def layer_count(self) -> int | None:
        """Number of decoder layers in the config; None if it has none, or an encoder with layers of its own."""
        if self._config.get("is_encoder_decoder") or "decoder_layers" in self._config:
            return None
        counts = [config[key] for config in self._decoder_configs for key in _LAYERS if type(config.get(key)) is int]
        return max(counts, default=None)

    @cached_property
    def hidden_size(self) -> int | None:
        """Size of a hidden state of the decoder in the config; None without one."""
        return self.count("hidden_size", "n_embd", "d_model")

    @cached_property
    def heads(self) -> Heads:
        """Attention heads of the decoder in the config."""
        queries = self.count("num_attention_heads", "n_head")
        return Heads(queries, self.count("num_key_value_heads", "num_kv_heads") or queries)

    def count(self, *keys: str) -> int | None:
        """Return a number of the decoder in the config, from the innermost config that has it; None without one."""
        counts = [config.get(key) for config in self._decoder_configs for key in keys]
        return next((count for count in reversed(counts) if type(count) is int and count > 0), None)

    @cached_property
    def _predictors(self) -> frozenset[str]:
        """Starts of the names of layers for multi-token prediction, as their input projection shows."""
        names = (view.name for view in self._views if view.name.endswith(".eh_proj.weight"))
        return frozenset(layer.group() for name in names if (layer := LAYER.match(name)))

    def is_beyond_the_layers(self, name: str) -> bool:
        """Return True for a tensor of a layer behind the last one: the multi-token prediction of GLM and DeepSeek."""
        if self._predictors and (layer := LAYER.match(name)) and layer.group() in self._predictors:
            return True
        found = DECODER_LAYER.search(name) if self.layer_count else None
        return found is not None and self.layer_count is not None and int(found.group(2)) >= self.layer_count

    @cached_property
    def _orders(self) -> tuple[frozenset[str], frozenset[str]]:
        """Last names of modules in layers whose bias shows a weight ``[in, out]``, and of those with ``[out, in]``."""
        found: tuple[set[str], set[str]] = set(), set()
        for view in self._views:
            if len(view.shape) == 2 and view.shape[0] != view.shape[1] and LAYER.match(view.name):
                bias = self.shapes.get(view.name.removesuffix(".weight") + ".bias")
                for side, names in ((1, found[0]), (0, found[1])):
                    if bias == (view.shape[side],):
                        names.add(_module_of(view.name))
        return frozenset(found[0]), frozenset(found[1])

    def is_transposed(self, view: TensorView) -> bool:
        """Return True for a matrix stored ``[in, out]``, as its bias or that of a module of the same name shows.

        Where all biases of several modules show that order, matrices without a bias and square ones have it too.
        """
        transposed, upright = self._orders
        everywhere = len(transposed) > 1 and not upright and LAYER.match(view.name) is not None
        return self._family.transposed or everywhere or _module_of(view.name) in transposed

    def is_router(self, view: TensorView) -> bool:
        """Return True for a matrix of a feed-forward part with a row for each expert, that is no projection by name."""
        return (
            FEED_FORWARD.search(view.name) is not None
            and view.shape[0] in self.expert_counts
            and not view.name.endswith("_proj.weight")
            and view.shape[0] < view.shape[1]
            and not self._family.is_routed(view.name)
        )

    def is_state_space(self, name: str) -> bool:
        """Return True for input and output of a Mamba-1 mixer, which engines build unquantized with its rest."""
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        return last in ("in_proj", "out_proj") and f"{stem}.x_proj.weight" in self.shapes

    @cached_property
    def attention_and_state_space(self) -> tuple[frozenset[int], frozenset[int]]:
        """Numbers of the layers with attention, and of those with a Mamba mixer, of Nemotron-H."""
        kinds: defaultdict[str, set[int]] = defaultdict(set)
        for view in self._views:
            found = DECODER_LAYER.search(view.name)
            if found and not any(rule.matches(view.name) for rule in EVERYWHERE):
                kinds[view.name[found.end() :]].add(int(found.group(2)))
        return frozenset(kinds["mixer.q_proj.weight"]), frozenset(kinds["mixer.in_proj.weight"])


def _module_of(name: str) -> str:
    """Return the last name of the module of a weight."""
    return name.rpartition(".")[0].rpartition(".")[2]


def decoder_configs(config: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield a config and its sub-configs, without those of encoders."""
    yield config
    if depth < MAX_DEPTH:
        for key, value in config.items():
            if isinstance(value, dict) and not _ENCODER_CONFIGS.search(key):
                yield from decoder_configs(value, depth + 1)
