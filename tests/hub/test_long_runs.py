"""Long tests of conversions over the Hub: many faults, rounds and shards; run by `make test-hub-faults`."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.checkpoint.inventory import CARD, MANIFEST
from nemotron_fp8.errors import NemotronFp8Error
from nemotron_fp8.errors.hub import (
    DestinationMovedError,
    GatedRepoError,
    MissingRepoError,
    MissingRevisionError,
    StagingBusyError,
    StagingLostError,
    StagingMismatchError,
    TokenRejectedError,
    UnusableAnswerError,
)
from tests.hub.conftest import TOKEN, our_client
from tests.hub.conversion import checkpoint, convert, run_alone, wanted
from tests.hub.test_client import assert_no_token
from tests.hub.test_hub_to_hub import contents
from tests.hub.test_staging import NAMES, RESULT, digest, put, staging
from tests.hub_server.faults import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.faults import Request
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer
    from tests.support.counts import Counted


# -- faults in whole conversions --------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_every_fourth_request_of_a_conversion(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, kind: str, counted: Counted
) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    result = wanted(client, tmp_path)
    first = len(hub.log)
    convert(our_client(server), tmp_path / "work")
    requests = len(hub.log) - first
    positions = range(KINDS.index(kind) % 4, requests, 4)  # type: ignore[arg-type]  # one of them
    for where in positions:
        target = f"me/target-{where}"
        hub.faults.clear()
        hub.faults.add(kind, skip=where, seconds=1.0 if kind.startswith("hang") else 0.1)  # type: ignore[arg-type]
        try:
            convert(our_client(server), tmp_path / "work", target=f"hf://{target}")
        except NemotronFp8Error as error:
            assert_no_token(error)
            if hub.store.find(target) is not None:
                assert contents(hub, target) in ({}, result), where
            convert(our_client(server), tmp_path / "work", target=f"hf://{target}")
        assert contents(hub, target) == result, where
        assert list((tmp_path / "work").iterdir()) == []
    assert hub.leaks() == []
    counted("faults", len(positions))


# -- changes on the server during a conversion ------------------------------------------------------------


def staging_branch(hub: Hub) -> str | None:
    repo = hub.store.find("me/target")
    refs = [] if repo is None else [ref for ref in repo.refs if "fp8-staging" in ref]
    return refs[0].removeprefix("refs/heads/") if refs else None


def staging_goes(hub: Hub) -> bool:
    if (branch := staging_branch(hub)) is None:
        return False
    hub.delete_branch("me/target", branch)
    return True


def main_moves(hub: Hub) -> bool:
    if staging_branch(hub) is None:
        return False
    hub.store.seed("me/target", {"notes.txt": b"mine"})
    return True


def object_is_collected(hub: Hub) -> bool:
    if (branch := staging_branch(hub)) is None:
        return False
    tree = hub.store.repo("me/target").resolve(branch).tree
    staged = [entry.sha256 for path, entry in tree.items() if path.endswith(".safetensors") and entry.sha256]
    # Once main refers to it, no Hub collects it any more.
    published = {entry.sha256 for entry in hub.store.repo("me/target").resolve("main").tree.values()}
    if not staged or staged[0] in published:
        return False
    hub.collect("me/target", staged[0])
    return True


def source_moves(hub: Hub) -> bool:
    hub.store.seed("nv/source", {"folder/notes.md": b"a later commit"})
    return True


def source_goes(hub: Hub) -> bool:
    shutil.rmtree(hub.store.repo("nv/source").folder)
    return True


def token_is_revoked(hub: Hub) -> bool:
    hub.store.revoke(TOKEN)
    return True


def source_is_gated(hub: Hub) -> bool:
    hub.set_gated("nv/source")
    return True


STAGING_GONE = (StagingLostError, StagingBusyError, StagingMismatchError, MissingRevisionError)
EVENTS: dict[str, tuple[Callable[[Hub], bool], tuple[type[Exception], ...]]] = {
    "staging gone": (staging_goes, STAGING_GONE),
    "main moved": (main_moves, (DestinationMovedError,)),
    "object collected": (object_is_collected, (StagingLostError, UnusableAnswerError)),
    "source moved": (source_moves, ()),
    "source gone": (source_goes, (MissingRepoError, MissingRevisionError, UnusableAnswerError)),
    "token revoked": (token_is_revoked, (TokenRejectedError,)),
    "source gated": (source_is_gated, (GatedRepoError,)),
}


def event_at(hub: Hub, client: HubClient, work: Path, event: str, number: int) -> tuple[bool, bool]:
    """Change the server at request ``number`` or later; return whether it changed, and whether the job failed."""
    happen, expected = EVENTS[event]
    first, done, once = len(hub.log), False, threading.Lock()

    def before(request: Request) -> None:
        nonlocal done
        with once:  # requests come from several threads
            if not done and request.number - first >= number:
                done = happen(hub)

    hub.before = before
    try:
        convert(client, work)
    except NemotronFp8Error as error:
        assert isinstance(error, expected), (event, number, repr(error))
        assert_no_token(error)
        return done, True
    finally:
        hub.before = None
    return done, False


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("step", [25, pytest.param(1, marks=pytest.mark.faults)])
def test_change_on_the_server_at_every_request(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, event: str, step: int, counted: Counted
) -> None:
    """At every request: a typed error or success, no partial main, and a later run succeeds."""
    files = checkpoint(tmp_path / "source", 2)
    hub.store.seed("nv/source", files)
    result = lasting(wanted(client, tmp_path))
    happened = failed = 0
    for number in range(0, 200, step):
        did, broke = event_at(hub, our_client(server), tmp_path / "work", event, number)
        happened, failed = happened + did, failed + broke
        if hub.store.find("me/target") is not None:
            assert lasting(contents(hub)) in ({}, result), number
        assert list(tmp_path.glob("work/*")) == []
        hub.store.add_token(TOKEN, "me")
        hub.store.seed("nv/source", files)
        hub.set_gated("nv/source", False)
        convert(our_client(server), tmp_path / "work", restart=broke, overwrite=broke)
        assert lasting(contents(hub)) == result, number
        shutil.rmtree(hub.store.repo("me/target").folder)
        if not did:
            break
    assert bool(failed) == (event != "source moved")
    counted("times", happened)


def lasting(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a result without those that name the source's commit or that the test added."""
    return {name: files[name] for name in files if name not in (CARD, MANIFEST, "notes.txt")}


