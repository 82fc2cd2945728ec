"""hf_quant_config.json states the quantization a second time: it is written, in the manifest, and compared."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import Recipe, dequantize_repo, plan_repo, quantize_repo, verify_repo
from tests.support.checkpoints import MANIFEST
from tests.support.decoders import decoder, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILE = "hf_quant_config.json"
RECIPES = {
    "channel": Recipe(format="modelopt"),
    "block": Recipe(format="modelopt", granularity="block"),
    "kv cache": Recipe(format="modelopt", kv_cache="fp8"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beside")
    write(root / "source", {"model_type": "llama"}, decoder())
    for name, recipe in RECIPES.items():
        quantize_repo(root / "source", root / name, recipe, device="cpu", threads=1)
    return root


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@pytest.mark.parametrize("name", RECIPES)
def test_both_files_state_the_same(made: Path, name: str) -> None:
    """In the two forms of Model Optimizer, and in the manifest; `plan` counts the file."""
    quantization, beside = read(made / name / "config.json")["quantization_config"], read(made / name / FILE)
    algorithm = "fp8_pb_wo" if name == "block" else "FP8_PER_CHANNEL_PER_TOKEN"
    assert quantization["quant_method"] == "modelopt"
    assert quantization["quant_algo"] == beside["quantization"]["quant_algo"] == algorithm
    assert quantization["ignore"] == beside["quantization"]["exclude_modules"] == ["lm_head"]
    assert quantization["producer"] == beside["producer"] == {"name": "modelopt"}
    cache = "FP8" if name == "kv cache" else None
    assert beside["quantization"]["kv_cache_quant_algo"] == cache
    assert ("kv_cache_scheme" in quantization) is (cache is not None)
    assert FILE in read(made / name / MANIFEST)["files"]
    assert verify_repo(made / "source", made / name).ok
    assert verify_repo(None, made / name).engines == ("vLLM",)
    files = [path for path in (made / name).iterdir() if path.is_file()]
    planned = plan_repo(made / "source", RECIPES[name]).disk_bytes
    assert abs(planned - sum(path.stat().st_size for path in files)) < 200  # digests and figures of the card


def lose(path: Path) -> None:
    path.unlink()


def contradict(path: Path) -> None:
    value = read(path)
    value["quantization"]["quant_algo"] = "NVFP4"
    path.write_text(json.dumps(value))


def shorten(path: Path) -> None:
    value = read(path)
    value["quantization"]["exclude_modules"] = []
    path.write_text(json.dumps(value))


def extend(path: Path) -> None:
    path.write_text(json.dumps(read(path) | {"quantized_layers": {}}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def replace_by_a_list(path: Path) -> None:
    path.write_text("[]")


CHANGES: dict[Callable[[Path], None], str] = {
    lose: "missing",
    contradict: "contradicts the quantization_config of config.json in 'quantization.quant_algo'",
    shorten: "contradicts the quantization_config of config.json in 'quantization.exclude_modules'",
    extend: "contradicts the quantization_config of config.json in 'quantized_layers'",
    truncate: "JSON",
    replace_by_a_list: "not an object",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_says_something_else_is_a_problem(
    made: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """With the source and alone; and without a manifest, whose digests would show any change."""
    shutil.copytree(made / "kv cache", tmp_path / "result")
    change(tmp_path / "result" / FILE)
    for source in (made / "source", None):
        assert any(p.tensor == FILE for p in verify_repo(source, tmp_path / "result").problems)
    (tmp_path / "result" / MANIFEST).unlink()
    for source in (made / "source", None):
        found = [p.problem for p in verify_repo(source, tmp_path / "result").problems if p.tensor == FILE]
        assert any(CHANGES[change] in problem for problem in found), found


def test_such_a_file_beside_another_layout_is_a_problem(made: Path, tmp_path: Path) -> None:
    """TensorRT-LLM reads it first."""
    quantize_repo(made / "source", tmp_path / "result", device="cpu", threads=1)
    shutil.copy(made / "channel" / FILE, tmp_path / "result")
    (tmp_path / "result" / MANIFEST).unlink()
    for source in (made / "source", None):
        problems = [p.problem for p in verify_repo(source, tmp_path / "result").problems if p.tensor == FILE]
        assert any("states a quantization beside config.json" in problem for problem in problems)


def test_another_cache_than_the_manifest_records_is_a_problem(made: Path, tmp_path: Path) -> None:
    """The config of a result may be changed together with the file beside it."""
    shutil.copytree(made / "kv cache", tmp_path / "result")
    for name in ("config.json", FILE):
        shutil.copy(made / "channel" / name, tmp_path / "result")
    problems = verify_repo(made / "source", tmp_path / "result").problems
    assert any("is not that of the recipe in" in p.problem for p in problems)


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_is_of_the_result_and_not_of_its_dequantized_copy(made: Path, tmp_path: Path, name: str) -> None:
    dequantize_repo(made / name, tmp_path / "bf16")
    assert not (tmp_path / "bf16" / FILE).exists()
    assert verify_repo(made / name, tmp_path / "bf16").ok


def test_in_place_too(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "source", tmp_path / "model")
    quantize_repo(tmp_path / "model", None, RECIPES["kv cache"], in_place=True, device="cpu", threads=1)
    assert (tmp_path / "model" / FILE).read_bytes() == (made / "kv cache" / FILE).read_bytes()
    assert verify_repo(None, tmp_path / "model").ok


@pytest.mark.parametrize("rounding", ["none", "power-of-two"])
@pytest.mark.parametrize("kept", [True, False], ids=["manifest", "card"])
def test_the_rounding_of_scales_is_that_of_the_manifest_or_of_the_card(
    made: Path, tmp_path: Path, rounding: Any, kept: bool
) -> None:
    """No config states it, and both are right."""
    recipe = Recipe(granularity="block", scale_rounding=rounding)
    quantize_repo(made / "source", tmp_path / "result", recipe, device="cpu", threads=1)
    if not kept:
        (tmp_path / "result" / MANIFEST).unlink()
    assert verify_repo(made / "source", tmp_path / "result").ok
