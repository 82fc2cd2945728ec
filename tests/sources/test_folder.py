"""Bad sources: each refused by its own error class that names file and tensor, with nothing left behind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import NemotronFp8Error, Recipe, plan_repo, quantize_repo
from nemotron_fp8.checkpoint.inventory import is_plain_name
from nemotron_fp8.errors import (
    BudgetError,
    DeviceError,
    MalformedIndexError,
    MissingShardError,
    NothingSelectedError,
    RecipeError,
    SourceError,
    SourceNotFoundError,
    SourceReadError,
    UnrepresentableError,
)
from nemotron_fp8.sources.folder import inspect_path, read_folder
from tests.support.breaks import BREAKS, FIRST, O_PROJ, SECOND, place
from tests.support.checkpoints import (
    CARD,
    INDEX,
    MANIFEST,
    contents,
    model,
    snapshot,
    write_checkpoint,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("case", BREAKS)
def test_bad_sources_are_refused_and_nothing_is_left(checkpoint: Path, destination: Path, case: str) -> None:
    """The class of the violation, its fields, a message that says where; no folder, partial or otherwise."""
    kind, damage, fields, says = BREAKS[case]
    damage(checkpoint)
    before = snapshot(checkpoint)
    with pytest.raises(kind, match=says) as caught:
        quantize_repo(checkpoint, destination)
    error = caught.value
    assert type(error) is kind
    assert isinstance(error, SourceError)
    assert {name: getattr(error, name) for name in fields} == fields
    assert "\n" not in str(error)
    assert not list(destination.parent.iterdir())
    assert snapshot(checkpoint) == before


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "a\\b.safetensors"),
        *(".h.safetensors", "~.safetensors", "c:x.safetensors", "nul.safetensors", "x\n.safetensors"),
        "x" * 250 + ".safetensors",
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(checkpoint: Path, destination: Path, name: str) -> None:
    place(checkpoint, **{O_PROJ: name})
    with pytest.raises(MalformedIndexError, match="not a plain file name"):
        quantize_repo(checkpoint, destination)
    assert not is_plain_name(name)


def test_a_source_that_is_not_there(tmp_path: Path, destination: Path) -> None:
    for source, problem in [(tmp_path / "no", "no such folder"), (tmp_path / "file", "neither a folder")]:
        (tmp_path / "file").write_text("x")
        with pytest.raises(SourceNotFoundError, match=problem) as caught:
            quantize_repo(source, destination)
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.source == str(source)
    assert not list(destination.parent.iterdir())


BAD_ARGUMENTS: dict[str, tuple[type[NemotronFp8Error], dict[str, Any]]] = {
    "budget": (BudgetError, {"max_memory": 1 << 20}),
    "amount": (RecipeError, {"max_memory": "lots"}),
    "device": (DeviceError, {"device": "tpu"}),
    "device number": (DeviceError, {"device": "cuda:x"}),
    "no such device": (DeviceError, {"device": "cuda:99"}),
    "nothing": (NothingSelectedError, {"recipe": Recipe(ignore=("proj",))}),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_and_nothing_is_left(checkpoint: Path, destination: Path, case: str) -> None:
    kind, arguments = BAD_ARGUMENTS[case]
    with pytest.raises(kind):
        quantize_repo(checkpoint, destination, **arguments)
    assert not list(destination.parent.iterdir())


def test_a_refused_tensor_in_the_last_shard_leaves_nothing(tmp_path: Path, destination: Path) -> None:
    """The first shard is staged by then."""
    shards = model(torch.float16)
    for held in shards.values():
        for name in held:
            held[name] = held[name] + 1
    shards[SECOND]["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(16, 16, dtype=torch.float16)
    source = write_checkpoint(tmp_path / "s", shards)
    with pytest.raises(UnrepresentableError) as caught:
        quantize_repo(source, destination, Recipe(numerics="original"))
    assert caught.value.tensor == "model.layers.1.self_attn.o_proj.weight"
    assert not list(destination.parent.iterdir())


# ---- what is copied ----

COPIED = [
    "tokenizer.json",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "merges.txt",
    "vocab.txt",
    "USAGE.md",
    "LICENSE",
    "LICENSE.pdf",
    "Notice",
    "tekken.tiktoken",
]
LEFT = {
    "pytorch_model.bin": "a pickle",
    "old.PT": "a pickle",
    "x.ckpt": "a pickle",
    "tf_model.h5": "another framework",
    "flax_model.msgpack": "another framework",
    "model.gguf": "another framework",
    "modeling_x.py": "code",
    ".gitattributes": "a dot file",
    ".env.json": "a dot file",
    "adapter.safetensors": "index does not list",
    "pytorch_model.bin.index.json": "an index of weights",
    "photo.png": "not a kind of file",
    "run.sh": "not a kind of file",
    "config.yaml~": "not a kind of file",
    "aux.json": "unsafe",
}


def test_side_files_by_an_allow_list(checkpoint: Path, destination: Path) -> None:
    """Files that an engine or a person needs are copied byte for byte. The others are reported with the reason."""
    for i, name in enumerate([*COPIED, *LEFT]):
        (checkpoint / name).write_bytes(b"%d" % i)
    report = quantize_repo(checkpoint, destination)
    found = contents(destination)
    assert found.keys() - {FIRST, SECOND, INDEX, "config.json", MANIFEST, CARD} == {*COPIED}
    for name in COPIED:
        assert found[name] == (checkpoint / name).read_bytes()
    reasons = dict(report.left_out)
    assert reasons.keys() == LEFT.keys()
    for name, reason in LEFT.items():
        assert reason in reasons[name]


def test_folders_in_a_source_are_named_as_left_out(checkpoint: Path, destination: Path) -> None:
    """A folder (another format's weights, an image set) is not copied, and that is said."""
    (checkpoint / "original").mkdir()
    (checkpoint / "original" / "consolidated.pth").write_bytes(b"x")
    report = quantize_repo(checkpoint, destination)
    assert not (destination / "original").exists()
    assert "original" in dict(report.left_out)


def test_links_into_a_cache_are_read(tmp_path: Path, checkpoint: Path, destination: Path) -> None:
    """A snapshot folder of the Hub's cache is links to blobs; the result is plain files."""
    links, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    links.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(checkpoint.iterdir()):
        (blobs / str(i)).write_bytes(path.read_bytes())
        (links / path.name).symlink_to(f"../../blobs/{i}")
    quantize_repo(links, destination)
    assert not any(path.is_symlink() for path in destination.iterdir())
    quantize_repo(checkpoint, tmp_path / "direct")
    assert contents(destination) == contents(tmp_path / "direct")


# ---- inspect ----


def test_inspect_reads_a_file_and_a_folder(checkpoint: Path) -> None:
    whole = inspect_path(checkpoint)
    assert [shard.name for shard in whole] == [FIRST, SECOND]
    (one,) = inspect_path(checkpoint / FIRST)
    assert one == whole[0]
    assert {view.name for view in one.views} == model()[FIRST].keys()
    with pytest.raises(SourceNotFoundError):
        inspect_path(checkpoint / "no")


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    source = write_checkpoint(tmp_path / "s", model())
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceReadError, match="Permission denied"):
        read_folder(source)


def test_plan_of_a_bad_source_is_refused_too(checkpoint: Path) -> None:
    (checkpoint / SECOND).unlink()
    with pytest.raises(MissingShardError):
        plan_repo(checkpoint)