# -- concurrent runs of one job ---------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=pytest.mark.faults)])
def test_two_runs_of_one_job_at_the_same_time(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, rounds: int, counted: Counted
) -> None:
    """The runs share no lock: the Hub refuses one by 412, or both end with the same result."""
    ends = {"won": 0, "refused": 0}
    surprises: list[BaseException] = []

    def run(number: int, which: int) -> None:
        folder = tmp_path / f"{number}-{which}"
        folder.mkdir()
        time.sleep(random.Random(f"{number} {which}").random() * 0.1)
        job = staging(our_client(server), f"me/target-{number}")
        try:
            staged = job.begin()
            if not job.published:
                for name in NAMES:
                    if name not in staged:
                        put(job, name, folder)
                job.publish({name: digest(name) for name in NAMES}, {n: RESULT[n] for n in RESULT if n not in NAMES})
            ends["won"] += 1
        except (StagingBusyError, StagingLostError, DestinationMovedError, MissingRevisionError):
            ends["refused"] += 1
        except BaseException as error:
            surprises.append(error)

    for number in range(rounds):
        threads = [threading.Thread(target=run, args=(number, which)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert surprises == [], number
        repo = f"me/target-{number}"
        assert contents(hub, repo) in ({}, RESULT), number
        for commit in hub.store.repo(repo).history("main"):
            assert {path for path in commit.tree if path.endswith(".safetensors")} in (set(), set(NAMES))
        job = staging(client, repo)  # whoever comes after finds it finished, or goes on with it
        staged = job.begin()
        if not job.published:
            for name in set(NAMES) - set(staged):
                put(job, name, tmp_path)
            job.publish({name: digest(name) for name in NAMES}, {n: RESULT[n] for n in RESULT if n not in NAMES})
        assert contents(hub, repo) == RESULT, number
    assert sum(ends.values()) == 2 * rounds
    counted("rounds; ends", f"{rounds}; {ends}")


# -- many shards ------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_disk_and_memory_of_200_shards(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, counted: Counted
) -> None:
    """The disk space stays within the formula, and resident memory is flat from shard 10 to 200."""
    shards = 200
    files = checkpoint(tmp_path / "source", shards, rows=1024, columns=512)
    hub.store.seed("nv/source", files)
    source = max(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    work = tmp_path / "work"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_alone, args=(server.endpoint, TOKEN, work))
    peak, commits, resident = 0, 0, dict[int, int]()

    def measure(request: Request) -> None:
        nonlocal peak, commits
        if work.is_dir():
            size = 0
            for path in work.glob("*/*"):
                with suppress(OSError):
                    size += path.stat().st_size
            peak = max(peak, size)
        if request.method == "POST" and "/commit/fp8-staging" in request.path:
            commits += 1
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            resident[commits] = int(status.split("VmRSS:")[1].split()[0]) * 1024

    hub.before = measure
    process.start()
    process.join(500)
    assert process.exitcode == 0
    there = contents(hub)
    assert set(files) < set(there)
    output = max(len(content) for name, content in there.items() if name.endswith(".safetensors"))
    formula = 2 * source + 2 * output
    assert 0 < peak <= 1.05 * formula
    early, late = max(resident[n] for n in range(5, 15)), max(resident[n] for n in range(190, 200))
    assert late - early < 8 << 20
    counted("peak bytes on disk, and by the formula", f"{peak:,} of {formula:,}")
    counted("resident bytes at shard 10 and at shard 200", f"{resident[11]:,} and {resident[201]:,}")


# -- a polling reader -------------------------------------------------------------------------------------


@pytest.mark.parametrize("polls", [300, pytest.param(10_000, marks=pytest.mark.faults)])
def test_polling_reader_sees_nothing_or_the_whole_result(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, polls: int, counted: Counted
) -> None:
    """The listing of main is read continuously while conversions are published."""
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    result = wanted(client, tmp_path)
    full = {*result, ".gitattributes"}
    done, seen, stop = 0, {"empty": 0, "complete": 0}, threading.Event()
    target = "me/target-0"
    hub.store.create(target)

    def poll() -> None:
        nonlocal done
        while not stop.is_set():
            url = f"{server.endpoint}/api/models/{target}?blobs=true"
            with urllib.request.urlopen(url) as answer:
                names = {item["rfilename"] for item in json.load(answer)["siblings"]}
            assert names in ({".gitattributes"}, full)
            seen["empty" if len(names) == 1 else "complete"] += 1
            done += 1

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            poll()
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=guarded)
    reader.start()
    rounds = 0
    while done < polls and not failures:
        convert(client, tmp_path / "work", target=f"hf://{target}")
        rounds += 1
        hub.store.create(f"me/target-{rounds}")
        target = f"me/target-{rounds}"
    stop.set()
    reader.join()
    assert not failures
    assert seen["empty"]
    counted("polls; conversions", f"{done} {seen}; {rounds}")


