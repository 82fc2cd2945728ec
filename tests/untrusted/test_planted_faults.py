"""Plant faults behind every reader of data from outside: each must come out as the error of that reader.

The rules of a format are tested elsewhere. Here a function behind the reader fails for no reason on good data, with
every class of exception that a missed rule could raise. A user sees one line about the file, never a traceback.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import pytest
import torch

from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.checkpoint import inventory, model_code
from nemotron_fp8.checkpoint.header import parse_header, read_header
from nemotron_fp8.cli.main import main
from nemotron_fp8.conversion.in_place import InPlaceFolder
from nemotron_fp8.destinations import lock_record
from nemotron_fp8.destinations.hub.branch_state import read_job
from nemotron_fp8.destinations.hub.destination import HubDestination, note_of
from nemotron_fp8.destinations.hub.job import JOB_FILE, JobOptions, StagedShard
from nemotron_fp8.destinations.journal import Journal, Terms, parse
from nemotron_fp8.documents.front_matter import split_card
from nemotron_fp8.documents.manifest import parse_manifest
from nemotron_fp8.documents.model_card import stated_recipe
from nemotron_fp8.documents.stats_json import parse_figures, render_figures
from nemotron_fp8.errors import (
    MalformedConfigError,
    MalformedHeaderError,
    MalformedIndexError,
    MalformedManifestError,
    RecipeError,
)
from nemotron_fp8.errors.destination import DamagedJournalError
from nemotron_fp8.errors.hub import HubError, StagingMismatchError
from nemotron_fp8.errors.nemo import (
    ChunkDecodeError,
    MalformedArchiveError,
    MalformedArrayError,
    MalformedDistError,
    MalformedTokenizerError,
    NemoConfigError,
)
from nemotron_fp8.hub import answers
from nemotron_fp8.hub.failures import MalformedAnswerError
from nemotron_fp8.planning.receipt import NonFinite, ShardReceipt, TensorStats, nonfinite_rows, receipt_entry
from nemotron_fp8.sources.nemo import model_config
from nemotron_fp8.sources.nemo.compressed_chunks import Packed, decode
from nemotron_fp8.sources.nemo.files import Place, files_of_folder
from nemotron_fp8.sources.nemo.sentencepiece import read_model
from nemotron_fp8.sources.nemo.tar_index import files_of_archive
from nemotron_fp8.sources.nemo.torch_dist import read_dist
from nemotron_fp8.sources.nemo.torch_save import read_saved
from nemotron_fp8.sources.nemo.zarr_metadata import Zarray, read_zarray
from tests.hub.conftest import our_client
from tests.hub_server.fixtures import TOKEN, hub, server  # noqa: F401  # fixtures
from tests.sources.nemo.test_torch_dist import write_dist
from tests.support.checkpoints import (
    CONFIG,
    INDEX,
    MANIFEST,
    ONE,
    model,
    shard_bytes,
    snapshot,
    weight,
    write_checkpoint,
)
from tests.support.nemo_writer import Sizes, compressed, hf_tensors, sentencepiece, write_nemo
from tests.support.stops import SECOND, StoppedError, stop_at, stop_when_marked

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer

FAULTS: tuple[type[Exception], ...] = (
    KeyError,
    ValueError,
    IndexError,
    AttributeError,
    TypeError,
    RecursionError,
    OverflowError,
    UnicodeError,
    AssertionError,
    ZeroDivisionError,
    RuntimeError,
    StopIteration,
)
DOCUMENT = "all of the document"
"""Stands for the text that an exception may hold, like ``JSONDecodeError.doc``."""


class Plant:
    """Replaces functions by ones that raise, and counts their calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch, self.calls = monkeypatch, 0

    def __call__(self, place: str, fault: type[Exception]) -> None:
        def fail(*_: object, **__: object) -> NoReturn:
            self.calls += 1
            error = fault("planted")
            error.doc = DOCUMENT  # type: ignore[attr-defined]
            raise error

        self._monkeypatch.setattr(f"nemotron_fp8.{place}", fail)

    def outcomes(self, place: str, read: Callable[[], object]) -> dict[str, BaseException | object]:
        """Return what a reader raises or returns, for every fault."""
        found: dict[str, BaseException | object] = {}
        for fault in FAULTS:
            with self._monkeypatch.context() as context:
                one = Plant(context)
                one(place, fault)
                try:
                    found[fault.__name__] = read()
                except Exception as error:
                    found[fault.__name__] = error
                assert one.calls, f"{place} was not called"
        return found


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    return Plant(monkeypatch)


