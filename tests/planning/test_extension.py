"""A layout and a family that are registered from outside the package, by one record each."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, dequantize_repo, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.families import (
    DEFAULT_FAMILY,
    Family,
    StackedExperts,
    family_of,
    register_family,
    unregister_family,
)
from nemotron_fp8.planning.layouts import (
    Layout,
    Readers,
    Scheme,
    WeightFormat,
    layout_names,
    register_layout,
    unregister_layout,
)
from nemotron_fp8.planning.number_format import Coverage, ElementType, NumberFormat
from nemotron_fp8.planning.recipe import choices_of, recipe_of
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import ONE, Tensors, edit, edit_json, read_tensors, same_bits, weight, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


BLOCK = (16, 8)


def toy_config(scheme: Scheme, unquantized: list[str]) -> dict[str, Any]:
    return {"quant_method": "toy", "covers": scheme.granularity, "toy_block": list(BLOCK), "plain": unquantized}


TOY = Layout(
    name="toy",
    weights={
        "tensor": WeightFormat(NumberFormat(Coverage("tensor", BLOCK)), "_toy", (1, 1)),
        "block": WeightFormat(NumberFormat(Coverage("block", BLOCK)), "_blocks"),
    },
    readers={
        Scheme("tensor", "none"): Readers(
            vllm=False,
            sglang=False,
            transformers=True,
            transformers_note="reads toys",
            notice="toys are slow",
            no_routed_experts="toys have no specialists",
        ),
        Scheme("block", "none"): Readers(True, False, False, "does not read blocks of toys"),
    },
    render_config=toy_config,
    read_config=lambda config: (config.get("covers"), "none") if config.get("quant_method") == "toy" else None,
    unquantized_keys=("plain",),
    refusals={"channel": "format 'toy' has no channels; use granularity 'tensor'"},
    tags=("toys",),
    execution_scales=frozenset({"toy_input"}),
    block_key="toy_block",
)

TOY_FAMILY = Family(
    "Toys",
    model_types=("toy_model",),
    architectures=("ToyForCausalLM",),
    linears=("_dense.weight",),
    unquantized=((re.compile(r"(^|\.)delicate\."), "delicate parts stay in their own precision"),),
    fused={"a_dense": "ab_dense", "b_dense": "ab_dense"},
    experts="specialists",
    stacked=StackedExperts(transposed=True, parts=(("both_dense", ("a_dense", "b_dense")),)),
)

STACK = "model.0.specialists.both_dense"
EXPERTS = [f"model.0.specialists.{e}.{p}_dense.weight" for e in (0, 1) for p in "ab"]
LINEARS = ["model.0.a_dense.weight", "model.0.b_dense.weight", "model.0.c_dense.weight"]
OTHERS = ["model.0.delicate.c_dense.weight", "model.0.q_proj.weight", "model.0.norm.weight"]


def tensors() -> Tensors:
    shapes = dict.fromkeys([*LINEARS, *OTHERS[:2]], (32, 24)) | {"model.0.norm.weight": (24,), STACK: (2, 24, 64)}
    return {name: weight(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def experts(source: Tensors) -> Tensors:
    """The matrices of the specialists, ``[out, in]``: a's columns of the stack before b's."""
    stack = source[STACK]
    return {
        f"model.0.specialists.{e}.{p}_dense.weight": stack[e, :, 32 * i : 32 * (i + 1)].T.contiguous()
        for e in (0, 1)
        for i, p in enumerate("ab")
    }


@pytest.fixture
def toys() -> Iterator[None]:
    register_layout(TOY)
    register_family(TOY_FAMILY)
    yield
    unregister_layout("toy")
    unregister_family(TOY_FAMILY)


@pytest.fixture
def source(tmp_path: Path, toys: None) -> Path:
    config = {"model_type": "toy_model", "architectures": ["ToyForCausalLM"]}
    return write_checkpoint(tmp_path / "source", {ONE: tensors()}, config=config)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_a_checkpoint_goes_there_and_back(source: Path, tmp_path: Path, granularity: Any) -> None:
    """Converted, verified with and without its source, dequantized, verified again: all through the public API."""
    ignore = (r"\.specialists\.",) if granularity == "tensor" else ()
    recipe = Recipe(format="toy", granularity=granularity, activations="none", stats=True, ignore=ignore)
    report = quantize_repo(source, tmp_path / "toy", recipe)
    before, after = tensors(), read_tensors(tmp_path / "toy" / ONE)
    matrices = {name: before[name] for name in LINEARS} | (experts(before) if granularity == "block" else {})
    assert report.tensors_quantized == len(matrices)
    suffix, shape = ("_toy", (1, 1)) if granularity == "tensor" else ("_blocks", (2, 3))
    for name, matrix in matrices.items():
        codes, scale = reference.quantize(matrix, granularity, BLOCK)
        assert same_bits(after[name], codes)
        assert same_bits(after[name + suffix], scale.reshape(shape))
    kept = {name: before[name] for name in [*OTHERS, *([STACK] if granularity == "tensor" else [])]}
    assert all(same_bits(after[name], tensor) for name, tensor in kept.items())
    assert after.keys() == {*matrices, *(name + suffix for name in matrices), *kept}

    config = json.loads((tmp_path / "toy" / "config.json").read_text())["quantization_config"]
    modules = [name.removesuffix(".weight") for name in OTHERS[:2]]
    stacked = ["model.0.specialists"] if granularity == "tensor" else []
    head = ["lm_head"] if granularity == "tensor" else []  # where transformers reads the list
    assert config == toy_config(recipe.scheme, config["plain"])
    assert sorted(config["plain"]) == sorted([*modules, *stacked, *head])
    assert recipe_of(config) == Recipe(format="toy", granularity=granularity, activations="none")

    assert verify_repo(None, tmp_path / "toy").ok
    found = verify_repo(source, tmp_path / "toy")
    assert found.ok, found.problems
    assert (found.quantized, found.kept) == (len(matrices), len(kept))
    assert {tensor.name for tensor in found.tensors} == matrices.keys()

    dequantize_repo(tmp_path / "toy", tmp_path / "plain", "float32")
    plain = read_tensors(tmp_path / "plain" / ONE)
    for name, matrix in matrices.items():
        q, s = reference.quantize(matrix, granularity, BLOCK)
        assert same_bits(plain[name], reference.dequantize(q, s, granularity, BLOCK, torch.float32))
    assert plain.keys() == {*matrices, *kept}
    assert verify_repo(tmp_path / "toy", tmp_path / "plain").ok


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_the_card_has_the_record_s_words(source: Path, tmp_path: Path, granularity: Any) -> None:
    recipe = Recipe(format="toy", granularity=granularity, activations="none", ignore=(r"\.specialists\.",))
    quantize_repo(source, tmp_path / "toy", recipe)
    card = (tmp_path / "toy" / "README.md").read_text()
    assert "- toys\n" in card
    if granularity == "tensor":
        assert "library_name: transformers" in card
        assert "transformers reads toys." in card
        assert "vLLM 0.32 does not load this layout." in card
        assert "one float32 scale for each tensor" in card
    else:
        assert "library_name: vllm" in card
        assert "transformers does not read blocks of toys." in card
        assert "vllm serve PATH" in card
        assert "one float32 scale for each block of 16x8" in card
    dequantize_repo(tmp_path / "toy", tmp_path / "plain")
    assert "toys" not in (tmp_path / "plain" / "README.md").read_text()


def test_what_is_wrong_with_a_toy_is_found(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(format="toy", granularity="block", activations="none")
    quantize_repo(source, tmp_path / "toy", recipe)
    name = LINEARS[2]
    edit(tmp_path / "toy" / ONE, {f"{name}_blocks": None})
    config = json.loads((tmp_path / "toy" / "config.json").read_text())["quantization_config"]
    edit_json(tmp_path / "toy" / "config.json", quantization_config=config | {"plain": config["plain"][1:]})
    for of in (None, source):
        problems = verify_repo(of, tmp_path / "toy").problems
        assert any(p.tensor == name and f"{name}_blocks is missing" in p.problem for p in problems)
        assert any(p.tensor == config["plain"][0] for p in problems)


def test_a_stray_scale_of_activations_is_dropped(source: Path, tmp_path: Path) -> None:
    quantize_repo(source, tmp_path / "toy", Recipe(format="toy", granularity="block", activations="none"))
    edit(tmp_path / "toy" / ONE, {"model.0.c_dense.toy_input": torch.ones(1)})
    report = dequantize_repo(tmp_path / "toy", tmp_path / "plain")
    assert any("1 scales of activations" in notice for notice in report.notices)
    assert "model.0.c_dense.toy_input" not in read_tensors(tmp_path / "plain" / ONE)


def test_the_recipe_asks_the_record(source: Path) -> None:
    assert choices_of("format") == ("fp8", "compressed-tensors", "toy")
    with pytest.raises(RecipeError, match="format 'toy' has no channels; use granularity 'tensor'"):
        Recipe(format="toy", granularity="channel", activations="none")
    with pytest.raises(RecipeError, match="'tensor' with 'none', 'block' with 'none'"):
        Recipe(format="toy")
    with pytest.raises(RecipeError, match="'fp8', 'compressed-tensors' or 'toy'"):
        Recipe(format="tox")
    with pytest.raises(RecipeError, match="toys have no specialists"):
        plan_repo(source, Recipe(format="toy", activations="none"))
    plan = plan_repo(source, Recipe(format="toy", activations="none", ignore=(r"\.specialists\.",)))
    assert "toys are slow" in plan.notices
    fates = {tensor.name: tensor.reason for tensor in plan.tensors}
    assert fates["model.0.delicate.c_dense.weight"] == "delicate parts stay in their own precision"
    assert fates["model.0.q_proj.weight"] == "not a linear projection"


def test_what_a_toy_fuses_stays_together(source: Path) -> None:
    recipe = Recipe(format="toy", granularity="block", activations="none", ignore=(r"0\.a_dense",))
    plan = plan_repo(source, recipe)
    assert plan.quantized() == {LINEARS[2]}  # b follows a, and the other specialists follow theirs
    assert any(notice.startswith("model.0.ab_dense:") for notice in plan.notices)
    assert any(notice.startswith("model.0.specialists:") for notice in plan.notices)


def test_numbers_that_no_kernel_computes_are_refused(checkpoint: Path, destination: Path) -> None:
    """Before anything is written: codes of another type would be labeled as that type."""
    numbers = NumberFormat(element=ElementType("F8_E5M2", "FP8 (E5M2)", 57344.0))
    readers = TOY.readers[Scheme("tensor", "none")]
    register_layout(
        Layout("e5m2", {"tensor": WeightFormat(numbers)}, {Scheme("tensor", "dynamic"): readers}, toy_config, dict, ())
    )
    try:
        with pytest.raises(RecipeError, match=r"no kernel computes FP8 \(E5M2\) with float32 scales"):
            quantize_repo(checkpoint, destination, Recipe(format="e5m2"))
    finally:
        unregister_layout("e5m2")
    assert not destination.exists()


def test_records_come_and_go() -> None:
    config = {"model_type": "toy_model"}
    assert family_of(config) is DEFAULT_FAMILY
    register_family(TOY_FAMILY)
    register_layout(TOY)
    try:
        assert family_of(config) is family_of({"architectures": ["ToyForCausalLM"]}) is TOY_FAMILY
        with pytest.raises(ValueError, match="'toy' is already registered"):
            register_layout(TOY)
        with pytest.raises(ValueError, match="'toy_model' already belongs to the family 'Toys'"):
            register_family(Family("others", ("toy_model",)))
    finally:
        unregister_family(TOY_FAMILY)
        unregister_layout("toy")
    assert family_of(config) is DEFAULT_FAMILY
    assert "toy" not in layout_names()
    with pytest.raises(ValueError, match="no weight format for granularity 'channel'"):
        register_layout(
            Layout("t", {}, {Scheme("channel", "none"): TOY.readers["block", "none"]}, *(toy_config,) * 2, ())
        )
    with pytest.raises(RecipeError, match="'fp8' or 'compressed-tensors'"):
        Recipe(format="toy")
