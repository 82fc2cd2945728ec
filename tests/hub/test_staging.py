"""The way to the Hub: main goes from nothing to complete in one step, whatever fails, whoever interferes."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants

from nemotron_fp8.hub.errors import (
    DestinationMovedError,
    HoldsWeightsError,
    MissingRepoError,
    NotAllowedError,
    StagingBusyError,
    StagingLostError,
    StagingMismatchError,
    StorageFullError,
    TokenRejectedError,
)
from nemotron_fp8.hub.staging import FOLDER, JOB_FILE, HubStaging
from nemotron_fp8.source import MANIFEST
from tests.hub.conftest import TOKEN, our_client
from tests.hub.test_client import assert_no_token

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.job import Published
    from tests.hub.faults import FaultKind, Request
    from tests.hub.hub import Hub
    from tests.hub.server import HubServer

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
    return HubStaging(client, repo, plan, "nv/source@0123456789ab", **options)  # type: ignore[arg-type]  # of the tests


def put(job: HubStaging, name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(SHARDS[name])
    job.stage(name, path, digest(name)[0], len(SHARDS[name]), json.dumps({"kept": [name]}).encode())
    path.unlink()


def digest(name: str) -> tuple[str, int]:
    return hashlib.sha256(SHARDS[name]).hexdigest(), len(SHARDS[name])


def convert(job: HubStaging, folder: Path) -> Published:
    """A whole run, as the pipeline makes it: what is staged is not made again."""
    staged = job.open()
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


def test_another_branch(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    published = convert(staging(client, revision="fp8"), tmp_path)
    assert published.revision == "fp8"
    assert contents(hub, revision="fp8") == RESULT
    assert contents(hub) == {}
    assert branches(hub) == ["fp8", "main"]


def test_a_second_run_goes_on_from_another_machine(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    first = staging(client)
    assert first.open() == {}
    put(first, NAMES[0], tmp_path)
    before = contents(hub)
    second = staging(our_client(server))
    assert set(second.open()) == {NAMES[0]}
    convert(second, tmp_path)
    assert before == {}
    assert contents(hub) == RESULT


def test_a_finished_job_is_found_finished(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    first = convert(staging(client), tmp_path)
    writes = len([request for request in hub.log if request.method == "PUT"])
    assert convert(staging(client), tmp_path) == first
    assert len([request for request in hub.log if request.method == "PUT"]) == writes


def test_a_finished_job_is_found_under_later_commits(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """However many pages of the history they fill; a page that links elsewhere is asked of the Hub all the same."""
    hub.page_size = 2
    first = convert(staging(client), tmp_path)
    for number in range(7):
        hub.store.seed("me/target", {"notes.txt": str(number).encode()})
    before = len(hub.log)
    again = staging(client)
    assert again.open() == {}
    assert again.published is not None
    assert again.published.commit == hub.store.repo("me/target").resolve("main").id != first.commit
    pages = [request for request in hub.log[before:] if "/commits/" in request.path]
    assert [request.query for request in pages] == ["", "cursor=2", "cursor=4", "cursor=6"]
    assert hub.leaks() == []


def test_the_search_for_a_finished_job_has_an_end(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemotron_fp8.hub.staging.MAX_PAGES", 2)
    hub.page_size = 2
    convert(staging(client), tmp_path)
    for number in range(7):
        hub.store.seed("me/target", {"notes.txt": str(number).encode()})
    before = len(hub.log)
    with pytest.raises(HoldsWeightsError):
        staging(client).open()
    assert sum("/commits/" in request.path for request in hub.log[before:]) == 2


def test_the_token_stays_on_the_hub_while_pages_are_turned(
    hub: Hub, client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror's answers link to the address that it mirrors: the path counts, never the host."""
    hub.store.create("me/target")
    for number in range(3):
        hub.store.seed("me/target", {"notes.txt": str(number).encode()})
    hub.page_size = 2
    monkeypatch.setattr(type(hub), "endpoint", property(lambda hub: f"http://localhost:{hub.port}"))
    branch = staging(client).branch
    assert [title for _, title, _ in branch.history("main", 9)] == ["seed", "seed", "seed", "initial commit"]
    assert {request.host for request in hub.log} == {"127.0.0.1"}


