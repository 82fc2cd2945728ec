"""Amaxes of a calibration are, to the bit, those of the whole model: inputs of every matrix, keys and values."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import nemotron_fp8
from nemotron_fp8 import Recipe, calibrate_repo, dequantize_repo, quantize_repo
from nemotron_fp8.calibration import observer
from nemotron_fp8.calibration.calibrate import calibrate
from nemotron_fp8.calibration.magnitudes import Magnitudes, magnitudes_of
from nemotron_fp8.errors import EvaluationBudgetError, NonFiniteOutputError
from nemotron_fp8.inference import session
from nemotron_fp8.planning.amaxes import merge_amaxes, parse_amaxes, read_amaxes
from tests.families import zoo
from tests.inference.conftest import CACHE
from tests.inference.layer_by_layer import write_tokens
from tests.inference.test_evaluation import IDS, Kind, changed
from tests.inference.whole_model_amaxes import measure
from tests.support.fake_device import FakeDevice

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.calibration.calibrate import Calibration

pytestmark = pytest.mark.engines

ATTENTION = "model.layers.{}.self_attn"
KINDS = [
    (Kind("nemotron"), ATTENTION),
    (Kind("nemotron_h"), "backbone.layers.{}.mixer"),
    (Kind("llama"), ATTENTION),
    (Kind("llama-tied"), ATTENTION),
    (Kind("llama", dtype="float16"), ATTENTION),
    (Kind("llama-tied", dtype="float32"), ATTENTION),
    (Kind("qwen3_moe"), ATTENTION),  # single experts
    (Kind("tiny_qwen3_moe"), ATTENTION),  # stacked
    (Kind("granitemoe"), ATTENTION),  # stacked under other names
    (Kind("mixtral"), ATTENTION),
    (Kind("deepseek_v3"), ATTENTION),
    (Kind("gemma2", {"sliding_window": 16}), ATTENTION),  # eager attention
    (Kind("gemma3_text", {"sliding_window": 16}), ATTENTION),
    (Kind("gemma3"), "language_model.model.layers.{}.self_attn"),
    (Kind("qwen3_next"), ATTENTION),
    (Kind("gpt2"), "transformer.h.{}.attn"),
    (Kind("gpt_oss", {"sliding_window": 16}), ATTENTION),
    (Kind("llama4_text"), ATTENTION),
    (Kind("phi3"), ATTENTION),
    (Kind("granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}), ATTENTION),
    (Kind("bamba"), ATTENTION),
    (Kind("falcon_h1"), ATTENTION),
    (Kind("opt"), "model.decoder.layers.{}.self_attn"),
]
"""Tiny models, each with the name of its attention modules in the checkpoint."""


def of_checkpoint(folder: Path, tokens: Path, **options: Any) -> Calibration:
    """Calibrate with the options of a test, and the defaults of the command for others."""
    given: dict[str, Any] = {"percentile": None, "factor": 1.0, "max_memory": None, "spill": False, "restart": False}
    given |= {"sequences": None, "length": None, "overwrite": False, "threads": None, "hub": None, "progress": None}
    given |= {"state_dir": tokens.parent / "state", **options}
    return calibrate(folder, None, None, tokens=tokens, device="cpu", **given)


@pytest.fixture(scope="session")
def specimen() -> Callable[[str], Path]:
    """``specimen(name)``: the folder of a tiny model of the zoo."""
    known = {each.name: each for each in zoo.specimens()}
    return lambda name: zoo.built(CACHE / "zoo", known[name])


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A file of `IDS`."""
    return write_tokens(tmp_path / "tokens.json", IDS)


def by_layer(attention: dict[int, float], name: str) -> dict[str, float]:
    return {name.format(number): amax for number, amax in attention.items()}


@pytest.mark.parametrize(("kind", "attention"), KINDS, ids=lambda value: getattr(value, "title", ""))
def test_amaxes_are_those_of_the_whole_model(
    kind: Kind, attention: str, specimen: Callable[[str], Path], qwen3_moe: Path, tokens: Path, tmp_path: Path
) -> None:
    source = qwen3_moe if kind.name == "tiny_qwen3_moe" else specimen(kind.name)
    if kind.config or kind.dtype != "bfloat16":
        source = changed(source, tmp_path / "changed", kind.dtype, **kind.config)
    amaxes = of_checkpoint(source, tokens).amaxes
    expected = measure(source, IDS)
    assert amaxes.inputs == expected.amaxes("inputs")
    assert amaxes.k == by_layer(expected.amaxes("k"), attention)
    assert amaxes.v == by_layer(expected.amaxes("v"), attention)
    assert amaxes.inputs
    assert amaxes.k


