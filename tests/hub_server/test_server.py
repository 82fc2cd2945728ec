"""Test Hub against the unmodified client: responses, refusals and the request log."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, get_session, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import parse_ratelimit_headers

from tests.hub_server.fixtures import TOKEN
from tests.hub_server.hub import Hub
from tests.hub_server.server import HubServer
from tests.hub_server.store import git_blob_id

if TYPE_CHECKING:
    from collections.abc import Callable

SHARD = random.Random(1).randbytes(300_000)
PYTHONS = [sys.executable, *filter(None, os.environ.get("NEMOTRON_FP8_HUB_PYTHONS", "").split(os.pathsep))]
"""Interpreters with other client versions, by their path."""


def seed(hub: Hub) -> str:
    files = {"model.safetensors": SHARD, "config.json": b'{"a": 1}', "sub/folder/file.txt": b"text"}
    return hub.store.seed("nv/source", files)


def url_of(server: HubServer, name: str, revision: str = "main") -> str:
    return f"{server.endpoint}/nv/source/resolve/{revision}/{name}"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("storage", ["single", "multipart", "xet"])
def test_a_whole_session_of_the_unmodified_client(hub: Hub, tmp_path: Path, python: str, storage: str) -> None:
    seed(hub)
    hub.part_size = 100_000 if storage == "multipart" else None
    hub.xet_enabled = storage == "xet"
    hub.page_size = 2
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "0" if hub.xet_enabled else "1",
    }
    with HubServer(hub) as server:
        program = str(Path(__file__).with_name("client_session.py"))
        environment["HF_ENDPOINT"] = server.endpoint
        done = subprocess.run(
            [python, program], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    digest = hashlib.sha256(SHARD).hexdigest()
    assert seen["listing"]["model.safetensors"] == [len(SHARD), digest]
    assert seen["listing"]["config.json"] == [8, git_blob_id(b'{"a": 1}')]
    folders = ["sub", "sub/folder"]
    assert seen["tree"] == sorted(
        [".gitattributes", "config.json", "model.safetensors", "sub/folder/file.txt", *folders]
    )
    assert seen["downloads"]["model.safetensors"] == digest
    part = hashlib.sha256(SHARD[1000:2000]).hexdigest()
    assert seen["range"] == [206, f"bytes 1000-1999/{len(SHARD)}", part]
    shard = random.Random(7).randbytes(350_001)
    digests = {"one.safetensors": shard, "two.safetensors": shard[::-1]}
    assert seen["staged"] == {name: hashlib.sha256(content).hexdigest() for name, content in digests.items()}
    assert hub.files("me/target") == {**digests, "README.md": b"# model\n"}
    assert seen["branches"] == ["main"]
    assert seen["history"] == ["Publish", "initial commit"]
    assert seen["read_back"]
    assert hub.leaks() == []
    sent = {request.path.split("/")[1] for request in hub.log if request.method == "PUT"}
    assert sent == {"single": {"_upload"}, "multipart": {"_part"}, "xet": set()}[storage]


def test_state_outlives_the_server(hub: Hub, tmp_path: Path) -> None:
    first = seed(hub)
    with HubServer(hub) as server:
        assert HfApi(endpoint=server.endpoint).model_info("nv/source").sha == first
    again = Hub(tmp_path / "hub")
    with HubServer(again) as server:
        api = HfApi(endpoint=server.endpoint, token=TOKEN)
        assert api.model_info("nv/source").sha == first
        assert api.whoami()["name"] == "me"


def test_a_server_of_its_own(hub: Hub, tmp_path: Path) -> None:
    seed(hub)
    command = [sys.executable, "-m", "tests.hub_server.server", str(tmp_path / "hub"), "--token", "hf_other=you"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        api = HfApi(endpoint=process.stdout.readline().strip(), token="hf_other")
        assert api.model_info("nv/source").sha == hub.store.repo("nv/source").resolve("main").id
        assert api.whoami()["name"] == "you"
        process.terminate()


@pytest.mark.parametrize(
    ("header", "status", "start", "stop"),
    [
        (None, 200, 0, len(SHARD)),
        ("bytes=0-0", 206, 0, 1),
        ("bytes=10-", 206, 10, len(SHARD)),
        ("bytes=-7", 206, len(SHARD) - 7, len(SHARD)),
        (f"bytes=0-{10 * len(SHARD)}", 206, 0, len(SHARD)),
        (f"bytes={len(SHARD)}-", 416, 0, 0),
    ],
)
def test_ranges(hub: Hub, server: HubServer, header: str | None, status: int, start: int, stop: int) -> None:
    seed(hub)
    headers = {"Range": header} if header else {}
    answer = get_session().get(url_of(server, "model.safetensors"), headers=headers)
    assert answer.status_code == status
    assert answer.content == SHARD[start:stop]


def test_a_store_refuses_a_token_and_an_old_address(hub: Hub, server: HubServer) -> None:
    seed(hub)
    answer = get_session().get(url_of(server, "model.safetensors"), follow_redirects=False)
    location = answer.headers["Location"]
    assert location.startswith("http://localhost:")
    assert get_session().get(location).content == SHARD
    assert get_session().get(location, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 400
    assert [request.path for request in hub.leaks()] == [hub.log[-1].path]
    assert get_session().get(location.replace("signature=", "signature=0")).status_code == 403
    hub.signer.lifetime = -1
    assert get_session().get(url_of(server, "model.safetensors")).status_code == 403


def test_what_a_stranger_may_see(hub: Hub, server: HubServer, api: HfApi, stranger: HfApi) -> None:
    seed(hub)
    hub.store.create("nv/private", private=True)
    hub.store.create("me/private", private=True)
    for name in ("nv/missing", "nv/private", "me/private"):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info(name)
    assert api.model_info("me/private").private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("nv/private")
    hub.set_gated("nv/source")
    assert stranger.model_info("nv/source").gated == "manual"
    for client in (api, stranger):
        with pytest.raises(GatedRepoError):
            client.hf_hub_download("nv/source", "config.json")
    hub.set_disabled("nv/source")
    with pytest.raises(DisabledRepoError):
        api.model_info("nv/source")


def test_missing_revision_and_entry(hub: Hub, api: HfApi) -> None:
    seed(hub)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("nv/source", revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("nv/source", "nothing.json")


def test_who_may_write(hub: Hub, server: HubServer, api: HfApi, stranger: HfApi) -> None:
    seed(hub)
    hub.store.add_token("hf_reader", "me", write=False)
    reader = HfApi(endpoint=server.endpoint, token="hf_reader")
    add = [CommitOperationAdd("a.txt", b"a")]
    for client in (stranger, reader):
        with pytest.raises(HfHubHTTPError):
            client.create_repo("me/new")
    with pytest.raises(HfHubHTTPError):
        api.create_commit("nv/source", add, commit_message="no")
    pull = api.create_commit("nv/source", add, commit_message="please", create_pr=True)
    assert pull.pr_revision == "refs/pr/1"
    assert "a.txt" in hub.files("nv/source", "refs/pr/1")
    assert "a.txt" not in hub.files("nv/source")
    refs = api.list_repo_refs("nv/source", include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests or []] == ["refs/pr/1"]
    hub.store.revoke(TOKEN)
    with pytest.raises(HfHubHTTPError) as revoked:
        api.model_info("nv/source")
    assert revoked.value.response.status_code == 401


def test_a_commit_on_another_parent_changes_nothing(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/target")
    base = api.model_info("me/target").sha
    api.create_commit("me/target", [CommitOperationAdd("a.txt", b"a")], commit_message="a", parent_commit=base)
    before = hub.files("me/target")
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("me/target", [CommitOperationAdd("a.txt", b"b")], commit_message="b", parent_commit=base)
    assert refused.value.response.status_code == 412
    assert hub.files("me/target") == before


def test_a_collected_object_cannot_be_committed(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/target")
    add = CommitOperationAdd("a.safetensors", SHARD)
    api.preupload_lfs_files("me/target", [add], free_memory=False)
    hub.collect("me/target", add.upload_info.sha256.hex())
    with pytest.raises(BadRequestError):
        api.create_commit("me/target", [add], commit_message="a")


def test_a_full_store_refuses_more(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/target")
    hub.quota = 1000
    with pytest.raises(HfHubHTTPError) as full:
        api.create_commit("me/target", [CommitOperationAdd("a.safetensors", SHARD)], commit_message="a")
    assert full.value.response.status_code == 403


def test_branches(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/target")
    api.create_branch("me/target", branch="staging")
    with pytest.raises(HfHubHTTPError) as exists:
        api.create_branch("me/target", branch="staging")
    assert exists.value.response.status_code == 409
    api.delete_branch("me/target", branch="staging")
    with pytest.raises(RevisionNotFoundError):
        api.delete_branch("me/target", branch="staging")
    with pytest.raises(HfHubHTTPError):
        api.delete_branch("me/target", branch="main")


def test_the_rate_limit_counts_and_tells(hub: Hub, server: HubServer, api: HfApi) -> None:
    seed(hub)
    hub.rate_limit.quota = 2
    api.model_info("nv/source")
    api.model_info("nv/source")
    with pytest.raises(HfHubHTTPError) as limited:
        api.model_info("nv/source")
    answer = limited.value.response
    told = parse_ratelimit_headers(answer.headers)
    assert answer.status_code == 429
    assert told is not None
    assert (told.remaining, told.limit) == (0, 2)


def lost_connection(action: Callable[[], object]) -> bool:
    http = sys.modules[type(get_session()).__module__.partition(".")[0]]  # httpx for 1.x clients, httpx2 for 2.x
    try:
        action()
    except http.TransportError:
        return True
    return False


@pytest.mark.parametrize("kind", ["refused", "reset_before", "reset_body", "early_end", "hang", "hang_body"])
def test_faults_of_the_connection(hub: Hub, server: HubServer, api: HfApi, kind: str) -> None:
    seed(hub)
    hub.faults.add(kind, path="/api/models/", seconds=0.3)  # type: ignore[arg-type]  # of the parameters above
    assert lost_connection(lambda: api.model_info("nv/source"))
    if kind == "refused":
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", hub.port))
        time.sleep(0.5)
    assert api.model_info("nv/source").id == "nv/source"
    assert [request.fault for request in hub.log] == [kind, None]


@pytest.mark.parametrize(
    ("kind", "status"), [("408", 408), ("429", 429), ("500", 500), ("503", 503), ("401", 401), ("403", 403)]
)
def test_faults_that_answer_in_place_of_the_server(hub: Hub, api: HfApi, kind: str, status: int) -> None:
    seed(hub)
    hub.faults.add(kind, method="GET", path="/api/models/", skip=1)  # type: ignore[arg-type]  # of the list above
    api.model_info("nv/source")
    with pytest.raises(HfHubHTTPError) as refused:
        api.model_info("nv/source")
    assert refused.value.response.status_code == status
    api.model_info("nv/source")


def test_faults_of_the_body(hub: Hub, server: HubServer) -> None:
    seed(hub)
    url, ask = url_of(server, "model.safetensors"), {"Range": "bytes=100-199"}
    hub.faults.add("ignore_range", path="/_cdn/")
    hub.faults.add("wrong_range", path="/_cdn/")
    hub.faults.add("corrupt", path="/_cdn/")
    whole, shifted, damaged, good = (get_session().get(url, headers=ask) for _ in range(4))
    assert (whole.status_code, whole.content) == (200, SHARD)
    assert (shifted.status_code, shifted.content) == (206, SHARD[99:198] + SHARD[198:199])
    assert shifted.headers["Content-Range"] == f"bytes 99-198/{len(SHARD)}"
    assert len(damaged.content) == 100
    assert sum(a != b for a, b in zip(damaged.content, SHARD[100:200], strict=True)) == 1
    assert good.content == SHARD[100:200]


def test_a_damaged_upload_is_refused(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/target")
    hub.faults.add("corrupt", method="PUT")
    with pytest.raises(RuntimeError, match=r"a\.safetensors"):
        api.create_commit("me/target", [CommitOperationAdd("a.safetensors", SHARD)], commit_message="a")
    assert hub.stored_bytes() == 0


@pytest.mark.parametrize("kind", ["answer_lost", "answer_lost_504"])
def test_a_lost_answer_is_to_a_commit_that_happened(hub: Hub, api: HfApi, kind: str) -> None:
    api.create_repo("me/target")
    hub.faults.add(kind, path="/commit/main")  # type: ignore[arg-type]  # of the parameters above
    with pytest.raises(Exception):  # noqa: B017  (a transport error or a 504, by the parameter)
        api.create_commit("me/target", [CommitOperationAdd("a.txt", b"a")], commit_message="a")
    assert hub.files("me/target")["a.txt"] == b"a"


def test_hooks_see_every_request_before_and_after(hub: Hub, api: HfApi) -> None:
    seed(hub)
    order: list[str] = []
    hub.before = lambda request: order.append(f"before {request.number}")
    hub.after = lambda request: order.append(f"after {request.number}")
    api.model_info("nv/source")
    assert order == ["before 0", "after 0"]


def test_a_path_that_climbs_reaches_the_other_repository(hub: Hub, server: HubServer) -> None:
    """The address decides, as on the Hub, not the repository that the caller meant."""
    seed(hub)
    hub.store.seed("nv/other", {"secret.json": b"secret"})
    with socket.create_connection(("127.0.0.1", hub.port)) as connection:
        path = "/nv/source/resolve/main/../../../other/resolve/main/secret.json"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        assert connection.makefile("rb").read().endswith(b"secret")


def test_cached_download_of_a_regular_file(hub: Hub, server: HubServer, tmp_path: Path) -> None:
    seed(hub)
    path = hf_hub_download(
        "nv/source", "sub/folder/file.txt", endpoint=server.endpoint, cache_dir=tmp_path / "c", token=False
    )
    assert Path(path).read_bytes() == b"text"
