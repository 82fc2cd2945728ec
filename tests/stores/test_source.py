"""A store as source: the same results as from a folder, by ranges alone."""

from __future__ import annotations

import json
import pickle
import random
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from nemotron_fp8.errors import BudgetError, MissingExtraError, OneShardError, RecipeError, SourceNotFoundError
from nemotron_fp8.errors.stores import ChangedObjectError
from nemotron_fp8.sources.open import open_source, shards_of
from nemotron_fp8.sources.read_ahead import SEGMENT
from tests.stores.conversion import SOURCE, checkpoint, contents, seed
from tests.support.nemo_writer import Sizes, hf_tensors, write_nemo

if TYPE_CHECKING:
    from pathlib import Path

    from tests.store_server.server import StoreServer


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(granularity="tensor"), Recipe(granularity="block")])
def test_the_result_is_that_of_a_folder(store: StoreServer, tmp_path: Path, recipe: Recipe) -> None:
    checkpoint(tmp_path / "source", rows=128)
    (tmp_path / "source" / "README.md").write_text("# A model\n")
    seed(store, tmp_path / "source")
    quantize_repo(tmp_path / "source", tmp_path / "wanted", recipe, "cpu", threads=2)
    quantize_repo(SOURCE, tmp_path / "result", recipe, "cpu", threads=2)
    assert contents(tmp_path / "result") == contents(tmp_path / "wanted")
    assert verify_repo(SOURCE, tmp_path / "result").ok
    assert {request.method for request in store.log} == {"GET"}
    shards = [request for request in store.log if request.path.endswith(".safetensors")]
    assert all(request.range for request in shards)


def test_a_finished_result_is_up_to_date(store: StoreServer, tmp_path: Path) -> None:
    checkpoint(tmp_path / "source")
    seed(store, tmp_path / "source")
    quantize_repo(SOURCE, tmp_path / "result", device="cpu")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "result").iterdir()}
    assert quantize_repo(SOURCE, tmp_path / "result", device="cpu").bytes_written == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "result").iterdir()}


def test_a_shard_that_is_replaced_ends_the_conversion(store: StoreServer, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "source")
    seed(store, tmp_path / "source")
    opened = open_source(SOURCE)
    name = opened.inventory.shards[0].name
    store.put("bucket", f"nv/source/{name}", files[name][:-1] + b"x")
    file = opened.opener.open(name)
    with pytest.raises(ChangedObjectError, match=f"'{name}' was replaced after it was listed"):
        file.read_into(8, memoryview(bytearray(100)))
    file.close()


def test_an_empty_folder_of_a_store(store: StoreServer) -> None:
    with pytest.raises(SourceNotFoundError, match="no files in this folder of the store"):
        open_source("s3://bucket/nothing")


def test_folders_in_a_folder_are_named(store: StoreServer, tmp_path: Path) -> None:
    checkpoint(tmp_path / "source", shards=1)
    seed(store, tmp_path / "source", "nv/models/one")
    with pytest.raises(SourceNotFoundError, match="FOLDER/one"):
        open_source("s3://bucket/nv/models")


def test_arguments_of_other_sources(store: StoreServer, tmp_path: Path) -> None:
    from nemotron_fp8 import HubOptions

    checkpoint(tmp_path / "source", shards=1)
    seed(store, tmp_path / "source")
    with pytest.raises(RecipeError, match="--revision"):
        open_source(SOURCE, hub=HubOptions(revision="main"))
    with pytest.raises(RecipeError, match="--shard-size"):
        open_source(SOURCE, "1GB")


def test_a_file_address_is_a_folder(tmp_path: Path) -> None:
    checkpoint(tmp_path / "source folder", shards=1)
    opened = open_source(f"file://{tmp_path}/source%20folder")
    assert opened.root == tmp_path / "source folder"


def test_the_memory_of_reads_ahead_counts(store: StoreServer, tmp_path: Path) -> None:
    checkpoint(tmp_path / "source", shards=1, rows=3000, columns=3000)
    seed(store, tmp_path / "source")
    assert open_source(SOURCE).inventory.opener_bytes == open_source(SOURCE).inventory.shards[0].size
    with pytest.raises(BudgetError):
        quantize_repo(SOURCE, tmp_path / "result", device="cpu", max_memory="16MiB")


def test_an_opener_travels_with_the_files_it_opens(store: StoreServer, tmp_path: Path) -> None:
    checkpoint(tmp_path / "source")
    (tmp_path / "source" / "old").mkdir()
    (tmp_path / "source" / "old" / "training.log").write_text("x")
    seed(store, tmp_path / "source")
    opened = open_source(SOURCE)
    assert ("old/training.log", "in a folder") in opened.inventory.left_out
    copy = pickle.loads(pickle.dumps(opened.opener))
    assert not [name for name in copy.listing.files if "/" in name]
    file = copy.open("tokenizer.model")
    buffer = bytearray(5000)
    file.read_into(0, memoryview(buffer))
    file.close()
    assert buffer == (tmp_path / "source" / "tokenizer.model").read_bytes()