# -- good data ---------------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """Files that every reader accepts."""

    source: Path
    result: Path
    zarr: Path
    packed: Path
    archive: Path
    dist: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A checkpoint with its result, and NeMo checkpoints of every format."""
    root = tmp_path_factory.mktemp("planted")
    card = b"---\nlicense: mit\n---\nwords\n"
    config = {**CONFIG, "auto_map": {"AutoModel": "code.Model"}}
    side = {"README.md": card, "code.py": b"from .more import x\n", "tokenizer_config.json": b"{}"}
    write_checkpoint(root / "source", model(), config=config, side=side)
    quantize_repo(root / "source", root / "result", recipe=Recipe(stats=True), device="cpu", threads=1)
    sizes = Sizes(layers=1)
    tensors = hf_tensors(sizes)
    write_nemo(root / "zarr", tensors, sizes)
    (root / "zarr" / "0123_tokenizer.model").write_bytes(sentencepiece())
    write_nemo(root / "packed", tensors, sizes, compress={"id": "zlib", "level": 1})
    with tarfile.open(root / "it.nemo", "w:") as archive:
        archive.add(root / "zarr", arcname=".")
    write_dist(root / "dist", sizes, tensors, blocks=False)
    return World(*(root / name for name in ("source", "result", "zarr", "packed", "it.nemo", "dist")))


RECEIPT = ShardReceipt(
    ONE, 8, "0" * 64, nonfinite=(NonFinite("a", 1, (0,), "nan"),), stats=(TensorStats("a", 30.0, 0.1, 0, 0),)
)
TERMS: dict[str, Any] = {
    "schema": 1,
    "version": "0",
    "mode": "folder",
    "plan": "0",
    "recipe": {},
    "source": {ONE: "0"},
    "saved": {ONE: [8, "0"]},
    "side": [["LICENSE", 3]],
    "notices": ["a notice"],
}
AMAXES = {"kind": "amax", "name": ONE, "size": 4, "sha256": "0", "nonfinite": nonfinite_rows(RECEIPT.nonfinite)}


def header(_: World) -> object:
    data = shard_bytes({"a": weight(2, 2)})
    return parse_header(data[8:-8], len(data), "weights.safetensors")


def header_of_file(made: World) -> object:
    path = next(made.source.glob("*.safetensors"))
    with path.open("rb") as file:
        return read_header(file.fileno(), "weights.safetensors")


def journal(tmp: Path, *entries: dict[str, Any]) -> Journal:
    (tmp / "journal").unlink(missing_ok=True)
    made = Journal.create(tmp / "journal", tmp / "temporary", TERMS)
    for entry in entries:
        made.append(entry)
    return made


def lines_of_journal(tmp: Path) -> object:
    journal(tmp).close()
    return parse((tmp / "journal").read_bytes(), str(tmp / "journal"))


def receipts_of_journal(tmp: Path) -> object:
    return journal(tmp, receipt_entry(RECEIPT)).receipts()


def amaxes_of_journal(tmp: Path) -> object:
    folder = InPlaceFolder.__new__(InPlaceFolder)
    folder._journal = journal(tmp, AMAXES)
    return folder._measured()


def figures(_: World) -> object:
    return parse_figures(render_figures(RECEIPT.stats, RECEIPT.nonfinite))


def arrays_of_dist(made: World) -> object:
    files, _ = files_of_folder(made.dist)
    return read_dist(files, "model_weights", lambda _: True)


def saved_tensor(made: World) -> object:
    files, _ = files_of_folder(made.dist)
    path = next((made.dist / "model_weights").glob("*.distcp"))
    torch.save(torch.ones(2), path.with_name("one.distcp"))
    files, _ = files_of_folder(made.dist)
    try:
        return read_saved(files, "model_weights/one.distcp", 0, path.with_name("one.distcp").stat().st_size)
    finally:
        path.with_name("one.distcp").unlink()


def chunk(compress: dict[str, object], _: World) -> object:
    meta = Zarray((4,), (4,), "F32", ".", dict(compress))
    return decode(Packed("an.array", meta, Place("0", 0, 16)), compressed(b"\0" * 16, compress))


def zarray(_: World) -> object:
    data = b'{"zarr_format": 2, "order": "C", "dtype": "<f4", "shape": [4], "chunks": [4]}'
    return read_zarray("an.array", data)


def model_of_config(_: World) -> object:
    tree = model_config.load_yaml(Sizes().yaml().encode(), "model_config.yaml")
    return model_config.read_model(tree, "model_config.yaml")


INFO = b'{"sha": "' + b"0" * 40 + b'", "siblings": [{"rfilename": "a\\u0041", "size": 1}]}'


def answer(_: World) -> object:
    return answers.parse(answers.ModelInfo, INFO)


def job_file(_: World) -> object:
    client = SimpleNamespace(read_small=lambda *_: b'{"plan": "p", "source": "s", "base": "b", "revision": "main"}')
    branch: Any = SimpleNamespace(client=client, repo="me/target", ref="staging")
    staging: Any = SimpleNamespace(files={JOB_FILE: None})
    return read_job(branch, JobOptions("me/target", "p", "s"), staging)


def note(_: World) -> object:
    opened: Any = SimpleNamespace(job=SimpleNamespace(repo="me/target", branch=SimpleNamespace(ref="staging")))
    shard = StagedShard(RECEIPT.name, RECEIPT.size, str(RECEIPT.sha256), note_of(RECEIPT))
    return HubDestination._receipt(opened, shard)


class Door(NamedTuple):
    """A reader, a function behind it, and its error, which names the data."""

    place: str
    read: Callable[[World], object]
    error: type[Exception]
    names: str


def config(_: World) -> object:
    return inventory.load_config(b"{}")


def index(_: World) -> object:
    return inventory.load_index(b'{"weight_map": {"a": "a.safetensors"}}')


def manifest(made: World) -> object:
    return parse_manifest((made.result / MANIFEST).read_bytes())


DOORS = {
    "header": Door("checkpoint.header._entry", header, MalformedHeaderError, "weights.safetensors"),
    "header, whole": Door("checkpoint.header._check_dense", header, MalformedHeaderError, "weights.safetensors"),
    "header of a file": Door("checkpoint.header._checked", header_of_file, MalformedHeaderError, "weights.safetensors"),
    "config": Door("untrusted.strict_json._check_size", config, MalformedConfigError, "config.json"),
    "index": Door("untrusted.strict_json._check_size", index, MalformedIndexError, INDEX),
    "index, names": Door("checkpoint.inventory.is_plain_name", index, MalformedIndexError, INDEX),
    "manifest": Door("documents.manifest._checked", manifest, MalformedManifestError, MANIFEST),
    "manifest, text": Door("documents.manifest.pretty_json", manifest, MalformedManifestError, MANIFEST),
    "manifest, values": Door("documents.manifest._source_bytes", manifest, MalformedManifestError, MANIFEST),
    "statistics": Door("documents.stats_json.parse_stats", figures, MalformedManifestError, "nemotron_fp8.stats.json"),
    "statistics, NaN": Door(
        "documents.stats_json.parse_nonfinite", figures, MalformedManifestError, "nemotron_fp8.stats.json"
    ),
    "pickle": Door("sources.nemo.inert_pickle._Machine._step", arrays_of_dist, MalformedDistError, ".metadata"),
    "torch_dist": Door("sources.nemo.torch_dist._sides", arrays_of_dist, MalformedDistError, ".metadata"),
    "torch_dist, top": Door("sources.nemo.torch_dist._metadata", arrays_of_dist, MalformedDistError, ".metadata"),
    "torch_save": Door("sources.nemo.torch_save._tensor", saved_tensor, MalformedDistError, "one.distcp"),
    "torch_save, zip": Door("sources.nemo.torch_save._Archive._add", saved_tensor, MalformedDistError, "one.distcp"),
    "torch_save, entry": Door(
        "sources.nemo.torch_save._Archive.place_of", saved_tensor, MalformedDistError, "one.distcp"
    ),
    "tokenizer": Door(
        "sources.nemo.sentencepiece._varint",
        lambda _: read_model(sentencepiece(), "tokenizer.model"),
        MalformedTokenizerError,
        "tokenizer.model",
    ),
    "archive": Door(
        "sources.nemo.tar_index._Directory._name",
        lambda made: files_of_archive(made.archive),
        MalformedArchiveError,
        "it.nemo",
    ),
    "zarr": Door("sources.nemo.zarr_metadata._sides", zarray, MalformedArrayError, "an.array"),
    "zlib chunk": Door(
        "sources.nemo.compressed_chunks._decode_stream",
        partial(chunk, {"id": "zlib", "level": 1}),
        ChunkDecodeError,
        "an.array",
    ),
    "zstd chunk": Door(
        "sources.nemo.compressed_chunks._zstd_size",
        partial(chunk, {"id": "zstd", "level": 1}),
        ChunkDecodeError,
        "an.array",
    ),
    "model config": Door("untrusted.yaml_text._Builder._node", model_of_config, NemoConfigError, "model_config.yaml"),
    "model config, values": Door(
        "sources.nemo.model_config.as_integer", model_of_config, NemoConfigError, "model_config.yaml"
    ),
    "answer": Door("hub.answers._encodable", answer, MalformedAnswerError, "answer"),
    "answer, types": Door("hub.answers._adapter", answer, MalformedAnswerError, "answer"),
    "job": Door("untrusted.strict_json._check_size", job_file, StagingMismatchError, JOB_FILE),
    "note": Door("destinations.hub.destination.receipt_of", note, StagingMismatchError, ONE),
    "note, values": Door("planning.receipt.parse_stats", note, StagingMismatchError, ONE),
}
JOURNALS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lines": ("destinations.journal._payload", lines_of_journal),
    "terms": ("destinations.journal._typed", lambda _: Terms.of(TERMS, "journal")),
    "terms, names": ("destinations.journal.is_plain_name", lambda _: Terms.of(TERMS, "journal")),
    "receipts": ("destinations.journal.entry_receipt", receipts_of_journal),
    "receipts, figures": ("planning.receipt.parse_stats", receipts_of_journal),
    "receipts, names": ("planning.receipt._name", receipts_of_journal),
    "amaxes": ("conversion.in_place.parse_nonfinite", amaxes_of_journal),
}


def carried(error: BaseException) -> list[BaseException]:
    """Return the exceptions that a traceback of an error shows before it."""
    shown: list[BaseException] = []
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    while before is not None:
        shown.append(before)
        before = before.__cause__ or (None if before.__suppress_context__ else before.__context__)
    return shown


def assert_told(found: dict[str, Any], kind: type[Exception], names: str) -> None:
    """One line that names the data and what was wrong; nothing that holds the document."""
    raw = {fault: error for fault, error in found.items() if not isinstance(error, kind)}
    assert not raw
    for error in found.values():
        assert names in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        assert not [each for each in carried(error) if getattr(each, "doc", None)]


@pytest.mark.parametrize("name", DOORS)
def test_a_fault_becomes_the_error_of_the_reader(name: str, made: World, plant: Plant) -> None:
    door = DOORS[name]
    assert_told(plant.outcomes(door.place, lambda: door.read(made)), door.error, door.names)


@pytest.mark.parametrize("name", JOURNALS)
def test_a_fault_damages_the_journal(name: str, tmp_path: Path, plant: Plant) -> None:
    place, read = JOURNALS[name]
    assert_told(plant.outcomes(place, lambda: read(tmp_path)), DamagedJournalError, "journal")


@pytest.mark.parametrize("name", DOORS)
def test_the_readers_accept_the_data_without_a_fault(name: str, made: World) -> None:
    DOORS[name].read(made)


# -- readers that refuse nothing ---------------------------------------------------------------------------------------

CARD = "---\nlicense: mit\n---\nwords\n"


def owner_of_lock(tmp: Path) -> str:
    (tmp / "lock").write_bytes(b'{"pid": 1, "host": "a"}')
    fd = os.open(tmp / "lock", os.O_RDONLY)
    try:
        found = lock_record.record_in(fd)
        return found.owner if found else ""
    finally:
        os.close(fd)


def modules_of_code(_: Path) -> object:
    return model_code.find_code({}, {"tokenizer_config.json": 2}, lambda _: b"{}")


LENIENT: dict[str, tuple[str, Callable[[World, Path], object], object]] = {
    "front matter": ("untrusted.yaml_text._Builder._node", lambda *_: split_card(CARD.encode()), ({}, CARD)),
    "front matter, keys": ("untrusted.yaml_text.is_text", lambda *_: split_card(CARD.encode()), ({}, CARD)),
    "recipe of a card": (
        "documents.model_card.shlex.split",
        lambda made, _: stated_recipe((made.result / "README.md").read_bytes()),
        None,
    ),
    "stacks of a manifest": (
        "untrusted.strict_json._check_size",
        lambda made, _: inventory.stacks_of((made.result / MANIFEST).read_bytes()),
        (),
    ),
    "config with code": (
        "untrusted.strict_json._check_size",
        lambda _, tmp: modules_of_code(tmp),
        model_code.ModelCode(),
    ),
    "imports": ("checkpoint.model_code.ast.parse", lambda *_: model_code.relative_imports(b"from .a import b\n"), []),
    "owner of a lock": ("untrusted.strict_json._check_size", lambda _, tmp: owner_of_lock(tmp), ""),
}
"""Data that is a help only: without it the command goes on."""


@pytest.mark.parametrize("name", LENIENT)
def test_a_fault_counts_as_nothing_found(name: str, made: World, tmp_path: Path, plant: Plant) -> None:
    place, read, nothing = LENIENT[name]
    found = plant.outcomes(place, lambda: read(made, tmp_path))
    assert {fault: value for fault, value in found.items() if value != nothing} == {}


@pytest.mark.parametrize("name", LENIENT)
def test_without_a_fault_something_is_found(name: str, made: World, tmp_path: Path) -> None:
    _, read, nothing = LENIENT[name]
    assert (read(made, tmp_path) == nothing) == (name in ("stacks of a manifest", "config with code"))


# -- the Hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["hub.answers._adapter", "hub.transport._within", "hub.transport.check_encoding"])
def test_a_fault_in_an_answer_names_the_repository(
    place: str,
    hub: Hub,  # noqa: F811  # the fixture of this name
    server: HubServer,  # noqa: F811
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_HUB_TOKEN", TOKEN)
    hub.store.seed("nv/source", {"config.json": b"{}"})
    found = plant.outcomes(place, lambda: our_client(server).listing("nv/source"))
    assert_told(found, HubError, "nv/source")


def test_a_fault_in_the_settings_of_the_connection(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP library reads a dozen variables of the environment."""
    monkeypatch.setattr("nemotron_fp8.hub.client.made_up", None, raising=False)

    def read() -> object:
        from nemotron_fp8.hub import client

        monkeypatch.setattr("huggingface_hub.get_session", client.made_up)
        return client.HubClient().session()

    assert_told(plant.outcomes("hub.client.made_up", read), RecipeError, "HTTP_PROXY")


