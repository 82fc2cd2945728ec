"""Results in a store: the bytes of a local conversion, resumed, refused, restarted, beside other runs."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, convert_repo, dequantize_repo, quantize_repo
from nemotron_fp8.destinations.store import ordered_bytes
from nemotron_fp8.destinations.store.job import RUN_FILE
from nemotron_fp8.destinations.store.sink import StoreSink
from nemotron_fp8.errors import NonFiniteError, OverlapError, RecipeError, WriteError
from nemotron_fp8.errors.destination import DamagedJournalError, OtherRunError
from nemotron_fp8.errors.store_results import JobLostError, OccupiedPrefixError, StagedObjectError
from nemotron_fp8.errors.stores import StoreAddressError, StoreDeniedError, UnconditionalStoreError
from nemotron_fp8.stores.listing import JOB_FILE, RECORDS
from tests.hub_server.faults import Fault
from tests.store_server.fixtures import BUCKET
from tests.store_server.server import KEY_ID
from tests.stores.writing import ANNOUNCING, PREFIX, TARGET, checkpoint_of, contents, convert, files_of, job_of, observe
from tests.support.checkpoints import ONE, model, weight, write_checkpoint
from tests.support.fp8_sources import mixed
from tests.support.nemo_writer import Sizes, hf_tensors, write_nemo
from tests.support.recipes import PUBLISHED

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8 import Progress
    from nemotron_fp8.destinations.base import Staged
    from tests.hub_server.faults import Request
    from tests.store_server.server import StoreServer
    from tests.support.counts import Counted

NAMES = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
BLOCKS = Recipe(granularity="block")
SIGNED = f"AWS4-HMAC-SHA256 Credential={KEY_ID}/20300101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""Header of a request that is not anonymous; moto does not check signatures."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four shards, a tokenizer, an empty file, and a file that is sent in parts."""
    return checkpoint_of(tmp_path / "source", 4, {"vocab.txt": b"", "big.model": bytes(range(256)) * 20_000})


class StoppedError(Exception):
    """A test stops the run here."""


def stop_at(shard: str, error: BaseException | None = None) -> Any:
    """Return a progress callback that ends the run when a shard begins to be made."""

    def progress(state: Progress) -> None:
        if state.shard == shard:
            raise error or StoppedError

    return progress


