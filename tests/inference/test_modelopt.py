"""Results in the layout ``modelopt`` are what NVIDIA's Model Optimizer writes, tensor for tensor.

The other side is Model Optimizer of the package index, in its own process and environment, from the same checkpoint and
the same tokens. Both compute on the CPU with the same versions of torch and transformers, so that amaxes are equal to
the bit. What differs, and why, is stated by the tests: weights are scaled and cast by other arithmetic, scales of the
cache are rounded as engines hold them, and lists of modules are written in another way.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import Recipe, calibrate_repo, quantize_repo
from tests.families import zoo
from tests.inference.conftest import CACHE, ROOT
from tests.inference.in_modelopt import FP8, FP8_NEMOTRON_H, Export, Folder, Host, host, side_by_side
from tests.inference.layouts import config_of, read_folder
from tests.support.decoders import in_list

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nemotron_fp8.planning.amaxes import Amaxes

pytestmark = pytest.mark.engines

PYTHON = Path(os.environ.get("MODELOPT_PYTHON", ROOT / ".venv-modelopt" / "bin" / "python")).absolute()
CALIBRATED = Recipe(format="modelopt", granularity="tensor", activations="static", kv_cache="fp8")
NVIDIAS = CALIBRATED.model_copy(update={"selection": "nvidia"})


@dataclass(frozen=True)
class Case:
    """A checkpoint to quantize on both sides.

    Attributes:
        model: name of the model.
        recipe: our settings.
        config: name of theirs.
    """

    model: str
    recipe: Recipe = CALIBRATED
    config: str = FP8

    @property
    def title(self) -> str:
        """Its name in reports."""
        marks = {"nvidia": self.recipe.selection == "nvidia", "no_cache": self.recipe.kv_cache == "none"}
        return "-".join([self.model, *(mark for mark, there in marks.items() if there)])


NEMOTRON, SMOLLM2 = Case("nemotron"), Case("smollm2")
NO_CACHE = Case("nemotron", CALIBRATED.model_copy(update={"kv_cache": "none"}))
QWEN3_MOE, UNSEEN = Case("qwen3_moe"), Case("unseen")
HYBRID, NVIDIAS_HYBRID = Case("nemotron_h"), Case("nemotron_h", NVIDIAS, FP8_NEMOTRON_H)
CASES = [NEMOTRON, Case("ragged_nemotron"), SMOLLM2, QWEN3_MOE, UNSEEN, HYBRID, NVIDIAS_HYBRID]


@dataclass(frozen=True)
class Compared:
    """A checkpoint, and what both sides made of it.

    Attributes:
        source: tensors of the source.
        amaxes: amaxes of our calibration.
        ours: our result.
        theirs: the export of Model Optimizer.
    """

    source: Mapping[str, torch.Tensor]
    amaxes: Amaxes
    ours: Folder
    theirs: Export


@pytest.fixture(scope="session")
def sources(
    nemotron: Path, ragged_nemotron: Path, smollm2: Path, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints by the names of the cases."""
    (hybrid,) = [each for each in zoo.specimens() if each.name == "nemotron_h"]
    # One expert for each token, and one token in a calibration: the others see none.
    unseen = shutil.copytree(qwen3_moe, tmp_path_factory.mktemp("unseen") / "checkpoint")
    (unseen / "config.json").write_text(json.dumps({**config_of(qwen3_moe), "num_experts_per_tok": 1}))
    return {
        "nemotron": nemotron,
        "ragged_nemotron": ragged_nemotron,
        "smollm2": smollm2,
        "qwen3_moe": qwen3_moe,
        "unseen": unseen,
        "nemotron_h": zoo.built(CACHE / "zoo", hybrid),
    }


