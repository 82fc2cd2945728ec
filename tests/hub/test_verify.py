"""A result on the Hub is checked as one in a folder is, without its shards being fetched."""

from __future__ import annotations

import json
import shutil
import struct
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, dequantize_repo, verify_repo
from nemotron_fp8.checkpoint.inventory import CONFIG, INDEX, MANIFEST
from nemotron_fp8.errors import RecipeError, SourceNotFoundError
from nemotron_fp8.errors.hub import GatedRepoError, HubError, MissingRepoError, MissingRevisionError, NoProgressError
from nemotron_fp8.verification import second_reader
from nemotron_fp8.verification.second_reader import LibraryTensor, read_with_library
from tests.hub.conversion import Options, checkpoint, convert
from tests.hub.test_command import command
from tests.support.recipes import SHARED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8 import Verification
    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer

Files = dict[str, bytes]
SHARD = "model-00002-of-00002.safetensors"


def flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0x10
    return bytes(changed)


def with_scale(content: bytes, value: float) -> bytes:
    """Return a shard whose first scale has this value."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    entry = next(e for name, e in json.loads(content[8:start]).items() if name.endswith("weight_scale"))
    begin, end = (start + offset for offset in entry["data_offsets"])
    return content[:begin] + struct.pack("<f", value) + content[end:]


DAMAGES: dict[str, Callable[[Files], Files]] = {
    "nothing": lambda files: files,
    "a code": lambda files: {**files, SHARD: flipped(files[SHARD], -200)},
    "a header": lambda files: {**files, SHARD: flipped(files[SHARD], 30)},
    "a scale that is no number": lambda files: {**files, SHARD: with_scale(files[SHARD], float("nan"))},
    "a scale of 0": lambda files: {**files, SHARD: with_scale(files[SHARD], 0.0)},
    "a shard cut short": lambda files: {**files, SHARD: files[SHARD][:-1]},
    "a shard gone": lambda files: {name: files[name] for name in files if name != SHARD},
    "a shard more": lambda files: {**files, "more.safetensors": files[SHARD]},
    "the config": lambda files: {**files, CONFIG: files[CONFIG].replace(b"llama", b"lhama")},
    "no config": lambda files: {name: files[name] for name in files if name != CONFIG},
    "a config that is none": lambda files: {**files, CONFIG: b"{"},
    "the index": lambda files: {**files, INDEX: files[INDEX].replace(b"up_proj", b"pu_proj")},
    "no index": lambda files: {name: files[name] for name in files if name != INDEX},
    "the tokenizer": lambda files: {**files, "tokenizer.json": b"[]"},
    "an object beside the shards": lambda files: {**files, "tokenizer.model": flipped(files["tokenizer.model"], 9)},
    "the manifest": lambda files: {**files, MANIFEST: flipped(files[MANIFEST], 40)},
    "no manifest": lambda files: {name: files[name] for name in files if name != MANIFEST},
}


def found(verification: Verification, *names: str) -> list[tuple[str, str]]:
    """Return the problems without the name of the result."""
    problems = [(problem.tensor, problem.problem) for problem in verification.problems]
    for name in names:
        problems = [(what.replace(name, "RESULT"), problem.replace(name, "RESULT")) for what, problem in problems]
    return sorted(problems)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Files]:
    """Checkpoint and files of its result."""
    from nemotron_fp8 import quantize_repo

    root = tmp_path_factory.mktemp("made")
    checkpoint(root / "source", 2)
    quantize_repo(root / "source", root / "result", device="cpu", threads=1)
    return root / "source", {path.name: path.read_bytes() for path in (root / "result").iterdir()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_hub_shows_what_a_folder_shows(
    hub: Hub, client: HubClient, tmp_path: Path, made: tuple[Path, Files], damage: str
) -> None:
    """Verify every damaged result alone and against the source; no damage may go unnoticed."""
    source, files = made
    files = DAMAGES[damage](files)
    (folder := tmp_path / "damaged").mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    hub.store.seed("me/damaged", files)
    options = Options(client, tmp_path / "work")
    for origin in (None, source):
        local = verify_repo(origin, folder, threads=2)
        remote = verify_repo(origin, "hf://me/damaged", threads=2, hub=options)
        assert found(remote, "hf://me/damaged", "me/damaged") == found(local, str(folder), folder.name)
        assert (remote.quantized, remote.kept, remote.tensors) == (local.quantized, local.kept, local.tensors)
        # A manifest's own digest is its only witness, and the source knows nothing of it.
        assert remote.ok == (damage == "nothing" or (origin is not None and damage == "no manifest"))
    assert not (tmp_path / "work").exists()


def test_of_shards_only_headers_and_scales_are_fetched(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 3, rows=2048, columns=1024))
    convert(client, tmp_path / "work")
    before = len(hub.log)
    verification = verify_repo(None, "hf://me/target", hub=Options(client, tmp_path / "work"))
    assert verification.ok
    assert (verification.quantized, verification.kept) == (3, 3)
    fetched = 0
    for request in hub.log[before:]:
        if request.path.startswith("/_cdn/"):
            assert request.range is not None
            first, last = request.range.removeprefix("bytes=").split("-")
            fetched += int(last) + 1 - int(first)
    assert 0 < fetched < 0.2 * hub.stored_bytes()
    assert hub.leaks() == []


def test_the_safetensors_library_opens_shards_of_the_hub(
    hub: Hub, client: HubClient, tmp_path: Path, made: tuple[Path, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse copy of the header of every shard, of source and result; and a difference is a problem."""
    source, files = made
    hub.store.seed("me/target", files)
    hub.store.seed("nv/source", {path.name: path.read_bytes() for path in source.iterdir()})
    options = Options(client, tmp_path / "work")
    opened: list[list[str]] = []

    def read(path: Path) -> tuple[dict[str, str], list[LibraryTensor]]:
        metadata, found = read_with_library(path)
        opened.append([tensor.name for tensor in found])
        return metadata, [tensor._replace(dtype="U8") if tensor.dtype == "F32" else tensor for tensor in found]

    monkeypatch.setattr(second_reader, "read_with_library", read)
    for origin in (None, "hf://nv/source"):
        opened.clear()
        verification = verify_repo(origin, "hf://me/target", threads=2, hub=options)
        assert len(opened) == sum(name.endswith(".safetensors") for name in files) * (1 if origin is None else 2)
        assert all("our reader finds F32 [64, 1]" in problem.problem for problem in verification.problems)
        assert {problem.tensor for problem in verification.problems} == {
            name for names in opened for name in names if name.endswith("_scale")
        }
        assert verification.problems
    assert hub.leaks() == []


