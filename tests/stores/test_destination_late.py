"""Requests to a store that arrive late, and folders that other runs or users have changed: no half result, no loss."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, status_of, verify_repo
from nemotron_fp8.destinations.store.prefix import WITHDRAWN
from nemotron_fp8.errors.store_results import JobLostError, OccupiedPrefixError
from nemotron_fp8.errors.stores import StoreAddressError, StoreDeniedError
from nemotron_fp8.stores.listing import JOB_FILE, RECORDS
from tests.hub_server.faults import Fault
from tests.store_server.fixtures import BUCKET
from tests.stores.test_destination import NAMES, StoppedError, stop_at
from tests.stores.writing import ANNOUNCING, PREFIX, TARGET, checkpoint_of, contents, convert, files_of
from tests.support.recipes import PUBLISHED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.hub_server.faults import Request
    from tests.store_server.server import StoreServer

INDEX, CONFIG, MANIFEST = ANNOUNCING
OTHER = Recipe(granularity="block")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint_of(tmp_path / "source", 4)


def local(source: Path, folder: Path, recipe: Recipe | None = None) -> dict[str, bytes]:
    """Return the files of a local conversion."""
    convert(source, folder, recipe)
    return files_of(folder)


def once(method: str, name: str, act: Callable[[], object]) -> Callable[[Request], Fault | None]:
    """Return a hook that acts once, at the first request of a method for a file."""
    done: list[int] = []

    def before(request: Request) -> Fault | None:
        if request.method == method and request.path.endswith(name) and not done:
            done.append(1)
            act()
        return None

    return before


def start_over(source: Path, recipe: Recipe | None) -> None:
    """Take the folder over, and stop after two shards."""
    with pytest.raises(StoppedError):
        convert(source, recipe=recipe, restart=True, progress=stop_at(NAMES[2]))


@pytest.mark.parametrize("recipe", [None, OTHER], ids=["same", "other"])
@pytest.mark.parametrize("late", [MANIFEST, CONFIG])
def test_a_run_whose_folder_was_taken_over_announces_nothing(
    store: StoreServer, source: Path, tmp_path: Path, recipe: Recipe | None, late: str
) -> None:
    """Its request is on the way while another run starts over; it fails, and the other run ends well."""
    store.before = once("PUT", f"/{late}", lambda: start_over(source, recipe))
    with pytest.raises(JobLostError, match="was replaced"):
        convert(source)
    store.before = None
    found = contents(store)
    assert MANIFEST not in found
    assert found.get(CONFIG, WITHDRAWN) == WITHDRAWN
    assert convert(source, recipe=recipe).resumed == 2
    assert contents(store) == local(source, tmp_path / "local", recipe)


def test_a_retried_manifest_does_not_land_in_the_folder_of_another_run(
    store: StoreServer, source: Path, tmp_path: Path
) -> None:
    def refuse(request: Request) -> Fault | None:
        if request.method != "PUT" or not request.path.endswith(f"/{MANIFEST}"):
            return None
        store.before = None
        start_over(source, OTHER)
        return Fault("503")

    store.before = refuse
    with pytest.raises(JobLostError, match="was replaced"):
        convert(source)
    assert MANIFEST not in contents(store)
    convert(source, recipe=OTHER)
    assert contents(store) == local(source, tmp_path / "local", OTHER)


def test_a_late_deletion_does_not_hit_the_result_of_a_later_run(
    store: StoreServer, source: Path, tmp_path: Path
) -> None:
    """A run that starts over stalls in its first deletion; the same command runs meanwhile, to its end."""
    with pytest.raises(StoppedError):
        convert(source, recipe=OTHER, progress=stop_at(NAMES[3]))
    finished: list[object] = []

    def run_beside(request: Request) -> Fault | None:
        if request.method == "POST" and request.query.startswith("delete") and not finished:
            finished.append(1)
            finished.append(convert(source))
        return None

    store.before = run_beside
    with pytest.raises(JobLostError):
        convert(source, restart=True)
    assert len(finished) == 2
    assert contents(store) == local(source, tmp_path / "local")


def test_a_manifest_of_another_result_is_not_taken_for_the_own_one(
    store: StoreServer, source: Path, tmp_path: Path
) -> None:
    result = local(source, tmp_path / "local")
    deny_at(store, "PUT", "/README.md")
    with pytest.raises(StoreDeniedError):
        convert(source)
    store.before = None
    store.put(BUCKET, PREFIX + MANIFEST, local(source, tmp_path / "other", OTHER)[MANIFEST])
    assert not convert(source).unchanged
    assert contents(store) == result


def deny_at(store: StoreServer, method: str, name: str) -> None:
    """Let the store answer 403 to the requests of a method for a file."""

    def deny(request: Request) -> Fault | None:
        return Fault("403") if request.method == method and f"{request.path}?{request.query}".find(name) >= 0 else None

    store.before = deny


def test_a_shard_is_made_again_only_after_the_result_is_withdrawn(
    store: StoreServer, source: Path, tmp_path: Path
) -> None:
    """Stopped before the manifest, then a shard is lost: no reader finds the config beside the missing shard."""
    deny_at(store, "PUT", f"/{MANIFEST}")
    with pytest.raises(StoreDeniedError):
        convert(source)
    store.before = None
    assert CONFIG in contents(store)
    store.remove(BUCKET, PREFIX + NAMES[1])
    seen: list[bytes] = []

    def look(request: Request) -> None:
        if request.method in ("PUT", "POST") and NAMES[1] in request.path:
            seen.append(contents(store)[CONFIG])

    store.after = look
    report = convert(source)
    store.after = None
    assert report.resumed == 3
    assert seen[0] == WITHDRAWN
    assert contents(store) == local(source, tmp_path / "local")


def test_a_run_that_fails_for_good_leaves_the_result_of_its_twin(
    store: StoreServer, source: Path, tmp_path: Path
) -> None:
    """The twin is stopped before it deletes its records; then the source changes for the first run."""
    result = local(source, tmp_path / "local")

    def twin() -> None:
        deny_at(store, "POST", "?delete")
        convert(source)
        store.before = None
        (source / NAMES[3]).write_bytes(b"another file")

    done: list[int] = []

    def progress(state: object) -> None:
        if getattr(state, "shard", "") == NAMES[2] and not done:
            done.append(1)
            twin()

    with pytest.raises(Exception, match=r"model-00004|changed"):
        convert(source, progress=progress)
    assert {name: data for name, data in contents(store).items() if not name.startswith(RECORDS)} == result
    assert verify_repo(None, TARGET).ok


def test_files_of_others_beside_the_records_are_left_alone(store: StoreServer, source: Path) -> None:
    with pytest.raises(StoreAddressError, match="holds the records of conversions"):
        convert(source, f"{TARGET}/{RECORDS}")
    store.put(BUCKET, f"{PREFIX}{RECORDS}/notes.txt", b"mine")
    before = contents(store)
    with pytest.raises(OccupiedPrefixError, match=r"notes\.txt"):
        convert(source)
    assert contents(store) == before


def test_shards_without_digests_are_made_again_by_a_run_with_them(
    store: StoreServer, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        convert(source, digests=False, progress=stop_at(NAMES[2]))
    assert convert(source).resumed == 0
    assert contents(store) == local(source, tmp_path / "local")
    assert verify_repo(None, TARGET).ok


def test_the_status_counts_neither_a_discarded_run_nor_the_time_between_two_runs(
    store: StoreServer, source: Path
) -> None:
    with pytest.raises(StoppedError):
        convert(source, recipe=PUBLISHED, progress=stop_at(NAMES[3]))
    assert status_of(TARGET).shards_done == 3

    deny_at(store, "POST", "?delete")
    with pytest.raises(StoreDeniedError):
        convert(source, restart=True)
    store.before = None
    assert status_of(TARGET).shards_done == 0
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[2]))
    time.sleep(2.5)
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[3]))
    status = status_of(TARGET)
    assert status.shards_done == 3
    assert status.seconds is None or status.seconds < 2.5


def test_a_damaged_record_of_a_run_is_no_error(store: StoreServer, source: Path) -> None:
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[2]))
    for record in (b"", b"{}", b"\xff" * 100, json.dumps({"pid": "x" * 70_000}).encode()):
        store.put(BUCKET, f"{PREFIX}{RECORDS}/run.json", record)
        status = status_of(TARGET)
        assert (status.state, status.process, status.shards_done) == ("unknown", None, 2)
    assert JOB_FILE in contents(store)
