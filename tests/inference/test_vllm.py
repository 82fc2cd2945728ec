"""vLLM loads every layout that its CPU build can be brought to run, and computes what the folder says.

The reference is transformers with the weights dequantized by hand. vLLM's FP8 kernels also cast the
activations to FP8, which moves the log-probabilities by more than the weights' own layout could; where the
kernel leaves them alone the bound is as tight as two bf16 engines agree on the unquantized model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

from tests.families.by_hand import write_dequantized
from tests.inference import in_transformers, models
from tests.inference.comparison import Distance, distance
from tests.inference.in_vllm import EngineRefusedError
from tests.inference.layouts import (
    E8M0,
    KV_CACHE,
    LAYOUTS,
    MODELOPT,
    MODELOPT_BLOCK,
    MODELOPT_KV_CACHE,
    MX,
    MX_WEIGHTS,
    MXFP8,
    SHARED,
    UNROUNDED,
    Layout,
    block_layout,
    config_of,
)
from tests.inference.vllm_plugins.scaled_mm_by_float import scaled_mm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.inference.in_vllm import Answer, Host

pytestmark = pytest.mark.engines

# Stated bounds, about twice what was measured (docs/engines.md has the figures): for bf16 activations, and for
# activations that the engine's kernel casts to FP8. The model of 30 layers and 49,152 tokens gets its own: its
# tail of tokens that will never come, at -20 nats and less, weighs as much in the mean as those that may.
BF16_ACTIVATIONS = {"tiny": Distance(0.03, 5e-4), "smollm2": Distance(0.3, 1.5e-2)}
FP8_ACTIVATIONS = {"tiny": Distance(0.2, 2e-2), "smollm2": Distance(0.7, 6e-2)}
WEIGHT_ONLY = ("", "DequantizingBlockKernel", "DequantizingWeightOnlyKernel", "EmulationMxfp8LinearKernel")

# vLLM 0.32 asserts `is_static_input_scheme is False` and passes None when there are no activations to scale.
REFUSED = block_layout("compressed-tensors", "none")
RUN = [layout for layout in LAYOUTS if layout != REFUSED]
OF_VLLM = (E8M0, UNROUNDED, MX, MX_WEIGHTS, MODELOPT, MODELOPT_BLOCK, KV_CACHE, MODELOPT_KV_CACHE)
CASES = [
    *(("nemotron", layout) for layout in (*RUN, SHARED, *OF_VLLM)),
    *(("ragged_nemotron", layout) for layout in RUN if layout.granularity == "block"),
    *(("qwen3_moe", layout) for layout in RUN if layout.format == "fp8"),
    *(("smollm2", layout) for layout in (*RUN, MX_WEIGHTS, MODELOPT, KV_CACHE) if layout.granularity != "block"),
]


def kernels(answer: Answer) -> str:
    """The FP8 kernels that the engine used, as one word."""
    return "+".join(sorted({layer["kernel"] for layer in answer.layers.values() if layer["kernel"]}))


def bound_for(model: str, answer: Answer) -> Distance:
    """The bound that the engine's own choice of kernel calls for; an FP8 cache rounds as much as a kernel."""
    size = "smollm2" if model == "smollm2" else "tiny"
    cached = any(cache["dtype"] != "auto" for cache in answer.caches.values())
    return (BF16_ACTIVATIONS if kernels(answer) in WEIGHT_ONLY and not cached else FP8_ACTIVATIONS)[size]


def prompts_for(model: str, source: Path) -> list[list[int]]:
    """Tokens to score: random ones for a random model, and the question for the trained one."""
    if model == "smollm2":
        tokens: list[int] = transformers.AutoTokenizer.from_pretrained(source)(models.PROMPT)["input_ids"]
        return [tokens]
    draw = torch.Generator().manual_seed(32)
    random: list[list[int]] = torch.randint(512, (3, 32), generator=draw).tolist()
    return random


def compare(
    host: Host, model: str, folder: Path, reference: transformers.PreTrainedModel, output: Path
) -> tuple[Answer, Distance]:
    """Run ``folder`` in vLLM and measure it against ``reference``."""
    vocabulary = config_of(folder)["vocab_size"]
    assert isinstance(vocabulary, int)
    prompts = prompts_for(model, folder)
    answer = host.run(folder, prompts, vocabulary=vocabulary, output=output)
    expected = in_transformers.logits(reference, prompts).float().log_softmax(-1)[:, :-1]
    return answer, distance(torch.cat(answer.logprobs), expected.flatten(0, 1))


