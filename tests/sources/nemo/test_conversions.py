"""From a NeMo checkpoint to a finished folder: against the same model's Hugging Face checkpoint, and beside it."""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from nemotron_fp8 import Recipe, convert_repo, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.cli.main import cli
from nemotron_fp8.errors import (
    BudgetError,
    DestinationExistsError,
    OverlapError,
    PickledWeightsError,
    RecipeError,
    SourceChangedError,
    SourceLinkError,
    SourceNotFoundError,
)
from nemotron_fp8.errors.nemo import MalformedTokenizerError
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.sources.reader import Reader
from tests.support.nemo_writer import LAYOUTS, Sizes, hf_tensors, sentencepiece, write_nemo, write_zarr
from tests.support.recipes import PUBLISHED, SHARED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SHARD = 30_000


def write_hf(folder: Path, tensors: Mapping[str, torch.Tensor], config: bytes, shard_size: int = SHARD) -> Path:
    """The Hugging Face checkpoint of a model, divided as transformers divides it."""
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir()
    parts = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=shard_size)
    for name, members in parts.filename_to_tensors.items():
        save_file({member: tensors[member] for member in members}, folder / name, {"format": "pt"})
    total = sum(tensor.numel() for tensor in tensors.values())
    if parts.is_sharded:
        index = {"metadata": {"total_parameters": total} | parts.metadata, "weight_map": parts.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes(config)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_size", [SHARD, 10**9])
@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        *((layout, Recipe()) for layout in LAYOUTS),
        ("uneven", SHARED),
        ("input", PUBLISHED),
    ],
)
def test_fp8_is_that_of_the_hugging_face_checkpoint(
    tmp_path: Path, layout: str, recipe: Recipe, shard_size: int
) -> None:
    """Byte for byte, every file but the manifest, which says where tensors came from."""
    sizes = Sizes()
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "nemo", tensors, sizes, layout)
    quantize_repo(tmp_path / "nemo", tmp_path / "from-nemo", recipe, shard_size=shard_size)
    convert_repo(tmp_path / "nemo", tmp_path / "plain", shard_size=shard_size)
    config = (tmp_path / "plain" / "config.json").read_bytes()
    hf = write_hf(tmp_path / "hf", tensors, config, shard_size)
    quantize_repo(hf, tmp_path / "from-hf", recipe)
    ours, theirs = contents(tmp_path / "from-nemo"), contents(tmp_path / "from-hf")
    for files in (ours, theirs):
        files.pop("nemotron_fp8.json")
    assert ours == theirs
    assert any(name.endswith(".safetensors") for name in ours)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_keeps_every_tensor(tmp_path: Path, layout: str) -> None:
    sizes = Sizes()
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "nemo", tensors, sizes, layout)
    report = convert_repo(tmp_path / "nemo", tmp_path / "out", shard_size=SHARD)
    assert (report.tensors_quantized, report.tensors_kept) == (0, len(tensors))
    got: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        got |= load_file(path)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name].view(torch.int16), tensor.view(torch.int16)), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert verify_repo(tmp_path / "nemo", tmp_path / "out", shard_size=SHARD).ok
    again = convert_repo(tmp_path / "nemo", tmp_path / "out", shard_size=SHARD)
    assert again.unchanged


