"""Read data that is made to harm: within seconds, within memory, with one line about it, and without running any of it.

Other files show the following already, and are not repeated here:

* code beside the driver, on a real cluster: ``tests/cluster/test_ray_connect.py``
* side files, lists and typed JSON, and pipes in place of files of a result: ``tests/verification/test_corruptions.py``
* files in subfolders: ``test_folders_in_a_source_are_named_as_left_out`` in ``tests/sources/test_folder.py``, and of a
  result ``tests/verification/test_corruptions.py``
* HTML in the names of a report: ``test_untrusted_names_are_escaped`` in ``tests/report/test_report.py``
* a pickle of 2^60 values: ``test_pickle_that_grows_when_it_is_walked`` in
  ``tests/sources/nemo/test_inert_pickle.py``
* broken front matters: ``test_a_front_matter_that_cannot_be_used_is_left_in_the_text`` in
  ``tests/documents/test_model_card.py``
* closed streams: ``test_a_closed_stream_is_like_dev_null`` in ``tests/cli/test_environments.py``
* a token in place of its variable: ``tests/hub/test_options.py``
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from nemotron_fp8 import Recipe, convert_repo, quantize_repo, verify_repo
from nemotron_fp8.checkpoint.json_text import pretty_json
from nemotron_fp8.checkpoint.model_code import MAX_CODE_BYTES, relative_imports
from nemotron_fp8.cli.main import main
from nemotron_fp8.conversion.workers.ray import entry
from nemotron_fp8.destinations import partial_folder
from nemotron_fp8.documents.front_matter import BEGIN, END, split_card
from nemotron_fp8.documents.manifest import OWN_DIGEST
from nemotron_fp8.documents.model_card import stated_recipe
from nemotron_fp8.errors import ForeignFolderError, RecipeError, excerpt
from nemotron_fp8.errors.nemo import MalformedDistError, MalformedTokenizerError, NemoConfigError
from nemotron_fp8.hub.client import HubClient
from nemotron_fp8.hub.failures import mask_tokens
from nemotron_fp8.sources.nemo.files import files_of_folder
from nemotron_fp8.sources.nemo.model_config import load_yaml, read_model
from nemotron_fp8.sources.nemo.sentencepiece import read_model as read_tokenizer
from nemotron_fp8.sources.nemo.torch_save import read_saved
from nemotron_fp8.untrusted.yaml_text import load_mapping
from tests.fuzz.hub_answers import ChangingHub
from tests.hub_server.messages import Response
from tests.hub_server.server import HubServer
from tests.sources.nemo.test_torch_dist import write_dist
from tests.support.checkpoints import (
    CARD,
    CONFIG,
    INDEX,
    MANIFEST,
    ONE,
    edit_json,
    model,
    weight,
    write_checkpoint,
)
from tests.support.nemo_writer import Sizes, hf_tensors, message, number_field, sentencepiece, write_nemo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STATS = "nemotron_fp8.stats.json"
MANY_DIGITS = "9" * 6000
"""``int`` rejects more than 4,300 digits, with an exception of its own."""


# -- bounds ------------------------------------------------------------------------------------------------------------


class TooLateError(BaseException):
    """A test took longer than it may. Not an Exception, which a reader may turn into an error of its own."""


@contextmanager
def bounds(seconds: float = 10, mebibytes: int = 400) -> Iterator[None]:
    """Limit the time of the body, also where it waits for a pipe, and the growth of the memory of this process."""

    def stop(*_: object) -> None:
        raise TooLateError(f"longer than {seconds} s")

    before = None
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        before = resident("VmRSS")
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert before is None or resident("VmHWM") - before < mebibytes << 20


def resident(field: str) -> int:
    """Return the bytes of a field of this process's status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found.group(1)) * 1024


