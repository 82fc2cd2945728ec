"""An error about a file of a source on the Hub says which repository it lies in, and at which commit."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import plan_repo, verify_repo
from nemotron_fp8.checkpoint.inventory import CONFIG, INDEX
from nemotron_fp8.errors import (
    IndexMismatchError,
    MalformedConfigError,
    MalformedHeaderError,
    MalformedIndexError,
    MissingShardError,
    PickledWeightsError,
    SourceChangedError,
    SourceError,
    SourceReadError,
)
from nemotron_fp8.errors.hub import UnlistedFileError
from nemotron_fp8.errors.nemo import NemoConfigError
from nemotron_fp8.sources.hub import HubOpener
from nemotron_fp8.sources.open import shards_of
from tests.hub.conversion import SOURCE, Options, checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub

    Files = dict[str, bytes]

FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def without(files: Files, *names: str) -> Files:
    return {name: content for name, content in files.items() if name not in names}


def misplaced(files: Files) -> Files:
    index = json.loads(files[INDEX])
    index["weight_map"] = dict.fromkeys(index["weight_map"], FIRST)
    return {**without(files, LAST), INDEX: json.dumps(index).encode()}


DAMAGES: dict[str, tuple[Callable[[Files], Files], type[SourceError], str]] = {
    "config": (lambda files: {**files, CONFIG: b"{"}, MalformedConfigError, CONFIG),
    "index": (lambda files: {**files, INDEX: b"[]"}, MalformedIndexError, INDEX),
    "an index of nothing": (lambda files: {**files, INDEX: b'{"weight_map": {}}'}, MalformedIndexError, INDEX),
    "an index that climbs": (
        lambda files: {**files, INDEX: b'{"weight_map": {"w": "../x.safetensors"}}'}, MalformedIndexError, INDEX,
    ),
    "header": (lambda files: {**files, LAST: b"\x08" + bytes(7) + b"no JSON."}, MalformedHeaderError, LAST),
    "a shard cut short": (lambda files: {**files, LAST: files[LAST][:-1]}, MalformedHeaderError, LAST),
    "no shard": (lambda files: without(files, LAST), MissingShardError, repr(LAST)),
    "another place": (misplaced, IndexMismatchError, repr(FIRST)),
    "the config of a NeMo checkpoint": (
        lambda files: {"model_config.yaml": b"- 1"}, NemoConfigError, "model_config.yaml",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_repository_is_named(hub: Hub, client: HubClient, tmp_path: Path, damage: str) -> None:
    damaged, error, file = DAMAGES[damage]
    commit = hub.store.seed("nv/source", damaged(checkpoint(tmp_path / "source", 2)))
    options = Options(client, tmp_path / "work")
    calls: list[Callable[[], Any]] = [
        lambda: plan_repo("hf://nv/source", hub=options),
        lambda: plan_repo("hf://nv/source@main", hub=options),
        lambda: shards_of("hf://nv/source", options),
    ]
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(f"hf://nv/source@{commit[:12]}: {file}: ")
        assert str(caught.value).count("nv/source") == 1
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), vars(again)) == (str(caught.value), vars(caught.value))


def test_of_two_repositories_the_right_one_is_named(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source", 2)
    hub.store.seed("me/result", files)
    commit = hub.store.seed("nv/source", {**files, CONFIG: b"{"})
    with pytest.raises(MalformedConfigError, match=rf"^hf://nv/source@{commit[:12]}: config\.json: not JSON"):
        verify_repo("hf://nv/source", "hf://me/result", hub=Options(client, tmp_path / "work"))


def test_what_names_the_repository_already_is_left_alone(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source", 2)
    hub.store.seed("nv/source", {CONFIG: files[CONFIG], "pytorch_model.bin": b"x" * 99})
    with pytest.raises(PickledWeightsError) as caught:
        plan_repo("hf://nv/source", hub=Options(client, tmp_path / "work"))
    assert str(caught.value).startswith("hf://nv/source: only pickled")
    listing = client.listing("nv/source")
    with pytest.raises(UnlistedFileError) as unlisted, listing.naming():
        listing.file("nothing")
    assert str(unlisted.value).startswith("hf://nv/source: 'nothing'")


def test_a_fetched_file_is_called_by_its_name_in_the_repository(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """Not the name of the file in the work folder, which is removed by then."""
    commit = hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    (work := tmp_path / "work").mkdir()
    opener = HubOpener(client, client.listing(SOURCE.repo), work)
    shard = opener.local[FIRST] = work / "digest.safetensors"
    for name in (FIRST, "tokenizer.json"):
        if name == FIRST:
            shard.write_bytes(b"12345678")
        file = opener.open(name)
        label = rf"^hf://nv/source@{commit[:12]}: {name}: "
        with pytest.raises(SourceReadError, match=rf"{label}truncated: \d+ bytes are missing"):
            file.read_into(0, memoryview(bytearray(99)))
        (path,) = (opener.local | opener.fetched).values() if name == FIRST else opener.fetched.values()
        path.write_bytes(b"")
        with pytest.raises(SourceChangedError, match=f"{label}changed"):
            file.close()
        path.unlink()
        with pytest.raises(SourceReadError, match=f"{label}No such file"):
            opener.open(name)