# -- the command line --------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command that fails at a planted fault; its error line names the data."""

    place: str
    words: str
    names: str


COMMANDS = {
    "header": Command("checkpoint.header._check_dense", "quantize {source} D --device cpu", ".safetensors"),
    "JSON": Command("untrusted.strict_json._check_size", "quantize {source} D --device cpu", ".json"),
    "index": Command("checkpoint.inventory.is_plain_name", "quantize {source} D --device cpu", INDEX),
    "inspect": Command("checkpoint.header._entry", "inspect {source}", ".safetensors"),
    "manifest": Command("documents.manifest._checked", "verify {result}", "result"),
    "manifest, with source": Command("documents.manifest._checked", "verify {source} {result}", "result"),
    "statistics": Command("documents.stats_json.parse_stats", "report {result}", "nemotron_fp8.stats.json"),
    "zarr": Command("sources.nemo.zarr_metadata._sides", "convert {zarr} D", ".zarray"),
    "tokenizer": Command("sources.nemo.sentencepiece._fields", "convert {zarr} D", "tokenizer.model"),
    "model config": Command("sources.nemo.model_config.as_integer", "convert {zarr} D", "model_config.yaml"),
    "chunk": Command("sources.nemo.compressed_chunks._decode_stream", "convert {packed} D", "array"),
    "archive": Command("sources.nemo.tar_index._Directory._check", "convert {archive} D", "it.nemo"),
    "pickle": Command("sources.nemo.inert_pickle._Machine._step", "quantize {dist} D --device cpu", ".metadata"),
    "torch_dist": Command("sources.nemo.torch_dist._storage", "quantize {dist} D --device cpu", ".metadata"),
    "torch_save": Command("sources.nemo.torch_save._tensor", "convert {dist} D", ".distcp"),
}


