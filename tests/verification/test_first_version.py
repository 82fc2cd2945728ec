"""Results of versions without roles: exact names in their lists, no ``also_select`` in their manifest. They stay good.

Such a folder is made by hand here, in the spelling of that version.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, dequantize_repo, quantize_repo, verify_repo
from nemotron_fp8.checkpoint.json_text import pretty_json
from nemotron_fp8.cli.main import main
from tests.support.checkpoints import MANIFEST, ONE, read_tensors
from tests.support.decoders import HIDDEN, INNER, Shapes, attention, decoder, mlp, write

if TYPE_CHECKING:
    from pathlib import Path

LAYOUTS = {
    "fp8 tensor": Recipe(format="fp8", granularity="tensor"),
    "fp8 block": Recipe(format="fp8"),
    "tensor": Recipe(granularity="tensor", activations="none"),
    "channel": Recipe(),
    "block": Recipe(granularity="block"),
}
NEW_FIELDS = ("selection", "also_select", "force_select")
LAYER = "model.layers.0."
HYBRID: Shapes = {
    "backbone.embeddings.weight": (512, HIDDEN),
    "lm_head.weight": (512, HIDDEN),
    **{f"backbone.layers.{i}.norm.weight": (HIDDEN,) for i in range(2)},
    "backbone.layers.0.mixer.in_proj.weight": (INNER, HIDDEN),
    "backbone.layers.1.mixer.gate.weight": (4, HIDDEN),
    "backbone.layers.1.mixer.experts.0.up_proj.weight": (INNER, HIDDEN),
    "mtp.layers.0.mixer.q_proj.weight": (HIDDEN, HIDDEN),
}
CASES: dict[str, tuple[dict[str, Any], Shapes]] = {
    "llama": ({"model_type": "llama"}, decoder()),
    "llama, tied": ({"model_type": "llama"}, decoder(head=None)),
    "an unknown family, tied": ({"model_type": "unheard_of"}, decoder(head=None)),
    "mixtral: most experts were left": (
        {"model_type": "mixtral", "num_local_experts": 4},
        {
            **decoder(dense=False),
            f"{LAYER}block_sparse_moe.gate.weight": (4, HIDDEN),
            **{f"{LAYER}block_sparse_moe.experts.0.w{i}.weight": (HIDDEN, HIDDEN) for i in (1, 2, 3)},
        },
    ),
    "granite: stacks were no modules": (
        {"model_type": "granitemoe", "hidden_size": HIDDEN},
        {
            **decoder(dense=False),
            f"{LAYER}block_sparse_moe.input_linear.weight": (4, 2 * INNER, HIDDEN),
            f"{LAYER}block_sparse_moe.output_linear.weight": (4, HIDDEN, INNER),
            f"{LAYER}block_sparse_moe.router.layer.weight": (4, HIDDEN),
        },
    ),
    "stacks of a known family": (
        {"model_type": "qwen3_moe"},
        {
            **decoder(dense=False),
            f"{LAYER}mlp.gate.weight": (4, HIDDEN),
            f"{LAYER}mlp.experts.gate_up_proj": (4, 2 * INNER, HIDDEN),
            f"{LAYER}mlp.experts.down_proj": (4, HIDDEN, INNER),
        },
    ),
    "a hybrid": ({"model_type": "nemotron_h"}, HYBRID),
    "an image encoder": (
        {"model_type": "llava"},
        {
            **{f"language_model.{name}": shape for name, shape in decoder().items()},
            **attention("vision_tower.layers.0.self_attn."),
            "vision_tower.embeddings.patch_embedding.weight": (HIDDEN, HIDDEN),
            "multi_modal_projector.linear_1.weight": (HIDDEN, HIDDEN),
        },
    ),
}
IGNORED = (r"layers\.1\.self_attn", r"layers\.0\.mlp\.(gate_proj|experts)")


def by_first_version(result: Path, config: dict[str, Any], shapes: Shapes, recipe: Recipe) -> None:
    """Rewrite config and manifest of a result as that version wrote them."""
    tensors = read_tensors(result / ONE)
    codes = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    modules = [
        name.rpartition(".")[0]
        for name, tensor in tensors.items()
        if (tensor.dim() == 2 and name.endswith(".weight") and name not in codes and "embed" not in name)
        or re.search(r"(^|\.)experts\.[^.]+$", name)
    ]
    modules = list(dict.fromkeys(modules))
    if not any(name.endswith("lm_head") for name in modules) and recipe.layout.readers[recipe.scheme].transformers:
        modules.append("lm_head")
    path = result / "config.json"
    written = json.loads(path.read_text())
    quantization = written["quantization_config"]
    for key in ("ignore", "ignored_layers", "modules_to_not_convert"):
        quantization.pop(key, None)
    if recipe.format == "compressed-tensors":
        quantization["ignore"] = [
            entry
            for name in modules
            for entry in (
                *([rf"re:.*{re.escape(name.removeprefix('backbone.'))}$"] if name.startswith("backbone.") else [name]),
                *([rf"re:.*{re.escape(name)}\.\d+\..*"] if name.endswith(".experts") else []),
            )
        ]
    else:
        key = "modules_to_not_convert" if recipe.granularity == "block" else "ignored_layers"
        quantization[key] = modules
    path.write_bytes(pretty_json(written))
    manifest = json.loads((result / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    manifest["source"].pop("stacks", None)
    for field in NEW_FIELDS:
        del manifest["recipe"][field]
    manifest["recipe"]["select"] = []
    data = path.read_bytes()
    manifest["files"]["config.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    digest = hashlib.sha256(pretty_json(manifest)).hexdigest()
    (result / MANIFEST).write_bytes(pretty_json({**manifest, "manifest_sha256": digest}))
    assert config["model_type"] == written["model_type"]
    assert shapes.keys() <= tensors.keys() | {n for n in shapes if len(shapes[n]) == 3}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["nemotron-fp8", *map(str, words)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return int(str(code)), "".join(capsys.readouterr())

    return call


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ignore", [False, True], ids=["", "ignore"])
def test_it_verifies_dequantizes_and_compares(
    tmp_path: Path, case: str, layout: str, ignore: bool, command: Any
) -> None:
    """That version took ``*_proj.weight`` alone, so that it is what this one takes with such a pattern."""
    config, shapes = CASES[case]
    source = write(tmp_path / "source", config, shapes)
    names = [name for name in shapes if name.endswith(("_proj.weight", "_proj"))]
    patterns = tuple(p for p in IGNORED if any(re.search(p, name) for name in names)) * ignore
    stacked = "experts" in "".join(name for name in shapes if len(shapes[name]) == 3)
    select = (r"_proj(\.weight)?$",) if stacked else (r"_proj\.weight$",)
    recipe = LAYOUTS[layout].model_copy(update={"select": select, "ignore": patterns})
    quantize_repo(source, tmp_path / "result", recipe, device="cpu", threads=1)
    by_first_version(tmp_path / "result", config, shapes, recipe)

    for origin in (source, None):
        done = verify_repo(origin, tmp_path / "result", threads=1)
        assert done.problems == ()
        assert done.engines == ()  # its lists were not made for the names in engines
    assert command("verify", source, tmp_path / "result")[0] == 0
    assert command("verify", tmp_path / "result")[0] == 0
    assert command("compare", tmp_path / "result", tmp_path / "result")[0] == 0
    assert command("report", tmp_path / "result", "--source", source)[0] == 0
    dequantize_repo(tmp_path / "result", tmp_path / "plain", threads=1)
    assert verify_repo(tmp_path / "result", tmp_path / "plain", threads=1).ok
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_wrong_list_of_it_is_still_a_problem(tmp_path: Path) -> None:
    config, shapes = CASES["llama"]
    source = write(tmp_path / "source", config, shapes)
    quantize_repo(source, tmp_path / "result", LAYOUTS["fp8 tensor"], device="cpu", threads=1)
    by_first_version(tmp_path / "result", config, shapes, LAYOUTS["fp8 tensor"])
    path = tmp_path / "result" / "config.json"
    written = json.loads(path.read_text())
    written["quantization_config"]["ignored_layers"] = ["model.layers.0.self_attn.q_proj"]
    path.write_bytes(pretty_json(written))
    problems = {p.tensor: p.problem for p in verify_repo(source, tmp_path / "result").problems}
    assert "does not list it" in problems["lm_head"]
    assert "which is FP8" in problems["model.layers.0.self_attn.q_proj"]


def test_moe_stems(tmp_path: Path) -> None:
    """Single experts one by one, of which that version listed the router only under its name in the file."""
    shapes = {**decoder(dense=False), f"{LAYER}mlp.gate.weight": (4, HIDDEN), **mlp(f"{LAYER}mlp.experts.0.")}
    config = {"model_type": "qwen3_moe"}
    source = write(tmp_path / "source", config, shapes)
    quantize_repo(source, tmp_path / "result", LAYOUTS["channel"], device="cpu", threads=1)
    by_first_version(tmp_path / "result", config, shapes, LAYOUTS["channel"])
    assert verify_repo(source, tmp_path / "result").ok