class Done(NamedTuple):
    """End of a command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only error line."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.err
        assert "internal error" not in lines[0]
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run commands in this process."""
    for name in ("watch", "close"):  # handlers belong to processes of the command line
        monkeypatch.setattr(f"nemotron_fp8.cli.signals.Signals.{name}", lambda _: None)

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["nemotron-fp8", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        done = Done(code, *capsys.readouterr())
        assert "internal error" not in done.err, done.err
        assert "Traceback" not in done.err, done.err
        return done

    return run


ONE_CORE = ("--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``s`` and its result ``d``."""
    root = tmp_path_factory.mktemp("hostile")
    write_checkpoint(root / "s", model(), side={"tokenizer.json": b"{}", "LICENSE": b"free", CARD: b"# A model\n"})
    quantize_repo(root / "s", root / "d", Recipe(stats=True), device="cpu", threads=1)
    return root


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made`, which is the current folder."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def sign(result: Path) -> None:
    """Make the manifest fit the files again, as a stranger would."""
    import hashlib

    tree = json.loads((result / MANIFEST).read_bytes())
    tree.pop(OWN_DIGEST)
    for name, file in tree["files"].items():
        data = (result / name).read_bytes()
        file.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    own = hashlib.sha256(pretty_json(tree)).hexdigest()
    (result / MANIFEST).write_bytes(pretty_json({**tree, OWN_DIGEST: own}))


def edit_manifest(result: Path, **recipe: object) -> None:
    """Set fields of the recipe in a manifest."""
    tree = json.loads((result / MANIFEST).read_bytes())
    tree["recipe"].update(recipe)
    (result / MANIFEST).write_bytes(pretty_json(tree))
    sign(result)


# -- code of others ----------------------------------------------------------------------------------------------------


def fake_ray(monkeypatch: pytest.MonkeyPatch, folders: Any) -> None:
    """Let `entry` find a Ray whose driver has put folders on the import path."""
    job = SimpleNamespace(py_driver_sys_path=folders)
    core = SimpleNamespace(get_job_config=lambda: job)
    worker = SimpleNamespace(global_worker=SimpleNamespace(core_worker=core))
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_runtime_context=lambda: context))
    monkeypatch.setitem(sys.modules, "ray._private.worker", worker)


@pytest.mark.parametrize("times", [1, 2])
def test_code_in_the_folder_of_the_driver_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    (tmp_path / "a_module_of_nobody.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    fake_ray(monkeypatch, [str(tmp_path)])
    before = [str(tmp_path)] * times + sys.path
    monkeypatch.setattr(sys, "path", list(before))

    def called(*_: object) -> tuple[str, object]:
        import a_module_of_nobody  # type: ignore[import-not-found]

        return "done", a_module_of_nobody

    monkeypatch.setattr(entry, "called", called)
    with pytest.raises(ModuleNotFoundError):
        entry.enter(("", ""), "work", b"")
    assert sys.path == before
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("folders", [None, 3, [None], [3]])
def test_a_job_of_another_version_of_ray_names_no_folder(monkeypatch: pytest.MonkeyPatch, folders: object) -> None:
    fake_ray(monkeypatch, folders)
    monkeypatch.setattr(entry, "called", lambda *_: ("done", None))
    assert entry.enter(("", ""), "work", b"") == ("node", "done", None)


@pytest.mark.parametrize(
    "code",
    [
        b"from ." + b" " * (MAX_CODE_BYTES - 20) + b"x",
        b" " * (MAX_CODE_BYTES - 20) + b"from . x",
        b"from . import (" + b" " * (MAX_CODE_BYTES - 20),
        b"from .a import (" + b"(" * 500_000,
        b"from .a import b\n" * 60_000,
        b"from ." + b"a." * 20_000 + b"a import b",
        b"from . import (" + b"#" * 900_000,
    ],
    ids=["spaces", "indent", "names", "brackets", "many", "long", "comment"],
)
def test_imports_of_hostile_code_are_found_in_seconds(code: bytes) -> None:
    with bounds(5, 100):
        relative_imports(code)


# -- many tensors ------------------------------------------------------------------------------------------------------

DESCRIPTORS = """
import resource, sys, torch
from nemotron_fp8 import quantize_repo, verify_repo
from tests.support.checkpoints import ONE, weight, write_checkpoint
from pathlib import Path
import nemotron_fp8.conversion.estimate, nemotron_fp8.verification.quantized_values

root = Path(sys.argv[1])
same = weight(1, 16)
names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(30) for j in range(100)]
write_checkpoint(root / "s", {ONE: dict.fromkeys(names, same)})
quantize_repo(root / "s", root / "d", device="cpu", threads=1)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
alone = verify_repo(None, root / "d", threads=2)
beside = verify_repo(root / "s", root / "d", threads=2)
print(alone.ok, alone.quantized, beside.ok, beside.quantized)
"""


def test_thousands_of_fp8_tensors_need_few_open_files(tmp_path: Path) -> None:
    """More than tests/verification/test_descriptors.py: as many as one shard of an expert model may have."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = [sys.executable, "-c", DESCRIPTORS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stdout.split() == ["True", "3000", "True", "3000"], done.stderr


def write_figures(result: Path, rows: list[list[Any]], nonfinite: list[list[Any]] | None = None) -> None:
    """Replace the statistics of a result."""
    columns = ["name", "sqnr_db", "max_abs_error", "clamped", "flushed_to_zero"]
    tree = {"schema": 1, "columns": columns, "tensors": rows, "nonfinite": nonfinite or []}
    (result / STATS).write_text(json.dumps(tree))
    sign(result)


def test_a_report_of_100_000_figures_takes_seconds(work: Path, run: Callable[..., Done]) -> None:
    rows = [
        [f"model.layers.{i // 400}.mlp.experts.{i % 400}.up_proj.weight", 30.0 + i % 7, 0.01, i % 3, 0]
        for i in range(100_000)
    ]
    write_figures(work / "d", rows)
    with bounds(10, 1000):
        assert run("report", "d", "--html", "page.html", "--quiet").code == 0
    assert (work / "page.html").stat().st_size < 5 << 20


@pytest.mark.parametrize(
    "rows",
    [
        [[f"a.{i}.b.weight", 1.7e308, 1.7e308, 2**511, 2**511] for i in range(4)],
        [[f"a.{i}.b.weight", (-1) ** i * 1.7e308, 5e-324, 0, 0] for i in range(4)],
        [[f"a.{i}.b.weight", value, value, 0, 0] for i, value in enumerate(("inf", "-inf", "nan", 0))],
        [[f"a.{MANY_DIGITS}.b.weight", 1.0, 1.0, 0, 0]],
        [["\u202e" + "a" * 100_000, 2**511, -(2**511), 0, 0]],
        [],
    ],
    ids=["large", "wide", "none", "digits", "long", "empty"],
)
def test_figures_that_overflow(work: Path, run: Callable[..., Done], rows: list[list[Any]]) -> None:
    write_figures(work / "d", rows, [["a", 2**511, [2**511] * 9, "x" * 10_000]])
    with bounds():
        for words in (["--html", "page.html"], ["--json"], []):
            assert run("report", "d", "--quiet", *words).code == 0
        assert run("compare", "d", "d", "--html", "two.html", "--quiet").code == 0
        assert run("verify", "s", "d", "--quiet").code == 1


# -- values of any kind ------------------------------------------------------------------------------------------------


def test_an_excerpt_is_cut_before_it_is_made() -> None:
    shared: Any = ("x",)
    for _ in range(40):
        shared = (shared, shared)
    deep: Any = []
    for _ in range(200_000):
        deep = [deep]
    with bounds(1, 50):
        for value in (
            shared,
            deep,
            {"a": shared},
            [shared] * 10**6,
            1 << 10**7,
            "x" * 10**7,
            b"x" * 10**7,
            -(1 << 10**6),
        ):
            assert len(excerpt(value)) < 500
    with suppress(TypeError):
        while deep:  # else Python frees it recursively
            deep = deep.pop()


def persistent(value: Any) -> bytes:
    """Return ``data.pkl`` of a tensor whose storage is named by any value."""

    class Storage:
        """Pickled as a persistent id."""

    class Pickler(pickle.Pickler):
        """Writes persistent ids."""

        def persistent_id(self, obj: object) -> Any:
            return value if isinstance(obj, Storage) else None

        def reducer_override(self, obj: object) -> Any:
            if obj is tensor:
                return torch._utils._rebuild_tensor_v2, (Storage(), 0, (2,), (1,), False, {})  # type: ignore[attr-defined]
            return NotImplemented

    tensor = SimpleNamespace()
    stream = io.BytesIO()
    Pickler(stream, 2).dump(tensor)
    return stream.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        1,
        "storage",
        (),
        ("storage",),
        ("storage", 1, "0", "cpu", 2),
        [1],
        ("storage", torch.float32, "0", "cpu", 2),
    ],
    ids=repr,
)
def test_a_persistent_id_that_is_no_record(tmp_path: Path, value: Any) -> None:
    check_saved(tmp_path, persistent(value))


@pytest.mark.parametrize("storage", [1, "x", (), None, []], ids=repr)
def test_a_storage_that_is_no_record(tmp_path: Path, storage: Any) -> None:
    class Tensor:
        """Pickled as a call with the wrong arguments."""

        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, 0, (2,), (1,), False, {})  # type: ignore[attr-defined]

    check_saved(tmp_path, pickle.dumps(Tensor(), 2))


def check_saved(folder: Path, data: bytes) -> None:
    """An archive with this description is refused by its own name."""
    with zipfile.ZipFile(folder / "__0_0.distcp", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", b"\0" * 8)
    files, _ = files_of_folder(folder)
    with bounds(), pytest.raises(MalformedDistError, match=r"__0_0\.distcp"):
        read_saved(files, "__0_0.distcp", 0, (folder / "__0_0.distcp").stat().st_size)


@pytest.mark.parametrize(
    "piece", [b"", number_field(3, 2), message(1, b"\xff"), number_field(1, 5), message(2, b"x")], ids=repr
)
def test_a_piece_without_a_text(piece: bytes) -> None:
    with pytest.raises(MalformedTokenizerError, match=r"tokenizer\.model"):
        read_tokenizer(message(1, piece) + sentencepiece(), "tokenizer.model")


@pytest.mark.parametrize("shape", [(), (4,), (0,), (1, 1), (0, 4)], ids=str)
def test_fp8_of_any_number_of_dimensions(work: Path, run: Callable[..., Done], shape: tuple[int, ...]) -> None:
    """A result may name any tensor as FP8."""
    name = "model.layers.0.mlp.up_proj.weight"
    codes, scale = torch.zeros(shape, dtype=torch.float8_e4m3fn), torch.ones(1)
    shards = {ONE: {name: codes, f"{name}_scale": scale, f"{name}_scale_inv": scale, "a_scale": torch.ones(())}}
    config = json.loads((work / "d" / "config.json").read_bytes())
    write_checkpoint(work / "odd", shards, config=config)
    write_checkpoint(work / "plain", {ONE: {name: codes.bfloat16()}})
    with bounds():
        for words in (
            ["verify", "odd"],
            ["verify", "plain", "odd"],
            ["report", "odd"],
            ["report", "odd", "--source", "plain"],
        ):
            assert run(*words, "--quiet").code in (0, 1)
        assert run("dequantize", "odd", "out", "--quiet").code in (0, 1)
        assert run("verify", "s", "odd", "--quiet").code == 1


# -- text and YAML -----------------------------------------------------------------------------------------------------

CARDS = {
    "marks that begin": BEGIN * ((4 << 20) // len(BEGIN)),
    "marks that end": END * ((4 << 20) // len(END)),
    "marks in pairs": (BEGIN + END) * ((4 << 20) // len(BEGIN + END)),
    "marks in the wrong order": (END + BEGIN) * ((4 << 20) // len(BEGIN + END)),
    "comments": "<!--" * (1 << 20),
    "lines": "\n" * ((4 << 20) - 5),
    "a front matter without end": "---\n" + "a: b\n" * 800_000,
    "front matters": "---\n" * (1 << 20),
    "spaces before": " " * ((4 << 20) - 20) + "---\na: b\n---\n",
    "nested lists": "---\na: " + "[" * 100_000 + "]" * 100_000 + "\n---\n",
    "nested blocks": "---\n" + "- " * 100_000 + "\n---\n",
    "nested keys": "---\n" + "? " * 100_000 + "\n---\n",
    "nested mappings": "---\n" + "{a: " * 60_000 + "\n---\n",
    "a long key": "---\n" + "k" * 250_000 + ": v\n---\n",
    "many anchors": "---\n" + "".join(f"k{i}: &a{i} x\n" for i in range(15_000)) + "---\n",
    "many quotes": "---\na: " + '"' * 250_000 + "\n---\n",
    "tags": "---\na: " + "!" * 250_000 + "\n---\n",
    "a command of 4 MB": f"{BEGIN}\npip install nemotron_fp8==1\nnemotron-fp8 quantize S DST "
    + "'a' " * 900_000
    + f"\n{END}\n",
    "a command of quotes": f"{BEGIN}\npip install nemotron_fp8==1\nnemotron-fp8 quantize S DST "
    + "\\'" * 900_000
    + f"\n{END}\n",
    "commits": "@0123456789abcdef" * 200_000,
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_of_4_mib_takes_seconds(name: str) -> None:
    data = CARDS[name].encode()
    assert len(data) <= 4 << 20
    with bounds(5):
        front, text = split_card(data)
        stated_recipe(data)
    assert isinstance(front, dict)
    assert len(text) <= len(data)


@pytest.mark.parametrize("name", ["marks in pairs", "a command of quotes", "front matters"])
def test_a_card_of_4_mib_is_compared_in_seconds(work: Path, run: Callable[..., Done], name: str) -> None:
    (work / "d" / CARD).write_text(CARDS[name])
    sign(work / "d")
    with bounds(10):
        assert run("verify", "s", "d", "--quiet").code == 1
        assert run("report", "d", "--quiet").code in (0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "a: b\n" * 800_000,
        "a: " + "[" * 100_000,
        "- " * 100_000,
        "? " * 100_000,
        "a: " + "{a: " * 60_000,
        "a: |\n" + " x\n" * 80_000,
        "a: " + "x" * 4_000_000,
        "%YAML 1.1\n" * 20_000,
        "a: !<" + "x" * 200_000,
    ],
    ids=["lines", "lists", "blocks", "keys", "mappings", "literal", "long", "directives", "tag"],
)
def test_yaml_of_4_mb_takes_seconds(text: str) -> None:
    with bounds(5, 100), suppress(NemoConfigError):
        load_yaml(text.encode(), "model_config.yaml")


KEPT = [
    "1", "-1", "007", "0o17", "0x1F", "0b11", "1_000", "1:20", "190:20:30", "1e3", "1.0e+3", "1.10", ".5", "5.",
    "+.inf", "-.INF", ".nan", "2024-01-01", "2001-12-14t21:59:43.10-05:00", "2001-12-14 21:59:43.10 -5",
    "12:30:45", "yes", "No", "ON", "true", "TRUE", "9" * 400, "0." + "1" * 300, "1" + "0" * 30 + ".0", "=", "<<",
]  # fmt: skip
"""Plain scalars that YAML 1.1 takes for something else than a text."""


def test_numbers_and_dates_of_a_card_keep_their_digits(tmp_path: Path) -> None:
    """Values of a front matter stand in the result as a person wrote them."""
    lines = [f"k{i}: {value}" for i, value in enumerate(KEPT)] + [f"q{i}: '{value}'" for i, value in enumerate(KEPT)]
    lines += ["list:", *(f"- {value}" for value in KEPT), "none: null", "tilde: ~", "empty:", "text: 'a: b'"]
    card = "---\n" + "\n".join(lines) + "\n---\n# A model\n"
    write_checkpoint(tmp_path / "s", model(), side={CARD: card.encode()})
    quantize_repo(tmp_path / "s", tmp_path / "d", device="cpu", threads=1)
    front, _ = split_card((tmp_path / "d" / CARD).read_bytes())
    written = (tmp_path / "d" / CARD).read_text().split("---\n")[1].splitlines()
    nothing = ("none: null", "tilde: ~", "empty:")
    assert [line for line in lines if line not in nothing and line not in written] == []
    assert front["text"] == "a: b"
    assert front["none"] is front["tilde"] is front["empty"] is None
    assert verify_repo(tmp_path / "s", tmp_path / "d", threads=1).ok


@pytest.mark.parametrize(
    "value",
    [
        "1:20",
        "0x30",
        "0o60",
        "060",
        "4.8e1",
        "48.0",
        "2024-01-01",
        "2001-12-14t21:59:43.10-05:00",
        "yes",
        ".inf",
        "!!int",
        "!!int 48",
        "!!timestamp 2024-01-01",
        "!!float",
        "!!binary SGVsbG8=",
        "!!null",
        "!!set {a, b}",
        MANY_DIGITS,
        "-" + MANY_DIGITS,
        "4_8" * 2000,
        "{}",
        "[48]",
    ],
)
def test_a_hidden_size_of_another_type_is_refused(value: str) -> None:
    text = re.sub(r"hidden_size: \d+", f"hidden_size: {value}", Sizes().yaml(), count=1)
    with bounds(2, 50), pytest.raises(NemoConfigError, match=r"model_config\.yaml") as caught:
        read_model(load_yaml(text.encode(), "model_config.yaml"), "model_config.yaml")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "value", ["!!int", "!!timestamp", "!!bool", "!!float", "!!str", "!!null", "!!seq []", "!!map {}"]
)
def test_a_tag_of_yaml_without_a_value_is_a_text(value: str) -> None:
    found = load_mapping(f"a: {value}\nb: 1\n", ValueError)
    assert found["a"] in ("", [], {})
    assert found["b"] == "1"


# -- damaged and odd files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch_dist checkpoint, whose archives have checksums."""
    folder = tmp_path_factory.mktemp("dist") / "nemo"
    write_dist(folder, Sizes(layers=1), hf_tensors(Sizes(layers=1)), blocks=False)
    return folder


@pytest.mark.parametrize("convert", [convert_repo, quantize_repo], ids=["convert", "quantize"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_changed_byte_of_a_payload_is_found(
    dist: Path, tmp_path: Path, convert: Callable[..., object], place: str
) -> None:
    shutil.copytree(dist, tmp_path / "nemo")
    path = next((tmp_path / "nemo" / "model_weights").glob("*.distcp"))
    data = bytearray(path.read_bytes())
    payload = (hf_tensors(Sizes(layers=1))["lm_head.weight"]).view(torch.uint8).numpy().tobytes()
    begin = bytes(data).index(payload)
    data[begin + {"first": 0, "middle": len(payload) // 2, "last": len(payload) - 1}[place]] ^= 1
    path.write_bytes(data)
    with pytest.raises(MalformedDistError, match="CRC-32") as caught:
        convert(tmp_path / "nemo", tmp_path / "out", threads=1)
    assert path.name in str(caught.value)
    assert not (tmp_path / "out").exists()


FILES = {
    "s": (*sorted(model()), INDEX, "config.json", CARD, "tokenizer.json", "LICENSE"),
    "d": (*sorted(model()), INDEX, "config.json", CARD, MANIFEST, STATS, "tokenizer.json", "LICENSE"),
}


def pipe(path: Path) -> None:
    """Replace a file by a pipe that nobody writes to."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def dangling(path: Path) -> None:
    """Replace a file by a link to nothing."""
    path.unlink(missing_ok=True)
    path.symlink_to("nothing-there")


def looping(path: Path) -> None:
    """Replace a file by a link to itself."""
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


ODD = {"pipe": pipe, "dangling link": dangling, "loop": looping}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", FILES["s"])
def test_an_odd_file_in_a_source_is_named(work: Path, run: Callable[..., Done], name: str, odd: str) -> None:
    ODD[odd](work / "s" / name)
    with bounds():
        done = run("quantize", "s", "out", *ONE_CORE)
    if done.code:
        assert name in done.error
        assert not (work / "out").exists()
    else:
        assert name in done.err + done.out
        assert not (work / "out" / name).exists() or name in (CARD, "config.json")


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", FILES["d"])
def test_an_odd_file_in_a_result_is_named(work: Path, run: Callable[..., Done], name: str, odd: str) -> None:
    ODD[odd](work / "d" / name)
    with bounds():
        for words in (["verify", "d"], ["verify", "s", "d"]):
            done = run(*words, "--quiet")
            assert done.code == 1
            assert name in done.out + done.error
        done = run("report", "d", "--quiet")
        if done.code:
            assert name in done.out + done.error


NEMO_FILES = (
    "model_config.yaml",
    "0123_tokenizer.model",
    "model_weights/metadata.json",
    "model_weights/model.output_layer.weight/.zarray",
    "model_weights/model.output_layer.weight/0.0",
)
DIST_FILES = (
    "model_config.yaml",
    "model_weights/.metadata",
    "model_weights/metadata.json",
    "model_weights/__0_0.distcp",
)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", [*(f"zarr/{name}" for name in NEMO_FILES), *(f"dist/{name}" for name in DIST_FILES)])
def test_an_odd_file_in_a_nemo_checkpoint_is_named(
    dist: Path, tmp_path: Path, run: Callable[..., Done], name: str, odd: str
) -> None:
    kind, _, rest = name.partition("/")
    if kind == "zarr":
        write_nemo(tmp_path / "nemo", hf_tensors(Sizes(layers=1)), Sizes(layers=1))
        (tmp_path / "nemo" / "0123_tokenizer.model").write_bytes(sentencepiece())
    else:
        shutil.copytree(dist, tmp_path / "nemo")
    assert (tmp_path / "nemo" / rest).is_file()
    ODD[odd](tmp_path / "nemo" / rest)
    with bounds():
        done = run("convert", tmp_path / "nemo", tmp_path / "out")
    if done.code:
        named = "output_layer" if "output_layer" in rest else Path(rest).name  # a part of an array
        assert named in done.error
    else:
        assert rest.endswith("metadata.json")  # not needed


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", ["out.partial/journal.jsonl", "out.partial/lock", "out.partial", "out"])
def test_an_odd_file_of_an_unfinished_run_is_named(work: Path, run: Callable[..., Done], place: str, odd: str) -> None:
    (work / place).parent.mkdir(exist_ok=True)
    ODD[odd](work / place)
    with bounds():
        done = run("quantize", "s", "out", *ONE_CORE)
    if done.code:
        assert Path(place).name in done.error
    else:
        assert verify_repo(None, work / "out", threads=1).ok


def test_the_folder_of_another_user_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Done]
) -> None:
    (work / "out.partial").mkdir()
    if os.geteuid() == 0:
        os.chown(work / "out.partial", 12345, 12345)
    else:
        real = os.lstat

        def lstat(path: Any, **options: Any) -> Any:
            info = real(path, **options)
            return SimpleNamespace(st_uid=12345, st_mode=info.st_mode) if Path(path).name == "out.partial" else info

        monkeypatch.setattr(partial_folder.os, "lstat", lstat)
    with pytest.raises(ForeignFolderError, match=r"out\.partial"):
        quantize_repo(work / "s", work / "out", device="cpu", threads=1)
    assert "12345" in run("quantize", "s", "out", *ONE_CORE).error
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 4096,
        b'{"a":' * 800,
        b'{"pid": 1e999, "host": "a"}',
        b'{"pid": NaN, "host": "a"}',
        b'{"pid": ' + b"9" * 4000 + b', "host": "a"}',
        b'{"pid": "' + b"9" * 4000,
        b'{"pid": 1, "host": "\\ud800\\u202e\\u001b[2J"}',
        b"\xff" * 4096,
        b"null",
        b'{"pid": [1], "host": {}}',
    ],
    ids=lambda data: repr(data[:20]),
)
def test_a_lock_with_any_owner_is_busy(work: Path, run: Callable[..., Done], data: bytes) -> None:
    import fcntl

    (work / "out.partial").mkdir()
    (work / "out.partial" / "lock").write_bytes(data)
    with (work / "out.partial" / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with bounds():
            error = run("quantize", "s", "out", *ONE_CORE).error
    assert "out.partial" in error
    assert error.isascii()
    assert error.isprintable()


# -- names and cards ---------------------------------------------------------------------------------------------------

ODD_CHARACTERS = "\u202e\u2066\x1b[2J\x07\u200b\ufeff\x85\u2028"
"""Marks of direction, an escape sequence, a bell, spaces without width, ends of lines."""
CONTROLS = frozenset(ODD_CHARACTERS) - frozenset("[2J")


def odd_checkpoint(folder: Path, **config: object) -> Path:
    """Write a checkpoint with odd characters in every text that a command may show."""
    odd = ODD_CHARACTERS
    names = (f"model.layers.0.{odd}.up_proj.weight", "model.layers.0.mlp.up_proj.weight")
    code = json.dumps({"auto_map": {"a": f"{odd}.X", "b": f"{odd}--m.Y"}}).encode()
    write_checkpoint(
        folder,
        {ONE: {**{name: weight(128, 128) for name in names}, f"{odd}.weight": weight(4)}},
        config={**CONFIG, "model_type": odd, "architectures": [odd], "auto_map": {"a": f"{odd}.M"}, odd: odd, **config},
        side={"tokenizer_config.json": code, CARD: b"# A model\n", f"{odd}.json": b"{}", f"{odd}.py": b""},
        metadata={ONE: {odd: odd}},
    )
    (folder / f"{odd} folder").mkdir()
    return folder


def test_marks_of_direction_and_escapes_reach_no_page_and_no_terminal(
    tmp_path: Path, run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, result = odd_checkpoint(tmp_path / f"s{ODD_CHARACTERS}"), f"d{ODD_CHARACTERS}"
    commands: list[list[object]] = [
        ["plan", source, "--no-estimate"],
        ["inspect", source],
        ["quantize", source, result, *ONE_CORE, "--stats"],
        ["quantize", source, "fp8", *ONE_CORE, "--format", "fp8"],
        ["verify", result],
        ["verify", source, result],
        ["report", result, "--html", "page.html"],
        ["report", result, "--source", source],
        ["compare", result, "fp8", "--html", "two.html"],
        ["dequantize", result, "back"],
        ["plan", result, "--no-estimate"],
        ["verify", f"{result}-no"],
        ["verify", "fp8", result],
    ]
    for command in commands:
        done = run(*command)
        assert not CONTROLS & set(done.out + done.err.replace("\r", "")), command
    assert not CONTROLS & set(Path("page.html").read_text() + Path("two.html").read_text())
    shown = (Path(result) / CARD).read_text().partition(BEGIN)[2].partition(END)[0]
    assert not CONTROLS & set(shown)


@pytest.mark.parametrize(
    "stated",
    [
        {"quant_method": ODD_CHARACTERS},
        {"quant_method": "fp8", "fmt": ODD_CHARACTERS, "activation_scheme": ODD_CHARACTERS},
        {"quant_method": "compressed-tensors", "format": ODD_CHARACTERS, "config_groups": {ODD_CHARACTERS: {}}},
    ],
    ids=lambda stated: ascii(stated["quant_method"]),
)
def test_odd_characters_of_a_quantization_are_escaped(
    tmp_path: Path, run: Callable[..., Done], stated: dict[str, object]
) -> None:
    source = odd_checkpoint(tmp_path / "s", quantization_config=stated)
    for command in (["plan"], ["quantize", *ONE_CORE], ["dequantize"], ["verify"], ["report"]):
        words = [source, tmp_path / "d"] if command[0] in ("quantize", "dequantize") else [source]
        done = run(command[0], *words, *command[1:])
        assert not CONTROLS & set(done.out + done.err)


COMMITS = ["0" * 40, "$(touch x)", "0" * 39, "a" * 40 + "; rm", "\u0660" * 40, "A" * 40]


@pytest.mark.parametrize("commit", COMMITS, ids=ascii)
def test_the_commit_in_a_card_is_checked(tmp_path: Path, run: Callable[..., Done], commit: str) -> None:
    """The command on a card is copied into a shell: its source is the name of a repository and a commit."""
    write_checkpoint(tmp_path / "s", model())
    quantize_repo(tmp_path / "s", tmp_path / "d", device="cpu", threads=1, base_model="nv/model")
    card = (tmp_path / "d" / CARD).read_text()
    line = next(line for line in card.splitlines() if line.startswith("nemotron-fp8 quantize"))
    assert shlex.split(line)[2] == "hf://nv/model"
    changed = line.replace("hf://nv/model", f"hf://nv/model@{commit}")
    (tmp_path / "d" / CARD).write_text(card.replace(line, changed))
    sign(tmp_path / "d")
    found = verify_repo(tmp_path / "s", tmp_path / "d", threads=1)
    assert found.ok == (commit == COMMITS[0]), found.problems
    assert all(CARD in (problem.place if hasattr(problem, "place") else str(problem)) for problem in found.problems)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("bad token aVerySecretToken of a mirror", "aVerySecretToken"),
        ("Bearer aVerySecretToken", "aVerySecretToken"),
        ("x" * 100 + "aVerySecretToken" * 400, "aVerySecretToken"),
        ("hf_abcdefghijklmnopqrstuvwxyz", None),
        ("a\naVery\tSecretToken", None),
    ],
)
def test_a_refusal_never_repeats_a_token(text: str, secret: str | None) -> None:
    masked = mask_tokens(text, secret)
    assert "aVerySecretToken" not in masked
    assert "abcdefghij" not in masked
    assert "\n" not in masked


ECHOES: dict[str, Callable[[str], str]] = {
    "plain": lambda token: f"invalid credentials {token}",
    "in a header": lambda token: f"Authorization: Bearer {token}",
    "far behind": lambda token: "x" * 3000 + token,
    "many times": lambda token: token * 50,
    "in quotes": lambda token: f'"{token}"',
    "in an address": lambda token: f"http://me:{token}@127.0.0.1/",
}
SECRET = "mirror.secret.0123456789"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 422, 451])
def test_a_server_that_echoes_a_token_of_its_own_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Done], status: int
) -> None:
    """The token of a mirror has any form."""
    from huggingface_hub import close_session

    hub = ChangingHub(tmp_path / "hub")
    hub.store.add_token(SECRET, "me")
    hub.store.seed("nv/source", {"config.json": b"{}"})
    monkeypatch.setenv("MIRROR_TOKEN", SECRET)
    with HubServer(hub) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        for echo in ECHOES.values():
            text = echo(SECRET)

            def change(call: object, answer: Response, text: str = text) -> Response:
                del call
                body = json.dumps({"error": text, "message": text, "errors": [{"message": text}]}).encode()
                return Response(status, body, {**answer.headers, "X-Error-Message": text, "X-Request-Id": text})

            hub.change = change
            with bounds():
                done = run("inspect", "hf://nv/source", "--token-env", "MIRROR_TOKEN")
            assert done.code == 1
            assert SECRET not in done.out + done.err
            assert "nv/source" in done.error
    close_session()


# -- digits ------------------------------------------------------------------------------------------------------------

NUMBERS = ("{}", "-{}", "{}MiB", "0.{}GB", "1e{}")
OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--threads": (("quantize", "plan", "convert"), NUMBERS[:2]),
    "--max-memory": (("quantize", "dequantize"), NUMBERS),
    "--max-device-memory": (("quantize", "plan"), NUMBERS),
    "--shard-size": (("quantize", "plan", "convert"), NUMBERS),
    "--device": (("quantize", "plan"), ("{}", "cuda:{}", "cuda:-{}", "cuda:0,cuda:{}")),
    "--ray": (("quantize",), ("{}", "localhost:{}", "ray://localhost:{}", "{}:6379")),
    "--revision": (("quantize", "plan"), ("{}", "refs/pr/{}")),
}
"""Commands with an option, and what is tried."""


@pytest.mark.parametrize(
    ("option", "command", "form"),
    [
        (option, command, form)
        for option, (commands, forms) in OPTIONS.items()
        for command in commands
        for form in forms
    ],
)
def test_options_of_6000_digits(work: Path, run: Callable[..., Done], option: str, command: str, form: str) -> None:
    words = [command, "s", *(["out"] if command != "plan" else []), f"{option}={form.format(MANY_DIGITS)}"]
    with bounds(mebibytes=100):
        done = run(*words)
    assert done.code in (1, 2)
    assert len(done.error) < 6500
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    "source",
    [
        f"hf://a/b@refs/pr/{MANY_DIGITS}",
        f"hf://a/{MANY_DIGITS}",
        f"hf://a/b@{MANY_DIGITS}",
        MANY_DIGITS,
        f"model-{MANY_DIGITS}-of-00002.safetensors",
    ],
    ids=lambda source: source[:12],
)
def test_names_of_6000_digits(
    work: Path, run: Callable[..., Done], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with bounds(mebibytes=100):
        for command in (["inspect", source], ["quantize", "s", source, *ONE_CORE]):
            assert run(*command).code in (1, 2)
    assert sorted(path.name for path in work.iterdir()) == ["d", "s"]


HEADERS: dict[str, Callable[[str], bytes]] = {
    "offset": lambda n: b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,' + n.encode() + b"]}}",
    "shape": lambda n: b'{"a":{"dtype":"U8","shape":[' + n.encode() + b'],"data_offsets":[0,1]}}',
    "fraction": lambda n: b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,0.' + n.encode() + b"]}}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_6000_digits(tmp_path: Path, run: Callable[..., Done], name: str) -> None:
    header = HEADERS[name](MANY_DIGITS)
    (tmp_path / ONE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with bounds(mebibytes=100):
        error = run("inspect", tmp_path / ONE).error
    assert ONE in error
    assert len(error) < 400


@pytest.mark.parametrize("digits", [20, 400, 490])
def test_layers_of_many_digits(tmp_path: Path, run: Callable[..., Done], digits: int) -> None:
    """A name may have 512 characters."""
    number = "9" * digits
    names = [f"a.layers.{number}.q_proj.weight"[-512:], f"a.experts.{number}.up.weight"[-512:], f"layers.{number}"]
    config = {**CONFIG, "num_hidden_layers": 10**300, "num_nextn_predict_layers": 10**300, "n_routed_experts": 10**300}
    write_checkpoint(tmp_path / "s", {ONE: {name: weight(16, 16) for name in names}}, config=config)
    with bounds(mebibytes=200):
        run("plan", tmp_path / "s", "--no-estimate")
        if not run("quantize", tmp_path / "s", tmp_path / "d", *ONE_CORE, "--stats").code:
            assert run("report", tmp_path / "d", "--html", tmp_path / "page.html").code == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", value) for value in (-(10**299), 1.7e308, MANY_DIGITS, [1], {"a": 1}, None, True)),
        *(
            (name, value)
            for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
            for value in (10**299, 0)
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_numbers_of_a_config_can_be_anything(work: Path, run: Callable[..., Done], name: str, value: object) -> None:
    edit_json(work / "s" / "config.json", **{name: value})
    with bounds(mebibytes=200):
        run("plan", "s", "--no-estimate")
        run("quantize", "s", "out", *ONE_CORE)


# -- patterns of strangers ---------------------------------------------------------------------------------------------

CATASTROPHE = "(a+)+b$|(a|a)*b$|(a*)*b$"
LONG_NAME = "model.layers.0." + "a" * 60 + ".up_proj.weight"


@pytest.fixture(scope="module")
def with_pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a name on which bad patterns take years, and its results of both formats."""
    root = tmp_path_factory.mktemp("patterns")
    tensors = {LONG_NAME: weight(128, 128), "model.norm.weight": weight(64), "a" * 60 + ".weight": weight(8, 8)}
    write_checkpoint(root / "s", {ONE: tensors})
    for form in ("compressed-tensors", "fp8", "modelopt"):
        recipe = Recipe(format=form, stats=True)  # type: ignore[arg-type]  # a name of a layout
        quantize_repo(root / "s", root / form, recipe, device="cpu", threads=1)
    return root


LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude", "targets")


@pytest.mark.parametrize("form", ["compressed-tensors", "fp8", "modelopt"])
@pytest.mark.parametrize("place", ["manifest", "card", "config"])
def test_a_pattern_of_a_stranger_is_never_run(
    with_pattern: Path, tmp_path: Path, run: Callable[..., Done], form: str, place: str
) -> None:
    shutil.copytree(with_pattern, tmp_path / "w")
    source, result = tmp_path / "w" / "s", tmp_path / "w" / form
    if place == "manifest":
        edit_manifest(result, select=[CATASTROPHE], ignore=[CATASTROPHE], also_select=[CATASTROPHE])
    elif place == "card":
        card = (result / CARD).read_text()
        line = next(line for line in card.splitlines() if line.startswith("nemotron-fp8 quantize"))
        options = " ".join(
            f"{option} {shlex.quote(CATASTROPHE)}" for option in ("--select", "--ignore", "--also-select")
        )
        (result / CARD).write_text(card.replace(line, f"{line} {options}"))
        (result / MANIFEST).unlink()
    else:
        config = json.loads((result / "config.json").read_bytes())
        stated = config["quantization_config"]
        entries = [
            CATASTROPHE,
            f"re:{CATASTROPHE}",
            f"re:.*{CATASTROPHE}",
            "re:" + "(" * 200,
            "re:" + "a?" * 60 + "a" * 60,
        ]
        for key in LISTS:
            stated[key] = [*(stated.get(key) or []), *entries]
        if "config_groups" in stated:
            for group in stated["config_groups"].values():
                group["targets"] = [*group["targets"], *entries]
        (result / "config.json").write_text(json.dumps(config))
        sign(result)
    with bounds(5):
        for words in (
            ["verify", result],
            ["verify", source, result],
            ["report", result],
            ["report", result, "--source", source],
        ):
            run(*words, "--quiet")
        run("dequantize", result, tmp_path / "out", "--quiet")


ENTRIES: dict[str, list[object]] = {
    "many names": [f"model.layers.{i}.x" for i in range(20_000)],
    "many patterns": [f"re:.*layers\\.{i}\\.(a+)+b" for i in range(20_000)],
    "a long pattern": ["re:" + "a" * 2_000_000],
    "a long name": ["a." * 1_000_000],
    "dots": ["re:" + ".*" * 200_000 + "b"],
    "other types": [1, None, [1], {"a": 1}, True, 1.5] * 1000,
}


@pytest.fixture(scope="module")
def of_400_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its results of several formats."""
    root = tmp_path_factory.mktemp("lists")
    same = weight(128, 128)
    write_checkpoint(root / "s", {ONE: {f"model.layers.{i}.mlp.up_proj.weight": same for i in range(400)}})
    for form in ("compressed-tensors", "fp8", "modelopt"):
        quantize_repo(root / "s", root / form, Recipe(format=form), device="cpu", threads=1)  # type: ignore[arg-type]  # a name
    return root


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize(
    ("form", "key"),
    [
        ("compressed-tensors", "ignore"),
        ("fp8", "ignored_layers"),
        ("fp8", "modules_to_not_convert"),
        ("modelopt", "ignore"),
    ],
    ids=lambda key: key,
)
def test_lists_of_a_stranger_take_seconds_and_few_lines(
    of_400_modules: Path, tmp_path: Path, run: Callable[..., Done], form: str, key: str, name: str
) -> None:
    source, result = of_400_modules / "s", tmp_path / "d"
    shutil.copytree(of_400_modules / form, result)
    config = json.loads((result / "config.json").read_bytes())
    config["quantization_config"][key] = ENTRIES[name]
    (result / "config.json").write_text(json.dumps(config))
    with bounds(4):
        for words in (["verify", result], ["verify", source, result], ["report", result]):
            done = run(*words, "--quiet")
            assert done.code in (0, 1)
            assert len(done.out + done.err) < 500_000


def test_many_statements_of_a_config_give_a_short_notice(work: Path, run: Callable[..., Done]) -> None:
    stated = {f"k{i}": {"quantization_config": {"quant_method": "fp8"}} for i in range(20_000)}
    edit_json(work / "s" / "config.json", **stated)
    with bounds():
        done = run("quantize", "s", "out", *ONE_CORE)
    assert len(done.out + done.err) < 10_000


# -- surroundings ------------------------------------------------------------------------------------------------------

PROXIES = [
    "x",
    "http://[",
    "http://a:99999999",
    "http://a:b",
    "socks5://a:1",
    "socks4://a:1",
    "ftp://a",
    "http://\u202e",
    "http://" + "a" * 70_000,
    "http://a b",
    "://",
    "http://user:pass@[::1",
    "http://\udcff",
    "http://\x01",
    "9" * 6000,
]


@pytest.mark.parametrize("value", PROXIES, ids=lambda value: ascii(value[:20]))
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"])
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    from huggingface_hub import close_session

    for other in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv(name, value)
    close_session()
    with bounds():
        try:
            HubClient().session()
        except RecipeError as error:
            assert "PROXY" in str(error)
            assert str(error).isprintable()
            assert len(str(error)) < 500
        finally:
            close_session()


TOKENS = [b"\xff\xfe", b"a\nb", b"\0" * 100, b"x" * 5000, "\u202e".encode(), b"hf_a b", b""]


@pytest.mark.parametrize("data", TOKENS, ids=lambda data: repr(data[:8]))
def test_a_login_that_is_no_token_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_bytes(data)
    with bounds():
        try:
            assert HubClient().token() in (None, "ab")
        except RecipeError as error:
            assert "hf auth login" in str(error)
            assert data.decode("latin-1").strip() not in str(error)


@pytest.mark.parametrize(
    "endpoint", ["x", "http://", "https://[", "http://a:99999", "file:///etc", "https://a b", "\u202e", "9" * 6000]
)
def test_an_endpoint_that_is_no_address_is_named(endpoint: str) -> None:
    with bounds(), pytest.raises(RecipeError, match="HF_ENDPOINT") as caught:
        HubClient(endpoint=endpoint).base()
    assert len(str(caught.value)) < 400