def test_amaxes_of_a_trained_model(smollm2: Path, tokens: Path) -> None:
    """Its output layer is the embedding: it has no tensor of its own, and no entry."""
    amaxes = of_checkpoint(smollm2, tokens).amaxes
    expected = measure(smollm2, IDS)
    assert amaxes.inputs == expected.amaxes("inputs")
    assert len(amaxes.inputs) == 30 * 7
    assert amaxes.k == by_layer(expected.amaxes("k"), ATTENTION)
    assert amaxes.v == by_layer(expected.amaxes("v"), ATTENTION)


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 99.99, 100])
def test_percentiles_are_those_of_all_values(percentile: float, qwen3_moe: Path, tokens: Path) -> None:
    """Of all sequences together, for inputs, experts, keys and values."""
    amaxes = of_checkpoint(qwen3_moe, tokens, percentile=percentile).amaxes
    expected = measure(qwen3_moe, IDS)
    assert amaxes.inputs == expected.percentiles("inputs", percentile)
    assert amaxes.k == by_layer(expected.percentiles("k", percentile), ATTENTION)
    assert amaxes.v == by_layer(expected.percentiles("v", percentile), ATTENTION)
    assert amaxes.percentile == percentile


ONE_TOKEN = torch.full((1, 8), 7)
"""A text of one token: all of its hidden states are equal, so that all reach the same experts."""


@pytest.mark.parametrize("stored", ["one by one", "stacked"])
def test_experts_without_tokens_have_no_entry(
    stored: str, specimen: Callable[[str], Path], qwen3_moe: Path, tokens: Path, tmp_path: Path
) -> None:
    """And those with tokens are measured as the whole model has them."""
    source = qwen3_moe if stored == "stacked" else specimen("qwen3_moe")
    source = changed(source, tmp_path / "changed", num_experts_per_tok=1)
    calibration = of_checkpoint(source, write_tokens(tokens, ONE_TOKEN))
    amaxes = calibration.amaxes
    assert amaxes.inputs == measure(source, ONE_TOKEN).amaxes("inputs")
    seen = {name.rpartition(".")[0] for name in amaxes.inputs if ".experts." in name}
    assert len(seen) == 2  # one of each layer
    assert (calibration.experts, calibration.unseen_experts) == (8, 6)
    assert any("no token reached 6 of 8 experts" in notice for notice in calibration.notices)


def test_experts_that_are_run_with_zeros_have_no_entry(specimen: Callable[[str], Path], tokens: Path) -> None:
    """Llama 4 multiplies all experts at once, and gives those without tokens zeros."""
    source = specimen("llama4_text")
    calibration = of_checkpoint(source, write_tokens(tokens, ONE_TOKEN))
    assert calibration.amaxes.inputs == measure(source, ONE_TOKEN).amaxes("inputs")
    assert calibration.unseen_experts > 0
    assert all(calibration.amaxes.inputs.values())


def test_merged_texts_are_one_text(qwen3_moe: Path, tokens: Path, tmp_path: Path) -> None:
    """The amaxes of two texts, merged, are those of both: also of experts that only one of them reaches."""
    source = changed(qwen3_moe, tmp_path / "changed", num_experts_per_tok=1)
    texts = torch.stack([torch.full((8,), 7), IDS[0, :8]])
    parts = [of_checkpoint(source, write_tokens(tokens, ids[None])).amaxes for ids in texts]
    both = of_checkpoint(source, write_tokens(tokens, texts)).amaxes
    assert parts[0].inputs.keys() < both.inputs.keys()
    merged = merge_amaxes([("a", parts[0]), ("b", parts[1])])
    assert (merged.inputs, merged.k, merged.v) == (both.inputs, both.k, both.v)
    assert len(merged.runs) == 2


