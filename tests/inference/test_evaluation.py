"""An evaluation, layer by layer, computes what the whole model computes: hidden states and logits to the bit.

The other side is ``from_pretrained`` of the same folder, in one piece, with the same attention and one sequence at a
time. Results of every layout are compared with their dequantized checkpoints. Models that cannot be run layer by layer
are rejected by name before any layer is run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_fp8 import Recipe, dequantize_repo, quantize_repo
from nemotron_fp8.errors import OtherModelError, UnsupportedArchitectureError
from nemotron_fp8.inference import layer_loop
from tests.families import zoo
from tests.inference.conftest import CACHE
from tests.inference.layer_by_layer import difference, evaluated, whole, write_tokens
from tests.inference.layouts import (
    E8M0,
    KV_CACHE,
    LAYOUTS,
    MODELOPT,
    MODELOPT_BLOCK,
    MX,
    MX_WEIGHTS,
    MXFP8,
    SHARED,
    UNROUNDED,
    Layout,
    block_layout,
    config_of,
)
from tests.inference.test_quantized_sources import as_mxfp4

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engines

IDS = torch.randint(10, 500, (2, 72), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Kind:
    """A tiny model, and what of it differs from the one in the zoo.

    Attributes:
        name: name of a specimen of the zoo, or of a fixture.
        config: changed fields of config.json.
        dtype: dtype of the checkpoint.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"

    @property
    def title(self) -> str:
        """Its name in reports."""
        return "-".join([self.name, *self.config, *([] if self.dtype == "bfloat16" else [self.dtype])])


