"""State of a conversion into a repository on the Hub, by its staging branch or its pull request."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.destinations.hub.branch import Branch
from nemotron_fp8.destinations.hub.branch_state import MAIN, job_record, listing_at
from nemotron_fp8.destinations.hub.job import JOB_FILE, STAGING, note_path
from nemotron_fp8.destinations.status import Finished, Pace, Status, advice_for, total_of
from nemotron_fp8.errors.hub import MissingRepoError, MissingRevisionError
from nemotron_fp8.hub.address import is_pull_request
from nemotron_fp8.hub.answers import Refs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.destinations.hub.job import JobRecord
    from nemotron_fp8.hub.address import Address
    from nemotron_fp8.hub.answers import HistoryItem
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing

MAX_JOBS = 20
"""Staging branches, and pull requests from the newest on, that are read."""
MAX_PAGES = 20
"""Pages of a history that are read."""
_STAGED = re.compile(r"Stage (\S+) \[job ")
_RUN = re.compile(r"\[run ([0-9a-f]{12})\]")


def hub_status(client: HubClient, address: Address, named: str) -> Status:
    """Return the state of a repository as a destination. Only lists, histories and job files are read.

    Args:
        client: client; a token is needed for a private repository.
        address: repository, and branch or pull request.
        named: the destination as it was named.

    Raises:
        HubError: the repository cannot be read; the class names the reason.
    """
    revision = address.revision or MAIN
    try:
        refs = _refs(client, address.repo)
    except MissingRepoError:
        return Status(named, advice="no such repository, or the token cannot see it")
    main: Listing | None = None
    with suppress(MissingRevisionError):
        main = client.listing(address.repo, revision)
    jobs = sorted(_jobs(client, address.repo, revision, refs, main, named), key=lambda each: -(each.last or 0.0))
    if jobs:
        newest, others = jobs[0], jobs[1:]
        more = tuple(f"another unfinished job: plan {each.plan}, {each.shards_done:,} shards" for each in others)
        return replace(newest, notices=(*newest.notices, *more))
    if main is not None and MANIFEST in main.files:
        return _complete(main, named)
    return Status(named, advice="no result, and no unfinished conversion, is there")


def _refs(client: HubClient, repo: str) -> Refs:
    def attempt(_progressed: Callable[[], None]) -> Refs:
        return client.get_json(f"/api/models/{repo}/refs", Refs, include_prs=1)

    return client.retry(client.context(repo, "list the branches"), attempt)


def _complete(main: Listing, named: str) -> Status:
    sizes = [file.size for name, file in main.files.items() if name.endswith(".safetensors")]
    return Status(
        named,
        "hub",
        "complete",
        shards_done=len(sizes),
        shards_total=len(sizes),
        bytes_done=sum(sizes),
        bytes_total=sum(sizes),
        advice=f"check it: nemotron-fp8 verify {named}",
    )


def _jobs(
    client: HubClient, repo: str, revision: str, refs: Refs, main: Listing | None, named: str
) -> Iterator[Status]:
    """Yield the unfinished jobs whose destination is a revision."""
    found = [branch.name for branch in refs.branches if branch.name.startswith(STAGING)][:MAX_JOBS]
    requests = sorted((each.ref for each in refs.pull_requests or []), key=lambda ref: -int(ref.rpartition("/")[2]))
    found += [revision] if is_pull_request(revision) else requests[:MAX_JOBS]
    for ref in found:
        branch = Branch(client, repo, ref, "")
        try:
            staging = client.listing(repo, ref)
        except MissingRevisionError:  # published, or discarded, meanwhile
            continue
        if JOB_FILE not in staging.files:
            continue
        job = job_record(branch, staging)
        if revision not in (job.revision, ref):
            continue
        commits = list(branch.commits(ref, MAX_PAGES))
        yield _of_job(client, job, staging, commits, main, named)


def _of_job(
    client: HubClient, job: JobRecord, staging: Listing, commits: list[HistoryItem], main: Listing | None, named: str
) -> Status:
    before = listing_at(client, staging.repo, job.base, main or staging)
    sizes = {
        name: file.size
        for name, file in staging.files.items()
        if note_path(name) in staging.files and before.files.get(name) != file
    }
    newest = next(iter(_RUN.findall(commits[0].title)), "") if commits else ""
    run = [item for item in reversed(commits) if newest and newest in item.title]
    staged = [(match.group(1), item) for item in run if (match := _STAGED.match(item.title))]
    finished = [Finished(name, sizes.get(name, 0), _time(item)) for name, item in staged]
    # A run that resumes makes no commit before its first shard, whose time is then its start.
    begun = [_time(item) for item in run if not _STAGED.match(item.title)]
    pace = Pace.of(begun[0], finished) if begun else Pace.of(finished[0].at if finished else None, finished[1:])
    total = total_of(sizes)
    status = Status(
        named,
        "hub",
        "unknown",
        shards_done=len(sizes),
        shards_total=total,
        bytes_done=sum(sizes.values()),
        seconds=pace.seconds,
        bytes_per_second=pace.bytes_per_second,
        recent_bytes_per_second=pace.recent,
        seconds_left=pace.left(None if total is None else total - len(sizes), None, None),
        last=max((at for item in commits if (at := _time(item)) is not None), default=None),
        source=job.source,
        plan=job.plan,
    )
    return replace(status, advice=advice_for(status))


def _time(item: HistoryItem) -> float | None:
    """Return the time of a commit in seconds since 1970; None if the server does not state it."""
    try:
        at = datetime.fromisoformat((item.date or "")[:40].replace("Z", "+00:00"))
        return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None
