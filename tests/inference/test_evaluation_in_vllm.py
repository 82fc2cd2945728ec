"""Perplexity and KL divergence of an evaluation are those of vLLM, on the same tokens.

Two engines never agree on a token: where activations are cast to FP8, a difference in the last bit of bfloat16 moves
them to another code. The mean over tokens has an error of its own, which is computed from the differences of tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import pytest
import torch

from nemotron_fp8.inference import sample
from nemotron_fp8.inference.activations import Scheme
from nemotron_fp8.inference.transformers_api import Transformers
from nemotron_fp8.sources.open import open_source
from nemotron_fp8_kernels import dequantize, quantize
from tests.inference.layer_by_layer import predicted, write_tokens
from tests.inference.layouts import LAYOUTS, SHARED, Layout, block_layout
from tests.inference.test_vllm import WEIGHT_ONLY, kernels

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.evaluation.comparison import TokenFigures
    from tests.inference.in_vllm import Answer, Host

pytestmark = pytest.mark.engines

CHANNEL, TENSOR = Layout("compressed-tensors", "channel", "dynamic"), LAYOUTS[0]
PER_TENSOR = "PerTensorTorchFP8ScaledMMLinearKernel"
"""Kernel of vLLM that casts the activations of all tokens by one scale: on CPUs, where a GPU has one for each token."""


def one_scale(self: Scheme, x: torch.Tensor) -> torch.Tensor:
    """Cast activations as `PER_TENSOR` does: those of all tokens by one scale."""
    assert self == Scheme()
    codes, scale = quantize(x.reshape(-1, x.shape[-1]).contiguous(), "tensor")
    return dequantize(codes, scale, dtype=x.dtype).view(x.shape)


def as_in(answer: Answer, source: Path, result: Path, tokens: Path) -> list[TokenFigures]:
    """Evaluate a result with the activations of vLLM's kernel."""
    kernel = kernels(answer)
    if kernel == PER_TENSOR:
        with mock.patch.object(Scheme, "apply", one_scale):
            return predicted(source, [result], tokens, "as-served")
    return predicted(source, [result], tokens, "none" if kernel in WEIGHT_ONLY else "as-served")


class Gap(NamedTuple):
    """Difference of two engines.

    Attributes:
        mean: mean difference of the negative log-likelihoods, vLLM's minus those of the evaluation: the relative
            difference of the perplexities.
        error: its standard error over tokens.
        token: mean absolute difference of a token.
    """

    mean: float
    error: float
    token: float


def gap(found: torch.Tensor, own: torch.Tensor) -> Gap:
    """Compare negative log-likelihoods of the same tokens."""
    apart = (found - own).flatten()
    return Gap(float(apart.mean()), float(apart.std()) / math.sqrt(len(apart)), float(apart.abs().mean()))


def likelihoods(answer: Answer) -> torch.Tensor:
    """Return negative log-likelihoods of the tokens of all prompts: ``[prompts, tokens - 1]``."""
    return -torch.stack(answer.logprobs)[..., 0].double()


SEQUENCES, LENGTH = 16, 256
# Stated bounds, about three standard errors, and about one and a half times the measured difference of a token.
UNQUANTIZED, QUANTIZED = (0.004, 0.07), (0.013, 0.27)


class Trained(NamedTuple):
    """The trained model in vLLM: its text, as a file and as prompts, and its own likelihoods."""

    tokens: Path
    prompts: list[list[int]]
    nll: torch.Tensor


@pytest.fixture(scope="module")
def trained(smollm2: Path, vllm: Host, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("trained")
    ids = sample.draw_text(open_source(smollm2), Transformers(), home, None, SEQUENCES, LENGTH).ids
    prompts = ids.tolist()
    answer = vllm.run(smollm2, prompts, vocabulary=0, output=home / "logprobs.safetensors")
    return Trained(write_tokens(home / "tokens.json", ids), prompts, likelihoods(answer))


@pytest.mark.parametrize("layout", [CHANNEL, TENSOR, SHARED], ids=lambda layout: layout.name)
def test_perplexity_is_that_of_vllm(
    layout: Layout,
    trained: Trained,
    smollm2: Path,
    vllm: Host,
    quantized: Callable[[Path, Layout], Path],
    record: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Of the trained model; vLLM casts q, k and v again, if each has a scale of its own, and so does the evaluation."""
    folder = quantized(smollm2, layout)
    answer = vllm.run(folder, trained.prompts, vocabulary=0, output=tmp_path / "logprobs.safetensors")
    source, own = as_in(answer, smollm2, folder, trained.tokens)
    nll = likelihoods(answer)
    for name, engine, evaluation, (most, most_token) in (
        ("bf16", trained.nll, source, UNQUANTIZED),
        (layout.name, nll, own, QUANTIZED),
    ):
        apart = gap(engine, evaluation.nll)
        if name != "bf16" or layout == CHANNEL:
            figures = {
                "perplexity": math.exp(engine.mean()),
                "evaluation": math.exp(evaluation.nll.mean()),
                "predictions": engine.numel(),
                "gap": apart.mean,
                "gap_error": apart.error,
                "gap_token": apart.token,
            }
            kernel = "" if name == "bf16" else kernels(answer)
            record("vllm", vllm.version, smollm2, name, kernel=kernel, **figures)
        print(f"{name}: {apart.mean:+.2%} +- {apart.error:.2%}, a token {apart.token:.3f}")
        assert apart.token < most_token
        assert abs(apart.mean) < most
        assert abs(apart.mean) < 4 * apart.error


RANDOM = torch.randint(3, 512, (4, 248), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("layout", [block_layout("fp8"), CHANNEL, TENSOR], ids=lambda layout: layout.name)
def test_likelihoods_and_divergence_are_those_of_vllm(
    layout: Layout,
    nemotron: Path,
    vllm: Host,
    quantized: Callable[[Path, Layout], Path],
    record: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Of a random model, with the distribution over all words. The kernel for blocks leaves activations in bf16."""
    folder, tokens = quantized(nemotron, layout), write_tokens(tmp_path / "tokens.json", RANDOM)

    def run(model: Path) -> tuple[Answer, torch.Tensor]:
        answer = vllm.run(model, RANDOM.tolist(), vocabulary=512, output=tmp_path / "logprobs.safetensors")
        return answer, torch.stack(answer.logprobs).double()

    (_, before), (answer, after) = run(nemotron), run(folder)
    source, own = as_in(answer, nemotron, folder, tokens)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    labels = RANDOM[:, 1:, None]
    apart = gap(-after.gather(2, labels)[..., 0], own.nll)
    unquantized = gap(-before.gather(2, labels)[..., 0], source.nll)
    print(f"{layout.name}: {apart.mean:+.2%} +- {apart.error:.2%}, KL {divergence:.5f}, {float(own.kl.mean()):.5f}")
    record(
        "vllm",
        vllm.version,
        nemotron,
        layout.name,
        kernel=kernels(answer),
        perplexity=math.exp(-float(after.gather(2, labels).mean())),
        evaluation=math.exp(float(own.nll.mean())),
        predictions=own.nll.numel(),
        gap=apart.mean,
        gap_error=apart.error,
        gap_token=apart.token,
        divergence=divergence,
        divergence_evaluation=float(own.kl.mean()),
    )
    assert abs(unquantized.mean) < 0.003
    assert abs(apart.mean) < (0.003 if kernels(answer) in WEIGHT_ONLY else 0.01)
    assert divergence == pytest.approx(float(own.kl.mean()), rel=0.05)
