"""Staging and publication: main changes from empty to complete in one step, whatever fails or interferes."""

from __future__ import annotations

import hashlib
import json
import random
from threading import Barrier
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants

from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.destinations.hub.job import FOLDER, JOB_FILE, JobOptions
from nemotron_fp8.destinations.hub.staging import HubStaging
from nemotron_fp8.errors.hub import (
    DestinationMovedError,
    HoldsWeightsError,
    MissingRepoError,
    NotAllowedError,
    PublicRepoError,
    StagingBusyError,
    StagingLostError,
    StagingMismatchError,
    StorageFullError,
    TokenRejectedError,
)
from tests.hub.conftest import TOKEN, our_client
from tests.hub.test_client import assert_no_token

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.destinations.hub.job import Published
    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.faults import Request
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDS = {name: random.Random(name).randbytes(200_000) for name in NAMES}
SMALL = {
    MANIFEST: b"{}",
    "config.json": b'{"quantization_config": {}}',
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "README.md": b"---\nbase_model: nv/source\n---\n",
    "tokenizer.model": b"an object, and small",
}
PLAN = hashlib.sha256(b"plan").hexdigest()
RESULT = {**SHARDS, **SMALL}


def staging(client: HubClient, repo: str = "me/target", plan: str = PLAN, **options: object) -> HubStaging:
    job = JobOptions(repo, plan, "nv/source@0123456789ab", **options)  # type: ignore[arg-type]  # of the tests
    return HubStaging(client, job)


