"""Evaluations of hostile or damaged checkpoints, and on machines that misbehave: one error, or right figures."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.errors import (
    EvaluationError,
    NonFiniteOutputError,
    OtherModelError,
    SampleError,
    ScaleError,
    UnsupportedArchitectureError,
    WriteError,
)
from nemotron_fp8.evaluation import serving
from nemotron_fp8.evaluation.evaluate import evaluate_repo
from nemotron_fp8.inference import layer_loop, sample
from nemotron_fp8.inference.transformers_api import Transformers
from tests.families import zoo
from tests.inference.conftest import CACHE
from tests.inference.layer_by_layer import write_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engines

IDS = torch.randint(10, 500, (2, 12), generator=torch.Generator().manual_seed(5))
LONGEST_LINE = 420
WEIGHT = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A file of `IDS`."""
    return write_tokens(tmp_path / "tokens.json", IDS)


def changed(
    source: Path,
    target: Path,
    change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None,
    **config: Any,
) -> Path:
    """Copy a checkpoint with other tensors, and other fields in its config.json."""
    target.mkdir()
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    known = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**known, **config}))
    return target


def specimen(name: str) -> Path:
    """Return the folder of a tiny model of the zoo."""
    zoo.build_all(CACHE / "zoo", [each for each in zoo.specimens() if each.name == name], again=False)
    return CACHE / "zoo" / name


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    line = [sys.executable, "-m", "nemotron_fp8", *map(str, arguments)]
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=120)


HUGE_CONFIGS: list[dict[str, Any]] = [
    *({"num_hidden_layers": count} for count in (60_000, 10**9, 10**30)),
    {"model_type": "qwen3", "num_hidden_layers": 10**9},  # whose config lists the kind of every layer
    {"text_config": {"num_hidden_layers": 10**9}},
    {"num_labels": 10**8},
    *({"vocab_size": count} for count in (10**9, 10**12, 10**30)),
    *({"hidden_size": count} for count in (10**9, 10**30)),
    {"intermediate_size": 10**12},
    {"head_dim": 10**10},
    {"num_key_value_heads": 10**9},
]


@pytest.mark.parametrize("config", HUGE_CONFIGS, ids=lambda config: "-".join(f"{k}={v}" for k, v in config.items()))
def test_a_config_of_a_huge_model_is_rejected_at_once(
    config: dict[str, Any], nemotron: Path, tokens: Path, tmp_path: Path
) -> None:
    """Neither memory nor address space is taken: a machine may have less of both than a real model has bytes."""
    bad = changed(nemotron, tmp_path / "bad", **config)
    started = time.monotonic()
    with pytest.raises(UnsupportedArchitectureError) as caught:
        evaluate_repo(bad, bad, tokens=tokens, state_dir=tmp_path / "state")
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert len(message) < LONGEST_LINE + len(str(bad))
    assert "allocate" not in message
    assert not (tmp_path / "state").exists()


VALUES: tuple[Any, ...] = (None, "512", -1, 0, 1.5, True, [], [1], {}, {"a": 1})
KEYS = ("dtype", "torch_dtype", "model_type", "architectures", "num_hidden_layers", "vocab_size", "return_dict")


@pytest.mark.parametrize("key", KEYS)
def test_values_of_any_type_in_a_config(key: str, nemotron: Path, tokens: Path, tmp_path: Path) -> None:
    for number, value in enumerate(VALUES):
        config: dict[str, Any] = {key: value}
        odd = changed(nemotron, tmp_path / str(number), **config)
        try:
            evaluation = evaluate_repo(odd, odd, tokens=tokens, state_dir=tmp_path / "state")
        except EvaluationError as error:
            assert len(str(error)) < LONGEST_LINE + len(str(odd))
            assert "frame #" not in str(error)
        else:
            assert evaluation.results[0].kl == 0


def set_first(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        tensors[name] = (tensors[name].float() * 1e30).bfloat16()


def set_head(tensors: dict[str, torch.Tensor], size: float) -> None:
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].float().sign() * size).bfloat16()


NON_FINITE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "NaN in a layer": (set_first(WEIGHT, math.nan), f"values of '{WEIGHT}'"),
    "infinity in a layer": (set_first(WEIGHT, math.inf), f"values of '{WEIGHT}'"),
    "NaN in the output layer": (set_first("lm_head.weight", math.nan), "values of 'lm_head.weight'"),
    "-infinity in the output layer": (set_first("lm_head.weight", -math.inf), "values of 'lm_head.weight'"),
    "products that overflow": (overflow, "hidden states after layer 1"),
    "logits that overflow": (lambda tensors: set_head(tensors, 3e38), "logits of words"),
    "large logits": (lambda tensors: set_head(tensors, 1e36), "its perplexities"),
}


@pytest.mark.parametrize("name", NON_FINITE)
@pytest.mark.parametrize("of_source", [True, False])
def test_no_figures_of_numbers_that_are_not_finite(
    name: str, of_source: bool, nemotron: Path, tokens: Path, tmp_path: Path
) -> None:
    change, place = NON_FINITE[name]
    bad = changed(nemotron, tmp_path / "bad", change)
    pair = (bad, nemotron) if of_source else (nemotron, bad)
    with pytest.raises(NonFiniteOutputError, match=place) as caught:
        evaluate_repo(*pair, tokens=tokens, state_dir=tmp_path / "state")
    assert caught.value.checkpoint == str(bad)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_scale_that_is_not_finite(value: float, nemotron: Path, tokens: Path, tmp_path: Path) -> None:
    quantize_repo(nemotron, tmp_path / "fp8")
    bad = changed(tmp_path / "fp8", tmp_path / "bad", set_first(f"{WEIGHT}_scale", value))
    with pytest.raises(NonFiniteOutputError, match=f"values of '{WEIGHT}'|hidden states after layer 1"):
        evaluate_repo(nemotron, bad, tokens=tokens, state_dir=tmp_path / "state")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_stored_scale_of_activations_that_is_no_scale(
    value: float, nemotron: Path, tokens: Path, tmp_path: Path
) -> None:
    quantize_repo(nemotron, tmp_path / "fp8", recipe=Recipe(granularity="tensor"))
    name = WEIGHT.replace("weight", "input_scale")
    bad = changed(tmp_path / "fp8", tmp_path / "bad", lambda tensors: tensors.update({name: torch.tensor(value)}))
    with pytest.raises(ScaleError) as caught:
        evaluate_repo(nemotron, bad, tokens=tokens, state_dir=tmp_path / "state")
    assert caught.value.tensor == name


