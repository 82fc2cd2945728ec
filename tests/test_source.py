"""Bad sources: each refused by its own error class that names file and tensor, with nothing left behind."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import NemotronFp8Error, Recipe, plan_repo, quantize_repo
from nemotron_fp8.errors import (
    AlreadyQuantizedError,
    BudgetError,
    DeviceError,
    IndexMismatchError,
    MalformedConfigError,
    MalformedHeaderError,
    MalformedIndexError,
    MissingShardError,
    NonFiniteError,
    NothingSelectedError,
    PickledWeightsError,
    RecipeError,
    SourceError,
    SourceNotFoundError,
    SourceReadError,
    UnknownDtypeError,
    UnrepresentableError,
)
from nemotron_fp8.source import inspect_path, is_plain_name, read_folder
from tests.checkpoints import (
    INDEX,
    MANIFEST,
    ONE,
    contents,
    edit_json,
    framed,
    model,
    shard_bytes,
    snapshot,
    weight,
    write_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FIRST, SECOND = (f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def weight_map(source: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
    return found


def place(source: Path, **tensors: str | None) -> None:
    """Change the index: where tensors are said to be; None for nowhere."""
    places = {**weight_map(source), **tensors}
    edit_json(source / INDEX, weight_map={name: shard for name, shard in places.items() if shard is not None})


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def header_of(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the first shard's header."""
    data = (source / FIRST).read_bytes()
    length = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + length])
    change(tree)
    (source / FIRST).write_bytes(framed(json.dumps(tree).encode(), data[8 + length :]))


def put(source: Path, shard: str, **tensors: torch.Tensor) -> None:
    """Replace or add tensors of a shard, the index following."""
    held = {**model()[shard], **tensors}
    (source / shard).write_bytes(shard_bytes(held))
    place(source, **dict.fromkeys(tensors, shard))


