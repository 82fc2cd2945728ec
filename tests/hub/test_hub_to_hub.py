"""A conversion from the Hub to the Hub is byte for byte that of a folder, and holds few shards at a time."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from nemotron_fp8.budget import parse_bytes
from nemotron_fp8.errors import MissingShardError, NemotronFp8Error, SourceError
from nemotron_fp8.hub.address import Address, parse_address
from nemotron_fp8.hub.destination import HubDestination, note_of, receipt_of
from nemotron_fp8.hub.errors import AddressError, DigestError, LocalDiskError
from nemotron_fp8.hub.prefetch import Prefetch, check_space
from nemotron_fp8.hub.source import HubOpener, read_bytes, read_repo
from nemotron_fp8.hub.staging import Staging
from nemotron_fp8.plan import make_plan
from nemotron_fp8.recipe import Recipe
from nemotron_fp8.unit import NonFinite, Receipt
from tests.hub.conftest import our_client

if TYPE_CHECKING:
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.plan import Plan
    from tests.hub.faults import Request
    from tests.hub.hub import Hub
    from tests.hub.server import HubServer

SOURCE = Address("nv/source")


def checkpoint(folder: Path, shards: int = 4) -> dict[str, bytes]:
    """A small sharded checkpoint; returns its files."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {
            f"model.layers.{shard}.mlp.up_proj.weight": torch.randn(64, 128, generator=generator).bfloat16(),
            f"model.layers.{shard}.input_layernorm.weight": torch.ones(128, dtype=torch.bfloat16),
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(random.Random(3).randbytes(5000))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def local_result(folder: Path, target: Path) -> dict[str, bytes]:
    from nemotron_fp8 import quantize_repo

    quantize_repo(folder, target, device="cpu", threads=1)
    return {path.name: path.read_bytes() for path in target.iterdir()}


def sources_of(plan: Plan) -> list[frozenset[str]]:
    """The source shards that each unit's own tensors lie in."""
    return [
        frozenset(run.file for work in unit.works for run in work.view.runs(0, work.view.nbytes))
        for unit in plan.units
    ]


def convert(client: HubClient, work: Path, stop_after: int | None = None) -> None:
    """What the pipeline does: plan, then fetch, quantise and upload a shard at a time, then publish."""
    from nemotron_fp8.execute import execute
    from nemotron_fp8.quantize import engine_for

    source = read_repo(client, SOURCE)
    plan = make_plan(source.inventory, Recipe(), parse_bytes("64MiB"), 1)
    opener = HubOpener(client, source.listing, work)
    staging = Staging(client, "me/target", hashlib.sha256(source.listing.sha.encode()).hexdigest(), str(SOURCE))
    work.mkdir(exist_ok=True)
    with (
        HubDestination(staging, work) as destination,
        Prefetch(opener, work, sources_of(plan), check=source.check_start) as prefetch,
    ):
        receipts = dict(destination.done)
        engine = engine_for("cpu", lambda _count: None)
        for number, unit in enumerate(plan.units):
            if unit.name in receipts or staging.published:
                continue
            if number == stop_after:
                destination.wait()
                raise KeyboardInterrupt
            prefetch.step(number)
            receipts[unit.name] = execute(unit, opener, destination, engine)
            destination.record(receipts[unit.name])
        copies = {}
        for file in plan.inventory.side_files:

            def pieces(file: str = file.name, size: int = file.size) -> object:
                opened = opener.open(file)
                buffer = bytearray(size)
                opened.read_into(0, memoryview(buffer))
                opened.close()
                yield bytes(buffer)

            copies[file.name] = pieces
        destination.publish(receipts, plan.documents(receipts), copies)  # type: ignore[arg-type]  # generators


def contents(hub: Hub) -> dict[str, bytes]:
    files = hub.files("me/target")
    files.pop(".gitattributes", None)
    return files