def test_reads_in_any_order_by_several_threads(store: StoreServer, tmp_path: Path) -> None:
    """Every read has the right bytes, whatever was fetched ahead; and reads in order cause few requests."""
    rows = 7 * SEGMENT // 2048
    data = checkpoint(tmp_path / "source", shards=1, rows=rows, columns=1024)["model-00001-of-00001.safetensors"]
    seed(store, tmp_path / "source")
    opened = open_source(SOURCE)
    file = opened.opener.open("model-00001-of-00001.safetensors")
    wrong: list[int] = []

    def read(offset: int, length: int) -> None:
        buffer = bytearray(min(length, len(data) - offset))
        file.read_into(offset, memoryview(buffer))
        if buffer != data[offset : offset + len(buffer)]:
            wrong.append(offset)

    before = len(store.log)
    step = 300_000
    for offset in range(0, len(data), step):
        read(offset, step)
    assert len(store.log) - before <= 2 + -(-len(data) // SEGMENT)

    def anywhere(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            offset = rng.randrange(len(data))
            for _ in range(rng.randrange(4)):
                length = rng.randrange(1, 2 * SEGMENT)
                if offset < len(data):
                    read(offset, length)
                offset += length

    threads = [Thread(target=anywhere, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert not wrong


def test_a_reader_goes_on_when_another_closes_the_file(store: StoreServer, tmp_path: Path) -> None:
    data = checkpoint(tmp_path / "source", shards=1, rows=20_000)["model-00001-of-00001.safetensors"]
    seed(store, tmp_path / "source")
    opener = open_source(SOURCE).opener
    first, second = opener.open("model-00001-of-00001.safetensors"), opener.open("model-00001-of-00001.safetensors")
    buffer = bytearray(len(data))
    step = 1 << 19
    for begin in range(0, len(data), step):
        first.read_into(begin, memoryview(buffer)[begin : begin + step])
        if begin == 4 * step:
            second.close()
    first.close()
    assert buffer == data


def test_reading_by_both_passes_of_a_verification(store: StoreServer, tmp_path: Path) -> None:
    """Small reads of headers cause no reading ahead, so that each pass fetches the bytes once."""
    data = checkpoint(tmp_path / "source", shards=1, rows=20_000)["model-00001-of-00001.safetensors"]
    seed(store, tmp_path / "source")
    quantize_repo(SOURCE, tmp_path / "result", device="cpu")
    before = len(store.log)
    assert verify_repo(SOURCE, tmp_path / "result").ok
    ranges = [request.range for request in store.log[before:] if request.path.endswith(".safetensors")]
    lengths = [int(last) - int(first) + 1 for first, last in (str(r)[6:].split("-") for r in ranges)]
    assert sum(lengths) < 2 * len(data) + (512 << 10)


def test_an_index_that_is_too_large_is_not_fetched_whole(store: StoreServer, tmp_path: Path) -> None:
    from nemotron_fp8.errors import MalformedConfigError
    from nemotron_fp8.untrusted import strict_json

    checkpoint(tmp_path / "source", shards=1)
    config = json.dumps({"model_type": "llama", "x": "y" * strict_json.MAX_BYTES})
    (tmp_path / "source" / "config.json").write_text(config)
    seed(store, tmp_path / "source")
    with pytest.raises(MalformedConfigError):
        open_source(SOURCE)


def fetched(store: StoreServer, name: str) -> list[int]:
    """Return how often each byte of an object was sent."""
    counts = [0] * len(store.files("bucket")[name])
    for request in store.log:
        if request.path == f"/bucket/{name}" and request.range:
            first, last = map(int, request.range.removeprefix("bytes=").split("-"))
            for at in range(first, min(last + 1, len(counts))):
                counts[at] += 1
    return counts


@pytest.mark.parametrize(("recipe", "times"), [(Recipe(), 1), (Recipe(granularity="tensor"), 2)])
def test_bytes_are_fetched_once_unless_a_scale_covers_the_tensor(
    store: StoreServer, tmp_path: Path, recipe: Recipe, times: int
) -> None:
    checkpoint(tmp_path / "source", shards=1, rows=3000)
    seed(store, tmp_path / "source")
    name = "nv/source/model-00001-of-00001.safetensors"
    header = 256 * 1024  # the first request for a header
    quantize_repo(SOURCE, tmp_path / "result", recipe, "cpu", threads=2)
    quantized = fetched(store, name)[header + 600 :]
    assert set(quantized) == {times}


def test_a_single_shard(store: StoreServer, tmp_path: Path) -> None:
    """Beside its config; one of several shards can be inspected only."""
    checkpoint(tmp_path / "source", shards=2)
    seed(store, tmp_path / "source")
    one = f"{SOURCE}/model-00001-of-00002.safetensors"
    assert [shard.name for shard in shards_of(one)] == ["model-00001-of-00002.safetensors"]
    with pytest.raises(OneShardError, match="2 shards"):
        open_source(one)
    for missing in (open_source, shards_of):
        with pytest.raises(SourceNotFoundError, match="no such file in the store"):
            missing(f"{SOURCE}/other.safetensors")
    store.put("bucket", "nv/single/model.safetensors", (tmp_path / "source" / one.rpartition("/")[2]).read_bytes())
    store.put("bucket", "nv/single/config.json", b'{"model_type": "llama", "torch_dtype": "bfloat16"}')
    address = "s3://bucket/nv/single/model.safetensors"
    quantize_repo(address, tmp_path / "result", device="cpu")
    assert verify_repo(address, tmp_path / "result").ok
    assert (tmp_path / "result" / "config.json").exists()


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemotron_fp8.stores.connection.find_spec", lambda _: None)
    for call in (open_source, shards_of):
        with pytest.raises(MissingExtraError, match=r"pip install 'nemotron_fp8\[stores\]'"):
            call(SOURCE)


def test_a_nemo_checkpoint(store: StoreServer, tmp_path: Path) -> None:
    sizes = Sizes(layers=1)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    seed(store, tmp_path / "nemo", "nv/nemo")
    quantize_repo(tmp_path / "nemo", tmp_path / "wanted", device="cpu")
    quantize_repo("s3://bucket/nv/nemo", tmp_path / "result", device="cpu")
    assert contents(tmp_path / "result") == contents(tmp_path / "wanted")
    assert verify_repo("s3://bucket/nv/nemo", tmp_path / "result").ok
