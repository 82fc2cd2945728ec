"""Needs of an evaluation: memory, bytes to read, arithmetic and time, from headers and config.json alone.

An evaluation holds one decoder layer at a time and pushes all sequences through it, one after another, each checkpoint
in turn. The embedding is looked up row by row, and the output layer is read in slices of words. So the largest layer
and the hidden states of all sequences determine the memory, not the size of the checkpoints. Stacks of experts are
filled in place from single experts.

No weight is read here, and neither torch nor transformers is imported.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._utils import shortened
from nemotron_fp8.checkpoint.dtypes import BITS, QUANTIZABLE
from nemotron_fp8.checkpoint.stated_quantization import is_quantized_name
from nemotron_fp8.errors import EvaluationBudgetError, RecipeError, UnsupportedArchitectureError
from nemotron_fp8.planning.encoded_source import encoded_source
from nemotron_fp8.planning.evidence import LAYER, Evidence, decoder_configs
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.families.base import ENCODERS, EVERYWHERE, MTP
from nemotron_fp8.planning.quantize import decide_all
from nemotron_fp8.planning.quantized_source import dtype_of_others
from nemotron_fp8.planning.recipe import as_recipe
from nemotron_fp8.planning.stacked_experts import is_stack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.recipe import Recipe


DEFAULT_SEQUENCES = 16
"""Sequences of a sample: enough for a KL divergence with an error of about 3%."""
DEFAULT_LENGTH = 512
"""Tokens of a sequence."""
HEAD_WORDS = 8192
"""Most words of a slice of the output layer."""
HEAD_LOGITS = 1 << 20
"""Most logits of a slice of the output layer, for a sequence and a checkpoint."""
LEAST_WORDS = 64
"""Fewest words of a slice, however long a sequence is."""
FORWARD_COPIES = 4
"""Float32 copies of the widest activation of a sequence: gate, up, their product, and the cast of one of them."""
SCORE_COPIES = 2
"""Copies of the attention scores of a sequence, before and after the softmax, where attention is not fused."""
LOGIT_COPIES = 4
"""Float32 copies of the logits of a sequence beside those of each checkpoint: 16-bit logits, exponentials, products."""
PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "num_selected_experts"),
    *("moe_topk", "moe_top_k", "moe_k", "top_k_experts", "top_k"),
)
"""Keys of config.json that state the routed experts of a token. Source: the configs of transformers."""
FLOAT32 = BITS["F32"] // 8
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number of the model, by the name of its dtype in config.json."""
UNUSED = (*(rule for rule in EVERYWHERE if rule.reason == MTP), *ENCODERS)
"""Names of tensors that an evaluation of text does not use: layers for multi-token prediction, encoders."""
_ATTENTION = re.compile(r"(^|\.)((?!linear_)\w*(attn|attention)\w*|q_proj|qkv_proj|query_key_value)\.")


class Part(NamedTuple):
    """A part of the memory.

    Attributes:
        name: name for people.
        size: bytes.
        advice: way to make it smaller, or the resource to raise.
    """

    name: str
    size: int
    advice: str