@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_a_quantized_source_runs_decoded(
    granularity: str, specimen: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    """With activations in 16 bits: the amaxes of its dequantized checkpoint."""
    quantize_repo(specimen("qwen3_moe"), tmp_path / "fp8", Recipe(granularity=granularity))
    dequantize_repo(tmp_path / "fp8", tmp_path / "plain")
    found, expected = (of_checkpoint(tmp_path / name, tokens).amaxes for name in ("fp8", "plain"))
    assert (found.inputs, found.k, found.v) == (expected.inputs, expected.k, expected.v)
    assert found.inputs == measure(tmp_path / "plain", IDS).amaxes("inputs")


def file_of(source: Path, path: Path, tokens: Path, **options: Any) -> bytes:
    """Return the bytes of the file that a calibration writes."""
    options = {"device": "cpu", **options}
    calibrate_repo(source, path, tokens=tokens, state_dir=tokens.parent / "state", **options)
    return path.read_bytes()


def test_the_same_bytes_in_every_way(
    qwen3_moe: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again, with other threads, within a budget, from another folder, and on a device."""
    expected = file_of(qwen3_moe, tmp_path / "a.json", tokens)
    assert parse_amaxes(expected, "a").render() == expected
    assert file_of(qwen3_moe, tmp_path / "a.json", tokens) == expected
    assert file_of(qwen3_moe, tmp_path / "b.json", tokens, threads=1) == expected
    assert file_of(qwen3_moe, tmp_path / "b.json", tokens, threads=5, spill=True) == expected
    with pytest.raises(EvaluationBudgetError) as caught:
        file_of(qwen3_moe, tmp_path / "c.json", tokens, max_memory=1)
    assert file_of(qwen3_moe, tmp_path / "c.json", tokens, max_memory=caught.value.needed) == expected
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(qwen3_moe, tmp_path / "elsewhere" / qwen3_moe.name)
    assert file_of(tmp_path / "elsewhere" / qwen3_moe.name, tmp_path / "d.json", tokens) == expected
    device = FakeDevice(1, slowest=0.02)
    monkeypatch.setattr(session, "_device", lambda _: device)
    assert file_of(qwen3_moe, tmp_path / "e.json", tokens) == expected
    device.end()
    assert not (tokens.parent / "state").exists()


def test_the_file_names_what_was_run(nemotron: Path, tokens: Path, tmp_path: Path) -> None:
    found = json.loads(file_of(nemotron, tmp_path / "a.json", tokens, factor=1.5, percentile=99))
    digest = hashlib.sha256(tokens.read_bytes()).hexdigest()
    assert found["runs"] == [
        {
            "source": nemotron.name,
            "text": "tokens.json",
            "sha256": digest,
            "sequences": 2,
            "length": 72,
            "version": nemotron_fp8.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    ]
    assert (found["factor"], found["percentile"]) == (1.5, 99)
    assert str(tmp_path) not in (tmp_path / "a.json").read_text()


STATIC = ["nemotron", "nemotron_h", "llama-tied", "qwen3_moe", "deepseek_v3", "gemma3", "qwen3_next", "mixtral"]
STATIC += ["granitemoe", "llama4_text", "phi3", "opt", "falcon_h1"]


@pytest.mark.parametrize("name", [*STATIC, "tiny_qwen3_moe"])
def test_amaxes_are_what_a_quantization_needs(
    name: str, specimen: Callable[[str], Path], qwen3_moe: Path, tokens: Path, tmp_path: Path
) -> None:
    """Every name fits: no amax is missing, and none is of another model."""
    source = qwen3_moe if name == "tiny_qwen3_moe" else specimen(name)
    calibrate_repo(source, tmp_path / "a.json", tokens=tokens, device="cpu", state_dir=tmp_path / "state")
    recipe = Recipe(format="compressed-tensors", granularity="tensor", activations="static", kv_cache="fp8")
    quantize_repo(source, tmp_path / "fp8", recipe, amaxes=tmp_path / "a.json")
    stored = {key: each for file in (tmp_path / "fp8").glob("*.safetensors") for key, each in load_file(file).items()}
    quantized = {key.removesuffix(".weight") for key, each in stored.items() if each.dtype == torch.float8_e4m3fn}
    assert quantized
    assert {key.removesuffix(".input_scale") for key in stored if key.endswith(".input_scale")} == quantized
    cached = {} if name == "deepseek_v3" else read_amaxes(tmp_path / "a.json").k  # latent attention caches no keys
    assert {key.removesuffix(".k_scale") for key in stored if key.endswith(".k_scale")} == set(cached)


def test_attention_that_is_not_seen(specimen: Callable[[str], Path], tokens: Path) -> None:
    """Inputs are measured all the same, and a notice says what is missing."""
    calibration = of_checkpoint(specimen("gptj"), tokens)
    assert calibration.amaxes.inputs == measure(specimen("gptj"), IDS).amaxes("inputs")
    assert not calibration.amaxes.k
    assert not calibration.amaxes.v
    assert any("no keys and values of attention were seen" in notice for notice in calibration.notices)


@pytest.mark.parametrize("table", ["inputs", "k", "v"])
def test_infinite_activations_are_an_error(
    table: str, nemotron: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the hidden states stay finite. Nothing is written, and no state remains."""
    place = {"inputs": r"inputs of 'model\.layers\.\d", "k": "keys of 'model", "v": "values of 'model"}[table]
    taken = observer.Measuring._take

    def infinite(self: Any, kind: str, found: dict[str, Magnitudes], where: str) -> None:
        for each in found.values() if kind == table else ():
            each.add(magnitudes_of(torch.tensor([float("-inf")]), False))
        taken(self, kind, found, where)

    monkeypatch.setattr(observer.Measuring, "_take", infinite)
    with pytest.raises(NonFiniteOutputError, match=place):
        file_of(nemotron, tmp_path / "a.json", tokens)
    assert not (tmp_path / "a.json").exists()
    assert not (tokens.parent / "state").exists()


def test_a_source_with_nan_is_an_error(specimen: Callable[[str], Path], tokens: Path, tmp_path: Path) -> None:
    source = tmp_path / "nan"
    shutil.copytree(specimen("llama"), source)
    (shard,) = source.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(NonFiniteOutputError, match="up_proj"):
        file_of(source, tmp_path / "a.json", tokens)
    assert not (tmp_path / "a.json").exists()
