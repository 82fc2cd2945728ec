"""verify finds every corruption of a result: with its manifest as made, without one, and with one made anew.

`tests.verification.corruptions` is the catalog. A manifest made anew stands for a change before the digests were taken:
all sizes and digests in it fit, so that only the source reveals the change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import NemotronFp8Error, Recipe, convert_repo, dequantize_repo, quantize_repo, verify_repo
from tests.support.checkpoints import MANIFEST, contents, snapshot, write_checkpoint
from tests.support.nemo_writer import Sizes, hf_tensors, write_nemo
from tests.verification.corruptions import (
    ANEW,
    AS_MADE,
    AUTHOR,
    BLOCK,
    CARD,
    CHANNEL,
    FIRST,
    MODEL_CONFIG,
    MODES,
    NEMO,
    PLAIN,
    QUANTIZATION,
    REMOVED,
    SECOND,
    SIDE_FILES,
    STATS,
    TENSOR,
    Corruption,
    catalog,
    model,
    put,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

SECONDS = 2
"""No verification of these small folders may take longer: one that waits for a FIFO never ends."""
TOO_LONG = f"more than {SECONDS} seconds"
SOURCES = {CHANNEL: "source", BLOCK: "source", TENSOR: "source", PLAIN: CHANNEL, NEMO: "nemo source"}
CASES = [(result, corruption) for corruption in catalog() for result in corruption.results]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The sources, and an untouched result of each kind; no test may change them."""
    root = tmp_path_factory.mktemp("made")
    write_checkpoint(
        root / "source",
        model(),
        metadata={name: {"format": "pt"} for name in (FIRST, SECOND)},
        config=MODEL_CONFIG,
        index_metadata={"total_parameters": 12},
        side={CARD: AUTHOR, **SIDE_FILES},
    )
    for name, recipe in {
        CHANNEL: Recipe(stats=True),
        BLOCK: Recipe(format="fp8"),
        TENSOR: Recipe(format="fp8", granularity="tensor"),
    }.items():
        quantize_repo(root / "source", root / name, recipe, device="cpu", threads=1)
    dequantize_repo(root / CHANNEL, root / PLAIN, threads=1)
    sizes = Sizes(layers=1, heads=2, groups=1, hidden=16, inner=16)
    write_nemo(root / "nemo source", hf_tensors(sizes), sizes)
    convert_repo(root / "nemo source", root / NEMO, threads=1)
    before = snapshot(root)
    yield root
    assert snapshot(root) == before


@pytest.fixture
def work(made: Path) -> Iterator[Path]:
    """A folder for copies by hard links; gone after the test, so that thousands of files do not gather."""
    folder = made.parent / f"{made.name}-work"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