@dataclass(frozen=True, slots=True)
class EvaluationNeeds:
    """Needs of an evaluation.

    Attributes:
        results: results that are compared with the source.
        sequences: sequences of the sample.
        length: tokens of a sequence.
        layers: decoder layers.
        itemsize: bytes of a number of the model in memory.
        layer_bytes: bytes of the largest decoder layer in memory.
        outside_bytes: bytes of the weights outside the layers that are held all the time, such as the last norm, of all
            checkpoints.
        hidden_bytes: bytes of the hidden states of all sequences and checkpoints.
        forward_bytes: bytes of the activations of one sequence in a layer.
        score_bytes: bytes of the attention scores of one sequence, at most: fused attention holds none.
        head_bytes: bytes of a slice of the output layer of each checkpoint, and of the logits.
        embedding_bytes: bytes of the rows of the embedding that the sample needs, at the beginning.
        output_bytes: bytes of the whole output layer, which is read in slices.
        source_read: bytes to read from the source.
        result_reads: bytes to read from each result.
        stream_flops: floating-point operations of one checkpoint; a multiplication and an addition are two.
        ahead: True if a layer is read during the computation with the one before, so that two are in memory.
    """

    results: int
    sequences: int
    length: int
    layers: int
    itemsize: int
    layer_bytes: int
    outside_bytes: int
    hidden_bytes: int
    forward_bytes: int
    score_bytes: int
    head_bytes: int
    embedding_bytes: int
    output_bytes: int
    source_read: int
    result_reads: tuple[int, ...]
    stream_flops: int
    ahead: bool = False

    @property
    def memory_bytes(self) -> int:
        """Peak bytes of weights and buffers: in the embedding, in the layers, or in the output layer."""
        in_layer = self._layers_held + self.forward_bytes + self.score_bytes
        return self.outside_bytes + self.hidden_bytes + max(self.embedding_bytes, in_layer, self.head_bytes)

    @property
    def _layers_held(self) -> int:
        return self.layer_bytes * (2 if self.ahead else 1)

    @property
    def read_bytes(self) -> int:
        """Bytes to read from all checkpoints, each once."""
        return self.source_read + sum(self.result_reads)

    @property
    def flops(self) -> int:
        """Floating-point operations of all checkpoints."""
        return (1 + self.results) * self.stream_flops

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts of the memory, without those of 0 bytes."""
        machine = "raise max_memory (--max-memory) on a machine that has it"
        shorter = "shorten the sequences (--length), or raise max_memory (--max-memory)"
        fewer = "take fewer sequences (--sequences), or raise max_memory (--max-memory)"
        spilled = f"keep them in a file (--spill), {fewer}"
        found = (
            Part("the largest decoder layer" + ", twice" * self.ahead, self._layers_held, machine),
            Part("the weights outside the layers", self.outside_bytes, machine),
            Part("the hidden states of all sequences", self.hidden_bytes, spilled),
            Part("the activations of a sequence", self.forward_bytes, shorter),
            Part("the attention scores of a sequence", self.score_bytes, shorter),
            Part("a slice of the output layer", self.head_bytes, shorter),
            Part("the rows of the embedding", self.embedding_bytes, fewer),
        )
        return tuple(part for part in found if part.size)


@dataclass(frozen=True, slots=True)
class Rates:
    """Speed of a device.

    Attributes:
        device: name for people.
        flops: floating-point operations per second.
        read: bytes read per second; None if unknown, as for the transfer from the Hub.
        measured: True for a measurement, False for an assumption.
        ahead: True if the device computes with a layer while the next one is read.
    """

    device: str
    flops: float
    read: float | None
    measured: bool = False
    ahead: bool = False


ASSUMED = (
    Rates("2 CPU cores", 0.2e12, 2e9),
    Rates("2 CPU cores with AMX", 1.6e12, 2e9),
    Rates("one H100", 400e12, 2e9, ahead=True),
)
"""Reference devices, with the speeds that are assumed for them: bf16 products of matrices, and a local disk."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted time of an evaluation on a device.

    Attributes:
        rates: speed of the device.
        read_seconds: seconds of reading; None if the rate is unknown.
        compute_seconds: seconds of arithmetic.
        ahead: True if both are at the same time.
    """

    rates: Rates
    read_seconds: float | None
    compute_seconds: float
    ahead: bool = False

    @property
    def seconds(self) -> float | None:
        """Seconds of both: their sum, or the longer ones of work at the same time; None if the rate is unknown."""
        if self.read_seconds is None:
            return None
        if self.ahead:
            return max(self.read_seconds, self.compute_seconds)
        return self.read_seconds + self.compute_seconds


def predict(needs: EvaluationNeeds, rates: Rates) -> Prediction:
    """Return the predicted time of an evaluation on a device."""
    read = None if rates.read is None else needs.read_bytes / rates.read
    return Prediction(rates, read, needs.flops / rates.flops, needs.ahead or rates.ahead)


def evaluation_needs(
    inventory: Inventory,
    results: int = 1,
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    *,
    known: Sequence[Inventory] = (),
    recipe: Recipe | None = None,
    ahead: bool = False,
) -> EvaluationNeeds:
    """Return the needs of an evaluation.

    Args:
        inventory: contents of the source.
        results: results that are compared with the source.
        sequences: sequences of the sample.
        length: tokens of a sequence.
        known: contents of the first results; the sizes of others are estimated.
        recipe: recipe of the other results; None for the default.
        ahead: True for a checkpoint on the Hub: a layer is fetched during the computation with the one before.

    Raises:
        UnsupportedArchitectureError: no decoder layer or no output layer is found.
        LayoutError: an FP8 tensor has no scale, several, or one whose shape fits no known layout.
        RecipeError: a number or the recipe has an unsupported value.
    """
    _check_counts(len(known), results, "results")
    _check_counts(1, sequences, "sequences")
    _check_counts(2, length, "length")
    source = _Checkpoint(inventory)
    others = [_Checkpoint(each) for each in known]
    unknown = results - len(known)
    reads = [other.read for other in others]
    if unknown:
        reads += [_estimated_read(source, as_recipe(recipe))] * unknown
    met = sum(map(source.met, source.layers.values())) + prod(source.output)
    return needs_of(
        results,
        sequences,
        length,
        layers=len(source.layers),
        itemsize=source.itemsize,
        layer_bytes=max(map(source.held, source.layers.values())),
        outside_bytes=source.held(source.outside),
        hidden=source.hidden,
        widest=source.widest,
        words=source.output[0],
        output_bytes=prod(source.output) * source.itemsize,
        reads=[source.read, *reads],
        heads=source.heads,
        # Causal attention: a token meets half of the others, on average.
        stream_flops=2 * met * sequences * length + sequences * length**2 * source.attention_width,
        ahead=ahead,
    )


def needs_of(
    results: int,
    sequences: int,
    length: int,
    *,
    layers: int,
    itemsize: int,
    layer_bytes: int,
    outside_bytes: int,
    hidden: int,
    widest: int,
    words: int,
    output_bytes: int,
    reads: Sequence[int],
    heads: int = 0,
    stream_flops: int = 0,
    ahead: bool = False,
) -> EvaluationNeeds:
    """Return the needs of an evaluation of a model of known sizes.

    Args:
        results: results that are compared with the source.
        sequences: sequences of the sample.
        length: tokens of a sequence.
        layers: decoder layers.
        itemsize: bytes of a number of the model in memory.
        layer_bytes: bytes of the largest decoder layer in memory.
        outside_bytes: bytes of the weights outside the layers that are held, of one checkpoint.
        hidden: size of a hidden state.
        widest: largest side of a matrix in a layer.
        words: rows of the output layer.
        output_bytes: bytes of the output layer.
        reads: bytes to read from the source, then from each result.
        heads: attention heads whose scores are held; 0 for fused attention.
        stream_flops: floating-point operations of one checkpoint.
        ahead: True if a layer is read during the computation with the one before.
    """
    streams, tokens, slice_words = 1 + results, sequences * length, min(head_words(length), words)
    return EvaluationNeeds(
        results=results,
        sequences=sequences,
        length=length,
        layers=layers,
        itemsize=itemsize,
        layer_bytes=layer_bytes,
        outside_bytes=streams * outside_bytes,
        hidden_bytes=streams * tokens * hidden * itemsize,
        forward_bytes=FORWARD_COPIES * length * max(widest, hidden) * FLOAT32,
        score_bytes=SCORE_COPIES * heads * length**2 * itemsize,
        head_bytes=streams * slice_words * hidden * itemsize
        + (streams + LOGIT_COPIES) * length * slice_words * FLOAT32,
        embedding_bytes=min(tokens, words) * hidden * itemsize,
        output_bytes=output_bytes,
        source_read=reads[0],
        result_reads=tuple(reads[1:]),
        stream_flops=stream_flops,
        ahead=ahead,
    )


def head_words(length: int) -> int:
    """Return the words of a slice of the output layer for sequences of some tokens."""
    return min(max(HEAD_LOGITS // length, LEAST_WORDS), HEAD_WORDS)


def needs_layer_files(needs: EvaluationNeeds, budget: int) -> bool:
    """Return True if layers have to be in files to fit a budget in bytes, False if they fit into memory.

    Raises:
        EvaluationBudgetError: all else exceeds the budget.
    """
    if needs.memory_bytes <= budget:
        return False
    rest = replace(needs, layer_bytes=0)
    if rest.memory_bytes <= budget:
        return True
    largest = max(rest.parts, key=lambda part: part.size)
    part = f"{largest.name} ({largest.size:,} bytes)"
    raise EvaluationBudgetError(part, rest.memory_bytes, budget, largest.advice)


def _check_counts(least: int, value: object, name: str) -> None:
    """Raise RecipeError for a number that is below its least value."""
    if type(value) is not int or value < least:
        raise RecipeError(f"{name} is {shortened(value)}, not a number of at least {least}", (name,))


def _estimated_read(source: _Checkpoint, recipe: Recipe) -> int:
    """Return the bytes to read of a result that is not made yet: one for each quantized weight, and the scales."""
    inventory, decisions, _ = decide_all(source.inventory, recipe, source.family)
    numbers = recipe.weight_format.numbers
    total = 0
    for view in inventory.views:
        if not source.uses(view):
            continue
        if decisions[view.name].quantize:
            scales = prod(numbers.coverage.scale_shape(view.shape))
            total += (view.numel * BITS[numbers.element.dtype] + scales * BITS[numbers.scale.dtype]) // 8
        else:
            total += source.held([view]) if view.encoding is not None else view.nbytes
    return total


class _Checkpoint:
    """Weights of a checkpoint by their place in the model.

    Attributes:
        inventory: contents of the checkpoint, with views of the values of quantized weights.
        family: model family.
        itemsize: bytes of a number of the model in memory.
        layers: weights of each decoder layer, by the start of their names.
        outside: weights outside the layers that are held: neither the embedding of words nor the output layer.
        output: rows and columns of the output layer.
    """

    def __init__(self, inventory: Inventory) -> None:
        source = encoded_source(inventory)
        self.inventory, self._scales = source.inventory, source.scales
        self.family = family_of(inventory.config)
        self._config = inventory.config or {}
        self._evidence = Evidence(self.inventory.views, self.family, inventory.config)
        self._views = [view for view in self.inventory.views if self.uses(view)]
        self.itemsize = self._stated_itemsize or BITS[dtype_of_others(self._views, inventory.config)] // 8
        found: defaultdict[str, defaultdict[str, list[TensorView]]] = defaultdict(lambda: defaultdict(list))
        for view in self._views:
            layer = LAYER.match(view.name)
            found[layer.group("stem") if layer else ""][layer.group() if layer else ""].append(view)
        # The largest modules are the layers; some models number their output layers too.
        sizes = {stem: sum(map(self.held, layers.values())) for stem, layers in found.items() if "" not in layers}
        decoder = max(sizes, key=lambda stem: sizes[stem], default="")
        self.layers = dict(found.pop(decoder, {})) if sizes else {}
        self.outside: list[TensorView] = []
        tables: list[TensorView] = []
        heads: list[TensorView] = []
        for view in (view for layers in found.values() for views in layers.values() for view in views):
            role = heads if self._is_head(view) else tables if self._is_table(view) else self.outside
            role.append(view)
        if not self.layers or self._config.get("is_encoder_decoder"):
            raise self._unsupported("it has no layers of a decoder alone")
        # A checkpoint with tied embeddings holds one table for both.
        embedding = sorted(tables, key=self._likeness)[-1:]
        self.outside += [view for view in tables if view not in embedding]
        output = heads or embedding
        if not output:
            raise self._unsupported("no output layer is known by its name or its shape")
        self.output = sum(view.shape[0] for view in output), output[0].shape[1]

    @property
    def _stated_itemsize(self) -> int | None:
        """Bytes of a number of the model as its config states them; None without a statement."""
        text = self._config.get("text_config")
        stated = [
            config.get(key)
            for config in (self._config, text if isinstance(text, dict) else {})
            for key in ("dtype", "torch_dtype")
        ]
        return next((ITEMSIZES[name] for name in stated if isinstance(name, str) and name in ITEMSIZES), None)

    def _unsupported(self, reason: str) -> UnsupportedArchitectureError:
        kind = self._config.get("model_type")
        return UnsupportedArchitectureError(self.inventory.source, kind if isinstance(kind, str) else "", reason)

    def uses(self, view: TensorView) -> bool:
        """Return True for a weight that an evaluation of text uses."""
        name, evidence = view.name, self._evidence
        return not (
            name in self._scales
            or is_quantized_name(name)
            or any(rule.matches(name) for rule in UNUSED)
            or evidence.is_beyond_the_layers(name)
            or evidence.is_beside_the_decoder(name)
        )

    def _is_head(self, view: TensorView) -> bool:
        if len(view.shape) != 2:
            return False
        if any(rule.matches(view.name) for rule in self.family.heads):
            return True
        named_table = any(rule.matches(view.name) for rule in self.family.embeddings)
        return self._evidence.is_vocabulary(view) and not named_table

    def _likeness(self, view: TensorView) -> tuple[bool, bool, int]:
        """Return how much a lookup table is like that of the words: a row for each, of the size of a hidden state."""
        size = self._evidence.hidden_size
        return self._evidence.is_vocabulary(view), view.shape[1] == size, view.numel

    def _is_table(self, view: TensorView) -> bool:
        return len(view.shape) == 2 and any(rule.matches(view.name) for rule in self.family.embeddings)

    def held(self, views: Iterable[TensorView]) -> int:
        """Return the bytes of weights in memory, where floating-point numbers have the dtype of the model."""
        return sum(v.numel * self.itemsize if v.dtype in QUANTIZABLE else v.nbytes for v in views)

    @property
    def read(self) -> int:
        """Bytes of the weights in files, with their scales."""
        return sum(part.nbytes for view in self._views for part in view.stored)

    @property
    def hidden(self) -> int:
        """Size of a hidden state."""
        return self._evidence.hidden_size or self.output[1]

    @property
    def heads(self) -> int:
        """Attention heads of a layer; 0 if the config does not state them."""
        return (self._evidence.heads.queries or 0) if self._attention_layers else 0

    @property
    def attention_width(self) -> int:
        """Numbers of the queries and of the values of a token, of all heads and layers."""
        count = self._evidence.count
        common = count("head_dim") or (self.hidden // self.heads if self.heads else 0)
        without, rotated = count("qk_nope_head_dim"), count("qk_rope_head_dim")
        queries = without + rotated if without and rotated else common
        return self._attention_layers * self.heads * (queries + (count("v_head_dim") or common))

    @cached_property
    def _attention_layers(self) -> int:
        return sum(
            any(len(view.shape) == 2 and _ATTENTION.search(view.name) for view in views)
            for views in self.layers.values()
        )

    @property
    def widest(self) -> int:
        """Largest side of a matrix in a layer: the widest activation of a token."""
        shapes = (view.shape[-2:] for views in self.layers.values() for view in views if len(view.shape) > 1)
        return max((max(shape) for shape in shapes), default=0)

    def met(self, views: Iterable[TensorView]) -> int:
        """Return the weights of a layer that a token meets: of routed experts, its share."""
        views = [view for view in views if len(view.shape) > 1]
        modules = {view.name: self._experts_of(view.name) for view in views}
        counts = Counter(module for module, _ in {place for place in modules.values() if place is not None})
        weights: Counter[int] = Counter()
        for view in views:
            place = modules[view.name]
            experts = counts[place[0]] if place else view.shape[0] if is_stack(view, self.family) else 1
            weights[max(experts, 1)] += view.numel
        return sum(total * min(self._per_token or experts, experts) // experts for experts, total in weights.items())

    def _experts_of(self, name: str) -> tuple[str, str] | None:
        """Return the module of the routed experts and the expert that a weight belongs to; None for any other."""
        found = self.family.routed.search(name)
        if found is None:
            return None
        expert = name[: found.end() - 1]
        return expert.rpartition(".")[0], expert

    @cached_property
    def _per_token(self) -> int | None:
        """Routed experts of a token; None if the config does not state them, so that all count.

        A config may list a number for each layer: the largest counts.
        """
        for key in PER_TOKEN:
            for config in reversed(list(decoder_configs(self._config))):
                counts = [value for value in _as_list(config.get(key)) if type(value) is int and value > 0]
                if counts:
                    return max(counts)
        return None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
