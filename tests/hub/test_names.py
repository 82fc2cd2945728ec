"""Untrusted names in an index or a listing: nothing outside the repository is requested, read or written."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import plan_repo
from nemotron_fp8.checkpoint.inventory import INDEX
from nemotron_fp8.errors import SourceError
from nemotron_fp8.errors.hub import HubError
from tests.hub.conversion import Options, checkpoint, convert

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub
    from tests.support.counts import Counted


UNTRUSTED_NAMES = [
    "../../../secret/resolve/main/model.safetensors", "..%2f..%2fsecret%2fmodel.safetensors", "/etc/passwd",
    "sub/../model.safetensors", "C:\\model.safetensors", "https://localhost/model.safetensors",
    "model.safetensors?x=.safetensors", "missing.safetensors", "con.safetensors", ".hidden.safetensors",
    "../model.safetensors", "..\\model.safetensors", "./model.safetensors", "model.safetensors/",
    "//host/a.safetensors",
    "\\\\host\\share\\a.safetensors", "a/b.safetensors", "a\\b.safetensors", "a:b.safetensors", "a*.safetensors",
    "a?.safetensors", 'a".safetensors', "a<b>.safetensors", "a|b.safetensors", "a\0.safetensors", "a\n.safetensors",
    "a\r.safetensors", "a\t.safetensors", "a\x1b[2J.safetensors", "a\u202e.safetensors", "a\u2028.safetensors",
    "nul.safetensors", "aux.safetensors", "prn.safetensors", "com1.safetensors", "lpt9.safetensors", "CON.safetensors",
    "~root.safetensors", " a.safetensors", "a.safetensors ", "a.safetensors.", "", ".", "..", "...", ".safetensors",
    "x" * 300 + ".safetensors", "é" * 130 + ".safetensors", "file:///etc/passwd", "hf://nv/secret/model.safetensors",
    "data:,x.safetensors", "%2e%2e%2fmodel.safetensors", "model.safetensors#main.safetensors", "model.bin",
    "model.safetensors.pt", "resolve/main/model.safetensors", "@main.safetensors/../x", "..;/model.safetensors",
    "\ud800.safetensors", "refs/pr/1/model.safetensors", "\uff0e\uff0e\uff0fmodel.safetensors",
    "$(touch x).safetensors",
]  # fmt: skip


def test_untrusted_names_in_an_index_and_in_a_listing(
    hub: Hub, client: HubClient, tmp_path: Path, counted: Counted
) -> None:
    """The names are used for shards in the index, and for files beside the shards."""
    files = checkpoint(tmp_path / "source", 2)
    hub.store.seed("nv/secret", {"model.safetensors": b"secret"})
    assert len(UNTRUSTED_NAMES) >= 60
    shard = next(name for name in files if name.endswith(".safetensors"))
    for name in UNTRUSTED_NAMES:
        index = json.loads(files[INDEX])
        index["weight_map"] = {key: name if value == shard else value for key, value in index["weight_map"].items()}
        hub.store.seed("nv/source", {**files, INDEX: json.dumps(index).encode()})
        before = len(hub.log)
        with pytest.raises((SourceError, HubError)):
            plan_repo("hf://nv/source", hub=Options(client, tmp_path / "work"))
        asked = {request.path.rpartition("/")[2] for request in hub.log[before:]}
        assert asked <= {"main", "source", "config.json", INDEX}, name
        assert not any("secret" in request.path for request in hub.log[before:])
    listed = 0
    for name in UNTRUSTED_NAMES:
        try:
            hub.store.seed("nv/other", {**files, name + ".json": b"{}"})
        except (OSError, ValueError, UnicodeError):
            continue
        listed += 1
        target = tmp_path / "results" / str(listed)
        convert(client, tmp_path / "work", "hf://nv/other", str(target))
        odd = {path.name for path in target.iterdir()} - set(files) - {"README.md", "nemotron_fp8.json"}
        assert odd <= {name + ".json"}
        assert not {path.name for path in (tmp_path / "results").iterdir()} - {str(n) for n in range(1, listed + 1)}
        shutil.rmtree(hub.store.repo("nv/other").folder)
    assert not (tmp_path / "x").exists()
    assert list((tmp_path / "work").iterdir()) == []
    assert hub.leaks() == []
    counted("names in an index; in a listing", f"{len(UNTRUSTED_NAMES)}; {listed}")