@pytest.fixture(scope="session")
def modelopt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A running Model Optimizer. Skips where it is not installed."""
    if not PYTHON.exists():
        pytest.skip(f"no Model Optimizer at {PYTHON}: make test-modelopt builds it")
    with host(PYTHON, tmp_path_factory.mktemp("modelopt") / "log.txt") as running:
        yield running


@pytest.fixture(scope="session")
def compared(
    sources: dict[str, Path], modelopt: Host, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], Compared]:
    """``compared(case)``: both sides of a case, once in a session."""
    known: dict[str, Compared] = {}

    def sides(case: Case) -> Compared:
        if case.title not in known:
            known[case.title] = _compare(case, sources[case.model], modelopt, tmp_path_factory.mktemp(case.title))
        return known[case.title]

    return sides


def _compare(case: Case, source: Path, modelopt: Host, home: Path) -> Compared:
    sequences, tokens, file = _sequences(case.model, source), home / "tokens.json", home / "amaxes.json"
    tokens.write_text(json.dumps(sequences))
    amaxes = calibrate_repo(source, file, tokens=tokens)
    quantize_repo(source, home / "ours", case.recipe, amaxes=file)
    kv_cache = case.recipe.kv_cache == "fp8"
    theirs = modelopt.quantize(source, home / "theirs", sequences, case.config, kv_cache=kv_cache)
    return Compared(read_folder(source), amaxes, Folder.read(home / "ours"), theirs)


def _sequences(model: str, source: Path) -> list[list[int]]:
    """Return sequences of random tokens; one token, twice, for experts that see none."""
    if model == "unseen":
        return [[11, 11]]
    draw = torch.Generator().manual_seed(448)
    ids: list[list[int]] = torch.randint(10, config_of(source)["vocab_size"], (3, 64), generator=draw).tolist()
    return ids


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_tensors_have_the_same_names_dtypes_and_shapes(case: Case, compared: Callable[[Case], Compared]) -> None:
    """So the same modules are quantized, and have the same scales."""
    both = compared(case)
    ours, theirs = both.ours.shapes, both.theirs.folder.shapes
    # transformers widens this bias when it loads the model, and Model Optimizer writes what was loaded.
    widened = {name for name in theirs if name.endswith("gate.e_score_correction_bias")}
    assert len(widened) == ("nemotron_h" in case.model)
    assert {n: each for n, each in ours.items() if n not in widened} == {
        n: each for n, each in theirs.items() if n not in widened
    }, side_by_side(both.ours, both.theirs.folder)
    assert both.ours.quantized == both.theirs.folder.quantized
    assert both.ours.quantized


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_scales_of_inputs_are_equal(case: Case, compared: Callable[[Case], Compared]) -> None:
    """To the bit: both are the same amax, divided by 448 in float32."""
    both = compared(case)
    ours, theirs = both.ours.scales("input_scale"), both.theirs.folder.scales("input_scale")
    assert ours.keys() == theirs.keys() == both.ours.quantized
    assert {n: float(each) for n, each in ours.items()} == {n: float(each) for n, each in theirs.items()}
    assert len({float(each) for each in ours.values()}) > 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_scales_of_the_cache_are_equal_but_for_bfloat16(case: Case, compared: Callable[[Case], Compared]) -> None:
    """Keys are measured after rotary embedding on both sides. Ours are the next bfloat16, as engines hold them."""
    both = compared(case)
    for last, table, projection in (("k_scale", both.amaxes.k, "k_proj"), ("v_scale", both.amaxes.v, "v_proj")):
        ours, theirs = both.ours.scales(last), both.theirs.folder.scales(last)
        assert ours.keys() == theirs.keys() == {f"{module}.{projection}" for module in table}
        for module, amax in table.items():
            name = f"{module}.{projection}"
            assert torch.equal(theirs[name], torch.tensor(amax) / 448)
            assert torch.equal(ours[name], _rounded_up(theirs[name]))


def _rounded_up(scale: torch.Tensor) -> torch.Tensor:
    """Return the smallest bfloat16 that is not below a scale, as float32."""
    near = scale.bfloat16()
    return (near if near >= scale else torch.nextafter(near, torch.tensor(torch.inf, dtype=torch.bfloat16))).float()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_scales_of_weights_are_equal_but_for_the_last_bit(case: Case, compared: Callable[[Case], Compared]) -> None:
    """Theirs are the amax divided by 448, ours the reciprocal of 448 divided by the amax, as in NVIDIA's first script.

    They have one amax for gate and up of an expert, as transformers holds them in one tensor. Ours are those of each
    matrix, unless ``share_scales`` is set.
    """
    both = compared(case)
    ours, theirs = both.ours.scales("weight_scale"), both.theirs.folder.scales("weight_scale")
    assert ours.keys() == theirs.keys() == both.ours.quantized
    for name, scale in ours.items():
        weight = _weight(both.source, name)
        own = weight.abs().max().float()
        assert _steps(scale, own / 448) <= 1
        other = _half_of_a_stack(name)
        fused = [_weight(both.source, other).abs().max().float()] if other in theirs else []
        assert torch.equal(theirs[name], max([own, *fused]) / 448)


def _half_of_a_stack(name: str) -> str:
    """Return the name of an expert's gate for its up, and the reverse; another name for any other module."""
    stem, _, last = name.rpartition(".")
    halves = {"gate_proj": "up_proj", "up_proj": "gate_proj"} if ".experts." in name else {}
    return f"{stem}.{halves.get(last)}"


def _weight(source: Mapping[str, torch.Tensor], module: str) -> torch.Tensor:
    """Return a weight of a checkpoint, also one of an expert that is held in a stack."""
    if f"{module}.weight" in source:
        return source[f"{module}.weight"]
    stem, expert, last = module.rsplit(".", 2)
    if last == "down_proj":
        return source[f"{stem}.down_proj"][int(expert)]
    gate, up = source[f"{stem}.gate_up_proj"][int(expert)].chunk(2)
    return gate if last == "gate_proj" else up