def test_two_runs_of_one_job_do_not_mix(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    first, second = staging(client), staging(our_client(server))
    first.open()
    second.open()
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
    first.open()
    put(first, NAMES[0], tmp_path)
    assert second.open() == {}
    assert len(branches(hub)) == 3


# -- what is there already --------------------------------------------------------------------------------


def test_weights_are_replaced_only_if_told(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    old = {"model-00001-of-00009.safetensors": b"old", NAMES[0]: b"older", "notes.txt": b"mine"}
    hub.store.create("me/target")
    hub.store.seed("me/target", old)
    with pytest.raises(HoldsWeightsError, match="--overwrite"):
        staging(client).open()
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
    job.open()
    for name in NAMES:
        put(job, name, tmp_path)
    hub.store.seed("me/target", {"notes.txt": b"mine"})
    with pytest.raises(DestinationMovedError, match="--overwrite"):
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == {"notes.txt": b"mine"}
    with pytest.raises(DestinationMovedError):
        staging(client).open()
    again = staging(client, overwrite=True)
    assert set(again.open()) == set(NAMES)
    again.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == {**RESULT, "notes.txt": b"mine"}


def test_the_history_is_squashed_while_the_job_is_stopped(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """The commit that the job began from is no more; what is staged is still good."""
    job = staging(client)
    job.open()
    for name in NAMES:
        put(job, name, tmp_path)
    repo = hub.store.repo("me/target")
    old = repo.resolve("main")
    squashed = repo.add_commit(None, old.tree, "squashed", "", "me")
    repo.set_ref("refs/heads/main", squashed)
    (repo.folder / "commits" / f"{old.id}.json").unlink()
    with pytest.raises(DestinationMovedError, match="--overwrite"):
        staging(client).open()
    again = staging(client, overwrite=True)
    assert set(again.open()) == set(NAMES)
    again.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == RESULT


def test_main_moves_at_the_last_moment(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """Between the look at main and the commit: the Hub's own check of the parent decides."""
    job = staging(client)
    job.open()
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
    job.open()
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
    job.open()
    for name in NAMES:
        put(job, name, tmp_path)
    hub.collect("me/target", digest(NAMES[1])[0])
    with pytest.raises(StagingLostError, match="--restart"):
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == {}


def test_somebody_else_changes_a_staged_shard(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.open()
    for name in NAMES:
        put(job, name, tmp_path)
    hub.store.seed("me/target", {NAMES[0]: b"tampered"}, job.branch.ref)
    with pytest.raises(StagingMismatchError):
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert contents(hub) == {}


def test_a_shard_that_is_missing_is_named(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.open()
    put(job, NAMES[0], tmp_path)
    with pytest.raises(StagingLostError) as lost:
        job.publish({name: digest(name) for name in NAMES}, SMALL)
    assert lost.value.file == NAMES[1]
    assert contents(hub) == {}


def test_content_other_than_announced(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.open()
    (tmp_path / "shard").write_bytes(b"something else")
    with pytest.raises(StagingMismatchError):
        job.stage(NAMES[0], tmp_path / "shard", digest(NAMES[0])[0], 14)


@pytest.mark.parametrize("stage", range(3))
def test_the_token_is_revoked_on_the_way(hub: Hub, client: HubClient, tmp_path: Path, stage: int) -> None:
    job = staging(client)
    steps: list[Callable[[], object]] = [
        job.open,
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
        staging(client, "nv/target").open()
    with pytest.raises((NotAllowedError, MissingRepoError)):
        staging(client, "nv/new").open()


# -- pull requests ----------------------------------------------------------------------------------------


def test_a_pull_request(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    hub.store.create("nv/target")
    first = staging(client, "nv/target", pull_request=True)
    assert first.open() == {}
    put(first, NAMES[0], tmp_path)
    second = staging(our_client(server), "nv/target", pull_request=True)
    assert set(second.open()) == {NAMES[0]}
    published = convert(second, tmp_path)
    assert published.revision == "refs/pr/1"
    assert contents(hub, "nv/target", "refs/pr/1") == RESULT
    assert contents(hub, "nv/target") == {}
    assert convert(staging(client, "nv/target", pull_request=True), tmp_path) == published
    assert hub.store.repo("nv/target").meta["pulls"] == 1


@pytest.mark.parametrize("kind", ["answer_lost", "answer_lost_504"])
def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(
    hub: Hub, client: HubClient, tmp_path: Path, kind: FaultKind
) -> None:
    hub.store.create("nv/target")
    hub.faults.add(kind, path="/commit/main")
    published = convert(staging(client, "nv/target", pull_request=True), tmp_path)
    assert contents(hub, "nv/target", published.revision) == RESULT
    assert hub.store.repo("nv/target").meta["pulls"] == 1


def test_the_staging_branch_holds_a_job_and_notes(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    job = staging(client)
    job.open()
    put(job, NAMES[0], tmp_path)
    files = contents(hub, revision=job.branch.ref)
    assert set(files) == {JOB_FILE, NAMES[0], f"{FOLDER}/{NAMES[0]}.json"}
    assert TOKEN.encode() not in b"".join(files.values())


def test_a_branch_that_was_left_after_the_end_is_cleared_away(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    """A run that began before the publication made its branch after it, and was stopped: nothing is left to do."""
    late = staging(our_client(server))
    original = late.branch.create

    def create(branch: str, start: str) -> None:
        convert(staging(client), tmp_path)
        original(branch, start)

    late.branch.create = create  # type: ignore[method-assign]  # to let another run come in between
    late.open()
    assert branches(hub) != ["main"]
    hub.store.seed("me/target", {"README.md": b"# edited since\n"})
    again = staging(client)
    assert again.open() == {}
    assert again.published is not None
    assert branches(hub) == ["main"]
    assert contents(hub) == {**RESULT, "README.md": b"# edited since\n"}


def test_who_loses_the_race_to_publish_ends_well(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    """The other run publishes and deletes the branch just before this one looks at it."""
    first = staging(client)
    first.open()
    for name in NAMES:
        put(first, name, tmp_path)
    second = staging(our_client(server))
    assert set(second.open()) == set(NAMES)

    def publish(_request: Request) -> None:
        if hub.log[-1].path.endswith(second.branch.ref):
            hub.before = None
            first.publish({name: digest(name) for name in NAMES}, SMALL)

    hub.before = publish
    published = second.publish({name: digest(name) for name in NAMES}, SMALL)
    assert hub.before is None
    assert published == first.published
    assert contents(hub) == RESULT