@pytest.mark.parametrize(("model", "layout"), CASES, ids=lambda value: getattr(value, "name", value))
def test_logprobs_are_those_of_dequantizing_by_hand(
    model: str,
    layout: Layout,
    vllm: Host,
    quantized: Callable[[Path, Layout], Path],
    record: Callable[..., None],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Within the stated mean and divergence, with FP8 weights in the engine; the trained model answers."""
    source: Path = request.getfixturevalue(model)
    folder = quantized(source, layout)
    reference = in_transformers.load_by_hand(source, folder)
    answer, apart = compare(vllm, model, folder, reference, tmp_path / "logprobs.safetensors")
    figures = {"mean": apart.mean, "kl": apart.divergence, "kernel": kernels(answer)}
    if model == "smollm2":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        figures["answer"] = tokenizer.decode(answer.generated[0])
        assert figures["answer"] == models.ANSWER
    record("vllm", vllm.version, source, layout.name, **figures)
    _check_layers(answer, config_of(folder)["quantization_config"])
    _check_caches(answer, layout)
    assert apart.within(bound_for(model, answer)), (apart, kernels(answer))


def _check_caches(answer: Answer, layout: Layout) -> None:
    """The engine casts keys and values to FP8 where the config declares it, with scales of 1.0."""
    wanted = ("auto",) if layout.kv_cache == "none" else ("fp8", "fp8_e4m3")
    assert answer.caches
    for name, cache in answer.caches.items():
        assert cache["dtype"] in wanted, (name, cache)
        assert (cache["k_scale"], cache["v_scale"]) == (1.0, 1.0), (name, cache)


@pytest.mark.parametrize(
    "layout", [MX, MX_WEIGHTS, block_layout("fp8"), E8M0, MODELOPT_BLOCK], ids=lambda layout: layout.name
)
def test_kernels_that_dequantize_are_bit_equal_to_the_dequantized_model(
    layout: Layout, vllm: Host, nemotron: Path, quantized: Callable[[Path, Layout], Path], tmp_path: Path
) -> None:
    """Both sides in vLLM, so that they differ in nothing but the layout."""
    folder = quantized(nemotron, layout)
    write_dequantized(folder, tmp_path / "bf16")
    prompts = prompts_for("nemotron", folder)
    found, expected = (
        vllm.run(each, prompts, vocabulary=512, output=tmp_path / "logprobs.safetensors")
        for each in (folder, tmp_path / "bf16")
    )
    assert any(layer["dtype"] == "float8_e4m3fn" for layer in found.layers.values())
    assert all(layer["dtype"] == "bfloat16" for layer in expected.layers.values())
    assert torch.equal(torch.cat(found.logprobs), torch.cat(expected.logprobs))


def test_the_format_mxfp8_is_refused(
    vllm: Host, nemotron: Path, quantized: Callable[[Path, Layout], Path], record: Callable[..., None], tmp_path: Path
) -> None:
    """The plan says so: most models look for the scales under another name."""
    folder = quantized(nemotron, MXFP8)
    with pytest.raises(EngineRefusedError, match="weight_scale_inv"):
        vllm.run(folder, [[1, 2]], vocabulary=512, output=tmp_path / "logprobs.safetensors")
    record("vllm", vllm.version, nemotron, MXFP8.name, refused="has no parameter weight_scale_inv")


def _matches(entry: str, name: str) -> bool:
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


def _check_layers(answer: Answer, said: object) -> None:
    """The engine holds FP8 in exactly the layers that the config does not leave alone."""
    assert isinstance(said, dict)
    kept = said.get("ignored_layers") or said.get("ignore") or []
    fused = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
    for name, layer in answer.layers.items():
        parent, _, last = name.rpartition(".")
        member = f"{parent}.{fused.get(last, last)}"
        # All experts of a layer are one layer of the engine's, whose dtype is the one that they were loaded in.
        quantized = last == "routed_experts" or (
            last.endswith("_proj") and not any(_matches(entry, member) for entry in kept)
        )
        assert layer["dtype"] == ("float8_e4m3fn" if quantized else "bfloat16"), (name, layer)


@pytest.mark.parametrize("model", ["nemotron", "smollm2"])
def test_unquantized_model_agrees(
    model: str, vllm: Host, record: Callable[..., None], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The two engines agree on the bf16 model within the tight bound: what remains is the engines' own."""
    source: Path = request.getfixturevalue(model)
    reference, _ = in_transformers.load(source)
    answer, apart = compare(vllm, model, source, reference, tmp_path / "logprobs.safetensors")
    record("vllm", vllm.version, source, "bf16", mean=apart.mean, kl=apart.divergence)
    assert apart.within(bound_for(model, answer)), apart


def test_weight_only_blocks_are_refused(
    vllm: Host, nemotron: Path, quantized: Callable[[Path, Layout], Path], record: Callable[..., None], tmp_path: Path
) -> None:
    """Known trouble of vLLM itself on any device; when this fails, the layout belongs with the others."""
    folder = quantized(nemotron, REFUSED)
    with pytest.raises(EngineRefusedError, match="is_static_input_scheme is False"):
        vllm.run(folder, [[1, 2]], vocabulary=512, output=tmp_path / "logprobs.safetensors")
    record("vllm", vllm.version, nemotron, REFUSED.name, refused="asserts that it has activations to scale")


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 17, 64])
def test_the_product_in_float_has_the_bits_of_torch(rows: int, bias: bool, out_dtype: torch.dtype) -> None:
    """On processors with AMX it stands in for torch's. Small whole numbers: no order of adding rounds them."""
    draw = torch.Generator().manual_seed(rows)
    a, b = (torch.randint(-8, 9, (count, 128), generator=draw).float().to(torch.float8_e4m3fn) for count in (rows, 48))
    added = torch.randint(-8, 9, (48,), generator=draw).to(out_dtype) if bias else None
    one_each = (torch.tensor([0.5]), torch.tensor([4.0]))
    by_row = (
        2.0 ** torch.arange(rows).remainder(5).reshape(-1, 1),
        0.5 ** torch.arange(48.0).remainder(3).reshape(1, -1),
    )
    for scale_a, scale_b in (one_each, by_row):
        given = {"scale_a": scale_a, "scale_b": scale_b, "bias": added, "out_dtype": out_dtype}
        assert torch.equal(scaled_mm(a, b.t(), **given), torch._scaled_mm(a, b.t(), **given))


def test_the_product_in_float_rounds_no_worse_than_torch() -> None:
    """With any scale it is at most a rounding to bf16 away, on less than a hundredth of the elements."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(count, 512, generator=draw).to(torch.float8_e4m3fn) for count in (32, 512))
    given = {"scale_a": torch.tensor([0.0123]), "scale_b": torch.tensor([0.0345]), "out_dtype": torch.bfloat16}
    ours, torchs = scaled_mm(a, b.t(), **given), torch._scaled_mm(a, b.t(), **given)
    assert (ours != torchs).float().mean() < 0.01
    torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=1e-6)
