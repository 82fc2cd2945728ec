"""A forward in vLLM of a family of each kind, in the layouts that its CPU build can be brought to run.

The reference is the result dequantized by hand, in vLLM as well: both sides differ in nothing but the layout.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from nemotron_fp8 import Recipe, quantize_repo
from tests.families import zoo
from tests.families.by_hand import write_dequantized
from tests.inference import in_vllm
from tests.inference.comparison import Distance, distance
from tests.inference.conftest import CACHE, VLLM_PYTHON
from tests.inference.test_vllm import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.engines

PROMPTS: list[list[int]] = torch.randint(10, 500, (3, 24), generator=torch.Generator().manual_seed(11)).tolist()
VOCABULARY = 512
CHANNEL, TENSOR, BLOCK = ("compressed-tensors", "channel"), ("fp8", "tensor"), ("fp8", "block")
MX, MODELOPT = ("compressed-tensors", "mx"), ("modelopt", "channel")
# Stated bounds, about twice the largest of what was measured: in blocks the activations stay in bf16, elsewhere vLLM's
# kernel casts them to FP8. Log-probabilities of these models have a standard deviation of 0.3.
BOUNDS = {BLOCK: Distance(0.004, 6e-6), TENSOR: Distance(0.045, 1.1e-3), CHANNEL: Distance(0.03, 3e-4)}
BOUNDS |= {MX: BOUNDS[BLOCK], MODELOPT: BOUNDS[CHANNEL]}
KINDS = {
    "dense": ("llama", (CHANNEL, TENSOR, BLOCK, MX, MODELOPT)),
    "dense, with biases": ("starcoder2", (CHANNEL, TENSOR, BLOCK, MX)),
    "mixture of experts": ("qwen3_moe", (TENSOR, BLOCK, MX)),
    "stacks, split": ("granitemoe", (TENSOR, BLOCK)),
    "hybrid of attention and Mamba-2": ("falcon_h1", (CHANNEL, TENSOR, MX, MODELOPT)),
    "hybrid of attention and DeltaNet": ("qwen3_next", (TENSOR, BLOCK, MX)),
    "latent attention": ("deepseek_v3-latent", (TENSOR, BLOCK, MX)),
    "text of a vision-language model": ("qwen2_5_vl", (CHANNEL, TENSOR, BLOCK, MX, MODELOPT)),
    "encoder and decoder": ("whisper-short", (CHANNEL,)),
    "text of a vision-language hybrid of experts": ("qwen3_5_moe", (TENSOR, BLOCK)),
}
CASES = [(kind, name, *layout) for kind, (name, layouts) in KINDS.items() for layout in layouts]


@pytest.fixture(scope="module")
def forwards(vllm: in_vllm.Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[in_vllm.Host]:
    """A running vLLM for tiny models of any family; skips where ``vllm`` does."""
    log = tmp_path_factory.mktemp("forwards") / "log.txt"
    with in_vllm.host(VLLM_PYTHON, log, module="tests.families.vllm_forward_host") as host:
        yield host


@pytest.fixture(scope="module")
def specimen() -> Callable[[str], Path]:
    """``specimen(name)``: the folder of a tiny model."""
    known = {each.name: each for each in zoo.specimens()}

    def folder(name: str) -> Path:
        built = zoo.built(CACHE / "zoo", known[name])
        if name.startswith("whisper"):
            _add_processor(built)
        return built

    return folder


def _add_processor(folder: Path) -> None:
    """Give a Whisper what vLLM wants to hear with: its features of two seconds, and a tokenizer of single bytes."""
    config = json.loads((folder / "config.json").read_text())
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<|{i}|>" for i in range(VOCABULARY))][:VOCABULARY]
    tokens[-1] = "<|endoftext|>"
    tokenizer = transformers.WhisperTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    features = transformers.WhisperFeatureExtractor(feature_size=config["num_mel_bins"], chunk_length=2)
    features.save_pretrained(folder)
    transformers.WhisperProcessor(features, tokenizer).save_pretrained(folder)


@pytest.mark.parametrize(("kind", "name", "form", "granularity"), CASES)
def test_a_result_computes_what_it_says(
    kind: str,
    name: str,
    form: str,
    granularity: str,
    forwards: in_vllm.Host,
    specimen: Callable[[str], Path],
    record: Callable[..., None],
    tmp_path: Path,
) -> None:
    source, result, reference = specimen(name), tmp_path / "result", tmp_path / "reference"
    quantize_repo(source, result, Recipe(format=form, granularity=granularity), "cpu")
    assert write_dequantized(result, reference)

    def run(folder: Path) -> Any:
        return forwards.run(folder, PROMPTS, vocabulary=VOCABULARY, output=tmp_path / "logprobs.safetensors")

    answer, expected = run(result), run(reference)
    apart = distance(torch.cat(answer.logprobs), torch.cat(expected.logprobs))
    figures = {"mean": apart.mean, "kl": apart.divergence, "kernel": kernels(answer), "kind": kind}
    record("vllm", forwards.version, source, f"{form}-{granularity}-dynamic", **figures)
    assert all(layer["dtype"] == "bfloat16" for layer in expected.layers.values())
    assert any(layer["dtype"] == "float8_e4m3fn" for layer in answer.layers.values())
    assert apart.within(BOUNDS[form, granularity]), apart
