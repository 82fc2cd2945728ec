"""The destination appears all at once, is never touched in vain, and nothing else is ever lost."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Progress, Recipe, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.errors import (
    BudgetError,
    DestinationBusyError,
    DestinationError,
    DestinationExistsError,
    NonFiniteError,
    OverlapError,
)
from nemotron_fp8.planning.receipt import ShardReceipt
from tests.support.checkpoints import ONE, contents, empty, model, replace, snapshot, weight, write_checkpoint
from tests.support.run import folder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.destinations.folder import FolderDestination

OTHER = Recipe(ignore=("o_proj",))
"""A recipe with another result."""


def alone(destination: Path) -> None:
    """Nothing but the destination is in its folder: no partial one, no temporary file."""
    assert [path.name for path in destination.parent.iterdir()] == [destination.name]


# ---- what is there already ----


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("keep", [False, True], ids=["finite", "with NaN kept"])
def test_the_same_again_changes_nothing(tmp_path: Path, destination: Path, overwrite: bool, keep: bool) -> None:
    """This very result: told as unchanged, every file the same inode with the same times; also if it may overwrite."""
    shards = model()
    recipe = Recipe(nonfinite="keep") if keep else Recipe()
    if keep:
        shards["model-00002-of-00002.safetensors"]["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    source = write_checkpoint(tmp_path / "s", shards)
    first = quantize_repo(source, destination, recipe)
    before, folder = snapshot(destination), destination.stat()
    again = quantize_repo(source, destination, recipe, max_memory="3MiB", threads=1, overwrite=overwrite)
    assert again.unchanged
    assert not first.unchanged
    assert again.bytes_written == 0
    assert again.tensors_quantized == first.tensors_quantized
    assert snapshot(destination) == before
    assert (destination.stat().st_ino, destination.stat().st_mtime_ns) == (folder.st_ino, folder.st_mtime_ns)
    alone(destination)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FIRST = "model-00001-of-00002.safetensors"


def linked(path: Path) -> None:
    """Move a file out of its folder and leave a link to it."""
    home = path.parent.parent.parent / "elsewhere"
    path.rename(home)
    path.symlink_to(home)


def only_a_diary(folder: Path) -> None:
    empty(folder)
    (folder / "diary.txt").write_text("mine")


OTHERS: dict[str, Callable[[Path], object]] = {
    "a file more": lambda d: (d / "notes.txt").write_text("mine"),
    "a hidden file more": lambda d: (d / ".hidden").write_text("mine"),
    "a file less": lambda d: (d / "LICENSE").unlink(),
    "a shard less": lambda d: (d / FIRST).unlink(),
    "a byte changed in a shard": lambda d: flip(d / FIRST),
    "a byte less in a shard": lambda d: cut(d / FIRST),
    "a byte changed in config.json": lambda d: flip(d / "config.json"),
    "a side file changed": lambda d: flip(d / "LICENSE"),
    "a side file longer": lambda d: (d / "LICENSE").write_bytes(b"free beer"),
    "a folder for a file": lambda d: replace(d / "LICENSE", None),
    "a folder for a shard": lambda d: replace(d / FIRST, None),
    "a dangling link for a file": lambda d: replace(d / "LICENSE", Path("nowhere")),
    "a link to the same shard elsewhere": lambda d: linked(d / FIRST),
    "a link to the same file elsewhere": lambda d: linked(d / "LICENSE"),
    "something else altogether": only_a_diary,
}


@pytest.mark.parametrize("case", OTHERS)
def test_anything_else_is_refused_and_kept(checkpoint: Path, destination: Path, case: str) -> None:
    """Not this very result: refused without --overwrite, and left exactly as it was."""
    quantize_repo(checkpoint, destination)
    OTHERS[case](destination)
    before = snapshot(destination)
    with pytest.raises(DestinationExistsError, match="--overwrite") as caught:
        quantize_repo(checkpoint, destination)
    assert caught.value.path == str(destination)
    assert isinstance(caught.value, FileExistsError)
    assert snapshot(destination) == before
    alone(destination)
    quantize_repo(checkpoint, destination, overwrite=True)
    assert verify_repo(checkpoint, destination).ok
    alone(destination)


def test_another_recipes_result_is_refused(checkpoint: Path, destination: Path) -> None:
    quantize_repo(checkpoint, destination, OTHER)
    before = snapshot(destination)
    with pytest.raises(DestinationExistsError):
        quantize_repo(checkpoint, destination)
    assert snapshot(destination) == before
    alone(destination)


def test_an_empty_folder_is_taken(checkpoint: Path, destination: Path) -> None:
    destination.mkdir()
    quantize_repo(checkpoint, destination)
    assert verify_repo(checkpoint, destination).ok
    alone(destination)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_overwritten(checkpoint: Path, destination: Path, overwrite: bool) -> None:
    """--overwrite is about folders."""
    destination.write_text("mine")
    with pytest.raises(DestinationExistsError):
        quantize_repo(checkpoint, destination, overwrite=overwrite)
    assert destination.read_text() == "mine"
    alone(destination)


def test_a_dangling_link_is_no_empty_folder(checkpoint: Path, destination: Path) -> None:
    """The folder appears where the link leads, or the run is refused; the link stays one."""
    destination.symlink_to("elsewhere")
    quantize_repo(checkpoint, destination)
    assert destination.is_symlink()
    assert {path.name for path in destination.parent.iterdir()} == {"result", "elsewhere"}
    assert verify_repo(checkpoint, destination).ok


# ---- overwrite ----


def test_overwrite_exchanges_the_folders(checkpoint: Path, destination: Path) -> None:
    """All the old is gone, the new is complete, nothing is left beside it."""
    destination.mkdir()
    (destination / "diary.txt").write_text("old")
    quantize_repo(checkpoint, destination, overwrite=True)
    assert "diary.txt" not in contents(destination)
    assert verify_repo(checkpoint, destination).ok
    alone(destination)


def test_overwrite_that_fails_keeps_the_old(tmp_path: Path, destination: Path) -> None:
    """A refusal in the middle of the work leaves the old folder as it was."""
    destination.mkdir()
    (destination / "diary.txt").write_text("old")
    before = snapshot(destination)
    tensors = {"a.o_proj.weight": weight(4, 4), "b.o_proj.weight": weight(4, 4) * float("inf")}
    source = write_checkpoint(tmp_path / "s", {ONE: tensors})
    with pytest.raises(NonFiniteError):
        quantize_repo(source, destination, overwrite=True)
    with pytest.raises(BudgetError):
        quantize_repo(source, destination, overwrite=True, max_memory=1000)
    assert snapshot(destination) == before
    alone(destination)


# ---- all at once ----


def test_nothing_is_to_be_seen_until_all_is(checkpoint: Path, destination: Path) -> None:
    """While a conversion runs there is no destination; with --overwrite it is the old one, whole."""
    seen: list[bool] = []
    quantize_repo(checkpoint, destination, progress=lambda _: seen.append(destination.exists()))
    assert seen
    assert not any(seen)
    old = snapshot(destination)
    seen = []
    quantize_repo(
        checkpoint,
        destination,
        OTHER,
        progress=lambda _: seen.append(snapshot(destination) == old),
        overwrite=True,
    )
    assert seen
    assert all(seen)
    assert snapshot(destination) != old


def test_a_reader_sees_all_or_nothing(checkpoint: Path, destination: Path) -> None:
    """A reader that polls while folders are exchanged finds one result or the other, never a mixture.

    Nor nothing. (Who has opened the old folder before the exchange may see it go; that is told apart by its inode.)
    """
    results = []
    for recipe in (Recipe(), OTHER):
        quantize_repo(checkpoint, destination, recipe, overwrite=True)
        results.append(contents(destination))
    assert results[0] != results[1]
    names = {frozenset(result) for result in results}
    found: list[frozenset[str]] = []
    done = False

    def poll() -> None:
        while not done:
            try:
                before = destination.stat().st_ino
                listed = frozenset(path.name for path in destination.iterdir())
                if destination.stat().st_ino == before:
                    found.append(listed)
            except FileNotFoundError:
                found.append(frozenset())

    reader = Thread(target=poll)
    reader.start()
    try:
        for i in range(4):
            quantize_repo(checkpoint, destination, (Recipe(), OTHER)[i % 2], overwrite=True)
    finally:
        done = True
        reader.join()
    assert len(found) > 50
    assert set(found) <= names


def test_two_at_once_do_not_disturb_each_other(checkpoint: Path, destination: Path) -> None:
    """A second run for the same destination is refused while the first is at work, which then succeeds."""
    caught: list[BaseException] = []

    def second(_: Progress) -> None:
        if not caught:
            try:
                quantize_repo(checkpoint, destination)
            except DestinationBusyError as error:
                caught.append(error)

    quantize_repo(checkpoint, destination, progress=second, threads=1)
    (error,) = caught
    assert isinstance(error, DestinationBusyError)
    assert error.owner == f"process {os.getpid()} on {socket.gethostname()}"
    assert verify_repo(checkpoint, destination).ok
    alone(destination)


# ---- source and destination inside each other ----


def test_overlap_is_refused(checkpoint: Path) -> None:
    """The same folder, inside, around, and the folder that the work is done in; the source is not touched."""
    before = snapshot(checkpoint)
    partial = checkpoint.rename(checkpoint.with_name("result.partial"))
    inner = partial / "inner"
    for source, destination in [
        (partial, partial),
        (partial, inner),
        (partial, partial / "." / ".." / partial.name),
        (partial, partial.parent),
        (partial, partial.parent / "result"),
    ]:
        for overwrite in (False, True):
            with pytest.raises(OverlapError) as caught:
                quantize_repo(source, destination, overwrite=overwrite)
            assert isinstance(caught.value, DestinationError)
    assert snapshot(partial) == before
    assert not inner.exists()


def test_overlap_is_refused_through_links(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever the names say: what counts is where they lead."""
    before = snapshot(checkpoint)
    (tmp_path / "link").symlink_to(checkpoint)
    (tmp_path / "up").symlink_to(tmp_path)
    for source, destination in [
        (checkpoint, tmp_path / "link"),
        (tmp_path / "link", checkpoint),
        (checkpoint, tmp_path / "link" / "inside"),
        (checkpoint, tmp_path / "up" / "source"),
        (checkpoint, tmp_path / "up"),
        (tmp_path / "link", tmp_path / "up" / "source" / "inside"),
    ]:
        with pytest.raises(OverlapError):
            quantize_repo(source, destination, overwrite=True)
    assert snapshot(checkpoint) == before


