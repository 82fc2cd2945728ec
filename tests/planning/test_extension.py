"""A layout and a family that are registered from outside the package, by one record each."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner

from nemotron_fp8 import Recipe, dequantize_repo, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.cli.main import cli
from nemotron_fp8.errors import LayoutError, RecipeError
from nemotron_fp8.planning.families import (
    DEFAULT_FAMILY,
    Family,
    Rule,
    StackedExperts,
    families,
    family_of,
    register_family,
    unregister_family,
)
from nemotron_fp8.planning.layouts import (
    COMPRESSED_TENSORS,
    Layout,
    Readers,
    Scheme,
    WeightFormat,
    layout_names,
    register_layout,
    unregister_layout,
)
from nemotron_fp8.planning.module_lists import Modules
from nemotron_fp8.planning.number_format import Coverage, ElementType, NumberFormat, ScaleType
from nemotron_fp8.planning.recipe import choices_of, recipe_of
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import ONE, Tensors, edit, edit_json, read_tensors, same_bits, weight, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


BLOCK = (16, 8)
FORMATS = ("fp8", "compressed-tensors", "mxfp8", "modelopt")
"""Layouts of this package."""


def toy_config(scheme: Scheme, modules: Modules) -> dict[str, Any]:
    plain = list(modules.unquantized)
    return {"quant_method": "toy", "covers": scheme.granularity, "toy_block": list(BLOCK), "plain": plain}


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
    block_path=("toy_block",),
)

TOY_FAMILY = Family(
    "Toys",
    model_types=("toy_model",),
    architectures=("ToyForCausalLM",),
    linears=("_dense.weight",),
    unquantized=(Rule(re.compile(r"(^|\.)delicate\."), "delicate parts stay in their own precision"),),
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
    assert config == toy_config(recipe.scheme, Modules(tuple(config["plain"])))
    assert sorted(config["plain"]) == sorted([*modules, *stacked, "lm_head"])
    assert recipe_of(config) == Recipe(format="toy", granularity=granularity, activations="none")

    assert verify_repo(None, tmp_path / "toy").ok
    found = verify_repo(source, tmp_path / "toy")
    assert found.ok, found.problems
    assert (found.quantized, found.kept) == (len(matrices), len(kept))
    assert {tensor.name for tensor in found.tensors} == matrices.keys()

    dequantize_repo(tmp_path / "toy", tmp_path / "plain", "float32")
    plain = read_tensors(tmp_path / "plain" / ONE)
    products = {
        name: reference.dequantize(*reference.quantize(matrix, granularity, BLOCK), granularity, BLOCK, torch.float32)
        for name, matrix in matrices.items()
    }
    assert plain.keys() == before.keys()
    for name in LINEARS:
        assert same_bits(plain[name], products[name])
    if granularity == "block":  # the stack comes back in one piece, with a's columns before b's
        rows = [torch.cat([products[f"model.0.specialists.{e}.{p}_dense.weight"].T for p in "ab"], 1) for e in (0, 1)]
        assert same_bits(plain[STACK], torch.stack(rows))
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
        assert "vLLM does not load this layout." in card
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
    assert choices_of("format") == (*FORMATS, "toy")
    with pytest.raises(RecipeError, match="format 'toy' has no channels; use granularity 'tensor'"):
        Recipe(format="toy", granularity="channel", activations="none")
    with pytest.raises(RecipeError, match="'tensor' with 'none', 'block' with 'none'"):
        Recipe(format="toy")
    with pytest.raises(RecipeError, match="'fp8', 'compressed-tensors', 'mxfp8', 'modelopt' or 'toy'"):
        Recipe(format="tox")
    with pytest.raises(RecipeError, match="toys have no specialists"):
        plan_repo(source, Recipe(format="toy", activations="none"))
    plan = plan_repo(source, Recipe(format="toy", activations="none", ignore=(r"\.specialists\.",)))
    assert "toys are slow" in plan.notices
    fates = {tensor.name: tensor.reason for tensor in plan.tensors}
    assert fates["model.0.delicate.c_dense.weight"] == "delicate parts stay in their own precision"
    assert fates["model.0.q_proj.weight"] == "not a linear projection"


def test_the_command_offers_a_layout_from_its_registration_on(source: Path, tmp_path: Path) -> None:
    """Also in a process that has parsed options before."""
    arguments = ["quantize", str(source), str(tmp_path / "q"), "--format", "toy", "--granularity", "block"]
    unregister_layout("toy")
    refused = CliRunner().invoke(cli, arguments)
    assert (refused.exit_code, "'toy' is not one of" in refused.output) == (2, True)
    register_layout(TOY)
    done = CliRunner().invoke(cli, [*arguments, "--activations", "none"])
    assert done.exit_code == 0, done.output


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
        Layout(
            "e5m2",
            {"tensor": WeightFormat(numbers)},
            {Scheme("tensor", "dynamic"): readers},
            toy_config,
            lambda _: None,
            (),
        )
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
    with pytest.raises(RecipeError, match="'fp8', 'compressed-tensors', 'mxfp8' or 'modelopt'"):
        Recipe(format="toy")


OTHER_BLOCKS = [(96, 96), (64, 32), (1, 64), (192, 1)]


def with_blocks(block: tuple[int, int], render: Any, path: tuple[str, ...]) -> Layout:
    return Layout(
        name="blocks",
        weights={"block": WeightFormat(NumberFormat(Coverage("block", block)), "_blocks")},
        readers={Scheme("block", "none"): Readers(False, True, False, "does not read blocks of toys")},
        render_config=render,
        read_config=lambda config: ("block", "none") if config.get("quant_method") == "blocks" else None,
        unquantized_keys=("plain",),
        block_path=path,
    )


@pytest.mark.parametrize("stated", ["nested in the config", "by the record alone"])
@pytest.mark.parametrize("block", OTHER_BLOCKS)
def test_blocks_of_any_size_come_back(tmp_path: Path, block: tuple[int, int], stated: str) -> None:
    """A scale of [2, 2] fits blocks of 96 and of 128 alike: the config or the record decides, not the shape."""
    path = ("groups", "first", "size") if stated.startswith("nested") else ()

    def render(scheme: Scheme, modules: Modules) -> dict[str, Any]:
        return {"quant_method": "blocks", "plain": list(modules.unquantized)} | (
            {"groups": {"first": {"size": list(block)}}} if path else {}
        )

    register_layout(with_blocks(block, render, path))
    try:
        name, matrix = "model.layers.0.mlp.down_proj.weight", weight(192, 192, seed=3)
        matrix[:96] *= 64  # one wrong scale is seen
        source = write_checkpoint(tmp_path / "source", {ONE: {name: matrix}}, config={"model_type": "llama"})
        quantize_repo(source, tmp_path / "q", Recipe(format="blocks", granularity="block", activations="none"))
        assert verify_repo(source, tmp_path / "q").ok
        assert verify_repo(None, tmp_path / "q").ok
        dequantize_repo(tmp_path / "q", tmp_path / "plain", "float32")
        codes, scale = reference.quantize(matrix, "block", block)
        expected = reference.dequantize(codes, scale, "block", block, torch.float32)
        assert same_bits(read_tensors(tmp_path / "plain" / ONE)[name], expected)
        card = (tmp_path / "q" / "README.md").read_text()
        assert "library_name: sglang" in card
    finally:
        unregister_layout("blocks")


@pytest.mark.parametrize("block", [(96, 96), (64, 64)])
def test_the_config_of_compressed_tensors_states_the_block(tmp_path: Path, block: tuple[int, int]) -> None:
    name, matrix = "model.layers.0.mlp.down_proj.weight", weight(192, 192, seed=4)
    codes, scale = reference.quantize(matrix, "block", block)
    scheme = Scheme("block", "dynamic")
    config = COMPRESSED_TENSORS.render_config(scheme, Modules(("lm_head",)))
    config["config_groups"]["group_0"]["weights"]["block_structure"] = list(block)
    source = write_checkpoint(
        tmp_path / "fp8", {ONE: {name: codes, name + "_scale": scale}}, config={"quantization_config": config}
    )
    dequantize_repo(source, tmp_path / "plain", "float32")
    expected = reference.dequantize(codes, scale, "block", block, torch.float32)
    assert same_bits(read_tensors(tmp_path / "plain" / ONE)[name], expected)


@pytest.mark.parametrize("strategy", [["block"], {"block": 1}, 7, None, "group"])
def test_a_strategy_of_any_type_describes_no_format(tmp_path: Path, strategy: Any) -> None:
    """The config comes from outside; the size of a block that it states still counts."""
    name, matrix = "model.layers.0.mlp.down_proj.weight", weight(192, 192, seed=5)
    codes, scale = reference.quantize(matrix, "block", (96, 96))
    config = COMPRESSED_TENSORS.render_config(Scheme("block", "dynamic"), Modules(("lm_head",)))
    config["config_groups"]["group_0"]["weights"] |= {"strategy": strategy, "block_structure": [96, 96]}
    source = write_checkpoint(
        tmp_path / "fp8", {ONE: {name: codes, name + "_scale": scale}}, config={"quantization_config": config}
    )
    dequantize_repo(source, tmp_path / "plain", "float32")
    expected = reference.dequantize(codes, scale, "block", (96, 96), torch.float32)
    assert same_bits(read_tensors(tmp_path / "plain" / ONE)[name], expected)
    assert not verify_repo(None, source).ok


def test_a_block_that_nothing_states_is_refused_if_two_fit(tmp_path: Path) -> None:
    register_layout(with_blocks((96, 96), toy_config, ()))
    try:
        codes, scale = reference.quantize(weight(192, 192), "block", (96, 96))
        name = "model.layers.0.mlp.down_proj.weight"
        source = write_checkpoint(tmp_path / "fp8", {ONE: {name: codes, name + "_blocks": scale}}, config={})
        with pytest.raises(LayoutError, match=r"fits blocks of 128x128 and 96x96; config\.json must state which"):
            dequantize_repo(source, tmp_path / "plain")
    finally:
        unregister_layout("blocks")
    assert not (tmp_path / "plain").exists()


def test_elements_that_no_kernel_computes_are_refused_everywhere(tmp_path: Path) -> None:
    """Planned, converted, dequantized or compared with a source: one sentence, and nothing is written."""
    numbers = NumberFormat(element=ElementType("F8_E5M2", "FP8 (E5M2)", 57344.0))
    readers = TOY.readers[Scheme("tensor", "none")]

    def render(scheme: Scheme, modules: Modules) -> dict[str, Any]:
        return {"quant_method": "e5m2", "plain": list(modules.unquantized)}

    def read(config: Any) -> tuple[object, object] | None:
        return ("tensor", "dynamic") if config.get("quant_method") == "e5m2" else None

    scheme = Scheme("tensor", "dynamic")
    register_layout(Layout("e5m2", {"tensor": WeightFormat(numbers)}, {scheme: readers}, render, read, ("plain",)))
    try:
        name, matrix = "model.layers.0.mlp.down_proj.weight", weight(8, 8)
        source = write_checkpoint(tmp_path / "source", {ONE: {name: matrix}}, config={"model_type": "llama"})
        codes = {name: matrix.to(torch.float8_e5m2), name + "_scale": torch.tensor(1.0)}
        config = {"model_type": "llama", "quantization_config": render(scheme, Modules(("lm_head",)))}
        result = write_checkpoint(tmp_path / "fp8", {ONE: codes}, config=config)
        computes, dequantizes = r"no kernel computes FP8 \(E5M2\)", "no kernel dequantizes F8_E5M2"
        with pytest.raises(RecipeError, match=computes):
            plan_repo(source, Recipe(format="e5m2"))
        with pytest.raises(RecipeError, match=computes):
            verify_repo(source, result)
        with pytest.raises(RecipeError, match=dequantizes):
            dequantize_repo(result, tmp_path / "plain")
        with pytest.raises(RecipeError, match=dequantizes):
            verify_repo(result, source)
    finally:
        unregister_layout("e5m2")
    assert not list(tmp_path.glob("plain*"))


def test_a_layout_changes_no_conversion_of_another(tmp_path: Path) -> None:
    """A layout of integers is registered; an integer tensor beside FP8 is no quantized weight for that."""
    numbers = NumberFormat(element=ElementType("I8", "INT8", 127.0))
    readers = TOY.readers[Scheme("tensor", "none")]
    scheme = Scheme("tensor", "dynamic")
    register_layout(
        Layout("int8", {"tensor": WeightFormat(numbers)}, {scheme: readers}, toy_config, lambda _: None, ())
    )
    try:
        tensors = {"model.layers.0.mlp.down_proj.weight": weight(8, 8), "model.mask": torch.ones(4, dtype=torch.int8)}
        source = write_checkpoint(tmp_path / "source", {ONE: tensors}, config={"model_type": "llama"})
        quantize_repo(source, tmp_path / "q")
        assert verify_repo(source, tmp_path / "q").ok
        assert verify_repo(None, tmp_path / "q").ok
        dequantize_repo(tmp_path / "q", tmp_path / "plain")
        assert verify_repo(tmp_path / "q", tmp_path / "plain").ok
        assert same_bits(read_tensors(tmp_path / "plain" / ONE)["model.mask"], tensors["model.mask"])
    finally:
        unregister_layout("int8")


def test_a_family_names_its_own_heads_and_tables(tmp_path: Path) -> None:
    family = Family(
        "Heads",
        ("heads",),
        linears=(".weight",),
        embeddings=(Rule(re.compile(r"(^|\.)table\.weight$"), "a table"),),
        heads=(Rule(re.compile(r"(^|\.)crown\.weight$"), "the crown", "crown"),),
        tied_heads=("crown",),
    )
    register_family(family)
    try:
        names = ["table.weight", "crown.weight", "embed_lin.weight"]
        source = write_checkpoint(
            tmp_path / "source", {ONE: {name: weight(8, 8) for name in names}}, config={"model_type": "heads"}
        )
        plan = plan_repo(source)
        assert plan.quantized() == {"embed_lin.weight"}
        assert {t.name: t.reason for t in plan.tensors if not t.quantize} == {
            "table.weight": "a table",
            "crown.weight": "the crown",
        }
        quantize_repo(source, tmp_path / "q", Recipe(format="fp8", granularity="tensor"))
        listed = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["ignored_layers"]
        assert listed == ["crown"]
        assert verify_repo(source, tmp_path / "q").ok
    finally:
        unregister_family(family)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": ""}, "no name"),
        ({"readers": {}}, "no readers"),
        ({"weights": {"tensor": WeightFormat(NumberFormat(), ""), "block": TOY.weights["block"]}}, "scale suffix ''"),
        (
            {
                "weights": {
                    "tensor": TOY.weights["tensor"],
                    "block": WeightFormat(NumberFormat(Coverage("block", (0, 8)))),
                }
            },
            r"block \(0, 8\)",
        ),
    ],
)
def test_a_layout_that_cannot_work_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        register_layout(replace(TOY, **change))
    assert layout_names() == FORMATS


def test_a_family_that_cannot_work_is_refused() -> None:
    before = families()
    with pytest.raises(ValueError, match="'LlamaForCausalLM' already belongs to the family 'Llama'"):
        register_family(Family("others", ("others",), ("LlamaForCausalLM",)))
    with pytest.raises(ValueError, match="neither a model_type nor an architecture"):
        register_family(Family("nobody"))
    with pytest.raises(TypeError, match="not a tuple of endings"):
        register_family(Family("list", ("list",), linears=["_proj.weight"]))  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match="is not a Rule"):
        register_family(Family("pair", ("pair",), unquantized=((re.compile("a"), "b"),)))  # type: ignore[arg-type]  # the point
    assert families() == before


def test_scales_of_every_type_are_read() -> None:
    """Against torch, every bit pattern of two bytes and of one."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        expected = bits.view(dtype).float()
        found = torch.tensor(list(ScaleType(name, name).unpack(bits.numpy().tobytes())))
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    every = torch.arange(256, dtype=torch.uint8)
    powers = torch.tensor(list(ScaleType("F8_E8M0", "E8M0").unpack(bytes(range(256)))))
    expected = every.view(torch.float8_e8m0fnu).float()
    assert torch.equal(powers.nan_to_num(7.0), expected.nan_to_num(7.0))
