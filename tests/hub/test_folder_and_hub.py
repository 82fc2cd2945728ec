"""Conversions between folders and the Hub, through the public function and the command."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from nemotron_fp8 import HubOptions, Progress, Recipe, quantize_repo, verify_repo
from nemotron_fp8.errors import DestinationExistsError, RecipeError, SourceNotFoundError, UnsteadyReadError
from nemotron_fp8.errors.hub import HoldsWeightsError, StagingLostError, TokenRejectedError
from nemotron_fp8.sources.remote import RangeFile
from tests.hub.conftest import TOKEN
from tests.hub.conversion import Options, checkpoint, convert, wanted
from tests.hub.test_hub_to_hub import contents, stop_at_upload
from tests.support.recipes import PUBLISHED, SHARED

if TYPE_CHECKING:
    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.faults import Request
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer

ROOT = Path(__file__).parents[2]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def local_result(folder: Path) -> dict[str, bytes]:
    quantize_repo(folder / "source", folder / "local", device="cpu", threads=1)
    return files_of(folder / "local")


# -- any mix ----------------------------------------------------------------------------------------------


def test_from_the_hub_to_a_folder(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    report = convert(client, tmp_path / "work", target=str(tmp_path / "target"))
    result, local = files_of(tmp_path / "target"), local_result(tmp_path)
    assert report.bytes_written == sum(map(len, result.values()))
    assert set(result) == set(local)
    for name, content in local.items():
        if name not in ("README.md", "nemotron_fp8.json"):  # these name the repository
            assert result[name] == content
    assert verify_repo(tmp_path / "source", tmp_path / "target").ok
    assert convert(client, tmp_path / "work", target=str(tmp_path / "target")).unchanged
    assert list((tmp_path / "work").iterdir()) == []


def test_from_a_folder_to_the_hub(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    checkpoint(tmp_path / "source")
    report = convert(client, tmp_path / "work", str(tmp_path / "source"))
    assert contents(hub) == local_result(tmp_path)
    assert (report.destination, report.resumed) == ("hf://me/target", 0)
    assert convert(client, tmp_path / "work", str(tmp_path / "source")).unchanged


def test_a_plain_name_and_a_branch(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    result = wanted(client, tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    report = convert(client, tmp_path / "work", "nv/source", "hf://me/target@fp8", private=True)
    assert report.destination == "hf://me/target@fp8"
    assert contents(hub, revision="fp8") == result
    assert contents(hub) == {}
    assert hub.store.repo("me/target").meta["private"]
    (tmp_path / "here" / "nv" / "source").mkdir(parents=True)  # a folder of that name goes before the Hub
    with pytest.raises(SourceNotFoundError, match=r"no \.safetensors"):
        convert(client, tmp_path / "work", "nv/source")
    with pytest.raises(SourceNotFoundError, match="no such folder; as a repository on the Hub"):
        convert(client, tmp_path / "work", "nv/missing")


def test_a_revision_is_the_source_as_it_was(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    first = hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    result = wanted(client, tmp_path)
    hub.store.seed("nv/source", {"config.json": b"not even JSON"})
    convert(client, tmp_path / "work", revision=first)
    convert(client, tmp_path / "work", f"hf://nv/source@{first}", "hf://me/other")
    assert contents(hub) == contents(hub, "me/other") == result


def test_a_single_file(client: HubClient, hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"model.layers.0.mlp.up_proj.weight": torch.randn(64, 64).bfloat16()}, path)
    quantize_repo(path, tmp_path / "local", device="cpu")
    convert(client, tmp_path / "work", str(path))
    assert contents(hub) == files_of(tmp_path / "local")
    assert verify_repo(path, tmp_path / "local").ok
    with pytest.raises(DestinationExistsError):
        quantize_repo(path, tmp_path / "local", PUBLISHED, device="cpu")


def test_options_that_fit_nowhere(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    checkpoint(tmp_path / "source")
    for options in ({"private": True}, {"pull_request": True}, {"revision": "main"}):
        with pytest.raises(RecipeError):
            convert(client, tmp_path / "work", str(tmp_path / "source"), str(tmp_path / "target"), **options)
    with pytest.raises(RecipeError, match="NO_SUCH_VARIABLE"):
        quantize_repo("hf://nv/source", tmp_path / "target", hub=HubOptions(token_env="NO_SUCH_VARIABLE"))
    assert hub.log == []


def test_a_pull_request_through_the_public_function(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    hub.store.create("nv/target")
    report = convert(client, tmp_path / "work", target="hf://nv/target", pull_request=True)
    assert report.destination == "hf://nv/target@refs/pr/1"
    assert contents(hub, "nv/target", "refs/pr/1") == wanted(client, tmp_path)
    assert contents(hub, "nv/target") == {}


# -- what is fetched --------------------------------------------------------------------------------------


def test_every_side_file_is_fetched_once(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    convert(client, tmp_path / "work")
    asked = [r.path for r in hub.log if r.method == "GET" and r.path.startswith(("/nv/source/resolve/", "/_cdn/nv/s"))]
    assert sum("tokenizer.json" in path for path in asked) == 1
    assert len(asked) == 2 * 4 + 4  # headers and shards; index, config and two of the tokenizer


def test_a_plan_fetches_headers_and_small_files_alone(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    big = {f"model-0000{n}-of-00003.safetensors": wide(tmp_path / f"{n}.safetensors", n) for n in (1, 2, 3)}
    index = {"weight_map": {f"model.layers.{n}.mlp.up_proj.weight": name for n, name in enumerate(big, 1)}}
    small = {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": b'{"model_type": "llama"}'}
    hub.store.seed("nv/source", {**big, **small, "tokenizer.json": b"{}" * 5000})
    from nemotron_fp8 import plan_repo

    plan = plan_repo("hf://nv/source", hub=Options(client, tmp_path / "work"))
    assert len(plan.quantized()) == 3
    requested = 0
    for request in hub.log:
        if request.range:
            start, stop = map(int, request.range.removeprefix("bytes=").split("-"))
            requested += stop - start + 1
    assert requested <= 3 * 256 * 1024 + sum(map(len, small.values()))
    assert requested < 0.1 * sum(map(len, big.values()))
    assert not any("tokenizer" in request.path for request in hub.log)
    assert not (tmp_path / "work").exists()


def wide(path: Path, number: int) -> bytes:
    save_file({f"model.layers.{number}.mlp.up_proj.weight": torch.randn(1024, 2048).bfloat16()}, path)
    return path.read_bytes()


# -- partners of a shared scale that are read by range -------------------------------------------------------


def attention(folder: Path) -> dict[str, bytes]:
    """Write q, k and v of one layer in three shards."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    weight_map = {}
    for number, part in enumerate("qkv", 1):
        name, tensor = f"model-{number:05d}-of-00003.safetensors", f"model.layers.0.self_attn.{part}_proj.weight"
        save_file({tensor: torch.randn(64, 64, generator=generator).bfloat16()}, folder / name)
        weight_map[tensor] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return files_of(folder)


