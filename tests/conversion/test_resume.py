"""Leftovers of an unfinished run, the runs that may resume it, and the changes that a finished result reports.

The kills, the full disks and the losses of power are in tests/faults; here are the rules, one at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import NemotronFp8Error, Recipe, quantize_repo, verify_repo
from nemotron_fp8.destinations import folder
from nemotron_fp8.documents.manifest import read_manifest
from nemotron_fp8.errors import (
    AlreadyQuantizedError,
    NonFiniteError,
    SourceChangedError,
    SourceLinkError,
    UnfinishedError,
    WriteError,
)
from nemotron_fp8.errors.destination import DamagedJournalError, DiskSpaceError, InPlaceError, OtherRunError
from nemotron_fp8.planning.layouts import layouts
from tests.support.amaxes import amaxes_of
from tests.support.checkpoints import checkpoint_files, contents, edit, snapshot, weight, write_checkpoint
from tests.support.recipes import PUBLISHED, SHARED
from tests.support.stops import StoppedError, stop_at, stop_when_marked

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.progress import Progress

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def half(checkpoint: Path, destination: Path) -> Path:
    """A destination of which the first shard is finished; its partial folder."""
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, destination, threads=1, progress=stop_at(SECOND))
    assert not destination.exists()
    return destination.with_name("result.partial")


def test_a_stopped_run_is_carried_on(checkpoint: Path, destination: Path, half: Path, tmp_path: Path) -> None:
    """With the same bytes, whatever budget and threads; the finished shard is not made again."""
    report = quantize_repo(checkpoint, destination, threads=3, max_memory="64MiB")
    quantize_repo(checkpoint, tmp_path / "straight")
    assert report.resumed == 1
    assert contents(destination) == contents(tmp_path / "straight")
    assert not half.exists()


def test_another_recipe_is_refused_until_restarted(checkpoint: Path, destination: Path, half: Path) -> None:
    before = contents(half / "out")
    with pytest.raises(OtherRunError, match="--restart") as caught:
        quantize_repo(checkpoint, destination, Recipe(ignore=("down",)), threads=1)
    assert caught.value.what == "recipe"
    assert contents(half / "out") == before
    assert quantize_repo(checkpoint, destination, Recipe(ignore=("down",)), threads=1, restart=True).resumed == 0


def test_a_changed_source_is_refused(checkpoint: Path, destination: Path, half: Path) -> None:
    assert half.exists()
    os.utime(checkpoint / SECOND, ns=(1, 1))
    with pytest.raises(OtherRunError) as caught:
        quantize_repo(checkpoint, destination, threads=1)
    assert caught.value.what == "source"


def test_a_damaged_shard_is_made_again(checkpoint: Path, destination: Path, half: Path) -> None:
    (shard,) = (half / "out").iterdir()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert quantize_repo(checkpoint, destination, threads=1).resumed == 0
    assert verify_repo(checkpoint, destination).ok


def test_without_digests_shards_are_made_again(checkpoint: Path, destination: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, destination, threads=1, progress=stop_at(SECOND), digests=False)
    assert quantize_repo(checkpoint, destination, threads=1, digests=False).resumed == 0
    manifest = read_manifest(destination)
    assert manifest is not None
    assert not manifest.has_digests
    quantize_repo(checkpoint, tmp_path / "with")
    assert checkpoint_files(destination) == checkpoint_files(tmp_path / "with")


@pytest.mark.parametrize("in_place", [False, True])
def test_nothing_is_left_of_a_source_that_cannot_be_converted(
    in_place: bool, checkpoint: Path, destination: Path
) -> None:
    edit(checkpoint / SECOND, {"model.layers.1.mlp.down_proj.weight": torch.full((24, 40), torch.nan).bfloat16()})
    before = snapshot(checkpoint)
    with pytest.raises(NonFiniteError):
        quantize_repo(checkpoint, None if in_place else destination, in_place=in_place)
    assert snapshot(checkpoint) == before
    assert list(destination.parent.iterdir()) == []


@pytest.mark.parametrize("in_place", [False, True])
def test_too_little_room_is_refused_at_once(
    in_place: bool, checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(checkpoint)
    real = os.statvfs

    class Full:
        f_bavail, f_frsize = 1, 4096

    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda path: Full() if real(path) else None)
        with pytest.raises(DiskSpaceError, match=r"free [0-9,]+ more") as caught:
            quantize_repo(checkpoint, None if in_place else destination, in_place=in_place)
    assert caught.value.missing == caught.value.needed - 4096 > 0
    assert snapshot(checkpoint) == before
    assert list(destination.parent.iterdir()) == []


def test_in_place_gives_what_a_destination_gives(checkpoint: Path, destination: Path) -> None:
    quantize_repo(checkpoint, destination)
    expected = contents(destination)
    quantize_repo(checkpoint, in_place=True)
    assert contents(checkpoint) == expected
    before = snapshot(checkpoint)
    assert quantize_repo(checkpoint, in_place=True).unchanged
    assert snapshot(checkpoint) == before
    with pytest.raises(AlreadyQuantizedError):
        quantize_repo(checkpoint, None, Recipe(ignore=("down",)), in_place=True)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(format=layout.name, granularity=scheme.granularity, activations=scheme.activations, nonfinite="keep")
        for layout in layouts()
        for scheme in layout.readers
        if scheme.activations != "none"
    ],
    ids=lambda recipe: f"{recipe.format} {recipe.granularity} {recipe.activations}",
)
def test_in_place_a_module_in_two_shards_is_left_unquantized_as_in_a_destination(
    tmp_path: Path, recipe: Recipe
) -> None:
    """Amaxes of the first shard are needed after its replacement, in the shape that every granularity holds."""
    stem = "model.layers.0.mlp"
    tensors = {f"{stem}.{name}_proj.weight": weight(128, 256, seed=i) for i, name in enumerate(("gate", "up", "down"))}
    tensors[f"{stem}.gate_proj.weight"][3, 5] = torch.nan
    first = {name: tensors.pop(name) for name in [f"{stem}.gate_proj.weight", f"{stem}.down_proj.weight"]}
    source = write_checkpoint(tmp_path / "source", {FIRST: first, SECOND: tensors}, config={"model_type": "llama"})
    amaxes = amaxes_of(source) if recipe.needs_amaxes else None
    quantize_repo(source, tmp_path / "fp8", recipe, device="cpu", amaxes=amaxes)
    report = quantize_repo(source, None, recipe, device="cpu", in_place=True, amaxes=amaxes)
    assert (report.tensors_quantized, report.tensors_kept) == (1, 2)
    assert contents(source) == contents(tmp_path / "fp8")


def test_in_place_half_way_is_visible_and_carried_on(checkpoint: Path, destination: Path) -> None:
    """Scales shared with a shard that is gone come from the journal."""
    recipe = SHARED
    quantize_repo(checkpoint, destination, recipe)
    expected, config = contents(destination), (checkpoint / "config.json").read_bytes()
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, None, recipe, in_place=True, threads=1, progress=stop_when_marked(checkpoint))
    assert (checkpoint / "config.json").read_bytes() == config
    with pytest.raises(UnfinishedError, match="--in-place"):
        quantize_repo(checkpoint, destination.with_name("other"))
    with pytest.raises(InPlaceError, match="already replaced"):
        quantize_repo(checkpoint, None, recipe, in_place=True, restart=True)
    with pytest.raises(OtherRunError):
        quantize_repo(checkpoint, None, PUBLISHED, in_place=True)
    assert quantize_repo(checkpoint, None, recipe, in_place=True).resumed == 1
    assert contents(checkpoint) == expected


@pytest.mark.parametrize("recipe", [Recipe(), SHARED])
def test_in_place_lost_amaxes_are_computed_again_if_their_tensors_still_exist(
    checkpoint: Path, destination: Path, recipe: Recipe
) -> None:
    """In the layout with shared scales they depend on the replaced shard."""
    quantize_repo(checkpoint, destination, recipe)
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, None, recipe, in_place=True, threads=1, progress=stop_when_marked(checkpoint))
    amaxes = checkpoint / ".nemotron_fp8/amaxes" / SECOND
    kept = amaxes.read_bytes()
    amaxes.write_bytes(kept[:-4] + b"\1\2\3\4")
    if recipe == SHARED:
        before = plain_files(checkpoint)
        with pytest.raises(InPlaceError, match=f"amaxes of {SECOND}.*model-00001-of-00002.*already replaced; restore"):
            quantize_repo(checkpoint, None, recipe, in_place=True)
        assert plain_files(checkpoint) == before
        amaxes.write_bytes(kept)
    assert quantize_repo(checkpoint, None, recipe, in_place=True).resumed == 1
    assert contents(checkpoint) == contents(destination)


JOURNAL_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "line 1 is damaged": lambda data: data.replace(b'"', b"'", 1),
    "line 2 is damaged": lambda data: data.replace(b'"kind":"amax', b'"kind":"amin', 1),
    "is missing or empty": lambda data: b"",
}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("what", JOURNAL_DAMAGE)
def test_in_place_half_way_without_its_journal_says_that_nothing_helps(
    checkpoint: Path, what: str, restart: bool
) -> None:
    """Which shards are replaced, and the amaxes, stood there alone: no advice to start over, which is refused next."""
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, in_place=True, threads=1, progress=stop_when_marked(checkpoint))
    journal = checkpoint / ".nemotron_fp8/journal.jsonl"
    journal.write_bytes(JOURNAL_DAMAGE[what](journal.read_bytes()))
    before = plain_files(checkpoint), journal.read_bytes()
    with pytest.raises(InPlaceError, match=rf"\({what}\), so it can be neither resumed nor restarted; restore"):
        quantize_repo(checkpoint, in_place=True, restart=restart)
    assert (plain_files(checkpoint), journal.read_bytes() if journal.exists() else b"") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_in_place_of_the_journal_is_refused_and_can_be_discarded(
    checkpoint: Path, destination: Path, half: Path, tmp_path: Path, overwrite: bool
) -> None:
    """Also where something stands at the destination, whose leftovers are looked at first."""
    outside = tmp_path / "outside"
    outside.write_text("{}")
    (half / "journal.jsonl").unlink()
    (half / "journal.jsonl").symlink_to(outside)
    if overwrite:
        destination.mkdir()
        (destination / "something.txt").write_text("else")
    with pytest.raises(DamagedJournalError, match="the journal is a link; discard it and start over"):
        quantize_repo(checkpoint, destination, overwrite=overwrite)
    quantize_repo(checkpoint, destination, overwrite=overwrite, restart=True)
    assert verify_repo(checkpoint, destination).ok
    assert outside.read_text() == "{}"
    assert not half.exists()


def test_in_place_before_anything_is_replaced_a_damaged_journal_can_be_discarded(
    checkpoint: Path, destination: Path
) -> None:
    quantize_repo(checkpoint, destination)
    expected = contents(destination)
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, in_place=True, threads=1, progress=stop_at(SECOND))
    journal = checkpoint / ".nemotron_fp8/journal.jsonl"
    journal.write_bytes(JOURNAL_DAMAGE["line 1 is damaged"](journal.read_bytes()))
    with pytest.raises(DamagedJournalError, match="--restart"):
        quantize_repo(checkpoint, in_place=True)
    quantize_repo(checkpoint, in_place=True, restart=True)
    assert contents(checkpoint) == expected


def plain_files(folder: Path) -> dict[str, bytes]:
    """Its files, without its working folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_in_place_refuses_links(checkpoint: Path) -> None:
    (checkpoint / SECOND).rename(checkpoint / "blob")
    (checkpoint / SECOND).symlink_to("blob")
    before = snapshot(checkpoint)
    with pytest.raises(InPlaceError, match="link"):
        quantize_repo(checkpoint, in_place=True)
    assert snapshot(checkpoint) == before