class TooLongError(BaseException):
    """A verification that does not end; no handler of the product may take it for its own."""


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Raise TooLongError if the body takes longer than it may, and release threads that wait for a writer of a FIFO."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        for path in folder.rglob("*"):
            if path.is_fifo():
                os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(source: Path | None, folder: Path) -> str:
    """Verify; return "passed", "found", or what went wrong with the verification itself."""
    try:
        with bounded(folder):
            return "passed" if verify_repo(source, folder, threads=1).ok else "found"
    except NemotronFp8Error:
        return "found"
    except TooLongError:
        return TOO_LONG
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def make_anew(folder: Path) -> None:
    """Write the manifest again with the size and the SHA-256 of every file that is there, and with its own digest."""
    tree = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST or path.name.startswith(".") or not path.name.isprintable():
            continue
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError:  # a dangling link, a loop
            continue
        if regular and not str(path.resolve()).startswith("/proc"):
            data = path.read_bytes()
            files[path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seal(folder, {**tree, "files": files})


def seal(folder: Path, tree: dict[str, Any]) -> None:
    """Write a manifest with its own digest; the form is that of `nemotron_fp8.documents.manifest`."""
    tree = {key: value for key, value in tree.items() if key != "manifest_sha256"}

    def text(value: dict[str, Any]) -> bytes:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

    put(folder / MANIFEST, text({**tree, "manifest_sha256": hashlib.sha256(text(tree)).hexdigest()}))


def copy(result: Path, folder: Path) -> Path:
    """Copy a result by hard links."""
    shutil.copytree(result, folder, copy_function=os.link)
    return folder


def tried(made: Path, work: Path, result: str, corruption: Corruption) -> dict[str, str]:
    """Verify a corrupted copy in every mode; return the outcome of each call, up to the first that takes too long."""
    folder = copy(made / result, work / "result")
    corruption.apply(folder)
    source, found = made / SOURCES[result], {}
    for call in (AS_MADE, f"{AS_MADE}, without the source", ANEW, REMOVED):
        mode = call.split(",")[0]
        if mode not in corruption.modes:
            continue
        if call == ANEW and corruption.name.startswith("forged manifest"):
            seal(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        elif call == ANEW:
            make_anew(folder)
        elif call == REMOVED:
            (folder / MANIFEST).unlink()
        found[call] = outcome(source if call == mode else None, folder)
        if found[call] == TOO_LONG:
            break
    return found


@pytest.mark.parametrize(
    ("result", "corruption"), [pytest.param(*case, id=f"{case[0]}: {case[1].name}") for case in CASES]
)
def test_a_corruption_is_found(made: Path, work: Path, result: str, corruption: Corruption) -> None:
    """In every mode; a harmless one may pass in the modes that it names, and one that people have must pass."""
    wanted = {"passed"} if corruption.passes else {"found"}
    wrong = {}
    for call, got in tried(made, work, result, corruption).items():
        spared = {"found", "passed"} if call.split(",")[0] in corruption.spared and not corruption.passes else wanted
        if result == NEMO and call == REMOVED:
            spared = {"found"}  # without a record, a folder without FP8 may be any other folder
        if got not in spared:
            wrong[call] = got
    assert not wrong, wrong


def test_the_results_are_those_that_are_corrupted(made: Path) -> None:
    for result, quantization in QUANTIZATION.items():
        config = json.loads((made / result / "config.json").read_text())
        assert config == {**MODEL_CONFIG, "quantization_config": quantization}
    for result in (*QUANTIZATION, PLAIN):
        files = contents(made / result)
        assert {name: files[name] for name in SIDE_FILES} == SIDE_FILES
        assert (STATS in files) is (result == CHANNEL)


def test_every_name_is_unique_and_every_exception_has_its_reason() -> None:
    names = [(result, corruption.name) for result, corruption in CASES]
    assert len(set(names)) == len(names)
    assert len({corruption.name for _, corruption in CASES}) >= 140
    for _, corruption in CASES:
        assert bool(corruption.harmless) is bool(corruption.spared)
        assert set(corruption.spared) <= set(MODES)


UNTOUCHED: dict[str, dict[str, Any]] = {
    "default": {},
    "stats": {"stats": True},
    "tensor, weights only": {"granularity": "tensor", "activations": "none"},
    "block": {"granularity": "block"},
    "fp8": {"format": "fp8"},
    "fp8 tensor": {"format": "fp8", "granularity": "tensor"},
    "shared scales": {"share_scales": True, "granularity": "tensor"},
    "the original arithmetic": {"numerics": "original"},
    "ignored modules": {"ignore": (r"self_attn",)},
    "selected modules": {"select": (r"mlp\..*_proj",), "stats": True},
    "also selected modules": {"also_select": (r"lm_head",), "force_select": True},
    "non-finite weights are kept": {"nonfinite": "keep", "stats": True},
}


@pytest.mark.parametrize("name", UNTOUCHED)
@pytest.mark.parametrize("digests", [True, False], ids=["", "no digests"])
def test_an_untouched_result_passes_in_every_mode(made: Path, work: Path, name: str, digests: bool) -> None:
    recipe = Recipe(**UNTOUCHED[name])
    source = made / "source"
    if recipe.nonfinite == "keep":
        tensors = model()
        tensors[FIRST]["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
        source = write_checkpoint(work / "source", tensors, config=MODEL_CONFIG, side={CARD: AUTHOR, **SIDE_FILES})
    quantize_repo(source, work / "result", recipe, device="cpu", threads=1, digests=digests)
    check_untouched(source, work / "result", digests)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", [CHANNEL, BLOCK, TENSOR])
def test_an_untouched_dequantized_result_passes(made: Path, work: Path, dtype: str, layout: str) -> None:
    dequantize_repo(made / layout, work / "result", dtype, threads=1)
    check_untouched(made / layout, work / "result")


def test_an_untouched_result_with_a_name_on_the_hub_passes(made: Path, work: Path) -> None:
    """The card has the name, which nothing but the manifest may know."""
    quantize_repo(made / "source", work / "result", device="cpu", threads=1, base_model="me/tiny")
    check_untouched(made / "source", work / "result")


def test_an_untouched_result_in_place_passes(made: Path, work: Path) -> None:
    shutil.copytree(made / "source", work / "result")
    quantize_repo(work / "result", device="cpu", threads=1, in_place=True)
    check_untouched(made / "source", work / "result")


def test_an_untouched_result_of_a_source_without_side_files_passes(work: Path) -> None:
    one = {"model.safetensors": {**model()[FIRST], **model()[SECOND]}}
    for config in (MODEL_CONFIG, None):
        source = write_checkpoint(work / f"source {config is None}", one, config=config)
        quantize_repo(source, work / f"result {config is None}", device="cpu", threads=1)
        check_untouched(source, work / f"result {config is None}")


def test_untouched_results_of_a_nemo_checkpoint_pass(made: Path, work: Path) -> None:
    """A converted one needs its manifest: without a record, a folder without FP8 may be any other folder."""
    folder = copy(made / NEMO, work / "converted")
    assert outcome(made / "nemo source", folder) == "passed"
    assert outcome(None, folder) == "passed"
    make_anew(folder)
    assert outcome(made / "nemo source", folder) == "passed"
    (folder / MANIFEST).unlink()
    assert outcome(made / "nemo source", folder) == "found"
    quantize_repo(made / "nemo source", work / "quantized", device="cpu", threads=1)
    check_untouched(made / "nemo source", work / "quantized")


def check_untouched(source: Path, folder: Path, digests: bool = True) -> None:
    assert outcome(source, folder) == "passed"
    assert outcome(None, folder) == ("passed" if digests else "found")
    make_anew(folder)
    assert outcome(source, folder) == "passed"
    assert outcome(None, folder) == "passed"
    (folder / MANIFEST).unlink()
    assert outcome(source, folder) == "passed"
    assert outcome(None, folder) == "found"


def test_no_verification_waits_long(made: Path, work: Path) -> None:
    """The slowest calls are those on files that never end or that nobody writes."""
    folder = copy(made / CHANNEL, work / "result")
    begun = time.monotonic()
    outcome(made / "source", folder)
    assert time.monotonic() - begun < SECONDS
    assert torch.get_num_threads() >= 1
