"""Files beside the shards: code that configs name is copied and never run, and no stale quantization is passed on."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, convert_repo, dequantize_repo, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.errors import (
    AlreadyQuantizedError,
    InPlaceError,
    LfsPointerError,
    NotQuantizedError,
    OneShardError,
    PackedWeightsError,
)
from tests.support.breaks import FIRST, SECOND, pointer
from tests.support.checkpoints import (
    CARD,
    CONFIG,
    INDEX,
    MANIFEST,
    ONE,
    contents,
    edit_json,
    model,
    snapshot,
    weight,
    write_checkpoint,
)
from tests.support.stops import StoppedError, stop_when_marked

if TYPE_CHECKING:
    from pathlib import Path

RUN = "raise SystemExit('this code was run')\n"
CODE = {
    "configuration_x.py": f"{RUN}",
    "modeling_x.py": f"from .configuration_x import XConfig\nfrom .layers_x import Layer\n{RUN}",
    "layers_x.py": RUN,
    "tokenization_x.py": RUN,
    "processing_x.py": RUN,
}
STRAY = "convert_weights.py"


def add_code(source: Path) -> None:
    """Add modules that three configs name, and one that none names."""
    for name, text in {**CODE, STRAY: RUN}.items():
        (source / name).write_text(text)
    edit_json(
        source / "config.json", auto_map={"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}
    )
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (source / "preprocessor_config.json").write_text('{"auto_map": {"AutoProcessor": "processing_x.XProcessor"}}')


def test_code_that_configs_name_is_copied_and_not_run(checkpoint: Path, destination: Path) -> None:
    """Byte for byte, in the manifest, with one notice; other code is left out."""
    add_code(checkpoint)
    before = set(sys.modules)
    report = quantize_repo(checkpoint, destination)
    assert not [name for name in set(sys.modules) - before if name.endswith("_x")]
    found = contents(destination)
    assert {name: data.decode() for name, data in found.items() if name.endswith(".py")} == CODE
    assert CODE.keys() <= json.loads(found[MANIFEST])["files"].keys()
    (notice,) = (notice for notice in report.notices if "trust_remote_code" in notice)
    assert all(name in notice for name in CODE)
    assert "was not run" in notice
    assert dict(report.left_out) == {STRAY: "code that no auto_map names"}
    assert notice in plan_repo(checkpoint).notices
    assert verify_repo(checkpoint, destination).ok
    assert quantize_repo(checkpoint, destination).unchanged
    (destination / "layers_x.py").write_text("changed")
    (problem,) = verify_repo(None, destination).problems
    assert problem.tensor == "layers_x.py"


def test_code_that_is_missing_is_named(checkpoint: Path, destination: Path, tmp_path: Path) -> None:
    """Also a link that leaves the folder, whose target is not copied; code of another repository has its own notice."""
    add_code(checkpoint)
    (tmp_path / "outside.py").write_text("secret")
    (checkpoint / "layers_x.py").unlink()
    (checkpoint / "layers_x.py").symlink_to(tmp_path / "outside.py")
    (checkpoint / "configuration_x.py").unlink()
    edit_json(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": "owner/other--tokenization_y.Y"})
    report = quantize_repo(checkpoint, destination)
    assert {path.name for path in destination.glob("*.py")} == {"modeling_x.py", "processing_x.py"}
    (missing,) = (notice for notice in report.notices if "not beside config.json" in notice)
    assert "'configuration_x.py', 'layers_x.py'" in missing
    assert any("'owner/other'" in notice for notice in report.notices)
    assert "outside" in dict(report.left_out)["layers_x.py"]


def test_code_in_place(checkpoint: Path, destination: Path) -> None:
    """The folder keeps its code, and the manifest lists what a destination would hold; also after an interruption."""
    add_code(checkpoint)
    (checkpoint / STRAY).unlink()
    notices = quantize_repo(checkpoint, destination).notices
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, in_place=True, threads=1, progress=stop_when_marked(checkpoint))
    assert quantize_repo(checkpoint, in_place=True).notices == notices
    assert contents(checkpoint) == contents(destination)
    assert verify_repo(None, checkpoint).ok


# ---- stale statements of a quantization ----

STALE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json", "recipe.yaml")
REMNANTS: dict[str, Any] = {
    "compression_config": {"config_groups": {"group_0": {}}},
    "text_config": {"hidden_size": 16, "quantization_config": {"quant_method": "fp8"}},
    "parts": [{"quantization_config": {"quant_method": "modelopt"}}],
}
CLEAN: dict[str, Any] = {"text_config": {"hidden_size": 16}, "parts": [{}]}


def add_remnants(source: Path) -> None:
    for name in STALE:
        (source / name).write_text("{}")
    edit_json(source / "config.json", **REMNANTS)


def test_stale_statements_are_not_passed_on(checkpoint: Path, destination: Path) -> None:
    """The result states its own quantization, in one place; files and keys that were dropped are named."""
    add_remnants(checkpoint)
    report = quantize_repo(checkpoint, destination)
    written = json.loads((destination / "config.json").read_bytes())
    assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert written == CONFIG | CLEAN
    assert not [name for name in STALE if (destination / name).exists()]
    assert dict(report.left_out).keys() == set(STALE)
    (notice,) = (notice for notice in report.notices if "dropped" in notice)
    assert all(key in notice for key in ("compression_config", "text_config.q", "parts[0].q", "modelopt"))
    assert verify_repo(checkpoint, destination).ok
    assert verify_repo(None, destination).ok


@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_model_itself_states_is_refused(checkpoint: Path, destination: Path, in_place: bool) -> None:
    """Even where its tensors are not quantized: only its author knows what that means."""
    edit_json(checkpoint / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    before = snapshot(checkpoint)
    with pytest.raises(AlreadyQuantizedError, match=r"a quantization_config, quant_method 'bitsandbytes'") as caught:
        quantize_repo(checkpoint, None if in_place else destination, in_place=in_place)
    assert not caught.value.fp8
    with pytest.raises(AlreadyQuantizedError):
        convert_repo(checkpoint, destination)
    assert snapshot(checkpoint) == before
    assert not list(destination.parent.iterdir())


def test_a_second_statement_in_a_result_is_a_problem(checkpoint: Path, destination: Path) -> None:
    quantize_repo(checkpoint, destination)
    edit_json(destination / "config.json", text_config={"quantization_config": {"quant_method": "gptq"}})
    (destination / MANIFEST).unlink()
    problems = [problem.problem for problem in verify_repo(None, destination).problems]
    assert any("text_config.quantization_config" in problem for problem in problems)
    assert not verify_repo(checkpoint, destination).ok


def test_results_without_quantization_state_none(checkpoint: Path, destination: Path) -> None:
    """Of a conversion, and of a dequantization whose source has more statements than its own."""
    add_remnants(checkpoint)
    convert_repo(checkpoint, destination.with_name("plain"))
    quantize_repo(checkpoint, destination.with_name("fp8"), Recipe(format="fp8", granularity="tensor"))
    add_remnants(destination.with_name("fp8"))
    edit_json(
        destination.with_name("fp8") / "config.json",
        quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"},
    )
    dequantize_repo(destination.with_name("fp8"), destination)
    for result in (destination.with_name("plain"), destination):
        assert json.loads((result / "config.json").read_bytes()) == CONFIG | CLEAN
        assert not [name for name in STALE if (result / name).exists()]
    assert verify_repo(destination.with_name("fp8"), destination).ok
    assert verify_repo(None, destination).ok


def test_a_nested_statement_about_quantized_tensors_is_dropped(checkpoint: Path, destination: Path) -> None:
    quantize_repo(checkpoint, destination)
    config = json.loads((destination / "config.json").read_bytes())
    statement = config.pop("quantization_config")
    (destination / "config.json").write_text(json.dumps({**config, "text_config": {"quantization_config": statement}}))
    again = quantize_repo(destination, destination.with_name("again"))
    assert again.recoded.kept == again.tensors_quantized
    written = json.loads((destination.with_name("again") / "config.json").read_bytes())
    assert written == {**config, "text_config": {}, "quantization_config": statement}
    with pytest.raises(AlreadyQuantizedError, match=r"text_config\.quantization_config.*dequantize it first") as caught:
        quantize_repo(destination, in_place=True)
    assert caught.value.fp8
    dequantize_repo(destination, destination.with_name("plain"))
    assert verify_repo(destination, destination.with_name("plain")).ok


OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "awq": ("AWQ", {"quant_method": "awq"}, {"x.q_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}),
    "gptq": ("GPTQ", {"quant_method": "gptq"}, {"x.q_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}),
    "bitsandbytes": (
        "bitsandbytes",
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"x.q_proj.weight": torch.zeros(8, 1, dtype=torch.uint8), "x.q_proj.weight.absmax": torch.zeros(4)},
    ),
}


@pytest.mark.parametrize("method", OTHERS)
def test_the_advice_for_other_methods_fits_them(tmp_path: Path, destination: Path, method: str) -> None:
    """Only FP8 and MXFP4 are read, so neither command sends its caller to the other one."""
    name, statement, tensors = OTHERS[method]
    held = {"x.k_proj.weight": weight(16, 16), **tensors}
    source = write_checkpoint(tmp_path / "s", {ONE: held}, config={**CONFIG, "quantization_config": statement})
    wanted = rf"its weights are {name}.*'{method}'.*undo it with .*, or start from the original checkpoint"
    with pytest.raises(PackedWeightsError, match=wanted) as caught:
        quantize_repo(source, destination)
    assert caught.value.format.startswith(name)
    with pytest.raises(NotQuantizedError, match=rf"another format \(.*'{method}'\); start from the original"):
        dequantize_repo(source, destination)
    assert not list(destination.parent.iterdir())


def test_in_place_stale_files_are_refused(checkpoint: Path) -> None:
    """They stay in the folder, where engines would read them; keys of the config are dropped."""
    add_remnants(checkpoint)
    before = snapshot(checkpoint)
    with pytest.raises(InPlaceError, match=r"hf_quant_config\.json.*move it"):
        quantize_repo(checkpoint, in_place=True)
    assert snapshot(checkpoint) == before
    for name in STALE:
        (checkpoint / name).unlink()
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, in_place=True, threads=1, progress=stop_when_marked(checkpoint))
    assert any("dropped" in notice for notice in quantize_repo(checkpoint, in_place=True).notices)
    written = json.loads((checkpoint / "config.json").read_bytes())
    del written["quantization_config"]
    assert written == CONFIG | CLEAN


# ---- tokenizers and processors ----

KEPT = [
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "feature_extractor_config.json",
    "image_processor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "qwen.tiktoken",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "vocab.bpe",
    "bpe.codes",
    "normalizer.json",
    "params.json",
]


@pytest.mark.parametrize("name", KEPT)
def test_files_of_tokenizers_and_processors_are_copied(tmp_path: Path, name: str) -> None:
    side = {name: b'{"any": "bytes"}'}
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": weight(4, 4)}}, side=side)
    report = quantize_repo(source, tmp_path / "d")
    assert (tmp_path / "d" / name).read_bytes() == side[name]
    assert report.left_out == ()


def test_chat_templates_in_a_folder_are_named(checkpoint: Path, destination: Path) -> None:
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    reasons = dict(quantize_repo(checkpoint, destination).left_out)
    assert "copy it to the result" in reasons["additional_chat_templates"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "config.json", INDEX, FIRST, CARD])
def test_a_pointer_in_place_of_a_file_is_refused(checkpoint: Path, destination: Path, name: str) -> None:
    (checkpoint / name).write_bytes(pointer(17_209_920))
    with pytest.raises(LfsPointerError, match=r"17,209,920 bytes.*git lfs pull in ") as caught:
        quantize_repo(checkpoint, destination)
    assert (caught.value.file, caught.value.folder, caught.value.size) == (name, str(checkpoint), 17_209_920)
    assert not list(destination.parent.iterdir())


def test_a_pointer_in_place_of_a_file_that_is_not_copied_does_no_harm(checkpoint: Path, destination: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(pointer(1 << 30))
    (checkpoint / "consolidated.safetensors").write_bytes(pointer(1 << 30))
    quantize_repo(checkpoint, destination)
    assert verify_repo(checkpoint, destination).ok


def test_an_adapter_beside_a_model_is_left_out(checkpoint: Path, destination: Path) -> None:
    """Transformers would load the adapter's own base model instead of the result."""
    (checkpoint / "adapter_config.json").write_text("{}")
    (checkpoint / "adapter_model.safetensors").write_bytes(b"x")
    report = quantize_repo(checkpoint, destination)
    assert not list(destination.glob("adapter*"))
    assert all("an adapter" in reason for reason in dict(report.left_out).values())
    assert dict(report.left_out).keys() == {"adapter_config.json", "adapter_model.safetensors"}
    notices = quantize_repo(checkpoint, in_place=True).notices
    assert any("adapter_config.json" in notice and "stays in the folder" in notice for notice in notices)


