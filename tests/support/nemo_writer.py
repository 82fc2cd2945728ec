"""NeMo checkpoints for tests, written by code that shares nothing with the reader.

From the tensors of a Hugging Face Nemotron: q, k and v are interleaved by query group with reshape and cat,
layers stacked, and every array is cut into chunks by slicing a padded copy.
"""

from __future__ import annotations

import itertools
import json
import struct
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = """\
mcore_gpt: true
encoder_seq_length: {positions}
max_position_embeddings: ${{.encoder_seq_length}}
num_layers: {layers}
hidden_size: {hidden}
ffn_hidden_size: {inner}
num_attention_heads: {heads}
init_method_std: 0.0063
kv_channels: {kv_channels}
normalization: layernorm1p
layernorm_epsilon: 1.0e-05
bias: false
activation: squared-relu
transformer_block_type: pre_ln
position_embedding_type: rope
rotary_percentage: 0.5
rotary_base: {rotary_base}
share_embeddings_and_output_weights: false
num_query_groups: {groups}
seq_len_interpolation_factor: null
tokenizer:
  library: sentencepiece
  model: nemo:0123_tokenizer.model
precision: bf16
"""


class Sizes:
    """The sizes of a tiny model."""

    def __init__(
        self,
        *,
        layers: int = 3,
        heads: int = 6,
        groups: int = 2,
        head_dim: int = 8,
        hidden: int = 48,
        inner: int = 80,
        vocabulary: int = 64,
        positions: int = 64,
        rotary_base: int = 10000,
    ) -> None:
        self.layers, self.heads, self.groups, self.head_dim = layers, heads, groups, head_dim
        self.hidden, self.inner, self.vocabulary, self.positions = hidden, inner, vocabulary, positions
        self.rotary_base = rotary_base

    def yaml(self) -> str:
        """The model config."""
        return CONFIG.format(
            positions=self.positions,
            rotary_base=self.rotary_base,
            layers=self.layers,
            hidden=self.hidden,
            inner=self.inner,
            heads=self.heads,
            groups=self.groups,
            kv_channels="null" if self.head_dim * self.heads == self.hidden else self.head_dim,
        )


