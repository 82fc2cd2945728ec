"""verify proves the lists of unquantized modules for each engine: an entry less, or one that matches FP8, is a problem.

What an engine reads in a list is written again in `tests.support.decoders.in_list`.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from nemotron_fp8.planning.module_lists import Modules
from tests.support.checkpoints import MANIFEST
from tests.support.decoders import HIDDEN, INNER, Shapes, attention, decoder, in_list, mlp, write

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8 import Verification

ENGINES = ("vLLM", "SGLang", "transformers")
LAYOUTS = {
    "channel": Recipe(),
    "block": Recipe(granularity="block"),
    "fp8 tensor": Recipe(format="fp8", granularity="tensor"),
    "fp8 block": Recipe(format="fp8"),
    "mx": Recipe(granularity="mx"),
    "mxfp8": Recipe(format="mxfp8"),
    "modelopt": Recipe(format="modelopt", ignore=(r"layers\.0\.mlp\.experts",)),
}
SHAPES: Shapes = {
    **decoder(layers=3, dense=False),
    **{f"model.layers.{i}.mlp.gate.weight": (4, HIDDEN) for i in range(2)},
    **mlp("model.layers.0.mlp.experts.0."),
    **mlp("model.layers.0.mlp.shared_expert."),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, HIDDEN),
    "model.layers.1.mlp.experts.gate_up_proj": (4, 2 * INNER, HIDDEN),
    "model.layers.1.mlp.experts.down_proj": (4, HIDDEN, INNER),
    **mlp("model.layers.2.mlp."),
    **attention("visual.blocks.0.attn."),
    "visual.blocks.0.norm.weight": (HIDDEN,),
}
"""Experts one by one in layer 0, as stacks that stay in layer 1, none in layer 2; and an encoder."""
UNQUANTIZED = {
    *(name.removesuffix(".weight") for name in SHAPES if name.endswith("gate.weight")),
    *(name.removesuffix(".weight") for name in SHAPES if name.startswith("visual") and "_proj" in name),
    "model.layers.1.mlp.experts",
    "lm_head",
}
EXPERTS = {
    "model.layers.0.mlp.experts",
    *(f"model.layers.0.mlp.experts.0.{part}_proj" for part in ("gate", "up", "down")),
}
"""Routed experts, which no engine loads in the layout of modelopt."""
FP8 = {
    *(name.removesuffix(".weight") for name in SHAPES if name.endswith("_proj.weight") and name.startswith("model")),
    "model.layers.0.mlp.experts",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, and a right result in each layout, without its manifest: digests would show any change."""
    root = tmp_path_factory.mktemp("lists")
    config = {"model_type": "qwen3_moe", "num_experts": 4}
    write(root / "source", config, SHAPES)
    for name, layout in LAYOUTS.items():
        recipe = layout.model_copy(update={"ignore": (*layout.ignore, r"layers\.1\.mlp\.experts")})
        quantize_repo(root / "source", root / name, recipe, device="cpu", threads=1)
        done = verify_repo(root / "source", root / name)
        assert done.ok
        assert done.engines == readers(recipe)
        assert verify_repo(None, root / name).engines == readers(recipe)
        (root / name / MANIFEST).unlink()
    return root


def readers(recipe: Recipe) -> tuple[str, ...]:
    loads = recipe.layout.readers[recipe.scheme]
    return tuple(engine for engine in ENGINES if loads.by(engine))


def changed(made: Path, layout: str, root: Path, key: str, entries: list[str]) -> tuple[dict[str, Any], Verification]:
    """Verify a copy of a result with another list, in all files that hold it."""
    shutil.copytree(made / layout, root / "result")
    path = root / "result" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = entries
    path.write_text(json.dumps(config))
    quantization: dict[str, Any] = config["quantization_config"]
    for name, value in LAYOUTS[layout].layout.beside(quantization).items():
        (root / "result" / name).write_text(json.dumps(value))
    return quantization, verify_repo(made / "source", root / "result")


def check(quantization: dict[str, Any], layout: str, found: Verification, missing: set[str], wrong: set[str]) -> None:
    """Compare the findings with what each engine would do with the list."""
    engines = []
    unquantized, fp8 = fates(layout)
    for engine in readers(LAYOUTS[layout]):
        lost = {module for module in unquantized if not in_list(quantization, engine, module)}
        taken = {module for module in fp8 if in_list(quantization, engine, module)}
        problems = {p.tensor for p in found.problems if engine in p.problem and "does not list it" in p.problem}
        matched = [p.problem for p in found.problems if engine in p.problem and "which is FP8" in p.problem]
        assert problems >= lost
        assert problems - lost <= missing  # names of a router in engines, and a head without a tensor
        assert bool(matched) is bool(taken)
        assert all(any(f"matches {module}, which" in problem for module in taken) for problem in matched)
        if not problems and not matched:
            engines.append(engine)
    assert found.engines == tuple(engines)
    assert {p.tensor for p in found.problems if "which is FP8" in p.problem} <= wrong