def spoilt(value: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    tensor = weight(16, 16, dtype=dtype)
    tensor[2, 7] = tensor[3, 1] = value
    return tensor


Break = tuple[type[NemotronFp8Error], "Callable[[Path], object]", dict[str, object], str]

BREAKS: dict[str, Break] = {
    "missing shard": (
        MissingShardError,
        lambda s: (s / SECOND).unlink(),
        {"shard": SECOND, "tensors": len(model()[SECOND])},
        "missing, but model.safetensors.index.json places 12 tensors in it",
    ),
    "dangling link for a shard": (
        MissingShardError,
        lambda s: ((s / SECOND).unlink(), (s / SECOND).symlink_to("nowhere")),
        {"shard": SECOND},
        "missing",
    ),
    "tensor in the index but not in its shard": (
        IndexMismatchError,
        lambda s: place(s, **{"ghost.weight": FIRST}),
        {"tensor": "ghost.weight", "shard": FIRST},
        "in model.safetensors.index.json, but not in the shard",
    ),
    "tensor in a shard but not in the index": (
        IndexMismatchError,
        lambda s: place(s, **{O_PROJ: None}),
        {"tensor": O_PROJ, "shard": FIRST},
        "not in model.safetensors.index.json",
    ),
    "tensor in another shard than the index says": (
        IndexMismatchError,
        lambda s: place(s, **{O_PROJ: SECOND}),
        {"tensor": O_PROJ, "shard": FIRST},
        "places it in",
    ),
    "tensor in two shards": (
        IndexMismatchError,
        lambda s: put(s, SECOND, **{O_PROJ: weight(16, 16)}),
        {"tensor": O_PROJ},
        "",
    ),
    "header: trailing bytes": (
        MalformedHeaderError,
        lambda s: append(s / FIRST, b"x"),
        {"file": FIRST},
        "the rest belongs to no tensor",
    ),
    "header: cut off": (
        MalformedHeaderError,
        lambda s: (s / FIRST).write_bytes((s / FIRST).read_bytes()[:-1]),
        {"file": FIRST},
        "some are missing",
    ),
    "header: empty file": (MalformedHeaderError, lambda s: (s / FIRST).write_bytes(b""), {"file": FIRST}, "0 bytes"),
    "header: shape and offsets": (
        MalformedHeaderError,
        lambda s: header_of(s, lambda tree: tree[O_PROJ].update(shape=[16, 17])),
        {"file": FIRST, "tensor": O_PROJ},
        "takes 544 bytes",
    ),
    "header: an LFS pointer": (
        MalformedHeaderError,
        lambda s: (s / FIRST).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        {"file": FIRST},
        "not a safetensors file",
    ),
    "unknown dtype": (
        UnknownDtypeError,
        lambda s: header_of(s, lambda tree: tree[O_PROJ].update(dtype="F7_E4M2")),
        {"file": FIRST, "tensor": O_PROJ, "dtype": "F7_E4M2"},
        "unknown dtype",
    ),
    "quantised: config": (
        AlreadyQuantizedError,
        lambda s: edit_json(s / "config.json", quantization_config={"quant_method": "fp8"}),
        {},
        "quant_method 'fp8'",
    ),
    "quantised: FP8 weight": (
        AlreadyQuantizedError,
        lambda s: put(s, FIRST, **{O_PROJ: weight(16, 16, dtype=torch.float8_e4m3fn)}),
        {},
        "F8_E4M3",
    ),
    "quantised: a scale": (
        AlreadyQuantizedError,
        lambda s: put(s, FIRST, **{f"{O_PROJ}_scale": torch.tensor(1.0)}),
        {},
        "is a scale",
    ),
    "NaN": (
        NonFiniteError,
        lambda s: put(s, FIRST, **{O_PROJ: spoilt(float("nan"))}),
        {"tensor": O_PROJ, "count": 2, "position": (2, 7), "value": "nan"},
        r"2 values are NaN or Inf, the first \(nan\) at \[2, 7\].*--nonfinite keep",
    ),
    "Inf": (
        NonFiniteError,
        lambda s: put(s, SECOND, **{"model.layers.1.self_attn.q_proj.weight": spoilt(float("-inf"))}),
        {"tensor": "model.layers.1.self_attn.q_proj.weight", "count": 2, "position": (2, 7), "value": "-inf"},
        r"the first \(-inf\) at \[2, 7\]",
    ),
    "nothing selected": (
        NothingSelectedError,
        lambda s: (
            [(s / n).unlink() for n in (FIRST, SECOND, INDEX)]
            + [(s / ONE).write_bytes(shard_bytes({"a.weight": weight(4, 4)}))]
        ),
        {"tensors": 1},
        r"\*_proj.weight",
    ),
    "no tensors": (
        NothingSelectedError,
        lambda s: [(s / n).unlink() for n in (FIRST, SECOND, INDEX)] + [(s / ONE).write_bytes(framed(b"{}"))],
        {"tensors": 0},
        "none of 0 tensors",
    ),
    "only pickled weights": (
        PickledWeightsError,
        lambda s: [(s / n).unlink() for n in (FIRST, SECOND, INDEX)] + [(s / "pytorch_model.bin").write_bytes(b"x")],
        {"files": ("pytorch_model.bin",)},
        "run code when",
    ),
    "no weights": (
        SourceNotFoundError,
        lambda s: [(s / n).unlink() for n in (FIRST, SECOND, INDEX)],
        {},
        "no .safetensors file",
    ),
    "shards without an index": (SourceNotFoundError, lambda s: (s / INDEX).unlink(), {}, "2 shards, but no"),
    "one shard of several without an index": (
        SourceNotFoundError,
        lambda s: [(s / n).unlink() for n in (SECOND, INDEX)],
        {},
        "1 shards, but no",
    ),
    "config: a list": (
        MalformedConfigError,
        lambda s: (s / "config.json").write_text("[]"),
        {"file": "config.json"},
        "config.json: .*not an object",
    ),
    "config: not JSON": (MalformedConfigError, lambda s: (s / "config.json").write_text("{"), {}, "config.json"),
    "config: NaN": (MalformedConfigError, lambda s: (s / "config.json").write_text('{"a": NaN}'), {}, "NaN"),
    "config: a key twice": (MalformedConfigError, lambda s: (s / "config.json").write_text('{"a":1,"a":2}'), {}, "a"),
    "index: a list": (MalformedIndexError, lambda s: (s / INDEX).write_text("[]"), {"file": INDEX}, "object"),
    "index: no weight_map": (MalformedIndexError, lambda s: (s / INDEX).write_text("{}"), {}, "weight_map"),
    "index: empty weight_map": (
        MalformedIndexError,
        lambda s: (s / INDEX).write_text('{"weight_map": {}}'),
        {},
        "weight_map is empty",
    ),
    "index: metadata": (MalformedIndexError, lambda s: edit_json(s / INDEX, metadata=[1]), {}, "metadata"),
    "index: no file name": (MalformedIndexError, lambda s: place(s, **{O_PROJ: 7}), {}, "no plain file name"),  # type: ignore[arg-type]
    "index: another kind of file": (
        MalformedIndexError,
        lambda s: place(s, **{O_PROJ: "pytorch_model.bin"}),
        {},
        "no .safetensors file",
    ),
    "index: two names but for case": (
        MalformedIndexError,
        lambda s: place(s, **{O_PROJ: FIRST.upper().replace(".SAFETENSORS", ".safetensors")}),
        {},
        "upper and lower case",
    ),
}


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
    ["../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "a\\b.safetensors", ".h.safetensors"]
    + ["", " ", "c:x.safetensors", "nul.safetensors", "x\n.safetensors", "x" * 250 + ".safetensors", "~.safetensors"],
)
def test_an_index_cannot_lead_out_of_the_folder(checkpoint: Path, destination: Path, name: str) -> None:
    place(checkpoint, **{O_PROJ: name})
    with pytest.raises(MalformedIndexError, match="no plain file name"):
        quantize_repo(checkpoint, destination)
    assert not is_plain_name(name)


def test_a_source_that_is_not_there(tmp_path: Path, destination: Path) -> None:
    for source, problem in [(tmp_path / "no", "no such folder"), (tmp_path / "file", "not a folder")]:
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
    "README.md",
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
    "adapter.safetensors": "index does not name",
    "pytorch_model.bin.index.json": "an index of weights",
    "photo.png": "not among",
    "run.sh": "not among",
    "config.yaml~": "not among",
    "aux.json": "unsafe",
}


def test_side_files_by_an_allow_list(checkpoint: Path, destination: Path) -> None:
    """What an engine or a person needs is copied byte for byte; the rest is named with the reason."""
    for i, name in enumerate([*COPIED, *LEFT]):
        (checkpoint / name).write_bytes(b"%d" % i)
    report = quantize_repo(checkpoint, destination)
    found = contents(destination)
    assert found.keys() - {FIRST, SECOND, INDEX, "config.json", MANIFEST} == {*COPIED}
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