def header_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the header of each shard come last, as no engine does it."""
    write_at, finish = StoreSink.write_at, StoreSink.finish
    headers: dict[StoreSink, bytes] = {}

    def write(sink: StoreSink, offset: int, data: memoryview) -> None:
        if offset:
            write_at(sink, offset, data)
        else:
            headers[sink] = bytes(data)

    def end(sink: StoreSink) -> Staged:
        write_at(sink, 0, memoryview(headers[sink]))
        return finish(sink)

    monkeypatch.setattr(StoreSink, "write_at", write)
    monkeypatch.setattr(StoreSink, "finish", end)


def uploads(store: StoreServer) -> list[str]:
    """Return the names of the files that were uploaded in parts, once for each time."""
    return [r.path.rpartition("/")[2] for r in store.log if r.method == "POST" and r.query.startswith("uploads")]


# -- the bytes of a local conversion ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (None, {}),
        (PUBLISHED, {}),
        (BLOCKS, {}),
        (Recipe(format="mxfp8"), {}),
        (Recipe(stats=True, kv_cache="fp8"), {"threads": 2}),
        (None, {"digests": False, "max_memory": "64MiB"}),
    ],
    ids=["channel", "tensor", "block", "mxfp8", "stats", "without digests"],
)
def test_the_bytes_are_those_of_a_folder(
    store: StoreServer, source: Path, tmp_path: Path, recipe: Recipe | None, options: dict[str, Any]
) -> None:
    quantize_repo(source, tmp_path / "local", recipe, "cpu", **options)
    report = quantize_repo(source, TARGET, recipe, "cpu", **options)
    assert contents(store) == files_of(tmp_path / "local")
    assert report.bytes_written == sum(map(len, contents(store).values()))
    assert (report.destination, report.resumed, report.unchanged) == (TARGET, 0, False)
    assert store.unfinished(BUCKET) == []


def test_one_shard(store: StoreServer, tmp_path: Path) -> None:
    (shard,) = (dict(pair for tensors in model(layers=1).values() for pair in tensors.items()),)
    source = write_checkpoint(tmp_path / "source", {ONE: shard})
    convert(source, tmp_path / "local")
    convert(source)
    assert contents(store) == files_of(tmp_path / "local")
    assert ONE in contents(store)


def test_quantized_and_nemo_sources_and_the_way_back(store: StoreServer, tmp_path: Path) -> None:
    fp8, _ = mixed(tmp_path / "fp8")
    sizes = Sizes(layers=1)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    ways: dict[str, Any] = {
        "requantized": lambda to: quantize_repo(fp8, to, BLOCKS, "cpu", threads=1),
        "dequantized": lambda to: dequantize_repo(fp8, to, threads=1),
        "nemo": lambda to: quantize_repo(tmp_path / "nemo", to, None, "cpu", threads=1, shard_size=100_000),
        "converted": lambda to: convert_repo(tmp_path / "nemo", to, threads=1),
    }
    for name, way in ways.items():
        way(tmp_path / f"local {name}")
        way(f"s3://{BUCKET}/{name}")
        assert contents(store, f"{name}/") == files_of(tmp_path / f"local {name}"), name


def test_the_whole_bucket_and_a_local_address(store: StoreServer, source: Path, tmp_path: Path) -> None:
    store.create("empty")
    convert(source, "s3://empty")
    convert(source, f"file://{tmp_path}/local")
    assert store.files("empty") == files_of(tmp_path / "local")


def test_shards_larger_than_a_part_with_bytes_out_of_order(
    store: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of several parts, whose first bytes come last: the others wait in the temporary file."""
    header_last(monkeypatch)
    monkeypatch.setattr(ordered_bytes.OrderedBytes.__init__, "__defaults__", (None, 1 << 20, 6 << 20))
    shard = {f"model.layers.{i}.mlp.up_proj.weight": weight(3000, 4096, seed=i) for i in range(2)}
    source = write_checkpoint(tmp_path / "source", {ONE: shard})
    quantize_repo(source, tmp_path / "local", None, "cpu", threads=2)
    quantize_repo(source, TARGET, None, "cpu", threads=2)
    assert contents(store) == files_of(tmp_path / "local")
    parts = [request for request in store.log if request.query.startswith("partNumber=")]
    assert len(parts) == 3  # of 24.6 MB


# -- the same command again -------------------------------------------------------------------------------


def test_finished_shards_are_kept(store: StoreServer, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "local")
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[2]))
    assert set(contents(store)) == {JOB_FILE, RUN_FILE, *NAMES[:2], *(f"{RECORDS}/{name}.json" for name in NAMES[:2])}
    assert store.unfinished(BUCKET) == []
    store.log.clear()
    assert convert(source).resumed == 2
    assert uploads(store) == [*NAMES[2:], "big.model"]
    assert contents(store) == files_of(tmp_path / "local")


def test_a_complete_result_is_left_alone(store: StoreServer, source: Path) -> None:
    convert(source)
    before = contents(store)
    store.put(BUCKET, f"{PREFIX}{RECORDS}/{NAMES[0]}.json", b"of a run that was killed while it deleted its records")
    store.log.clear()
    assert convert(source).unchanged
    assert contents(store) == before
    assert not [request for request in store.log if request.method == "PUT"]
    with pytest.raises(OccupiedPrefixError, match="holds a result: of another conversion"):
        convert(source, recipe=BLOCKS)
    with pytest.raises(OccupiedPrefixError, match="holds a result: of another conversion"):
        convert(source, recipe=BLOCKS, restart=True)
    assert contents(store) == before


def test_a_damaged_shard_is_made_again(store: StoreServer, source: Path, tmp_path: Path) -> None:
    """Deleted, cut, other bytes of the same length; one that was written again with the same bytes is kept."""
    convert(source, tmp_path / "local")
    result = files_of(tmp_path / "local")
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[3]))
    store.remove(BUCKET, PREFIX + NAMES[0])
    store.put(BUCKET, PREFIX + NAMES[1], result[NAMES[1]][:-1] + b"?")
    store.put(BUCKET, PREFIX + NAMES[2], result[NAMES[2]])  # with the tag of an upload in one part
    store.log.clear()
    assert convert(source).resumed == 1
    assert uploads(store) == [NAMES[0], NAMES[1], NAMES[3], "big.model"]
    assert contents(store) == result


