"""Status of a conversion into a repository: what the staging branch says, read by anybody who may read it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, status_of
from nemotron_fp8.errors.hub import HubError
from tests.hub.conversion import Options, checkpoint, convert
from tests.support.stops import StoppedError

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8 import Progress, Status
    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub


def status(client: HubClient, tmp_path: Path, target: str = "hf://me/target") -> Status:
    return status_of(target, Options(client, tmp_path / "unused"))


def staged(hub: Hub) -> list[int]:
    """The numbers of shards on the staging branches, and on pull requests, as the store of the Hub has them."""
    refs = [ref for ref in hub.store.repo("me/target").refs if "fp8-staging" in ref or "refs/pr" in ref]
    files = [hub.files("me/target", ref) for ref in refs]
    return [sum(name.startswith(".nemotron-fp8/model") for name in each) for each in files]


def stopped(client: HubClient, tmp_path: Path, shard: int, recipe: Recipe | None = None, **options: object) -> None:
    """Convert until a shard of four is begun; of the shards before it, the last may still be in transit."""

    def stop(progress: Progress) -> None:
        if progress.shard == f"model-{shard:05d}-of-00004.safetensors":
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(client, tmp_path / "work", progress=stop, recipe=recipe, **options)


@pytest.mark.parametrize("pull_request", [False, True])
def test_a_staging_branch(hub: Hub, client: HubClient, tmp_path: Path, pull_request: bool) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    if pull_request:
        hub.store.seed("me/target", {"README.md": b"mine"})
    found = status(client, tmp_path)
    assert (found.state, found.shards_done) == ("none", 0)
    stopped(client, tmp_path, 3, pull_request=pull_request)
    requests = len(hub.log)
    found = status(client, tmp_path)
    assert all(each.method == "GET" for each in hub.log[requests:])
    assert (found.kind, found.state, found.process) == ("hub", "unknown", None)
    (count,) = staged(hub)
    assert count in (1, 2)
    assert (found.shards_done, found.shards_total, found.shards_left) == (count, 4, 4 - count)
    assert found.bytes_done > 0
    assert found.source.startswith("hf://nv/source")
    assert found.last is not None
    assert abs(found.last - time.time()) < 600
    assert "its process is not recorded" in found.advice
    convert(client, tmp_path / "work", pull_request=pull_request)
    found = status(client, tmp_path, "hf://me/target@refs/pr/1" if pull_request else "hf://me/target")
    assert (found.state, found.shards_done, found.shards_left) == ("complete", 4, 0)
    assert status(client, tmp_path).state == ("none" if pull_request else "complete")


def test_several_jobs(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """The newest is told, the others are named."""
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    stopped(client, tmp_path, 3)
    first = staged(hub)[0]
    time.sleep(1.1)  # the test Hub counts whole seconds
    stopped(client, tmp_path, 4, Recipe(ignore=("layers.3",)))
    found = status(client, tmp_path)
    assert sorted([first, found.shards_done]) == sorted(staged(hub))
    assert len(found.notices) == 1
    assert "another unfinished job" in found.notices[0]
    assert f"{first} shards" in found.notices[0]
    assert status(client, tmp_path, "hf://me/target@other").state == "none"


def test_a_hostile_job_file(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    stopped(client, tmp_path, 3)
    repo = hub.store.repo("me/target")
    branch = next(ref.removeprefix("refs/heads/") for ref in repo.refs if "fp8-staging" in ref)
    client.api().upload_file(
        path_or_fileobj=b'{"plan": 3}', path_in_repo=".nemotron-fp8/job.json", repo_id="me/target", revision=branch
    )
    with pytest.raises(HubError, match="not a job file"):
        status(client, tmp_path)