# ---- shards without an index, and single shards ----


def test_numbered_shards_need_no_index(checkpoint: Path, destination: Path) -> None:
    """The result has one, whatever the source; also in place, after an interruption."""
    quantize_repo(checkpoint, destination.with_name("with"))
    (checkpoint / INDEX).unlink()
    report = quantize_repo(checkpoint, destination)
    assert any(INDEX in notice for notice in report.notices)
    index = json.loads((destination / INDEX).read_bytes())
    reference = json.loads((destination.with_name("with") / INDEX).read_bytes())
    assert index["weight_map"] == reference["weight_map"]
    assert index["metadata"] == {"total_size": reference["metadata"]["total_size"]}
    assert verify_repo(checkpoint, destination).ok
    assert verify_repo(None, destination).ok
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, in_place=True, threads=1, progress=stop_when_marked(checkpoint))
    assert quantize_repo(checkpoint, in_place=True).resumed == 1
    assert contents(checkpoint) == contents(destination)


def test_one_numbered_shard_is_a_checkpoint_if_its_name_says_so(tmp_path: Path) -> None:
    name = "model-00001-of-00001.safetensors"
    source = write_checkpoint(tmp_path / "s", {name: {"a.o_proj.weight": weight(4, 4)}})
    quantize_repo(source, tmp_path / "d")
    assert json.loads((tmp_path / "d" / INDEX).read_bytes())["weight_map"]["a.o_proj.weight"] == name
    assert verify_repo(source, tmp_path / "d").ok