def test_neighbors_with_alike_names_do_not_overlap(checkpoint: Path) -> None:
    quantize_repo(checkpoint, Path(f"{checkpoint}-FP8"))
    assert verify_repo(checkpoint, f"{checkpoint}-FP8").ok


# ---- what else may stand beside it ----


def test_a_persons_folder_called_partial_is_not_lost(checkpoint: Path, destination: Path) -> None:
    """A folder of that name which no conversion has made: what is in it survives."""
    partial = destination.with_name("result.partial")
    partial.mkdir()
    (partial / "diary.txt").write_text("mine")
    try:
        quantize_repo(checkpoint, destination)
    except DestinationError:
        assert not destination.exists()
    assert (partial / "diary.txt").read_text() == "mine"


def test_a_destination_that_cannot_be_made(checkpoint: Path, tmp_path: Path) -> None:
    """Its parent is a file: an error of ours, and nothing changed."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError):
        quantize_repo(checkpoint, tmp_path / "file" / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


def test_parents_are_made(checkpoint: Path, tmp_path: Path) -> None:
    quantize_repo(checkpoint, tmp_path / "a" / "b" / "c")
    assert verify_repo(checkpoint, tmp_path / "a" / "b" / "c").ok


def test_parents_that_were_made_go_when_all_fails(tmp_path: Path) -> None:
    """Folders that were not there before are not there after a refusal either."""
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": weight(2, 2) * float("nan")}})
    with pytest.raises(NonFiniteError):
        quantize_repo(source, tmp_path / "new" / "newer" / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_must_not_be_written(checkpoint: Path, destination: Path) -> None:
    destination.parent.chmod(0o500)
    try:
        with pytest.raises(DestinationError, match="Permission denied"):
            quantize_repo(checkpoint, destination)
    finally:
        destination.parent.chmod(0o700)


# ---- shards are recorded one by one, beside the next one's work ----

SHARDS = 4


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FolderDestination]:
    """A destination of four shards, open; its parameter: in how many threads it works."""
    shards = {
        f"model-{i:05d}-of-{SHARDS:05d}.safetensors": {f"layers.{i}.up_proj.weight": weight(8, 8)}
        for i in range(SHARDS)
    }
    source = write_checkpoint(tmp_path / "source", shards)
    with folder_of(plan_repo(source), tmp_path / "out", source, request.param) as opened:
        yield opened


def record(folder: FolderDestination, number: int) -> None:
    """Stage and record a shard of any content."""
    with folder.staging.stage(f"model-{number:05d}-of-{SHARDS:05d}.safetensors", 2) as sink:
        sink.write_at(0, memoryview(b"ab"))
        staged = sink.finish()
    folder.record(ShardReceipt(staged.name, staged.size, staged.sha256))


def numbers(folder: FolderDestination) -> list[int]:
    return [int(name[6:11]) for name in folder.finished()]


@pytest.mark.parametrize("folder", [1, 4], indirect=True)
def test_shards_are_recorded_in_order(folder: FolderDestination) -> None:
    for number in range(SHARDS):
        record(folder, number)
    folder.wait()
    assert numbers(folder) == list(range(SHARDS))


@pytest.mark.parametrize("folder", [1, 4], indirect=True)
def test_a_shard_that_cannot_be_recorded_ends_the_run(
    folder: FolderDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one has failed none is begun, and the error comes up by the next call at the latest."""
    begun: list[int] = []

    def commit_file(made: Path, _size: int, _final: Path) -> None:
        begun.append(int(made.name[6:11]))
        if begun[-1] == 1:
            raise ZeroDivisionError

    monkeypatch.setattr("nemotron_fp8.destinations.folder.commit_file", commit_file)
    record(folder, 0)

    def the_others() -> None:
        for number in range(1, SHARDS):
            record(folder, number)

    with pytest.raises(ZeroDivisionError):
        the_others()
    assert begun == [0, 1]
    assert numbers(folder) == [0]


@pytest.mark.parametrize("threads", [1, 4])
def test_leaving_waits_for_what_is_being_recorded(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source", {ONE: {"up_proj.weight": weight(8, 8)}})

    def slow(_made: Path, _size: int, _final: Path) -> None:
        time.sleep(0.05)
        (tmp_path / "done").touch()

    monkeypatch.setattr("nemotron_fp8.destinations.folder.commit_file", slow)
    with folder_of(plan_repo(source), tmp_path / "out", source, threads) as folder:
        record(folder, 0)
    assert (tmp_path / "done").exists()