def test_config(tmp_path: Path) -> None:
    sizes = Sizes(heads=6, groups=2, head_dim=10, hidden=48)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    convert_repo(tmp_path / "nemo", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "hidden_act": "relu2",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "vocab_size": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected


def test_the_commands(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    nemo, fp8, plain = (str(tmp_path / name) for name in ("nemo", "fp8", "plain"))
    runner = CliRunner()
    for line in (
        ["plan", nemo, "--shard-size", "30kB"],
        ["quantize", nemo, fp8, "--shard-size", "30kB"],
        ["verify", nemo, fp8, "--shard-size", "30kB"],
        ["verify", fp8],
        ["convert", nemo, plain],
        ["verify", nemo, plain],
    ):
        result = runner.invoke(cli, line, catch_exceptions=False)
        assert result.exit_code == 0, (line, result.output)
    assert len(list((tmp_path / "fp8").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "plain" / "model.safetensors").exists()


def test_shard_size_is_for_nemo(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(RecipeError, match="shard size"):
        plan_repo(checkpoint, shard_size="1GB")
    with pytest.raises(RecipeError, match="no shard size"):
        quantize_repo(checkpoint, in_place=True, shard_size="1GB")


def test_result_of_another_shard_size_is_another_result(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    quantize_repo(tmp_path / "nemo", tmp_path / "out", shard_size=SHARD)
    with pytest.raises(DestinationExistsError):
        quantize_repo(tmp_path / "nemo", tmp_path / "out")


def test_destination_inside_the_source(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    with pytest.raises(OverlapError):
        convert_repo(tmp_path / "nemo", tmp_path / "nemo" / "out")


def test_chunk_that_changes_after_the_inventory(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    source = open_source(tmp_path / "nemo")
    view = next(view for view in source.inventory.views if view.name.endswith("q_proj.weight"))
    chunk = tmp_path / "nemo" / view.extents[0].file
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    with pytest.raises(SourceChangedError), Reader(source.opener) as reader, reader.elements(view, 0, view.numel):
        pass


def test_link_to_elsewhere(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "nemo" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceLinkError):
        open_source(tmp_path / "nemo")


# ---- what stands beside the weights


def test_tokenizer_is_taken_over(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    model = sentencepiece()
    (tmp_path / "nemo" / "0123_tokenizer.model").write_bytes(model)
    (tmp_path / "nemo" / "LICENSE").write_text("free")
    report = convert_repo(tmp_path / "nemo", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (tokenizer["bos_token"], tokenizer["eos_token"], tokenizer["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert tokenizer["pad_token"] is None
    assert tokenizer["add_bos_token"] is False
    assert tokenizer["added_tokens_decoder"]["5"]["content"] == "<extra_id_1>"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 3)
    assert any("chat template" in notice for notice in report.notices)
    assert ("model_config.yaml", "converted to config.json") in report.left_out


CARD = "<extra_id_0>System\n\n<extra_id_1>User\n{prompt}\n<extra_id_1>Assistant\n"
"""The prompt of the model card of Nemotron-4-340B-Instruct."""


def test_chat_template_gives_the_format_of_the_card(tmp_path: Path) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from nemotron_fp8.sources.nemo.sentencepiece import CHAT_TEMPLATE

    def refuse(text: str) -> None:
        raise ValueError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(CHAT_TEMPLATE)

    def chat(*turns: tuple[str, str], prompt: bool = True) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return template.render(messages=messages, add_generation_prompt=prompt)

    assert chat(("user", "Hi")) == CARD.format(prompt="Hi")
    assert chat(("system", "S"), ("user", "Hi")) == CARD.format(prompt="Hi").replace("\n\n", "\nS\n", 1)
    two = chat(("user", "A"), ("assistant", "B"), ("user", "C"))
    assert two == (
        "<extra_id_0>System\n\n<extra_id_1>User\nA\n<extra_id_1>Assistant\nB\n<extra_id_1>User\nC\n"
        "<extra_id_1>Assistant\n"
    )
    whole = chat(("user", "A"), ("assistant", "B"), prompt=False)
    assert whole == "<extra_id_0>System\n\n<extra_id_1>User\nA\n<extra_id_1>Assistant\nB\n"
    with pytest.raises(ValueError, match="roles"):
        chat(("user", "A"), ("system", "S"))


def test_tokenizer_without_markers_has_no_chat_template(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    (tmp_path / "nemo" / "any.model").write_bytes(sentencepiece(bos=1, eos=-1, markers=False, prefix=True))
    report = convert_repo(tmp_path / "nemo", tmp_path / "out")
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "chat_template" not in tokenizer
    assert tokenizer["bos_token"] == "<pad>"
    assert tokenizer["eos_token"] is None
    assert any("spaces" in notice for notice in report.notices)


def test_tokenizer_of_the_source_stays(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    (tmp_path / "nemo" / "tokenizer.model").write_bytes(sentencepiece())
    (tmp_path / "nemo" / "tokenizer_config.json").write_text('{"mine": true}')
    convert_repo(tmp_path / "nemo", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"mine": true}'


@pytest.mark.parametrize("data", [b"", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05ab", b"\xff" * 40, sentencepiece()[:-3]])
def test_hostile_tokenizer(tmp_path: Path, data: bytes) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    (tmp_path / "nemo" / "x.model").write_bytes(data)
    with pytest.raises(MalformedTokenizerError):
        open_source(tmp_path / "nemo")


def test_reward_head_is_kept_and_told_of(tmp_path: Path) -> None:
    """The head of a Reward model keeps its name; a notice and the README say that engines must know it."""
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes, "output")
    head = torch.randn(9, sizes.hidden).bfloat16()
    name = "model.rm_head.linear.weight"
    write_zarr(tmp_path / "nemo" / "model_weights" / name, head, (4, 20))
    (tmp_path / "nemo" / "README.md").write_text("# Theirs\n")
    report = quantize_repo(tmp_path / "nemo", tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], head)
    assert any(name in notice and "engines need support" in notice for notice in report.notices)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "# Theirs\n" in readme
    assert f"`{name}`" in readme
    assert "need support" in readme
    assert verify_repo(tmp_path / "nemo", tmp_path / "out").ok


def test_reward_model_without_output_layer(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    weights = tmp_path / "nemo" / "model_weights"
    (weights / "model.output_layer.weight").rename(tmp_path / "elsewhere")
    write_zarr(weights / "model.rm_head.weight", torch.zeros(1, 48, dtype=torch.bfloat16), (1, 48))
    names = {view.name for view in open_source(tmp_path / "nemo").inventory.views}
    assert "lm_head.weight" not in names
    assert "model.rm_head.weight" in names


def test_state_of_the_training_is_left_out(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    name = "optimizer.state.exp_avg.model.output_layer.weight"
    write_zarr(tmp_path / "nemo" / "model_weights" / name, torch.zeros(2, 2), (2, 2))
    inventory = open_source(tmp_path / "nemo").inventory
    assert (name, "training state, not weights") in inventory.left_out
    assert name not in {view.name for view in inventory.views}


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "nemo"
    root.mkdir()
    (root / "model_config.yaml").write_text(Sizes().yaml())
    with pytest.raises(SourceNotFoundError):
        open_source(root)
    (root / "model_weights.ckpt").write_bytes(b"PK")
    with pytest.raises(PickledWeightsError):
        open_source(root)


def test_budget_that_is_too_small(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    with pytest.raises(BudgetError):
        convert_repo(tmp_path / "nemo", tmp_path / "out", max_memory=1000)


def test_archive_gives_what_the_folder_gives(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes, "uneven")
    (tmp_path / "nemo" / "0123_tokenizer.model").write_bytes(sentencepiece())
    with tarfile.open(tmp_path / "it.nemo", "w:") as archive:
        archive.add(tmp_path / "nemo", arcname="./")
    quantize_repo(tmp_path / "nemo", tmp_path / "a", shard_size=SHARD)
    quantize_repo(tmp_path / "it.nemo", tmp_path / "b", shard_size=SHARD)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    for files in (a, b):
        files.pop("nemotron_fp8.json")
    assert a == b
    assert verify_repo(tmp_path / "it.nemo", tmp_path / "b", shard_size=SHARD).ok