def test_errors_of_large_hidden_states_are_finite() -> None:
    exact = torch.full((2, 3, 4), 1e30, dtype=torch.bfloat16)
    assert serving._relative_error(2 * exact, exact) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float64, torch.bool], ids=str)
@pytest.mark.parametrize("name", [WEIGHT, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_dtypes_of_no_weight_are_rejected_before_any_layer(
    name: str, dtype: torch.dtype, nemotron: Path, tokens: Path, tmp_path: Path
) -> None:
    bad = changed(nemotron, tmp_path / "bad", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    progress = mock.Mock()
    with pytest.raises(OtherModelError, match=f"{name} has the dtype"):
        evaluate_repo(nemotron, bad, tokens=tokens, state_dir=tmp_path / "state", progress=progress)
    progress.assert_not_called()


def test_sequences_longer_than_the_positions(nemotron: Path, tmp_path: Path) -> None:
    """Learned positions end in an error with advice; computed ones in a notice."""
    ids = torch.randint(10, 200, (1, 40), generator=torch.Generator().manual_seed(5))
    tokens = write_tokens(tmp_path / "tokens.json", ids)
    short = changed(nemotron, tmp_path / "short", max_position_embeddings=32)
    evaluation = evaluate_repo(short, short, tokens=tokens, state_dir=tmp_path / "state")
    assert "40 tokens are longer than the 32 positions" in evaluation.source.notices[0]
    assert not evaluation.results[0].notices
    gpt2 = specimen("gpt2")
    most = json.loads((gpt2 / "config.json").read_text())["n_positions"]
    tokens = write_tokens(tmp_path / "tokens.json", torch.ones((1, most + 1), dtype=torch.int64))
    with pytest.raises(UnsupportedArchitectureError, match=r"pass a smaller length \(--length\)"):
        evaluate_repo(gpt2, gpt2, tokens=tokens, state_dir=tmp_path / "state")


def test_transformers_prints_nothing(tokens: Path, tmp_path: Path) -> None:
    """Layers with slow replacements of missing kernels warn in their first forward."""
    folder = specimen("qwen3_next")
    done = command("evaluate", folder, folder, "--tokens", tokens, "--state-dir", tmp_path / "state", "-q")
    assert done.returncode == 0
    assert done.stderr == ""


class Panic(BaseException):
    """A panic of Rust in Python, like ``pyo3_runtime.PanicException``."""


def test_a_panic_of_the_tokenizer(nemotron: Path, tmp_path: Path) -> None:
    source = changed(nemotron, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    tokenizer = mock.Mock(side_effect=Panic("retry-limit"))
    with mock.patch.object(sample, "_tokenizer", lambda *_: tokenizer), pytest.raises(SampleError, match="retry-limit"):
        evaluate_repo(source, source, state_dir=tmp_path / "state")
    with (
        mock.patch.object(Transformers().package.AutoTokenizer, "from_pretrained", tokenizer),
        pytest.raises(SampleError, match="retry-limit"),
    ):
        evaluate_repo(source, source, state_dir=tmp_path / "state")


class Canary:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._path), "w")


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model", "vocab.txt"])
def test_no_code_of_a_checkpoint_is_run(name: str, nemotron: Path, tokens: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    source = changed(nemotron, tmp_path / "source", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (source / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (source / name).write_bytes(pickle.dumps(Canary(canary)))
    described = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    (source / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(SampleError):
        evaluate_repo(source, source, state_dir=tmp_path / "state")
    assert evaluate_repo(source, source, tokens=tokens, state_dir=tmp_path / "state").results[0].kl == 0
    assert not canary.exists()


def test_a_full_disk_of_layers_in_files(nemotron: Path, tokens: Path, tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with (
        mock.patch.object(layer_loop, "needs_layer_files", lambda *_: True),
        mock.patch("os.posix_fallocate", mock.Mock(side_effect=full)),
        pytest.raises(WriteError, match=r"No space left on device; choose another folder .* \(--state-dir\)"),
    ):
        evaluate_repo(nemotron, nemotron, tokens=tokens, state_dir=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_many_threads_are_as_many_as_there_is_work(nemotron: Path, tokens: Path, tmp_path: Path) -> None:
    evaluate_repo(nemotron, nemotron, tokens=tokens, state_dir=tmp_path / "state", threads=10**9)


def test_buffers_are_those_of_small_vocabularies(nemotron: Path, tokens: Path, tmp_path: Path) -> None:
    """A vocabulary smaller than a slice of the output layer needs buffers of its own size."""
    words = json.loads((nemotron / "config.json").read_text())["vocab_size"]
    with pytest.raises(EvaluationError, match="slice of the output layer") as caught:
        evaluate_repo(nemotron, nemotron, tokens=tokens, state_dir=tmp_path / "state", max_memory=1)
    width = json.loads((nemotron / "config.json").read_text())["hidden_size"]
    assert f"({2 * words * width * 2 + 6 * IDS.shape[1] * words * 4:,} bytes)" in str(caught.value)
