"""A conversion from the Hub to the Hub equals that of a folder byte for byte, and stores few shards at a time."""

from __future__ import annotations

import json
import pickle
import threading
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.checkpoint.inventory import CARD, MANIFEST
from nemotron_fp8.destinations.hub.destination import note_of, receipt_of
from nemotron_fp8.destinations.hub.job import job_digest
from nemotron_fp8.destinations.run_identity import run_identity
from nemotron_fp8.errors import NemotronFp8Error, SourceError
from nemotron_fp8.errors.hub import AddressError, DigestError, LocalDiskError, TokenRejectedError
from nemotron_fp8.hub.address import Address, parse_address
from nemotron_fp8.hub.options import require_space
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.planning.receipt import NonFinite, ShardReceipt
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.planning.tasks import files_of
from nemotron_fp8.progress import TransferTracker
from nemotron_fp8.sources.hub import HubFiles, HubOpener, read_repo
from nemotron_fp8.sources.hub_prefetch import HubPrefetch, space_needed
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.sources.remote import read_bytes
from tests.hub.conftest import TOKEN, our_client
from tests.hub.conversion import SOURCE, Options, checkpoint, convert, wanted

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.sources.hub import HubSource
    from tests.hub_server.faults import Request
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer
    from tests.support.counts import Counted


def contents(hub: Hub, repo: str = "me/target", revision: str = "main") -> dict[str, bytes]:
    files = hub.files(repo, revision)
    files.pop(".gitattributes", None)
    return files