# -- the token --------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_token_appears_nowhere(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, caplog: pytest.LogCaptureFixture, counted: Counted
) -> None:
    """Under every fault: not in logs, messages, progress, local files, other requests, or on the Hub."""
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    looked = 0
    for kind in KINDS:
        for where in (3, 17, 31):
            target = f"me/target-{kind.replace('_', '-')}-{where}"
            hub.faults.clear()
            hub.faults.add(kind, skip=where, seconds=0.7 if kind.startswith("hang") else 0.1)
            texts: list[str] = []
            caplog.clear()
            with caplog.at_level(0):
                try:
                    convert(
                        our_client(server),
                        tmp_path / "work",
                        target=f"hf://{target}",
                        progress=lambda p, texts=texts: texts.append(repr(p)),  # type: ignore[misc]
                    )
                except NemotronFp8Error as error:
                    assert_no_token(error)
                    texts += [str(error), repr(vars(error))]
            texts += [record.getMessage() for record in caplog.records]
            texts += [request.path + request.query for request in hub.log]
            looked += len(texts)
            assert not any(TOKEN in text for text in texts)
            if (repo := hub.store.find(target)) is not None:
                for ref in repo.refs:
                    held = hub.files(target, ref)
                    looked += len(held)
                    assert not any(TOKEN.encode() in content for content in held.values())
    for path in (tmp_path / "work").rglob("*"):
        assert TOKEN.encode() not in path.read_bytes()
    assert hub.leaks() == []
    counted("texts and files looked through", looked)