@pytest.mark.parametrize(
    "receipt", [b"", b"{}", b"[" * 100_000, b'{"schema":1,"schema":1}', b"\xff", b'{"schema":1,"etag":{}}']
)
def test_a_malformed_receipt_counts_as_none(store: StoreServer, source: Path, receipt: bytes) -> None:
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[2]))
    store.put(BUCKET, f"{PREFIX}{RECORDS}/{NAMES[0]}.json", receipt)
    assert convert(source).resumed == 1


def test_the_receipt_of_another_shard_counts_as_none(store: StoreServer, source: Path) -> None:
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[2]))
    records = contents(store)
    store.put(BUCKET, f"{PREFIX}{RECORDS}/{NAMES[0]}.json", records[f"{RECORDS}/{NAMES[1]}.json"])
    assert convert(source).resumed == 1


@pytest.mark.parametrize("change", ["version", "files", "discard", "size", "terms", "text", "extra"])
def test_a_malformed_job_file_is_refused(store: StoreServer, source: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[1]))
    job = job_of(store)
    changed = {
        "version": {**job, "schema": 2},
        "files": {**job, "files": {"../../other/key": 1}},
        "discard": {**job, "discard": ["a/b"]},
        "size": {**job, "files": {"a": -1}},
        "terms": {**job, "terms": {"kind": "terms"}},
        "extra": {**job, "more": 1},
    }.get(change)
    store.put(BUCKET, PREFIX + JOB_FILE, b"no JSON" if changed is None else json.dumps(changed).encode())
    before = contents(store)
    with pytest.raises(DamagedJournalError, match="--restart"):
        convert(source)
    assert contents(store) == before
    convert(source, restart=True)
    convert(source, tmp_path / "local")
    assert contents(store) == files_of(tmp_path / "local")