@pytest.mark.parametrize("read", range(6))
def test_one_wrong_bit_in_a_range_is_found_and_repaired(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    hub.store.seed("nv/source", attention(tmp_path / "source"))
    result = wanted(client, tmp_path, recipe=SHARED)
    flip(monkeypatch, {read})
    convert(client, tmp_path / "work", recipe=SHARED)
    assert contents(hub) == result


def test_a_result_that_was_staged_wrong_is_made_again(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run detects it from the notes, or when it makes the other shards."""
    hub.store.seed("nv/source", attention(tmp_path / "source"))
    result = wanted(client, tmp_path, recipe=SHARED)
    stop_at_upload(hub, 3)
    with monkeypatch.context() as patch, pytest.raises(TokenRejectedError):
        flip(patch, {0})
        convert(client, tmp_path / "work", recipe=SHARED)
    hub.store.add_token(TOKEN, "me")
    convert(client, tmp_path / "work", recipe=SHARED)
    assert contents(hub) == result


def test_ranges_that_never_agree_are_an_error(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.seed("nv/source", attention(tmp_path / "source"))
    flip(monkeypatch, set(range(1000)))
    with pytest.raises(UnsteadyReadError) as unsteady:
        convert(client, tmp_path / "work", recipe=SHARED)
    assert unsteady.value.attempts == 3
    assert contents(hub) == {}


def flip(monkeypatch: pytest.MonkeyPatch, reads: set[int]) -> None:
    """Give the reads with these numbers a wrong first value, larger than the true one and different each time."""
    original, seen = RangeFile.read_into, 0

    def read_into(self: RangeFile, offset: int, buffer: memoryview) -> None:
        nonlocal seen
        original(self, offset, buffer)
        if seen in reads:
            buffer[:2] = (0x4300 + seen).to_bytes(2, "little")  # bfloat16 of 128 and more
        seen += 1

    monkeypatch.setattr(RangeFile, "read_into", read_into)


# -- going on, and starting over ----------------------------------------------------------------------------


def test_starting_over_where_a_staged_object_is_lost(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    stop_at_upload(hub, 3)
    with pytest.raises(TokenRejectedError):
        convert(client, tmp_path / "work")
    hub.store.add_token(TOKEN, "me")
    branch = next(ref for ref in hub.store.repo("me/target").refs if "fp8-staging" in ref)
    staged = hub.store.repo("me/target").resolve(branch).tree
    sha256 = next(entry for path, entry in staged.items() if path.endswith(".safetensors")).sha256
    assert sha256
    hub.collect("me/target", sha256)
    for _ in range(2):  # by itself it does not go away
        with pytest.raises(StagingLostError, match="--restart"):
            convert(client, tmp_path / "work")
    convert(client, tmp_path / "work", restart=True)
    assert contents(hub) == wanted(client, tmp_path)
    assert len(hub.store.repo("me/target").refs) == 1


def test_a_finished_result_that_was_edited(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    convert(client, tmp_path / "work")
    result = contents(hub)
    hub.store.seed("me/target", {"README.md": b"# mine\n", "notes.txt": b"more"})
    assert convert(client, tmp_path / "work").unchanged
    assert contents(hub)["README.md"] == b"# mine\n"
    shard = next(name for name in result if name.endswith(".safetensors"))
    hub.store.seed("me/target", {shard: b"another"})
    with pytest.raises(HoldsWeightsError):
        convert(client, tmp_path / "work")
    convert(client, tmp_path / "work", overwrite=True)
    assert contents(hub) == {**result, "notes.txt": b"more"}


# -- progress -----------------------------------------------------------------------------------------------


def test_progress_reports_all_transfers_and_waits(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    hub.faults.add("503", path="/_cdn/", skip=5)

    def slow(request: Request) -> None:
        if request.method == "PUT" or request.path.startswith("/_cdn/"):
            time.sleep(0.05)

    hub.before = slow
    seen: list[Progress] = []
    convert(client, tmp_path / "work", progress=seen.append)
    directions = [{transfer.direction for transfer in progress.transfers} for progress in seen]
    assert {"download", "upload"} in directions
    names = {(t.direction, t.name) for progress in seen for t in progress.transfers if t.done == t.total}
    shards = [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert names == {(direction, name) for direction in ("download", "upload") for name in shards}
    assert any("503" in progress.waiting for progress in seen)
    assert seen[-1].transfers == ()
    assert seen[-1].waiting == ""


def test_progress_of_an_upload_over_xet_has_no_bytes_until_it_ends(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet reads the shard itself and reports nothing, so any number would be invented."""
    hub.xet_enabled = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    seen: list[Progress] = []
    convert(client, tmp_path / "work", progress=seen.append)
    uploads = [t for progress in seen for t in progress.transfers if t.direction == "upload"]
    shards = {f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)}
    assert {t.name for t in uploads if t.done is None} == shards
    assert {t.name for t in uploads if t.done == t.total} == shards
    assert {t.done for t in uploads} - {None} == {t.total for t in uploads}
    assert seen[-1].transfers == ()


def test_random_checkpoints_of_any_order(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """Tensors of a layer are spread over shards at random; with and without shared scales, all granularities."""
    rng = random.Random(4)
    for number, recipe in enumerate((SHARED, Recipe(), PUBLISHED)):
        folder = tmp_path / str(number)
        folder.mkdir()
        weight_map, held = {}, [{} for _ in range(4)]
        for layer in range(3):
            for part in ("q", "k", "v", "o"):
                name, shard = f"model.layers.{layer}.self_attn.{part}_proj.weight", rng.randrange(4)
                held[shard][name] = torch.randn(32, 32, generator=torch.Generator().manual_seed(layer)).bfloat16()
                weight_map[name] = f"model-{shard + 1:05d}-of-00004.safetensors"
        for shard, tensors in enumerate(held, 1):
            name = f"model-{shard:05d}-of-00004.safetensors"
            tensors[f"extra.{shard}"] = torch.ones(3)
            weight_map[f"extra.{shard}"] = name
            save_file(tensors, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text('{"model_type": "llama"}')
        hub.store.seed(f"nv/source{number}", files_of(folder))
        convert(client, tmp_path / "work", f"hf://nv/source{number}", str(tmp_path / f"out{number}"), recipe=recipe)
        assert verify_repo(folder, tmp_path / f"out{number}").ok