def _steps(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return how many float32 values two positive ones are apart."""
    return int((one.view(torch.int32) - other.view(torch.int32)).abs())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_codes_differ_by_rounding_twice_only(case: Case, compared: Callable[[Case], Compared]) -> None:
    """They divide in bfloat16 and round the quotient again, to FP8; ours are rounded once, from float32.

    So a code of theirs is that of ours or a neighbor, and ours are nearer to the weight.
    """
    both = compared(case)
    different = total = 0
    errors = torch.zeros(2, dtype=torch.float64)
    for module in sorted(both.ours.quantized):
        weight = _weight(both.source, module)
        ours, theirs = (each.tensors[f"{module}.weight"] for each in (both.ours, both.theirs.folder))
        scales = [each.scales("weight_scale")[module] for each in (both.ours, both.theirs.folder)]
        assert torch.equal(theirs.view(torch.uint8), (weight / scales[1]).to(torch.float8_e4m3fn).view(torch.uint8))
        if _steps(*scales) > 1:
            continue  # gate and up of an expert: other scales, other codes
        apart = (_ordered(ours) - _ordered(theirs)).abs()
        assert int(apart.max()) <= 1
        different += int(apart.sum())
        total += apart.numel()
        for side, (codes, scale) in enumerate(zip((ours, theirs), scales, strict=True)):
            errors[side] += (codes.double() * scale.double() - weight.double()).square().sum()
    assert 0 < different < total / 25
    assert errors[0] < errors[1]


def _ordered(codes: torch.Tensor) -> torch.Tensor:
    """Return codes as integers in the order of their values: neighbors differ by 1, and both zeros are 0."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_other_tensors_are_equal(case: Case, compared: Callable[[Case], Compared]) -> None:
    both = compared(case)
    scaled = tuple(f".{last}" for last in ("input_scale", "weight_scale", "k_scale", "v_scale"))
    rest = {n for n, (dtype, _) in both.ours.shapes.items() if dtype != "float8_e4m3fn" and not n.endswith(scaled)}
    assert rest
    for name in rest:
        ours, theirs = both.ours.tensors[name], both.theirs.folder.tensors[name]
        assert torch.equal(ours, theirs.to(ours.dtype))
        assert torch.equal(ours, both.source[name])


@pytest.mark.parametrize("case", [NEMOTRON, NO_CACHE, SMOLLM2, QWEN3_MOE], ids=lambda case: case.title)
def test_both_configs_are_theirs(case: Case, compared: Callable[[Case], Compared], modelopt: Host) -> None:
    """But for the version of the producer, and how the lists of unquantized modules are written."""
    both = compared(case)
    theirs = both.theirs.folder
    assert theirs.config["producer"] == {"name": "modelopt", "version": modelopt.versions["modelopt"]}
    assert both.ours.config["producer"] == {"name": "modelopt"}
    differing = {"ignore": None, "producer": None}
    assert {**both.ours.config, **differing} == {**theirs.config, **differing}
    assert ("kv_cache_scheme" in theirs.config) == (case.recipe.kv_cache == "fp8")
    assert both.ours.beside.keys() == theirs.beside.keys()
    differing = {"exclude_modules": None}
    assert {**both.ours.beside["quantization"], **differing} == {**theirs.beside["quantization"], **differing}
    for folder in (both.ours, theirs):
        assert folder.beside["quantization"]["exclude_modules"] == folder.config["ignore"]
        assert not [name for name in folder.quantized if in_list(folder.config, "vLLM", name)]
    # Model Optimizer also lists embeddings, of which no engine has a quantized form.
    kept = {n.removesuffix(".weight") for n, each in both.source.items() if each.dim() == 2 and "embed" not in n}
    kept = {name for name in kept if f"{name}.weight" in theirs.tensors} - theirs.quantized | {"lm_head"}
    for folder in (both.ours, theirs):
        assert {name for name in kept if in_list(folder.config, "vLLM", name)} == kept


def test_experts_that_see_no_token_have_the_scale_of_the_others(compared: Callable[[Case], Compared]) -> None:
    """One value for each layer and role, on both sides."""
    both = compared(UNSEEN)
    measured = {name for name in both.amaxes.inputs if ".experts." in name}
    scales = {n: float(each) for n, each in both.theirs.folder.scales("input_scale").items() if ".experts." in n}
    assert len(measured) == len(scales) / 4  # one expert of four
    for layer in range(2):
        for roles in (("gate_proj", "up_proj"), ("down_proj",)):
            of_role = {n for n in scales if n.startswith(f"model.layers.{layer}.") and n.endswith(roles)}
            assert len({scales[name] for name in of_role}) == 1
            assert of_role & measured


def test_amaxes_are_measured_in_bfloat16(compared: Callable[[Case], Compared]) -> None:
    """As the layers' inputs are: no rounding lies between the amaxes of both sides. Ours have that of lm_head, too."""
    both = compared(NEMOTRON)
    assert {dtype for _, dtype in both.theirs.amaxes.values()} == {"torch.bfloat16"}
    suffix = ".input_quantizer"
    inputs = {n.removesuffix(suffix): amax for n, (amax, _) in both.theirs.amaxes.items() if n.endswith(suffix)}
    assert {**both.amaxes.inputs, "lm_head": None} == {**inputs, "lm_head": None}