@pytest.mark.parametrize("index", [False, True])
def test_a_single_shard_takes_the_files_beside_it(tmp_path: Path, index: bool) -> None:
    """As if the folder were named; other weights beside it are left out."""
    held = {ONE: {"a.o_proj.weight": weight(4, 4)}}
    source = write_checkpoint(tmp_path / "s", held, side={"tokenizer.json": b"{}", CARD: b"# A"}, index=index)
    quantize_repo(source, tmp_path / "folder")
    (source / "other.safetensors").write_bytes(b"x")
    report = quantize_repo(source / ONE, tmp_path / "file")
    assert contents(tmp_path / "file") == contents(tmp_path / "folder")
    assert dict(report.left_out).keys() == {"other.safetensors"}
    assert verify_repo(source / ONE, tmp_path / "file").ok


def test_a_single_shard_without_a_config_is_taken_alone(tmp_path: Path) -> None:
    """Files beside it are not those of a checkpoint: it may lie in any folder."""
    held = {ONE: {"a.o_proj.weight": weight(4, 4)}}
    source = write_checkpoint(tmp_path / "s", held, config=None, side={"notes.txt": b"mine"})
    quantize_repo(source / ONE, tmp_path / "d")
    assert contents(tmp_path / "d").keys() == {ONE, MANIFEST, CARD}


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_one_shard_of_several_is_refused(tmp_path: Path, destination: Path, index: bool, config: bool) -> None:
    source = write_checkpoint(tmp_path / "s", model(), index=index, config=CONFIG if config else None)
    with pytest.raises(OneShardError, match="one of 2 shards") as caught:
        quantize_repo(source / SECOND, destination)
    assert (caught.value.shards, caught.value.folder) == (2, str(source))
    assert quantize_repo(source, destination, Recipe()).tensors_quantized