def fates(layout: str) -> tuple[set[str], set[str]]:
    """Modules that are unquantized in a layout, and those that are FP8."""
    return (UNQUANTIZED | EXPERTS, FP8 - EXPERTS) if layout == "modelopt" else (UNQUANTIZED, FP8)


def keys_of(layout: str) -> list[str]:
    return list(LAYOUTS[layout].layout.unquantized_entries(quantization_of(layout)))


def quantization_of(layout: str) -> dict[str, Any]:
    recipe = LAYOUTS[layout]
    return recipe.layout.render_config(recipe.scheme, Modules(("lm_head",)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_entry_less_is_a_problem_for_the_engines_that_need_it(made: Path, tmp_path: Path, layout: str) -> None:
    """Each entry of each list in turn; some only repeat what others cover."""
    found_any = set()
    for key in keys_of(layout):
        config = json.loads((made / layout / "config.json").read_text())["quantization_config"]
        for i, entry in enumerate(config[key]):
            root = tmp_path / f"{key}{i}"
            rest = [other for other in config[key] if other != entry]
            quantization, found = changed(made, layout, root, key, rest)
            renamed = {p.tensor for p in found.problems if p.tensor not in fates(layout)[0]}
            check(quantization, layout, found, renamed, set())
            found_any |= {p.tensor for p in found.problems}
            shutil.rmtree(root)
    assert found_any >= {"lm_head", "model.layers.1.mlp.experts", "model.layers.0.mlp.shared_expert_gate"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_list_is_a_problem_for_every_module(made: Path, tmp_path: Path, layout: str) -> None:
    key = keys_of(layout)[0]
    _, found = changed(made, layout, tmp_path, key, [])
    missing = {p.tensor for p in found.problems if "does not list it" in p.problem}
    if layout == "mxfp8":  # SGLang reads the other list then, and finds the ends of names in it
        assert any("ignored_layers is empty" in p.problem for p in found.problems)
    elif layout == "fp8 block":  # vLLM compares whole names with it
        assert "model.layers.0.mlp.gate" in missing
    else:
        assert missing >= UNQUANTIZED
        assert found.engines == ()


ADDED = {
    "an FP8 module": "model.layers.0.self_attn.q_proj",
    "the start of its name": "model.layers.2.mlp",
    "the end of its name": "o_proj",
    "a part of a name, which no engine matches": "layers.2.ml",
    "a pattern": "re:.*down_proj$",
    "a pattern from the start": r"re:model\.layers\.2\.",
    "a pattern for transformers": r".*layers\.\d+\.mlp\.up_proj",
    "a pattern that is none": "re:(",
    "a part of it with the experts": "model.layers.0.mlp.experts",
    "one expert": "model.layers.0.mlp.experts.0.up_proj",
    "another module": "model.layers.7.self_attn.q_proj",
}


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_entry_that_matches_an_fp8_module_is_a_problem(made: Path, tmp_path: Path, layout: str, kind: str) -> None:
    """Exactly, by prefix, by regular expression or as a suffix: as the engine matches, which the problem names."""
    for key in keys_of(layout):
        config = json.loads((made / layout / "config.json").read_text())["quantization_config"]
        quantization, found = changed(made, layout, tmp_path / key, key, [*config[key], ADDED[kind]])
        if kind == "a pattern that is none":
            assert {p.tensor for p in found.problems} <= {ADDED[kind]}
            continue
        check(quantization, layout, found, set(), {ADDED[kind]})
        if kind == "an FP8 module":
            assert {p.tensor for p in found.problems} == {ADDED[kind]}


def test_an_unknown_family_is_checked_and_nothing_is_claimed(tmp_path: Path) -> None:
    """Names in its engines are not known: a wrong list is a problem, and a right one no proof."""
    write(tmp_path / "source", {"model_type": "unheard_of"}, decoder())
    quantize_repo(tmp_path / "source", tmp_path / "result", device="cpu", threads=1)
    for origin in (tmp_path / "source", None):
        done = verify_repo(origin, tmp_path / "result")
        assert done.ok
        assert done.engines == ()
    path = tmp_path / "result" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = []
    path.write_text(json.dumps(config))
    problems = {p.tensor: p.problem for p in verify_repo(tmp_path / "source", tmp_path / "result").problems}
    assert "vLLM and SGLang and transformers" in problems["lm_head"]