@pytest.mark.parametrize("recipe", [Recipe(format="fp8"), SHARED], ids=["block", "shared"])
def test_both_ends_on_the_hub(hub: Hub, client: HubClient, tmp_path: Path, recipe: Recipe) -> None:
    first = hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2, rows=128))
    convert(client, tmp_path / "work", recipe=recipe, target="hf://me/target@fp8")
    options = Options(client, tmp_path / "work")
    assert verify_repo("hf://nv/source", "hf://me/target@fp8", hub=options).ok
    assert verify_repo(tmp_path / "source", "hf://me/target@fp8", hub=options).ok
    (tmp_path / "other").mkdir()
    other = checkpoint(tmp_path / "other" / "source", 2, rows=32)
    hub.store.seed("nv/source", other)
    assert not verify_repo("hf://nv/source", "hf://me/target@fp8", hub=options).ok
    earlier = Options(client, tmp_path / "work", revision=first)
    assert verify_repo("hf://nv/source", "hf://me/target@fp8", hub=earlier).ok


def test_a_dequantized_result_on_the_hub(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    convert(client, tmp_path / "work")
    options = Options(client, tmp_path / "work")
    dequantize_repo("hf://me/target", "hf://me/plain", hub=options)
    alone, beside = (verify_repo(origin, "hf://me/plain", hub=options) for origin in (None, "hf://me/target"))
    assert alone.ok
    assert beside.ok
    assert beside.plain == 2


def test_what_cannot_be_read_is_an_error_and_no_finding(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    convert(client, tmp_path / "work")
    hub.store.create("me/empty")
    options = Options(client, tmp_path / "work")

    def check(address: str, expected: type[Exception], match: str | None = None, **more: object) -> None:
        for origin in (None, str(tmp_path / "source")):
            with pytest.raises(expected, match=match):
                verify_repo(origin, address, hub=Options(client, tmp_path / "work", **more))

    check("hf://me/missing", MissingRepoError)
    check("hf://me/target@nowhere", MissingRevisionError)
    check("hf://me/empty", SourceNotFoundError, "rerun an interrupted conversion")
    check("me/target", SourceNotFoundError, "hf://me/target")
    check("hf://me/target", RecipeError, "--revision", revision="main")
    hub.store.seed("nv/gated", hub.files("me/target"))
    hub.set_gated("nv/gated")
    check("hf://nv/gated", GatedRepoError)
    for path in ("/_cdn/", "/resolve/", "/api/models/me/target"):
        hub.faults.clear()
        hub.faults.add("503", path=path, times=None)
        with pytest.raises(NoProgressError):
            verify_repo(None, "hf://me/target", hub=options)
    assert issubclass(NoProgressError, HubError)


def test_the_command(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    convert(client, tmp_path / "work", private=True)

    def run(*arguments: str) -> tuple[int, str, str]:
        process = command(server, tmp_path / "home", "verify", *arguments)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    token = ("--token-env", "MY_TOKEN")
    code, out, err = run("hf://me/target", *token)
    assert code == 0
    assert err.startswith("next:\n  vllm serve me/target\n")
    assert "every file of hf://me/target matches its manifest" in out
    code, out, _ = run("nv/source", "hf://me/target", *token)
    assert code == 0
    assert "hf://me/target matches nv/source" in out
    code, _, err = run("hf://me/target")
    assert code == 1
    assert "--token-env" in err
    hub.store.seed("me/target", {"tokenizer.json": b"[]"})
    code, out, err = run("hf://me/target", *token)
    assert code == 1
    assert "tokenizer.json" in out
    assert "1 problem found" in err
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