def test_another_job_is_refused_and_can_be_discarded(store: StoreServer, source: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        convert(source, recipe=Recipe(stats=True), progress=stop_at(NAMES[2]))
    before = contents(store)
    with pytest.raises(OtherRunError, match="its recipe differs"):
        convert(source, recipe=BLOCKS)
    assert contents(store) == before
    report = convert(source, recipe=BLOCKS, restart=True)
    convert(source, tmp_path / "local", BLOCKS)
    assert report.resumed == 0
    assert contents(store) == files_of(tmp_path / "local")


def test_a_new_start_keeps_nothing_even_if_it_is_stopped(store: StoreServer, source: Path, tmp_path: Path) -> None:
    """Stopped after each of its requests until the first upload: no receipt of the discarded run counts."""
    for number in range(1, 16, 4):
        store.reset()
        store.create(BUCKET)
        with pytest.raises(StoppedError):
            convert(source, recipe=PUBLISHED, progress=stop_at(NAMES[3]))
        store.log.clear()

        def stop(request: Request, number: int = number) -> Fault | None:
            return Fault("403") if request.number == number else None

        store.before = stop
        with pytest.raises(StoreDeniedError):
            convert(source, recipe=PUBLISHED, restart=True)
        store.before = None
        again = convert(source, recipe=PUBLISHED)
        convert(source, tmp_path / f"local-{number}", PUBLISHED)
        assert again.resumed in (0, 3)  # 3 only if the new start had not replaced the job file yet
        assert contents(store) == files_of(tmp_path / f"local-{number}")


def test_a_source_that_can_never_be_converted_leaves_nothing(store: StoreServer, tmp_path: Path) -> None:
    shards = {
        name: {f"model.layers.{i}.mlp.up_proj.weight": weight(64, 128, seed=i)} for i, name in enumerate(NAMES[:2])
    }
    shards[NAMES[1]]["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    source = write_checkpoint(tmp_path / "source", shards)
    with pytest.raises(NonFiniteError):
        convert(source)
    assert contents(store) == {}
    assert convert(source, recipe=Recipe(nonfinite="keep")).nonfinite
    convert(source, tmp_path / "local", Recipe(nonfinite="keep"))
    assert contents(store) == files_of(tmp_path / "local")
    assert convert(source, recipe=Recipe(nonfinite="keep")).unchanged


def test_ctrl_c_during_an_upload(store: StoreServer, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, progress=stop_at(NAMES[1], KeyboardInterrupt()))
    assert NAMES[1] not in contents(store)
    assert store.unfinished(BUCKET) == []
    assert convert(source).resumed == 1


def test_a_full_disk_under_the_temporary_file(
    store: StoreServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        header_last(patch)
        patch.setattr(ordered_bytes.OrderedBytes.__init__, "__defaults__", (None, 1 << 20, 0))
        patch.setattr("os.pwrite", full)
        with pytest.raises(WriteError, match=r"No space left on device .*TMPDIR"):
            convert(source)
    assert set(contents(store)) == {JOB_FILE, RUN_FILE}
    assert store.unfinished(BUCKET) == []
    convert(source)
    convert(source, tmp_path / "local")
    assert contents(store) == files_of(tmp_path / "local")


# -- what is refused --------------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused(store: StoreServer, source: Path) -> None:
    store.put(BUCKET, f"{PREFIX}notes.txt", b"mine")
    for restart in (False, True):
        with pytest.raises(OccupiedPrefixError, match=r"holds other files \(notes\.txt\); name a new folder"):
            convert(source, restart=restart)
    assert contents(store) == {"notes.txt": b"mine"}


def test_neighbors_are_no_part_of_the_folder(store: StoreServer, source: Path) -> None:
    neighbors = {"models/target2/config.json": b"{}", "models/targe": b"x", "models/target": b"a file"}
    for key, data in neighbors.items():
        store.put(BUCKET, key, data)
    store.put(BUCKET, PREFIX, b"")  # the marker that a console makes for a folder
    convert(source)
    assert {key: store.files(BUCKET)[key] for key in neighbors} == neighbors


def test_a_file_that_appears_during_the_run(store: StoreServer, source: Path, tmp_path: Path) -> None:
    def intrude(state: Progress) -> None:
        if state.shard == NAMES[3]:
            store.put(BUCKET, f"{PREFIX}notes.txt", b"mine")

    with pytest.raises(OccupiedPrefixError, match=r"received other files during this run \(notes\.txt\)"):
        convert(source, progress=intrude)
    assert not set(ANNOUNCING) & contents(store).keys()
    store.remove(BUCKET, f"{PREFIX}notes.txt")
    assert convert(source).resumed == 4
    convert(source, tmp_path / "local")
    assert contents(store) == files_of(tmp_path / "local")


@pytest.mark.parametrize("damage", ["remove", "replace"])
def test_a_shard_that_changes_during_the_run(store: StoreServer, source: Path, tmp_path: Path, damage: str) -> None:
    def change(state: Progress) -> None:
        if state.shard == NAMES[3]:
            if damage == "remove":
                store.remove(BUCKET, PREFIX + NAMES[0])
            else:
                store.put(BUCKET, PREFIX + NAMES[0], bytes(len(contents(store).get(NAMES[0], b""))))

    with pytest.raises(StagedObjectError, match=f"'{NAMES[0]}' is "):
        convert(source, progress=change)
    assert not set(ANNOUNCING) & contents(store).keys()
    assert convert(source).resumed == 3
    convert(source, tmp_path / "local")
    assert contents(store) == files_of(tmp_path / "local")


def test_options_and_names_that_a_store_does_not_take(store: StoreServer, source: Path) -> None:
    from nemotron_fp8 import HubOptions

    for options, message in (
        ({"overwrite": True}, "a mixture: name a new folder"),
        ({"hub": HubOptions(private=True)}, "on the Hub"),
        ({"hub": HubOptions(pull_request=True)}, "on the Hub"),
    ):
        with pytest.raises(RecipeError, match=message):
            convert(source, **options)
    with pytest.raises(RecipeError, match="in place replaces the shards of a local folder"):
        quantize_repo(TARGET, in_place=True, device="cpu")
    for name in ("s3://", "s3://bucket/a/../b", "s3://key:secret@bucket/a", "s3://bucket/a?X-Amz-Signature=secret"):
        with pytest.raises(StoreAddressError) as caught:
            convert(source, name)
        assert "secret" not in str(caught.value)
    assert store.log == []


def test_a_store_without_conditional_writes(store: StoreServer, source: Path) -> None:
    forward = store.forward

    def ignorant(method: str, path: str, headers: Any, body: bytes) -> Any:
        return forward(method, path, {k: v for k, v in headers.items() if not k.startswith("if-")}, body)

    store.forward = ignorant  # type: ignore[method-assign]
    with pytest.raises(UnconditionalStoreError, match="two runs could mix their files"):
        convert(source)
    assert contents(store) == {}


# -- several runs at once ---------------------------------------------------------------------------------


def test_two_runs_of_one_job(store: StoreServer, source: Path, tmp_path: Path) -> None:
    """Both are inside at the same time: each succeeds, or says that the other one has finished the job."""
    convert(source, tmp_path / "local")
    result = files_of(tmp_path / "local")
    outcomes = race(lambda _: convert(source))
    assert contents(store) == result
    assert any(outcome is None for outcome in outcomes)
    assert all(outcome is None or isinstance(outcome, (JobLostError, OccupiedPrefixError)) for outcome in outcomes)


def race(run: Any, runs: int = 2) -> list[BaseException | None]:
    """Start runs at the same time; return the error of each, or None."""
    outcomes: list[BaseException | None] = [None] * runs
    gate = threading.Barrier(runs)

    def one(number: int) -> None:
        gate.wait()
        try:
            run(number)
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_two_jobs_begin_at_the_same_moment(store: StoreServer, source: Path, tmp_path: Path) -> None:
    recipes = [PUBLISHED, BLOCKS]
    outcomes = race(lambda number: convert(source, recipe=recipes[number]))
    (winner,) = [number for number, outcome in enumerate(outcomes) if outcome is None]
    assert isinstance(outcomes[1 - winner], (OtherRunError, OccupiedPrefixError))
    convert(source, tmp_path / "local", recipes[winner])
    assert contents(store) == files_of(tmp_path / "local")


def test_a_run_whose_folder_is_taken_over_writes_no_more_shards(
    store: StoreServer, source: Path, tmp_path: Path
) -> None:
    """Another recipe starts over while the first run is in its third shard; the first one ends there."""

    def take_over(state: Progress) -> None:
        if state.shard == NAMES[2] and not taken:
            taken.append(convert(source, recipe=BLOCKS, restart=True))

    taken: list[object] = []
    with pytest.raises(JobLostError, match="is gone: another run finished this job, started over"):
        convert(source, recipe=PUBLISHED, progress=take_over)
    convert(source, tmp_path / "local", BLOCKS)
    assert contents(store) == files_of(tmp_path / "local")


def test_a_run_that_begins_while_another_one_publishes_deletes_nothing(
    store: StoreServer, source: Path, tmp_path: Path
) -> None:
    """It has listed the folder before the manifest was there, and reads the receipts when they are gone."""

    def pause(request: Request) -> Fault | None:
        if request.method == "GET" and f"/{RECORDS}/model" in request.path and not finished.is_set():
            store.before = None
            go_on.set()
            assert finished.wait(30)
        return None

    def begin(request: Request) -> Fault | None:
        if request.method == "PUT" and request.path.endswith(ANNOUNCING[2]) and not go_on.is_set():
            store.before = pause
            second.start()
            assert go_on.wait(30)
        return None

    def run() -> None:
        try:
            convert(source)
        except JobLostError as error:
            errors.append(error)

    go_on, finished, errors = threading.Event(), threading.Event(), list[JobLostError]()
    second = threading.Thread(target=run)
    store.before = begin
    convert(source)
    finished.set()
    second.join()
    convert(source, tmp_path / "local")
    assert len(errors) == 1
    assert contents(store) == files_of(tmp_path / "local")


def test_a_run_that_another_one_overtakes_ends_well(store: StoreServer, source: Path, tmp_path: Path) -> None:
    """The other run of the same job publishes while the first one is about to."""

    def overtake(request: Request) -> Fault | None:
        if request.method == "PUT" and request.path.endswith("README.md") and not taken:
            taken.append(1)
            taken.append(convert(source))
        return None

    taken: list[object] = []
    store.before = overtake
    convert(source)
    convert(source, tmp_path / "local")
    assert len(taken) == 2
    assert contents(store) == files_of(tmp_path / "local")


def test_source_and_destination_overlap(store: StoreServer, source: Path) -> None:
    for path in source.iterdir():
        store.put(BUCKET, f"models/source/{path.name}", path.read_bytes())
    for target in ("s3://bucket/models/source", "s3://bucket/models/source/fp8", "s3://bucket/models", "s3://bucket"):
        with pytest.raises(OverlapError):
            convert("s3://bucket/models/source", target)
    assert len(store.files(BUCKET)) == len(list(source.iterdir()))


# -- what a reader sees -----------------------------------------------------------------------------------


def test_a_polling_reader_sees_nothing_or_everything(store: StoreServer, tmp_path: Path) -> None:
    polls, complete = poll_during(store, checkpoint_of(tmp_path / "source", 4), tmp_path, 3)
    assert polls > 30
    assert complete > 0


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_thousands_of_polls(store: StoreServer, tmp_path: Path, part: int, counted: Counted) -> None:
    conversions = 48
    polls, complete = poll_during(store, checkpoint_of(tmp_path / "source", 4), tmp_path, conversions)
    assert polls > 800
    assert complete > 0
    counted("conversions", conversions)
    counted("polls, none of which saw a part of a result", polls)
    counted("polls that saw the result", complete)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_many_races_of_one_job(store: StoreServer, tmp_path: Path, part: int, counted: Counted) -> None:
    source = checkpoint_of(tmp_path / "source", 2)
    convert(source, tmp_path / "local")
    result, ended = files_of(tmp_path / "local"), Counter[str]()
    for number in range(25):
        store.reset()
        store.create(BUCKET)
        pauses = random.Random(100 * part + number)
        delays = [pauses.random() * 0.3, pauses.random() * 0.3]

        def run(which: int, delays: list[float] = delays) -> None:
            time.sleep(delays[which])
            convert(source)

        outcomes = race(run)
        ended.update("success" if each is None else type(each).__name__ for each in outcomes)
        assert any(each is None for each in outcomes)
        assert all(isinstance(each, (JobLostError, OccupiedPrefixError, type(None))) for each in outcomes), outcomes
        convert(source)  # what is left of a run that was overtaken
        assert contents(store) == result
    counted("runs of races", dict(ended))


def read_as_reader(store: StoreServer, result: dict[str, bytes], turn: int) -> dict[str, bytes]:
    """Read the files of a result by one request each: first those by which a reader finds it.

    If there are none, read one of the others, in turn.
    """
    found: dict[str, bytes] = {}

    def read(name: str) -> None:
        status, _, content = store.forward("GET", f"/{BUCKET}/{PREFIX}{name}", {"authorization": SIGNED}, b"")
        assert status in (200, 404)
        if status == 200:
            found[name] = content

    for name in reversed(ANNOUNCING):
        read(name)
    others = sorted(result.keys() - {*ANNOUNCING})
    for name in others if found else [others[turn % len(others)]]:
        read(name)
    return found


def poll_during(store: StoreServer, source: Path, tmp_path: Path, conversions: int) -> tuple[int, int]:
    """Convert several times, also resumed and started over, while a reader polls; return polls and complete ones."""
    if not (tmp_path / "local").exists():
        convert(source, tmp_path / "local")
    result = files_of(tmp_path / "local")
    over, polls, complete = threading.Event(), 0, 0
    failures: list[BaseException] = []

    def poll() -> None:
        nonlocal polls, complete
        try:
            while not over.is_set():
                complete += observe(read_as_reader(store, result, polls), result)
                polls += 1
        except BaseException as error:
            failures.append(error)

    for number in range(conversions):
        over.clear()
        reader = threading.Thread(target=poll)
        reader.start()
        if number % 3:
            with pytest.raises(StoppedError):
                convert(source, progress=stop_at(NAMES[number % 4]))
        convert(source, restart=number % 3 == 2)
        convert(source)
        over.set()
        reader.join()
        assert not failures, failures
        assert contents(store) == result
        store.reset()
        store.create(BUCKET)
    return polls, complete