def run(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["nemotron-fp8", *words])
    for name in ("watch", "close"):  # handlers belong to processes of the command line
        monkeypatch.setattr(f"nemotron_fp8.cli.signals.Signals.{name}", lambda _: None)
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    return code, capsys.readouterr().err


@pytest.mark.parametrize("fault", [KeyError, AttributeError, RecursionError], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_one_line_and_writes_nothing(
    name: str,
    fault: type[Exception],
    made: World,
    tmp_path: Path,
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    before = {root: snapshot(root) for root in (made.source, made.result)}
    plant(command.place, fault)
    words = command.words.format(**{field: str(path) for field, path in made._asdict().items()}).split()
    code, err = run(words, monkeypatch, capsys)
    assert plant.calls
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, len(errors)) == (1, 1), err
    assert "internal error" not in errors[0]
    assert "Traceback" not in err
    assert command.names in errors[0]
    assert list(tmp_path.iterdir()) == []
    assert {root: snapshot(root) for root in before} == before


@pytest.mark.parametrize(
    ("place", "mode"),
    [
        ("destinations.journal.entry_receipt", "folder"),
        ("destinations.journal._typed", "in-place"),
        ("conversion.in_place.SavedAmaxes.parse", "in-place"),
    ],
)
def test_a_resumed_command_names_the_journal(
    place: str,
    mode: str,
    made: World,
    tmp_path: Path,
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made.source, tmp_path / "S")
    stop, destination = (stop_at(SECOND), "D") if mode == "folder" else (stop_when_marked(tmp_path / "S"), None)
    with pytest.raises(StoppedError):
        quantize_repo("S", destination, in_place=mode == "in-place", device="cpu", threads=1, progress=stop)  # type: ignore[arg-type]  # a callback
    words = ["quantize", "S", *(["D"] if mode == "folder" else ["--in-place"]), "--device", "cpu", "--threads", "1"]
    before = snapshot(tmp_path)
    plant(place, KeyError)
    code, err = run(words, monkeypatch, capsys)
    assert plant.calls, err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, len(errors)) == (1, 1), err
    assert "journal" in errors[0]
    assert "internal error" not in errors[0]
    assert {name for name in snapshot(tmp_path).keys() ^ before.keys() if "lock" not in name} == set()


def test_a_command_on_the_hub_names_the_repository(
    hub: Hub,  # noqa: F811
    server: HubServer,  # noqa: F811
    tmp_path: Path,
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
    monkeypatch.setattr("nemotron_fp8._retry.time.sleep", lambda _: None, raising=False)
    hub.store.seed("nv/source", {"config.json": b"{}"})
    plant("hub.answers._adapter", KeyError)
    code, err = run(["inspect", "hf://nv/source"], monkeypatch, capsys)
    assert plant.calls
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, len(errors)) == (1, 1), err
    assert "nv/source" in errors[0]
    assert "internal error" not in errors[0]