def hf_tensors(sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of a Nemotron in Hugging Face's names, shapes and order, bf16."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int) -> None:
        made[name] = (torch.randn(shape, generator=generator) * 0.1).bfloat16()

    add("model.embed_tokens.weight", sizes.vocabulary, sizes.hidden)
    for layer in range(sizes.layers):
        stem = f"model.layers.{layer}"
        add(f"{stem}.self_attn.q_proj.weight", sizes.heads * sizes.head_dim, sizes.hidden)
        add(f"{stem}.self_attn.k_proj.weight", sizes.groups * sizes.head_dim, sizes.hidden)
        add(f"{stem}.self_attn.v_proj.weight", sizes.groups * sizes.head_dim, sizes.hidden)
        add(f"{stem}.self_attn.o_proj.weight", sizes.hidden, sizes.heads * sizes.head_dim)
        add(f"{stem}.mlp.up_proj.weight", sizes.inner, sizes.hidden)
        add(f"{stem}.mlp.down_proj.weight", sizes.hidden, sizes.inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{stem}.{norm}.weight", sizes.hidden)
            add(f"{stem}.{norm}.bias", sizes.hidden)
    add("model.norm.weight", sizes.hidden)
    add("model.norm.bias", sizes.hidden)
    add("lm_head.weight", sizes.vocabulary, sizes.hidden)
    return made


def nemo_arrays(
    tensors: Mapping[str, torch.Tensor], sizes: Sizes, prefix: str = "model.", *, stacked: bool = True
) -> dict[str, torch.Tensor]:
    """The same model as Megatron's arrays: fused, interleaved by query group, layers on dimension 0."""
    layers = range(sizes.layers)
    per_group, size, hidden = sizes.heads // sizes.groups, sizes.head_dim, sizes.hidden

    def fused(layer: int) -> torch.Tensor:
        stem = f"model.layers.{layer}.self_attn"
        q = tensors[f"{stem}.q_proj.weight"].reshape(sizes.groups, per_group, size, hidden)
        k = tensors[f"{stem}.k_proj.weight"].reshape(sizes.groups, 1, size, hidden)
        v = tensors[f"{stem}.v_proj.weight"].reshape(sizes.groups, 1, size, hidden)
        return torch.cat([q, k, v], dim=1).reshape(-1, hidden)

    def each(name: str) -> list[torch.Tensor]:
        return [tensors[f"model.layers.{layer}.{name}"] for layer in layers]

    by_layer = {
        "self_attention.linear_qkv.weight": [fused(layer) for layer in layers],
        "self_attention.linear_proj.weight": each("self_attn.o_proj.weight"),
        "mlp.linear_fc1.weight": each("mlp.up_proj.weight"),
        "mlp.linear_fc2.weight": each("mlp.down_proj.weight"),
        "self_attention.linear_qkv.layer_norm_weight": each("input_layernorm.weight"),
        "self_attention.linear_qkv.layer_norm_bias": each("input_layernorm.bias"),
        "mlp.linear_fc1.layer_norm_weight": each("post_attention_layernorm.weight"),
        "mlp.linear_fc1.layer_norm_bias": each("post_attention_layernorm.bias"),
    }
    made = {f"{prefix}embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"]}
    for name, parts in by_layer.items():
        if stacked:
            made[f"{prefix}decoder.layers.{name}"] = torch.stack(parts)
        else:
            made |= {f"{prefix}decoder.layers.{i}.{name}": part for i, part in enumerate(parts)}
    made[f"{prefix}decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
    made[f"{prefix}decoder.final_layernorm.bias"] = tensors["model.norm.bias"]
    made[f"{prefix}output_layer.weight"] = tensors["lm_head.weight"]
    return made


def chunks_of(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Chunk shapes of the layouts that a checkpoint may have."""
    if layout == "whole":
        return shape
    lead, rest = ((1,), shape[1:]) if len(shape) == 3 else ((), shape)
    if layout == "layer":
        return (*lead, *rest)
    if layout == "output":  # tensor-parallel over the rows
        return (*lead, max(1, rest[0] // 2), *rest[1:])
    if layout == "input":  # tensor-parallel over the columns
        return (*lead, *rest[:-1], max(1, rest[-1] // 4))
    if layout == "uneven":  # no dimension divides: padded chunks at every edge
        return tuple(max(1, (side * 2) // 3 - (side % 2 == 0)) if side > 2 else side for side in shape)
    raise ValueError(layout)


LAYOUTS = ("whole", "layer", "output", "input", "uneven")


def write_zarr(
    folder: Path,
    array: torch.Tensor,
    chunks: tuple[int, ...],
    separator: str = ".",
    compress: dict[str, object] | None = None,
) -> None:
    """Write one array; edge chunks are stored whole, their padding is 0xFF so that nobody can miss it."""
    folder.mkdir(parents=True)
    dtype = {torch.bfloat16: "bfloat16", torch.float32: "<f4", torch.float16: "<f2"}[array.dtype]
    meta = {
        "chunks": list(chunks),
        "compressor": compress,
        "dtype": dtype,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(array.shape),
        "zarr_format": 2,
    }
    if separator != ".":
        meta["dimension_separator"] = separator
    (folder / ".zarray").write_text(json.dumps(meta, indent=4))
    counts = [-(-side // chunk) for side, chunk in zip(array.shape, chunks, strict=True)]
    for index in itertools.product(*map(range, counts)):
        part = array[tuple(slice(i * chunk, (i + 1) * chunk) for i, chunk in zip(index, chunks, strict=True))]
        padded = torch.full(chunks, float("nan"), dtype=array.dtype)
        padded.view(torch.uint8).fill_(0xFF)
        padded[tuple(slice(0, side) for side in part.shape)] = part
        data = padded.contiguous().view(torch.uint8).numpy().tobytes()
        if compress is not None:
            data = compressed(data, compress)
        path = folder / separator.join(map(str, index))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def compressed(data: bytes, compress: dict[str, object]) -> bytes:
    """Compress a chunk: by the standard library, or by tensorstore what only a package can."""
    import bz2
    import gzip
    import zlib

    simple = {"zlib": zlib.compress, "gzip": gzip.compress, "bz2": bz2.compress}
    if compress["id"] in simple:
        return simple[str(compress["id"])](data)
    import numpy as np
    import tensorstore as ts

    context = ts.Context()
    store = ts.KvStore.open("memory://", context=context).result()
    metadata = {
        "zarr_format": 2,
        "shape": [len(data)],
        "chunks": [len(data)],
        "dtype": "|u1",
        "compressor": compress,
        "fill_value": None,
        "filters": None,
        "order": "C",
    }
    spec = {"driver": "zarr", "kvstore": {"driver": "memory"}, "metadata": metadata}
    ts.open(spec, context=context, create=True).result().write(np.frombuffer(data, np.uint8)).result()
    return bytes(store["0"])


def write_nemo(
    root: Path,
    tensors: Mapping[str, torch.Tensor],
    sizes: Sizes,
    layout: str | Mapping[str, tuple[int, ...]] = "layer",
    prefix: str = "model.",
    *,
    stacked: bool = True,
    separator: str = ".",
    compress: dict[str, object] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a whole checkpoint in the zarr layout; return its arrays by name.

    ``layout`` is a name of `chunks_of`, or chunk shapes by array name.
    """
    root.mkdir(parents=True)
    (root / "model_config.yaml").write_text(sizes.yaml())
    weights = root / "model_weights"
    weights.mkdir()
    (weights / "metadata.json").write_text('{"sharded_backend": "zarr", "common_backend": "torch"}')
    (weights / "common.pt").write_bytes(b"never opened")
    arrays = nemo_arrays(tensors, sizes, prefix, stacked=stacked)
    for name, array in arrays.items():
        chunks = chunks_of(tuple(array.shape), layout) if isinstance(layout, str) else layout[name]
        write_zarr(weights / name, array, chunks, separator, compress)
    state = weights / f"{prefix}decoder.layers.self_attention.linear_qkv._extra_state"
    state.mkdir()
    (state / "shard_0_3.pt").write_bytes(b"never opened")
    return arrays


def varint(value: int) -> bytes:
    """A number of protocol buffers."""
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(number: int, data: bytes) -> bytes:
    """A field that holds bytes."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def number_field(number: int, value: int) -> bytes:
    """A field that holds a number."""
    return varint(number << 3) + varint(value)


def sentencepiece(*, bos: int = 2, eos: int = 3, markers: bool = True, prefix: bool = False) -> bytes:
    """A SentencePiece model of a few pieces."""
    pieces = [("<unk>", 2), ("<pad>", 3), ("<s>", 3), ("</s>", 3)]
    pieces += [(f"<extra_id_{i}>", 4) for i in range(3)] if markers else []
    pieces += [("\u2581a", 1), ("b", 1)]
    data = b"".join(
        message(
            1,
            message(1, text.encode())
            + varint(2 << 3 | 5)
            + struct.pack("<f", -1.0)
            + (number_field(3, kind) if kind != 1 else b""),
        )
        for text, kind in pieces
    )
    trainer = number_field(3, 2) + number_field(40, 0) + number_field(41, bos) + number_field(42, eos)
    normalizer = number_field(3, int(prefix)) + number_field(4, 0)
    return data + message(2, trainer + number_field(43, -1)) + message(3, normalizer)