KINDS = [
    Kind("nemotron"),
    Kind("nemotron_h"),
    Kind("llama"),
    Kind("llama-tied"),
    Kind("llama", dtype="float16"),
    Kind("llama-tied", dtype="float32"),
    Kind("qwen3_moe"),  # single experts
    Kind("tiny_qwen3_moe"),  # stacked
    Kind("deepseek_v3"),
    Kind("gemma2", {"sliding_window": 16}),  # logits are capped
    Kind("gemma3_text", {"sliding_window": 16}),
    Kind("gemma3"),  # the text of a model of text and images
    Kind("qwen3_next"),
    Kind("gpt2"),
    Kind("gptj"),  # rotary positions in a buffer that no checkpoint holds
    Kind("cohere"),  # logits are scaled
    Kind("granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
    Kind("gpt_oss", {"sliding_window": 16}),
    Kind("llama4_text", {"attention_chunk_size": 16}),
    Kind("mixtral"),
    Kind("phi3"),
    Kind("olmo"),  # norms without weights
    Kind("bamba"),  # layers return attention weights, too
    Kind("opt"),  # the decoder is run without its owner
]


@pytest.fixture(scope="session")
def specimen() -> Callable[[str], Path]:
    """``specimen(name)``: the folder of a tiny model of the zoo."""
    known = {each.name: each for each in zoo.specimens()}
    return lambda name: zoo.built(CACHE / "zoo", known[name])


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A file of `IDS`."""
    return write_tokens(tmp_path / "tokens.json", IDS)


def changed(source: Path, target: Path, dtype: str = "bfloat16", **config: Any) -> Path:
    """Copy a checkpoint with other fields in its config.json, and other dtypes."""
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps({**config_of(source), "dtype": dtype, **config}))
    for shard in target.glob("*.safetensors"):
        tensors = {name: each.to(getattr(torch, dtype)) for name, each in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})
    return target


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_states_and_logits_are_those_of_the_whole_model(
    kind: Kind, specimen: Callable[[str], Path], qwen3_moe: Path, tokens: Path, tmp_path: Path
) -> None:
    """Also of a result, here of the source itself: all of its figures are exact."""
    source = qwen3_moe if kind.name == "tiny_qwen3_moe" else specimen(kind.name)
    if kind.config or kind.dtype != "bfloat16":
        source = changed(source, tmp_path / "changed", kind.dtype, **kind.config)
    evaluation, states = evaluated(source, [source], tokens)
    expected = whole(source, IDS)
    assert difference(states.of(0), expected) == ""
    assert difference(states.of(1), expected) == ""
    nll = torch.nn.functional.cross_entropy(expected.logits.double().transpose(1, 2), IDS[:, 1:])
    assert evaluation.source.perplexity == pytest.approx(float(nll.exp()), rel=1e-6)
    own = evaluation.results[0]
    assert (own.kl, own.kl_error, own.top1, own.top1_error) == (0, 0, 1, 0)
    assert (own.perplexity, own.perplexity_change, own.perplexity_error) == (evaluation.source.perplexity, 0, 0)
    assert set(own.layers) == {0}
    assert not own.notices


def test_a_trained_model_is_equal(smollm2: Path, tokens: Path) -> None:
    """Its output layer is computed in parts, because no computer holds the logits of all words of a large model."""
    evaluation, states = evaluated(smollm2, [smollm2], tokens)
    assert difference(states.of(0), whole(smollm2, IDS)) == ""
    assert (evaluation.results[0].kl, evaluation.results[0].top1) == (0, 1)


REJECTED = {
    "gemma3n_text": "its layers share state",
    "gemma4_text-sharing": "its layers share state",
    "whisper-short": "its decoder needs the output of an encoder",
    "t5": "its decoder needs the output of an encoder",
    "bert": "its layers see the tokens that are to be predicted",
    "cpmant": "it adds tokens of its own to a text",
    "glm_moe_dsa": "its layers hand each other more than hidden states",
    "hrm_text": "it changes hidden states between its layers",
}


def check_rejected(source: Path, tokens: Path, reason: str) -> None:
    """The error names the architecture and the reason, and no layer was run."""
    architecture = (config_of(source).get("architectures") or [config_of(source)["model_type"]])[0]
    with (
        mock.patch.object(layer_loop.LayerLoop, "_run_layers") as run_layers,
        pytest.raises(UnsupportedArchitectureError, match=reason) as caught,
    ):
        evaluated(source, [source], tokens)
    run_layers.assert_not_called()
    assert caught.value.architecture == architecture
    assert str(source) in str(caught.value)


@pytest.mark.parametrize("name", REJECTED)
def test_other_architectures_are_rejected_by_name(name: str, specimen: Callable[[str], Path], tokens: Path) -> None:
    check_rejected(specimen(name), tokens, REJECTED[name])


def test_an_unknown_model_is_rejected(specimen: Callable[[str], Path], tokens: Path, tmp_path: Path) -> None:
    source = changed(specimen("llama"), tmp_path / "unknown", model_type="unheard_of", architectures=["Unheard"])
    check_rejected(source, tokens, "unheard_of")


def test_code_of_a_checkpoint_is_not_run(specimen: Callable[[str], Path], tokens: Path, tmp_path: Path) -> None:
    """An error if transformers does not know the model; its own class is built if it does."""
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    unknown = changed(specimen("llama"), tmp_path / "unknown", model_type="own", architectures=["Own"], auto_map=code)
    known = changed(specimen("llama"), tmp_path / "known", auto_map=code)
    for folder in (unknown, known):
        (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    check_rejected(unknown, tokens, r"its own code \(auto_map\) is not run")
    _, states = evaluated(known, [known], tokens)
    assert difference(states.of(0), whole(specimen("llama"), IDS)) == ""
    assert not (tmp_path / "ran").exists()


def test_states_in_float32_are_rejected(specimen: Callable[[str], Path], tokens: Path) -> None:
    """Known only after the first layer: Mamba adds in float32, and bfloat16 would lose it."""
    with pytest.raises(UnsupportedArchitectureError, match=r"layer 0 makes hidden states of torch\.float32"):
        evaluated(specimen("mamba"), [specimen("mamba")], tokens)


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a missing tensor": (
        lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
        r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "a missing norm": (lambda state: state.pop("model.norm.weight"), r"no tensor for model\.norm\.weight"),
    "a missing output layer": (lambda state: state.pop("lm_head.weight"), "lm_head"),
    "another shape": (
        lambda state: state.update({"model.layers.0.mlp.up_proj.weight": torch.ones(16, 16)}),
        r"up_proj\.weight has the shape \[16, 16\]",
    ),
    "another width of the embedding": (
        lambda state: state.update({"model.embed_tokens.weight": torch.ones(512, 128)}),
        r"embed_tokens\.weight has the shape \[512, 128\]",
    ),
    "fewer layers": (
        lambda state: [state.pop(name) for name in list(state) if "layers.1." in name],
        r"no tensor for model\.layers\.1\.",
    ),
    "more layers": (
        lambda state: state.update(
            {name.replace("layers.1.", "layers.2."): each for name, each in state.items() if "layers.1." in name}
        ),
        r"tensors of layer 2",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_result_of_another_model_is_rejected(
    name: str, specimen: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    damage, problem = DAMAGES[name]
    source, other = specimen("llama"), tmp_path / "other"
    shutil.copytree(source, other)
    state = {key: each for file in other.glob("*.safetensors") for key, each in load_file(file).items()}
    damage(state)
    for file in other.glob("*.safetensors*"):
        file.unlink()
    save_file({key: each.contiguous().clone() for key, each in state.items()}, other / "model.safetensors")
    with (
        mock.patch.object(layer_loop.LayerLoop, "_run_layers") as run_layers,
        pytest.raises(OtherModelError, match=problem) as caught,
    ):
        evaluated(source, [other], tokens)
    run_layers.assert_not_called()
    assert (caught.value.result, caught.value.source) == (str(other), str(source))


FURTHER = (SHARED, UNROUNDED, E8M0, MXFP8, MX, MX_WEIGHTS, MODELOPT, MODELOPT_BLOCK, KV_CACHE)
OF_EXPERTS = (Layout("compressed-tensors", "channel", "dynamic"), block_layout("fp8"), LAYOUTS[0])
RESULTS = {
    "nemotron": (*LAYOUTS, *FURTHER),
    "ragged_nemotron": tuple(layout for layout in LAYOUTS if layout.granularity == "block"),
    "qwen3_moe": (*OF_EXPERTS, MXFP8),  # a stack that is split
    "granitemoe": OF_EXPERTS,
    "llama4_text": OF_EXPERTS,  # stacks of transposed matrices
    "mistral4": OF_EXPERTS,
    "qwen3_vl_moe": OF_EXPERTS,
}


@pytest.mark.parametrize("model", RESULTS)
def test_values_of_results_are_those_of_dequantized_checkpoints(
    model: str, specimen: Callable[[str], Path], tokens: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With activations in 16 bits a result is its dequantized checkpoint, in every layout; both are evaluated."""
    fixtures = ("nemotron", "ragged_nemotron", "qwen3_moe")
    source: Path = request.getfixturevalue(model) if model in fixtures else specimen(model)
    layouts = RESULTS[model]
    results, plain = ([tmp_path / f"{way}-{layout.name}" for layout in layouts] for way in ("fp8", "plain"))
    for layout, result, back in zip(layouts, results, plain, strict=True):
        quantize_repo(source, result, layout.recipe)
        dequantize_repo(result, back)
    evaluation, states = evaluated(source, [*results, *plain], tokens)
    for number, layout in enumerate(layouts, 1):
        dequantized = states.of(len(layouts) + number)
        assert difference(states.of(number), dequantized) == "", layout.name
        assert difference(dequantized, whole(plain[number - 1], IDS)) == "", layout.name
        figures = evaluation.results[number - 1]
        assert figures.kl > 0, layout.name
        assert figures.activations == "16 bits", layout.name
        assert all(figures.layers), layout.name
        assert not figures.notices, layout.name


SOURCES = {"blocks": block_layout("fp8"), "blocks, unrounded": UNROUNDED, "one scale": LAYOUTS[0], "MXFP8": MXFP8}


@pytest.mark.parametrize("kind", [*SOURCES, "MXFP4"])
def test_sources_may_be_quantized(kind: str, nemotron: Path, tokens: Path, tmp_path: Path) -> None:
    """As those of DeepSeek are: the source is decoded like a result, and results of it are compared with that."""
    source, back = tmp_path / "source", tmp_path / "back"
    if kind == "MXFP4":
        as_mxfp4(nemotron, source)
    else:
        quantize_repo(nemotron, source, SOURCES[kind].recipe)
    dequantize_repo(source, back)
    rows, mx = tmp_path / "rows", tmp_path / "mx"
    quantize_repo(source, rows, Recipe(format="compressed-tensors", granularity="channel"))
    quantize_repo(source, mx, MXFP8.recipe)
    evaluation, states = evaluated(source, [back, rows, mx], tokens)
    assert difference(states.of(0), states.of(1)) == ""
    assert difference(states.of(0), whole(back, IDS)) == ""
    assert evaluation.results[0].kl == 0
    assert (evaluation.results[1].kl == 0) == (kind == "one scale")  # rows repeat it
    kept = kind in ("blocks", "MXFP8", "MXFP4")  # codes and powers of two fit groups of 32
    assert (evaluation.results[2].kl == 0) == kept