def test_the_result_is_that_of_a_folder(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    convert(client, tmp_path / "work")
    assert contents(hub) == local_result(tmp_path / "source", tmp_path / "target")
    assert list((tmp_path / "work").glob("*.safetensors*")) == []
    assert hub.leaks() == []


def test_a_job_goes_on_without_its_work_folder(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    with pytest.raises(KeyboardInterrupt):
        convert(client, tmp_path / "one", stop_after=2)
    assert contents(hub) == {}
    before = len(hub.log)
    convert(our_client(server), tmp_path / "two")
    assert contents(hub) == local_result(tmp_path / "source", tmp_path / "target")
    uploads = [request for request in hub.log[before:] if request.method == "PUT"]
    assert len(uploads) == 2 + 1  # two shards and the tokenizer


def test_a_plan_reads_headers_only(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/source", files)
    inventory = read_repo(client, SOURCE).inventory
    from nemotron_fp8.source import read_folder

    local = read_folder(tmp_path / "source")
    assert [shard.views for shard in inventory.shards] == [shard.views for shard in local.shards]
    assert inventory.side_files == local.side_files
    ranged = [request for request in hub.log if request.path.startswith("/_cdn/")]
    assert len(ranged) == 4
    assert all(request.range for request in ranged)


def test_an_index_that_climbs_out_is_refused_before_any_request_for_it(
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
    opener = pickle.loads(pickle.dumps(HubOpener(client, source.listing, tmp_path)))
    file = opener.open(run.file)
    buffer = bytearray(64)
    assert file.window(run.offset, 64) is None
    file.read_into(run.offset, memoryview(buffer))
    assert bytes(buffer) == (tmp_path / "source" / run.file).read_bytes()[run.offset : run.offset + 64]
    assert hub.log[-1].range == f"bytes={run.offset}-{run.offset + 63}"


def test_a_header_that_was_altered_on_its_way_is_found_out(
    hub: Hub, client: HubClient, tmp_path: Path
) -> None:
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/source", files)
    source = read_repo(client, SOURCE)
    name = source.inventory.shards[0].name
    length = source.starts[name][0]
    source.check_start(name, tmp_path / "source" / name)
    damaged = bytearray(files[name])
    damaged[length // 2] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(DigestError):
        source.check_start(name, tmp_path / "damaged")


def test_few_shards_are_on_the_disk_at_a_time(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """40 shards; the work folder is measured at every request."""
    shards = 40
    files = checkpoint(tmp_path / "source", shards)
    hub.store.seed("nv/source", files)
    work = tmp_path / "work"
    peak = 0

    def measure(_request: Request) -> None:
        nonlocal peak
        sizes = []
        for path in work.glob("*"):
            try:
                sizes.append(path.stat().st_size)
            except OSError:
                continue
        peak = max(peak, sum(sizes))

    hub.before = measure  # type: ignore[assignment]  # it never returns a fault
    convert(client, work)
    largest = max(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    output = max(len(content) for name, content in contents(hub).items() if name.endswith(".safetensors"))
    # The tokenizer is spooled at the end, when the shards are gone.
    assert 0 < peak <= (1 + 1) * largest + (1 + 1) * output
    assert len(contents(hub)) == len(files)


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
    assert {len(tree) for tree in seen} <= {1, 1 + len(files)}


def test_prefetch_is_ahead_by_one_step(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/source", files)
    names = sorted(name for name in files if name.endswith(".safetensors"))
    source = read_repo(client, SOURCE)
    opener = HubOpener(client, source.listing, tmp_path)
    with Prefetch(opener, tmp_path, [frozenset([name]) for name in names]) as prefetch:
        for number, name in enumerate(names):
            prefetch.step(number)
            assert opener.local[name].read_bytes() == files[name]
            assert len(list(tmp_path.glob("*.safetensors"))) <= 2
    assert list(tmp_path.glob("*.safetensors*")) == []


def test_a_failed_download_is_raised_where_it_is_needed(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source")
    hub.store.seed("nv/source", files)
    names = sorted(name for name in files if name.endswith(".safetensors"))
    source = read_repo(client, SOURCE)
    hub.faults.add("corrupt", path="/_cdn/", times=None)
    opener = HubOpener(client, source.listing, tmp_path)
    with Prefetch(opener, tmp_path, [frozenset(names)]) as prefetch, pytest.raises(DigestError):
        prefetch.step(0)
    assert list(tmp_path.glob("*.safetensors*")) == []


def test_the_space_that_is_needed() -> None:
    assert check_space("me/target", Path("/"), [5, 3], [2]) == 2 * 5 + 2 * 2
    with pytest.raises(LocalDiskError, match="short"):
        check_space("me/target", Path("/"), [1 << 60], [])


def test_a_receipt_survives_its_note() -> None:
    odd = NonFinite("w", 3, (1, 2), "nan")
    receipt = Receipt("a.safetensors", 5, "ab", frozenset({"b", "a"}), (odd,), ("g",))
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
    assert read_bytes(client, client.listing("nv/source"), "config.json", 3, 3) == b""
