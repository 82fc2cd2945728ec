"""Perplexity and KL divergence of an evaluation are those of vLLM, on the same tokens.

Two engines never agree on a token: where activations are cast to FP8, a difference in the last bit of bfloat16 moves
them to another code. The mean over tokens has an error of its own, which is computed from the differences of tokens.

vLLM's kernels for CPUs truncate what they write to an FP8 cache. A plugin rounds it to nearest before, as GPUs do.
"""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import pytest
import torch

from nemotron_fp8 import calibrate_repo, quantize_repo
from nemotron_fp8.inference import sample
from nemotron_fp8.inference.activations import Scheme
from nemotron_fp8.inference.transformers_api import Transformers
from nemotron_fp8.sources.open import open_source
from nemotron_fp8_kernels import dequantize, quantize
from tests.inference.layer_by_layer import predicted, write_tokens
from tests.inference.layouts import LAYOUTS, SHARED, STATIC, STATIC_ROWS, Layout, block_layout, read_folder
from tests.inference.test_vllm import WEIGHT_ONLY, kernels
from tests.support.checkpoints import edit, read_tensors

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


STORED = (*STATIC, STATIC_ROWS)


@pytest.fixture(scope="module")
def stored(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """``stored(layout)``: the trained model with the scales of a calibration on text that is not evaluated."""
    home = tmp_path_factory.mktemp("stored")
    everything = sample.draw_text(open_source(smollm2), Transformers(), home, None, 1 << 30, LENGTH)
    evaluated = sample.draw_text(open_source(smollm2), Transformers(), home, None, SEQUENCES, LENGTH)
    rest = [number for number in everything.sample.indices if number not in evaluated.sample.indices]
    tokens = write_tokens(home / "calibration.json", everything.ids[rest[:SEQUENCES]])
    amaxes = calibrate_repo(smollm2, tokens=tokens, device="cpu", state_dir=home / "state")

    def folder(layout: Layout) -> Path:
        if not (home / layout.name).exists():
            quantize_repo(smollm2, home / layout.name, layout.recipe, amaxes=amaxes, device="cpu")
        return home / layout.name

    return folder


def served(vllm: Host, folder: Path, layout: Layout, prompts: list[list[int]], output: Path) -> Answer:
    """Score prompts in vLLM, with the FP8 cache that format ``fp8`` has no entry for in its config."""
    asked = {"kv_cache_dtype": "fp8"} if (layout.format, layout.kv_cache) == ("fp8", "fp8") else {}
    return vllm.run(folder, prompts, vocabulary=0, output=output, **asked)


def scales_of(folder: Path, ending: str) -> dict[str, float]:
    """The stored scales of a folder, by the names of their modules."""
    return {
        name.removesuffix(f".{ending}"): float(each)
        for name, each in read_folder(folder).items()
        if name.endswith(f".{ending}")
    }


@pytest.mark.parametrize("layout", STORED, ids=lambda layout: layout.name)
def test_perplexity_with_stored_scales_is_that_of_vllm(
    layout: Layout,
    stored: Callable[[Layout], Path],
    trained: Trained,
    smollm2: Path,
    vllm: Host,
    record: Callable[..., None],
    tmp_path: Path,
) -> None:
    """In every format, and with an FP8 cache; vLLM holds the scales that the folder stores."""
    folder = stored(layout)
    answer = served(vllm, folder, layout, trained.prompts, tmp_path / "logprobs.safetensors")
    inputs = scales_of(folder, "input_scale")
    held = {name: scale for name, layer in answer.layers.items() if (scale := layer["input_scale"]) is not None}
    parts = {"qkv_proj": "q_proj", "gate_up_proj": "up_proj"}
    for name, scale in held.items():
        above, _, last = name.rpartition(".")
        assert scale == inputs[f"{above}.{parts.get(last, last)}"], name
    assert len(held) == 4 * len(answer.caches)
    for name, cache in answer.caches.items():
        held_scales = {key: cache[key] for key in ("k_scale", "v_scale")}
        module = name.removesuffix(".attn")
        own = {
            key: value
            for key in held_scales
            for place, value in scales_of(folder, key).items()
            if place == module or place.startswith(f"{module}.")
        }
        assert held_scales == (own if layout.kv_cache == "fp8" else {"k_scale": 1.0, "v_scale": 1.0}), name
        assert (cache["dtype"] == "auto") == (layout.kv_cache == "none")
        assert bool(own) == (layout.kv_cache == "fp8")
    _, own_figures = predicted(smollm2, [folder], trained.tokens, "as-served")
    nll = likelihoods(answer)
    apart = gap(nll, own_figures.nll)
    figures = {
        "perplexity": math.exp(nll.mean()),
        "evaluation": math.exp(own_figures.nll.mean()),
        "predictions": nll.numel(),
        "gap": apart.mean,
        "gap_error": apart.error,
        "gap_token": apart.token,
    }
    record("vllm", vllm.version, smollm2, layout.name, kernel=kernels(answer), **figures)
    print(f"{layout.name}: {apart.mean:+.2%} +- {apart.error:.2%}, a token {apart.token:.3f}")
    most, most_token = QUANTIZED
    assert apart.token < most_token
    assert abs(apart.mean) < most
    assert abs(apart.mean) < 4 * apart.error


@pytest.mark.parametrize("ending", ["down_proj.input_scale", "q_proj.input_scale", "k_scale", "v_scale"])
def test_vllm_and_the_evaluation_compute_with_a_scale_that_was_changed(
    ending: str, stored: Callable[[Layout], Path], trained: Trained, smollm2: Path, vllm: Host, tmp_path: Path
) -> None:
    """Neither ignores it: a sixteenth of a scale clips most values, of every layer, and both predict the same worse.

    That of q, k and v must be changed in all three, since the engine takes the largest.
    """
    layout = STATIC[3]
    assert (layout.format, layout.kv_cache) == ("fp8", "fp8")
    broken = tmp_path / "broken"
    shutil.copytree(stored(layout), broken)
    endings = tuple(ending.replace("q_proj", name) for name in ("q_proj", "k_proj", "v_proj"))
    for shard in broken.glob("*.safetensors"):
        edit(shard, {name: each / 16 for name, each in read_tensors(shard).items() if name.endswith(endings)})
    prompts = trained.prompts[:4]
    tokens = write_tokens(tmp_path / "tokens.json", torch.tensor(prompts))
    answer = served(vllm, broken, layout, prompts, tmp_path / "logprobs.safetensors")
    right, wrong = predicted(smollm2, [stored(layout), broken], tokens, "as-served")[1:]
    change, own_change = (float((each - right.nll).mean()) for each in (likelihoods(answer), wrong.nll))
    print(f"{ending}: {change:+.3f} in vLLM, {own_change:+.3f} in the evaluation")
    assert own_change > 0.05
    assert change == pytest.approx(own_change, rel=0.1, abs=0.02)


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