def test_a_link_out_of_the_source_is_refused(checkpoint: Path, destination: Path, tmp_path: Path) -> None:
    (checkpoint / SECOND).rename(tmp_path / "elsewhere")
    (checkpoint / SECOND).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceLinkError) as caught:
        quantize_repo(checkpoint, destination)
    assert caught.value.file == SECOND


def test_a_source_that_changes_between_plan_and_read_is_noticed(checkpoint: Path, destination: Path) -> None:
    def change(progress: Progress) -> None:
        if progress.shard != SECOND:
            edit(checkpoint / SECOND, {"model.layers.1.mlp.down_proj.weight": weight(24, 40, seed=9)})

    with pytest.raises(SourceChangedError):
        quantize_repo(checkpoint, destination, threads=1, progress=change)
    assert not destination.exists()


def test_a_result_tells_what_was_changed_in_it(checkpoint: Path, destination: Path) -> None:
    """Every file of it, also the manifest, by one bit."""
    quantize_repo(checkpoint, destination)
    assert verify_repo(None, destination).ok
    for path in sorted(destination.iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert not verify_repo(None, destination).ok, path.name
        path.write_bytes(data)
    (destination / "extra.safetensors").write_bytes(b"")
    assert not verify_repo(None, destination).ok


def test_what_stands_in_the_way_of_the_partial_folder(checkpoint: Path, destination: Path, tmp_path: Path) -> None:
    """A link there is neither followed nor removed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    destination.with_name("result.partial").symlink_to(outside)
    with pytest.raises(NemotronFp8Error):
        quantize_repo(checkpoint, destination)
    assert contents(outside) == {"kept": b"kept"}


@pytest.mark.parametrize("other", ["starts", "ends"])
def test_a_run_that_the_lock_did_not_keep_out(
    other: str, checkpoint: Path, destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another machine, where the file system grants every lock: whatever it does when this one has looked at
    what it is about to publish, what is published is whole.
    """
    quantize_repo(checkpoint, tmp_path / "expected", overwrite=True)
    expected = contents(tmp_path / "expected")
    monkeypatch.setattr(fcntl, "flock", lambda _fd, _how: None)
    looked_at: list[Path] = []
    check = folder._check_result

    def then_comes_another(result: Path, *rest: object) -> None:
        check(result, *rest)  # type: ignore[arg-type]  # as it was called
        looked_at.append(result)
        if len(looked_at) == 1:
            stop = stop_at("model-00001-of-00002.safetensors") if other == "starts" else None
            with suppress(StoppedError):
                quantize_repo(checkpoint, destination, threads=1, overwrite=True, progress=stop)  # type: ignore[arg-type]  # a callback

    monkeypatch.setattr(folder, "_check_result", then_comes_another)
    with suppress(NemotronFp8Error):  # one of the two may lose
        quantize_repo(checkpoint, destination, threads=1, overwrite=True)
    assert looked_at
    if destination.exists():
        assert contents(destination) == expected
    quantize_repo(checkpoint, destination, threads=1, overwrite=True)
    assert contents(destination) == expected
    assert not destination.with_name("result.partial").exists()


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EXDEV])
def test_where_there_are_no_hard_links(
    refusal: int, checkpoint: Path, destination: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the same, and nothing stays behind."""
    quantize_repo(checkpoint, tmp_path / "expected")

    def link(first: str, second: str) -> None:
        raise OSError(refusal, os.strerror(refusal), first, None, second)

    monkeypatch.setattr(os, "link", link)
    quantize_repo(checkpoint, destination)
    assert contents(destination) == contents(tmp_path / "expected")
    assert not half.exists()


@pytest.mark.parametrize("stop", ["an error", "a kill"])
def test_stopped_at_the_rename_itself(
    stop: str, checkpoint: Path, destination: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No finished shard is made again: a kill leaves them where they were about to be published from."""
    shard = "model-00001-of-00002.safetensors"
    if stop == "a kill":
        result = half / "work-00000000-1-1-00000000.result"  # of a system that is no longer known
        result.mkdir()
        (half / "out" / shard).rename(result / shard)
    else:
        rename = os.rename

        def refused(first: Path, second: Path) -> None:
            if Path(second) == destination:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(first))
            rename(first, second)

        with monkeypatch.context() as patched, pytest.raises(WriteError, match="Input/output"):
            patched.setattr(os, "rename", refused)
            quantize_repo(checkpoint, destination)
        assert sorted(path.name for path in (half / "out").iterdir()) == [shard, SECOND]
    assert quantize_repo(checkpoint, destination).resumed == (1 if stop == "a kill" else 2)
    assert (destination / shard).stat().st_nlink == 1
    assert not half.exists()