def put(job: HubStaging, name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(SHARDS[name])
    job.stage(name, path, digest(name)[0], len(SHARDS[name]), json.dumps({"kept": [name]}).encode())
    path.unlink()


def digest(name: str) -> tuple[str, int]:
    return hashlib.sha256(SHARDS[name]).hexdigest(), len(SHARDS[name])


def convert(job: HubStaging, folder: Path) -> Published:
    """Make a whole run like the pipeline: staged shards are not made again."""
    staged = job.begin()
    if job.published:
        return job.published
    for name in NAMES:
        if name in staged:
            assert (staged[name].sha256, staged[name].size) == digest(name)
            assert json.loads(staged[name].note) == {"kept": [name]}
        else:
            put(job, name, folder)
    return job.publish({name: digest(name) for name in NAMES}, SMALL)


def contents(hub: Hub, repo: str = "me/target", revision: str = "main") -> dict[str, bytes]:
    files = hub.files(repo, revision)
    files.pop(".gitattributes", None)
    return files


def branches(hub: Hub, repo: str = "me/target") -> list[str]:
    return sorted(ref.removeprefix("refs/heads/") for ref in hub.store.repo(repo).refs)


@pytest.mark.parametrize("storage", ["single", "multipart", "xet"])
def test_a_job_from_nothing_to_complete(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    hub.part_size = 64_000 if storage == "multipart" else None
    if storage == "xet":
        hub.xet_enabled = True
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    published = convert(staging(client), tmp_path)
    assert contents(hub) == RESULT
    assert branches(hub) == ["main"]
    repo = hub.store.repo("me/target")
    assert [commit.title for commit in repo.history("main")][1:] == ["initial commit"]
    assert (published.commit, published.revision) == (repo.resolve("main").id, "main")
    assert hub.leaks() == []


def test_a_new_repository_is_private_if_asked(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    convert(staging(client, private=True), tmp_path)
    assert hub.store.repo("me/target").meta["private"]


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.create("me/target")
    with pytest.raises(PublicRepoError, match="--private"):
        staging(client, private=True).begin()
    assert branches(hub) == ["main"]
    hub.set_private("me/target")
    convert(staging(client, private=True), tmp_path)
    assert contents(hub) == RESULT


def test_another_branch(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    published = convert(staging(client, revision="fp8"), tmp_path)
    assert published.revision == "fp8"
    assert contents(hub, revision="fp8") == RESULT
    assert contents(hub) == {}
    assert branches(hub) == ["fp8", "main"]


def test_what_is_staged_is_read_several_at_a_time(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    """Read one after another, the notes of hundreds of shards would delay the next run."""
    first = staging(client)
    first.begin()
    for name in NAMES:
        put(first, name, tmp_path)
    meeting = Barrier(len(NAMES), timeout=20)

    def meet(request: Request) -> None:
        if request.path.endswith(".safetensors.json"):
            meeting.wait()

    hub.before = meet
    assert list(staging(our_client(server)).begin()) == list(NAMES)
    assert not meeting.broken


def test_a_second_run_resumes_on_another_machine(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    first = staging(client)
    assert first.begin() == {}
    put(first, NAMES[0], tmp_path)
    before = contents(hub)
    second = staging(our_client(server))
    assert set(second.begin()) == {NAMES[0]}
    convert(second, tmp_path)
    assert before == {}
    assert contents(hub) == RESULT


def test_two_runs_of_one_job_do_not_mix(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    first, second = staging(client), staging(our_client(server))
    first.begin()
    second.begin()
    put(first, NAMES[0], tmp_path)
    with pytest.raises(StagingBusyError):
        put(second, NAMES[1], tmp_path)
    put(first, NAMES[1], tmp_path)
    first.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == RESULT


def test_jobs_with_other_plans_have_their_own_branches(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    first, second = staging(client), staging(our_client(server), plan=hashlib.sha256(b"other").hexdigest())
    first.begin()
    put(first, NAMES[0], tmp_path)
    assert second.begin() == {}
    assert len(branches(hub)) == 3


# -- what is there already --------------------------------------------------------------------------------


def test_weights_are_replaced_only_with_overwrite(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    old = {"model-00001-of-00009.safetensors": b"old", NAMES[0]: b"older", "notes.txt": b"mine"}
    hub.store.create("me/target")
    hub.store.seed("me/target", old)
    with pytest.raises(HoldsWeightsError, match="--overwrite"):
        staging(client).begin()
    assert branches(hub) == ["main"]
    convert(staging(client, overwrite=True), tmp_path)
    assert contents(hub) == {**RESULT, "notes.txt": b"mine"}


def test_a_shard_that_main_holds_already_is_kept(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.create("me/target")
    hub.store.seed("me/target", {NAMES[0]: SHARDS[NAMES[0]]})
    convert(staging(client, overwrite=True), tmp_path)
    assert contents(hub) == RESULT


def test_main_moved_while_the_job_ran(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.begin()
    for name in NAMES:
        put(job, name, tmp_path)
    hub.store.seed("me/target", {"notes.txt": b"mine"})
    with pytest.raises(DestinationMovedError, match="--overwrite"):
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == {"notes.txt": b"mine"}
    with pytest.raises(DestinationMovedError):
        staging(client).begin()
    again = staging(client, overwrite=True)
    assert set(again.begin()) == set(NAMES)
    again.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == {**RESULT, "notes.txt": b"mine"}


def test_the_history_is_squashed_while_the_job_is_stopped(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """The base commit of the job is gone; the staged shards remain valid."""
    job = staging(client)
    job.begin()
    for name in NAMES:
        put(job, name, tmp_path)
    repo = hub.store.repo("me/target")
    old = repo.resolve("main")
    squashed = repo.add_commit(None, old.tree, "squashed", "", "me")
    repo.set_ref("refs/heads/main", squashed)
    (repo.folder / "commits" / f"{old.id}.json").unlink()
    with pytest.raises(DestinationMovedError, match="--overwrite"):
        staging(client).begin()
    again = staging(client, overwrite=True)
    assert set(again.begin()) == set(NAMES)
    again.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == RESULT


def test_main_moves_at_the_last_moment(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """Between reading main and the commit: the Hub's check of the parent decides."""
    job = staging(client)
    job.begin()
    for name in NAMES:
        put(job, name, tmp_path)

    def move(request: object) -> None:
        if getattr(request, "path", "").endswith("/commit/main"):
            hub.before = None
            hub.store.seed("me/target", {"notes.txt": b"mine"})

    hub.before = move
    with pytest.raises(DestinationMovedError):
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == {"notes.txt": b"mine"}


# -- the server moves -------------------------------------------------------------------------------------


def test_the_staging_branch_is_removed(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.begin()
    put(job, NAMES[0], tmp_path)
    hub.delete_branch("me/target", job.branch.ref)
    with pytest.raises(StagingLostError):
        put(job, NAMES[1], tmp_path)
    with pytest.raises(StagingLostError):
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == {}
    convert(staging(client), tmp_path)
    assert contents(hub) == RESULT


def test_a_staged_object_is_collected(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.begin()
    for name in NAMES:
        put(job, name, tmp_path)
    hub.collect("me/target", digest(NAMES[1])[0])
    with pytest.raises(StagingLostError, match="--restart") as lost:
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert lost.value.answer.startswith("400: ")  # the response may name another reason, so it is part of the message
    assert lost.value.answer in str(lost.value)
    assert contents(hub) == {}


def test_somebody_else_changes_a_staged_shard(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.begin()
    for name in NAMES:
        put(job, name, tmp_path)
    hub.store.seed("me/target", {NAMES[0]: b"tampered"}, job.branch.ref)
    with pytest.raises(StagingMismatchError):
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == {}


def test_a_shard_that_is_missing_is_named(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.begin()
    put(job, NAMES[0], tmp_path)
    with pytest.raises(StagingLostError) as lost:
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert lost.value.file == NAMES[1]
    assert contents(hub) == {}


def test_content_other_than_announced(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.begin()
    (tmp_path / "shard").write_bytes(b"something else")
    with pytest.raises(StagingMismatchError):
        job.stage(NAMES[0], tmp_path / "shard", digest(NAMES[0])[0], 14)


@pytest.mark.parametrize("stage", range(3))
def test_the_token_is_revoked_on_the_way(hub: Hub, client: HubClient, tmp_path: Path, stage: int) -> None:
    job = staging(client)
    steps: list[Callable[[], object]] = [
        job.begin,
        lambda: put(job, NAMES[0], tmp_path),
        lambda: put(job, NAMES[1], tmp_path),
    ]
    for step in steps[:stage]:
        step()
    hub.store.revoke(TOKEN)
    with pytest.raises(TokenRejectedError) as rejected:
        steps[stage]()
    assert_no_token(rejected.value)
    hub.store.add_token(TOKEN, "me")
    convert(staging(client), tmp_path)
    assert contents(hub) == RESULT


def test_the_store_fills_up(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.quota = 300_000
    with pytest.raises(StorageFullError, match="free storage"):
        convert(staging(client), tmp_path)
    assert contents(hub) == {}
    hub.quota = None
    convert(staging(client), tmp_path)
    assert contents(hub) == RESULT


def test_a_repository_of_somebody_else(hub: Hub, client: HubClient) -> None:
    hub.store.create("nv/target")
    with pytest.raises(NotAllowedError, match="pull request"):
        staging(client, "nv/target").begin()
    with pytest.raises((NotAllowedError, MissingRepoError)):
        staging(client, "nv/new").begin()


def test_the_staging_branch_holds_a_job_and_notes(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.begin()
    put(job, NAMES[0], tmp_path)
    files = contents(hub, revision=job.branch.ref)
    assert set(files) == {JOB_FILE, NAMES[0], f"{FOLDER}/{NAMES[0]}.json"}
    assert TOKEN.encode() not in b"".join(files.values())
