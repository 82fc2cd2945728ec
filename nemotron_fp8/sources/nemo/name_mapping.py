"""Map names and shapes of NeMo to those of Hugging Face, for Nemotron-4.

The rows of ``linear_qkv`` are ordered by query group: the queries of the group's heads, then its key, then its value.
Layer norms are copied unchanged: both sides add the 1 of LayerNorm1P at run time.
Source: ``SelfAttention`` and ``get_query_key_value_tensors`` in Megatron-LM, ``NemotronDecoderLayer`` in
transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemotron_fp8.errors.nemo import ArrayShapeError, DuplicateArrayError, ExtraArrayError, MissingArrayError
from nemotron_fp8.sources.nemo.arrays import Band

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.sources.nemo.arrays import Stored
    from nemotron_fp8.sources.nemo.model_config import Model


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
LAYERS = "decoder.layers."
QKV = "self_attention.linear_qkv.weight"

_PREFIX = re.compile(r"^(?:(?:model|module)\.)+(?=embedding\.|decoder\.|output_layer\.)")
_ONE_LAYER = re.compile(r"^decoder\.layers\.(\d{1,9})\.(.+)$", re.ASCII)
_LEFT_OUT = re.compile(r"(^|\.)(optimizer|rng_state|rerun_state_machine_state|opt_param_scheduler)(\.|$)")
"""Arrays of a training checkpoint that are not part of the model."""

LAYER_NORMS = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias"),
    ("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ("post_attention_layernorm.bias", "mlp.linear_fc1.layer_norm_bias"),
)


def plain_name(name: str) -> str:
    """Return an array's name without the prefixes ``model.`` and ``module.`` of NeMo and Megatron."""
    return _PREFIX.sub("", name)


def why_left_out(name: str) -> str | None:
    """Return the reason why an array is not part of the model; None if it is."""
    return "training state, not weights" if _LEFT_OUT.search(name) else None


@dataclass(frozen=True)
class Table:
    """Arrays of a checkpoint by their role in the model.

    Attributes:
        source: name of the checkpoint in messages.
        model: dimensions and settings of the model.
        arrays: arrays by plain name; those of single layers under their own names, ``decoder.layers.L.…``.
    """

    source: str
    model: Model
    arrays: dict[str, Stored]
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, source: str, model: Model, stored: Iterable[Stored]) -> Table:
        """Sort arrays by plain name.

        Raises:
            DuplicateArrayError: two arrays have the same plain name.
        """
        arrays: dict[str, Stored] = {}
        for array in stored:
            first = arrays.setdefault(plain_name(array.name), array)
            if first is not array:
                raise DuplicateArrayError(source, first.name, array.name)
        table = cls(source, model, arrays)
        for name, array in arrays.items():
            found = _ONE_LAYER.match(name)
            if found and LAYERS + found.group(2) in arrays:
                raise DuplicateArrayError(source, arrays[LAYERS + found.group(2)].name, array.name)
        return table

    def array(self, name: str, shape: tuple[int, ...], why: str) -> Stored:
        """Return an array of the model by its plain name.

        Raises:
            MissingArrayError: there is no such array.
            ArrayShapeError: the array has another shape.
        """
        array = self.arrays.get(name)
        if array is None:
            raise MissingArrayError(self.full_name(name), self.source)
        if array.shape != shape:
            raise ArrayShapeError(array.name, array.shape, shape, why)
        self.used.add(name)
        return array

    def layer(self, index: int, name: str, shape: tuple[int, ...], why: str) -> Stored:
        """Return one layer's part of an array, from an array of all layers or from an array of its own."""
        stacked = LAYERS + name
        if stacked in self.arrays:
            layers = self.model.layers
            return self.array(stacked, (layers, *shape), f"{layers} layers, {why}").layer(index)
        alone = f"{LAYERS}{index}.{name}"
        if alone not in self.arrays:
            raise MissingArrayError(self.full_name(alone if index else stacked), self.source)
        return self.array(alone, shape, why)

    def full_name(self, name: str) -> str:
        """Return a plain name with the prefix of this checkpoint's names."""
        for plain, array in self.arrays.items():
            if array.name.endswith(plain) and array.name != plain:
                return array.name.removesuffix(plain) + name
        return name

    def outside(self) -> list[Stored]:
        """Return the arrays that belong to no tensor.

        Raises:
            ExtraArrayError: one of them is a part of the decoder, the embedding or the output layer: the model
                computes something that NemotronForCausalLM does not.
        """
        found = {name: array for name, array in self.arrays.items() if name not in self.used}
        for name, array in found.items():
            if name.startswith(("decoder.", "embedding.", "output_layer.")):
                raise ExtraArrayError(array.name, self.source)
        return list(found.values())


def tensors(table: Table) -> Iterator[TensorView]:
    """Yield the tensors of NemotronForCausalLM, in the order of its parameters.

    Raises:
        MissingArrayError: an array of the model is missing.
        ArrayShapeError: the shape of an array differs from the model config.
    """
    model = table.model
    hidden = (model.hidden,)
    embedding = _vocabulary_array(table, EMBEDDING)
    yield embedding.whole("model.embed_tokens.weight")
    for index in range(model.layers):
        stem = f"model.layers.{index}."
        yield from _attention(table, index, f"{stem}self_attn.")
        up = table.layer(index, "mlp.linear_fc1.weight", (model.inner, model.hidden), "[ffn, hidden]")
        yield up.whole(f"{stem}mlp.up_proj.weight")
        down = table.layer(index, "mlp.linear_fc2.weight", (model.hidden, model.inner), "[hidden, ffn]")
        yield down.whole(f"{stem}mlp.down_proj.weight")
        for name, theirs in LAYER_NORMS:
            yield table.layer(index, theirs, hidden, "[hidden]").whole(stem + name)
    for part in ("weight", "bias"):
        norm = table.array(f"decoder.final_layernorm.{part}", hidden, "[hidden]")
        yield norm.whole(f"model.norm.{part}")
    has_head = OUTPUT in table.arrays
    if has_head and not model.tied:
        yield table.array(OUTPUT, embedding.shape, "as the embedding").whole("lm_head.weight")
    elif not model.tied and not any("rm_head" in array.name for array in table.arrays.values()):
        raise MissingArrayError(table.full_name(OUTPUT), table.source)


def _vocabulary_array(table: Table, name: str) -> Stored:
    """Return the embedding, whose rows (the padded vocabulary) no config records."""
    found = table.arrays.get(name)
    rows = found.shape[0] if found is not None and len(found.shape) == 2 else 1
    return table.array(name, (rows, table.model.hidden), "[vocabulary, hidden]")


def _attention(table: Table, index: int, stem: str) -> Iterator[TensorView]:
    """Yield q, k, v and o of a layer; q, k and v are bands of rows of one matrix."""
    model = table.model
    size, per_group = model.head_dim, model.heads // model.groups
    queries, step = per_group * size, (per_group + 2) * size
    qkv = table.layer(
        index,
        QKV,
        (model.groups * step, model.hidden),
        f"[{model.groups} groups * ({per_group} queries + key + value) * {size}, hidden]",
    )
    for name, begin, rows in (("q", 0, queries), ("k", queries, size), ("v", queries + size, size)):
        bands = [Band(group * step + begin, rows, group * rows) for group in range(model.groups)]
        yield qkv.matrix(f"{stem}{name}_proj.weight", model.groups * rows, bands)
    out = table.layer(
        index, "self_attention.linear_proj.weight", (model.hidden, model.heads * size), "[hidden, heads * size]"
    )
    yield out.whole(f"{stem}o_proj.weight")
