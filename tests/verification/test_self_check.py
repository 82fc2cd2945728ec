"""verify DST, years later: any damage to any file is found without the source, and whatever came or went."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo, verify_repo
from tests.support.checkpoints import INDEX, MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def result(checkpoint: Path, destination: Path) -> Path:
    (checkpoint / "LICENSE").write_text("Apache-2.0\n")
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (checkpoint / "README.md").write_text("# A model\n")
    quantize_repo(checkpoint, destination)
    assert verify_repo(None, destination).ok
    return destination


def problems(result: Path) -> dict[str, str]:
    return {problem.tensor: problem.problem for problem in verify_repo(None, result).problems}


FILES = ("LICENSE", "README.md", "tokenizer.json", "config.json", INDEX, SHARD, MANIFEST)
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit flips": lambda path: path.write_bytes(path.read_bytes()[:-3] + bytes([path.read_bytes()[-3] ^ 1, *b"}\n"])),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "longer by a byte": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_of_every_kind_of_file_is_found(result: Path, name: str, damage: str) -> None:
    DAMAGE[damage](result / name)
    assert name in problems(result)


@pytest.mark.parametrize(
    "name",
    ["model-00003-of-00003.safetensors", "modeling_x.py", "pytorch_model.bin", "model.GGUF", "generation_config.json",
     "chat_template.jinja", "tokenizer.model", "adapter_config.json"],
)  # fmt: skip
def test_what_an_engine_may_load_and_no_manifest_names_is_a_problem(result: Path, name: str) -> None:
    shutil.copy(result / SHARD if name.endswith("safetensors") else result / "LICENSE", result / name)
    assert problems(result)[name] == f"not in {MANIFEST}: added after the conversion"


def test_what_no_engine_loads_may_be_added(result: Path) -> None:
    (result / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (result / "report.html").write_text("<html></html>")
    (result / "figures").mkdir()
    assert not problems(result)


@pytest.mark.parametrize("change", ["digest", "size", "less", "more", "recipe", "source"])
def test_a_manifest_that_was_tampered_with_tells_on_itself(result: Path, change: str) -> None:
    value = json.loads((result / MANIFEST).read_text())
    files = value["files"]
    if change == "digest":
        files[SHARD]["sha256"] = "0" * 64
    elif change == "size":
        files["LICENSE"]["size"] += 1
    elif change == "less":
        del files["LICENSE"]
    elif change == "more":
        files["x.json"] = files["LICENSE"]
    else:
        value[change] = {}
    (result / MANIFEST).write_text(json.dumps(value, indent=2) + "\n")
    assert "changed after the conversion" in problems(result)[MANIFEST]


def cached(result: Path, root: Path) -> Path:
    """The same in a Hub cache: ``snapshots/<revision>`` with links into ``blobs``."""
    snapshot, blobs = root / "models--a--b/snapshots/0123", root / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in result.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    return snapshot


def test_a_result_in_a_hub_cache_is_checked_through_its_links(result: Path, checkpoint: Path, tmp_path: Path) -> None:
    snapshot = cached(result, tmp_path / "hub")
    assert verify_repo(None, snapshot).ok
    assert verify_repo(checkpoint, snapshot).ok
    blob = snapshot.parents[1] / "blobs/blob-LICENSE"
    blob.write_bytes(blob.read_bytes()[::-1])
    assert "SHA-256" in problems(snapshot)["LICENSE"]


def test_a_link_that_leads_elsewhere_is_not_followed(result: Path, tmp_path: Path) -> None:
    shutil.move(result / "LICENSE", tmp_path / "LICENSE")
    (result / "LICENSE").symlink_to(tmp_path / "LICENSE")
    assert problems(result)["LICENSE"] == "a link to another folder; replace it by a copy of the file"