def test_the_result_is_that_of_a_folder(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    convert(client, tmp_path / "work")
    assert contents(hub) == wanted(client, tmp_path)
    assert list((tmp_path / "work").iterdir()) == []
    assert hub.leaks() == []


def stop_at_upload(hub: Hub, number: int) -> None:
    """Revoke the token at the start of the upload with this number, counted from 1."""

    def before(request: Request) -> None:
        nonlocal number
        if request.method == "PUT":
            number -= 1
        if number == 0:
            hub.before = None
            hub.store.revoke(TOKEN)

    hub.before = before


def test_a_job_resumes_without_its_work_folder(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    stop_at_upload(hub, 3)
    with pytest.raises(TokenRejectedError):
        convert(client, tmp_path / "one")
    assert list((tmp_path / "one").iterdir()) == []
    hub.store.add_token(TOKEN, "me")
    assert contents(hub) == {}
    before = len(hub.log)
    convert(our_client(server), tmp_path / "two")
    assert contents(hub) == wanted(client, tmp_path)
    uploads = [request for request in hub.log[before:] if request.method == "PUT"]
    assert len(uploads) in (2 + 1, 1 + 1)  # the shards that were left, and the tokenizer


def test_a_plan_reads_headers_only(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/source", files)
    inventory = read_repo(client, SOURCE).inventory
    from nemotron_fp8.sources.folder import read_folder

    local = read_folder(tmp_path / "source")
    assert [shard.views for shard in inventory.shards] == [shard.views for shard in local.shards]
    assert inventory.side_files == local.side_files
    ranged = [request for request in hub.log if request.path.startswith("/_cdn/")]
    assert len(ranged) == 4
    assert all(request.range for request in ranged)


def test_an_index_that_leaves_the_repository_is_refused_before_any_request_for_it(
    hub: Hub, client: HubClient, tmp_path: Path
) -> None:
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/secret", {"model.safetensors": b"secret"})
    names = [
        "../../../secret/resolve/main/model.safetensors",
        "..%2f..%2fsecret/model.safetensors",
        "/etc/passwd",
        "sub/../model.safetensors",
        "C:\\model.safetensors",
        "https://localhost/model.safetensors",
        "model.safetensors?x=",
        "missing.safetensors",
        "con.safetensors",
        ".hidden.safetensors",
    ]
    for name in names:
        index = {"weight_map": {"w": name}}
        hub.store.seed("nv/source", {**files, "model.safetensors.index.json": json.dumps(index).encode()})
        before = len(hub.log)
        with pytest.raises(SourceError):
            read_repo(client, SOURCE)
        asked = {request.path.rpartition("/")[2] for request in hub.log[before:]}
        assert asked <= {"main", "source", "config.json", "model.safetensors.index.json"}, name


def test_shared_scales_fetch_partners_by_range(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    source = read_repo(client, SOURCE)
    view = source.inventory.shards[2].views[0]
    run = next(iter(view.runs(0, 64)))
    opener = pickle.loads(pickle.dumps(HubOpener(client, source.listing)))
    file = opener.open(run.file)
    buffer = bytearray(64)
    assert file.window(run.offset, 64) is None
    file.read_into(run.offset, memoryview(buffer))
    assert bytes(buffer) == (tmp_path / "source" / run.file).read_bytes()[run.offset : run.offset + 64]
    assert hub.log[-1].range == f"bytes={run.offset}-{run.offset + 63}"


def test_a_copy_of_an_opener_removes_what_it_has_fetched(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """A worker process has one for each shard, so files must not accumulate over a checkpoint."""
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/source", files)
    (folder := tmp_path / "work").mkdir()
    opener = HubOpener(client, client.listing("nv/source"), folder)
    opener.open("tokenizer.json").close()
    (kept,) = folder.iterdir()
    copy = pickle.loads(pickle.dumps(opener))
    before = len(hub.log)
    for _ in range(2):
        file = copy.open("tokenizer.model")
        buffer = bytearray(len(files["tokenizer.model"]))
        file.read_into(0, memoryview(buffer))
        file.close()
        assert bytes(buffer) == files["tokenizer.model"]
    assert sum(request.path.startswith("/_cdn/") for request in hub.log[before:]) == 1
    assert len(list(folder.iterdir())) == 2
    del copy
    assert list(folder.iterdir()) == [kept]
    opener.drop_fetched()
    assert list(folder.iterdir()) == []


def test_a_header_that_was_altered_on_its_way_is_found_out(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/source", files)
    source = read_repo(client, SOURCE)
    name = source.inventory.shards[0].name
    length = source.header_digests[name][0]
    source.check_header(name, tmp_path / "source" / name)
    damaged = bytearray(files[name])
    damaged[length // 2] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(DigestError):
        source.check_header(name, tmp_path / "damaged")


def test_disk_of_40_shards_within_the_formula(hub: Hub, client: HubClient, tmp_path: Path, counted: Counted) -> None:
    """The work folder is measured at every request."""
    shards = 40
    files = checkpoint(tmp_path / "source", shards)
    hub.store.seed("nv/source", files)
    work = tmp_path / "work"
    peak = 0

    def measure(_request: Request) -> None:
        nonlocal peak
        sizes = []
        for path in work.glob("*/*"):
            try:
                sizes.append(path.stat().st_size)
            except OSError:
                continue
        peak = max(peak, sum(sizes))

    hub.before = measure
    convert(client, work)
    largest = max(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    output = max(len(content) for name, content in contents(hub).items() if name.endswith(".safetensors"))
    # The tokenizer is spooled at the end, when the shards are gone.
    formula = (1 + 1) * largest + (1 + 1) * output
    assert 0 < peak <= formula
    counted("peak bytes on disk of 40 shards, and by the formula", f"{peak:,} of {formula:,}")
    assert set(contents(hub)) == {*files, MANIFEST, CARD}


def test_a_reader_never_sees_a_part(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/source", files)
    hub.store.create("me/target")
    seen: set[frozenset[str]] = set()
    polls = 0
    stop = threading.Event()

    def poll() -> None:
        nonlocal polls
        while not stop.is_set():
            seen.add(frozenset(hub.store.repo("me/target").resolve("main").tree))
            polls += 1

    reader = threading.Thread(target=poll)
    reader.start()
    convert(client, tmp_path / "work")
    stop.set()
    reader.join()
    assert polls > 100
    assert {len(tree) for tree in seen} <= {1, 1 + len(files) + 2}  # .gitattributes; manifest and card


def units_of(source: HubSource) -> tuple[ShardTask, ...]:
    return make_plan(source.inventory, Recipe(), 1 << 26, 1).shard_tasks


def test_prefetch_is_ahead_by_one_step(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/source", files)
    source = read_repo(client, SOURCE)
    opener = HubOpener(client, source.listing)
    shard_tasks = units_of(source)
    with HubPrefetch(source, opener, tmp_path / "work", TransferTracker(None)) as prefetch:
        for shard_task in prefetch.shard_tasks(shard_tasks):
            assert opener.local[shard_task.name].read_bytes() == files[shard_task.name]
            assert len(list(tmp_path.glob("work/*/*.safetensors"))) <= 2
            prefetch.done(shard_task.name)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("workers", [2, 3])
def test_running_tasks_keep_their_shards(hub: Hub, client: HubClient, tmp_path: Path, workers: int) -> None:
    """Several workers request the next task before a finished one is released."""
    files = checkpoint(tmp_path / "source", 8)
    hub.store.seed("nv/source", files)
    source = read_repo(client, SOURCE)
    opener = HubOpener(client, source.listing)
    with HubPrefetch(source, opener, tmp_path / "work", TransferTracker(None)) as prefetch:
        making: list[str] = []
        for shard_task in prefetch.shard_tasks(units_of(source)):
            making.append(shard_task.name)
            for name in making:
                assert opener.local[name].read_bytes() == files[name]
            assert len(list(tmp_path.glob("work/*/*.safetensors"))) <= workers + 1 + 1
            if len(making) > workers:
                prefetch.done(making.pop(0))


def test_a_failed_download_is_raised_where_it_is_needed(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    source = read_repo(client, SOURCE)
    hub.faults.add("corrupt", path="/_cdn/", times=None)
    opener = HubOpener(client, source.listing)
    with (
        HubPrefetch(source, opener, tmp_path / "work", TransferTracker(None)) as prefetch,
        pytest.raises(DigestError),
    ):
        next(iter(prefetch.shard_tasks(units_of(source))))
    assert list((tmp_path / "work").iterdir()) == []


def test_the_space_that_is_needed(tmp_path: Path) -> None:
    assert space_needed([5, 3], 2) == 2 * 5 + 2 * 2
    assert space_needed([], 2) == 2 * 2
    assert space_needed([5], 0, workers=4) == (4 + 1 + 1) * 5
    require_space("me/target", tmp_path, 1)
    with pytest.raises(LocalDiskError, match="are missing; free space"):
        require_space("me/target", tmp_path, 1 << 60)


def test_a_receipt_survives_its_note() -> None:
    odd = NonFinite("w", 3, (1, 2), "nan")
    receipt = ShardReceipt("a.safetensors", 5, "ab", frozenset({"b", "a"}), (odd,), ("g",))
    assert receipt_of(note_of(receipt)) == receipt
    assert note_of(receipt) == note_of(receipt_of(note_of(receipt)))


@pytest.mark.parametrize(
    "text",
    ["nv", "nv/", "/x", "nv/a/b", "nv/a@", "nv/..", "../a", "nv/a@../x", "nv/a@b..c", "nv/a@/b", "nv/a--b", "n v/a",
     "nv/a@x.lock", "nv/a@b//c", "nv/a?x", "nv/a@b?c", "nv/a@b#c", "hf://", "hf://nv", "nv/a@b\n", "nv/.a", "nv/a."],
)  # fmt: skip
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(AddressError):
        parse_address(text)
    assert issubclass(AddressError, NemotronFp8Error)


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("hf://nv/a", "nv/a", None),
        ("nv/a.b-c_1@main", "nv/a.b-c_1", "main"),
        ("hf://nv/a@refs/pr/1", "nv/a", "refs/pr/1"),
    ],
)
def test_addresses(text: str, repo: str, revision: str | None) -> None:
    assert parse_address(text) == Address(repo, revision)
    assert parse_address(str(parse_address(text))) == Address(repo, revision)


def test_read_bytes_of_nothing(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    assert read_bytes(HubFiles(client, client.listing("nv/source")), "config.json", 3, 3) == b""


def test_no_token_in_any_log(hub: Hub, client: HubClient, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All loggers write at the lowest level, in a run with faults."""
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    for kind in ("503", "reset_before", "answer_lost"):
        hub.faults.add(kind, skip=20)
    with caplog.at_level(0):
        for name in ("nemotron_fp8", "huggingface_hub"):
            caplog.set_level(0, name)
        convert(client, tmp_path / "work")
    assert len(caplog.records) > 100
    assert TOKEN not in caplog.text
    for path in (tmp_path / "work").rglob("*"):
        assert TOKEN.encode() not in path.read_bytes()
    for request in hub.log:
        assert TOKEN not in request.path + request.query


def test_what_tells_two_jobs_apart(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source")

    def digest(recipe: Recipe, memory: int = 1 << 26) -> str:
        source = open_source(str(SOURCE), hub=Options(client, tmp_path))

        plan = make_plan(source.inventory, recipe, memory, 1)
        identity = run_identity(plan, source.stamps, "hub")
        names = sorted(shard.name for shard in source.inventory.shards)
        assert [files_of(shard_task) for shard_task in plan.shard_tasks] == [frozenset([name]) for name in names]
        return job_digest(identity)

    hub.store.seed("nv/source", files)
    first = digest(Recipe())
    assert digest(Recipe(), 1 << 27) == first
    assert digest(Recipe(nonfinite="keep")) != first
    hub.store.seed("nv/source", {"folder/notes.md": b"another commit, the same weights"})
    assert digest(Recipe()) == first
    name = next(name for name in files if name.endswith(".safetensors"))
    hub.store.seed("nv/source", {name: files[name][:-1] + bytes([files[name][-1] ^ 1])})
    assert digest(Recipe()) != first
