"""The saved state of an evaluation: complete after every save, checked before use, locked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from nemotron_fp8 import NemotronFp8Error
from nemotron_fp8.errors import EvaluationBusyError, EvaluationStateError, WriteError
from nemotron_fp8.inference import state as module
from nemotron_fp8.inference.state import STATE, Saved, SavedState, private_folder

CLIPPED = [{}, {"a.0 (keys)": [0, 448], "b\u00e9": [3, 4]}]
AMAXES = {"inputs": {"a.0": 448.0, "b\u00e9": 0.0}, "k": {}}


def hidden(seed: int) -> torch.Tensor:
    return torch.randn((2, 3, 5, 7), generator=torch.Generator().manual_seed(seed)).bfloat16()


def save(folder: Path, layers: int, identity: str = "a") -> None:
    with SavedState(folder, identity) as state:
        state.save(hidden(layers), Saved(layers, [[0.5] * layers], AMAXES, CLIPPED))


def load(folder: Path, identity: str = "a") -> tuple[Saved | None, torch.Tensor]:
    target = torch.zeros_like(hidden(0))
    with SavedState(folder, identity) as state:
        return state.load(target), target


def test_a_saved_state_is_loaded_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "s", 3)
    saved, found = load(tmp_path / "s")
    assert saved == Saved(3, [[0.5] * 3], AMAXES, CLIPPED)
    assert torch.equal(found, hidden(3))


def test_only_the_last_hidden_states_remain(tmp_path: Path) -> None:
    for layers in range(1, 4):
        save(tmp_path / "s", layers)
    assert sorted(path.name for path in (tmp_path / "s" / "out").iterdir()) == ["hidden-000003.bin", STATE]


def test_a_folder_without_a_state_is_removed_and_a_finished_one_too(tmp_path: Path) -> None:
    with SavedState(tmp_path / "a" / "s", "a"):
        pass
    assert not (tmp_path / "a").exists()
    with SavedState(tmp_path / "b" / "s", "a") as state:
        state.save(hidden(1), Saved(1, [[0.5]]))
        state.discard()
    assert not (tmp_path / "b").exists()


def test_the_state_of_another_evaluation_is_no_state_of_this_one(tmp_path: Path) -> None:
    """Hours of work are not discarded without a word."""
    save(tmp_path / "s", 3)
    with pytest.raises(EvaluationStateError, match=r"is of other checkpoints.*--restart"):
        load(tmp_path / "s", "b")
    assert load(tmp_path / "s")[0] == Saved(3, [[0.5] * 3], AMAXES, CLIPPED)


def test_private_folders_of_killed_runs_are_removed(tmp_path: Path) -> None:
    with private_folder(tmp_path / "s") as folder:
        mine = folder.name.split("-")
        dead = tmp_path / "s" / "-".join((*mine[:2], "999999999", "1", mine[4]))
        dead.mkdir()
    assert not folder.exists()
    with private_folder(tmp_path / "s") as folder:
        assert not dead.exists()


def test_every_damaged_byte_of_the_hidden_states_is_found(tmp_path: Path) -> None:
    save(tmp_path / "s", 1)
    path = tmp_path / "s" / "out" / "hidden-000001.bin"
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(EvaluationStateError, match="SHA-256"):
            load(tmp_path / "s")
    for wrong in (whole[:-1], whole + b"x", b""):
        path.write_bytes(wrong)
        with pytest.raises(EvaluationStateError, match="bytes of this state"):
            load(tmp_path / "s")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvaluationStateError):
        load(tmp_path / "s")


def test_every_damage_of_the_description_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path / "s", 2)
    path = tmp_path / "s" / "out" / STATE
    whole = path.read_bytes()
    for at in range(len(whole)):
        for wrong in (whole[:at], whole[:at] + b"9" + whole[at + 1 :], whole[:at] + b'"' + whole[at + 1 :]):
            path.write_bytes(wrong)
            try:
                saved, found = load(tmp_path / "s")
            except NemotronFp8Error as error:
                assert "\n" not in str(error)
            else:
                # A changed figure: no other value passes.
                assert saved is not None
                assert saved.layers == 2
                assert torch.equal(found, hidden(2))


@pytest.mark.parametrize("field", ["layers", "errors", "amaxes", "clipped", "sha256", "schema"])
@pytest.mark.parametrize(
    "value",
    [None, -1, 1 << 70, "x", [], {}, [[None]], [["x", 1]], 1.5, True, {"k": 1}, {"k": {"a": -1}}, {"k": {"a": "1"}}],
)
def test_a_wrong_value_is_an_error(tmp_path: Path, field: str, value: object) -> None:
    save(tmp_path / "s", 2)
    path = tmp_path / "s" / "out" / STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    if (field, value) in (("errors", []), ("amaxes", {}), ("clipped", [])):
        return  # a run that finds none
    with pytest.raises(EvaluationStateError):
        load(tmp_path / "s")


def test_two_runs_of_one_evaluation(tmp_path: Path) -> None:
    with SavedState(tmp_path / "s", "a"), pytest.raises(EvaluationBusyError, match="does the same run"):
        SavedState(tmp_path / "s", "a")


@pytest.mark.parametrize("call", ["open", "fdopen", "fsync", "rename"])
def test_a_failed_save_leaves_the_state_before(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "s", 1)
    real = getattr(os, call)
    for failing in range(1, 9):
        count = 0

        def fail(*args: object, _failing: int = failing, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == _failing:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with SavedState(tmp_path / "s", "a") as state:
            monkeypatch.setattr(module.os, call, fail)
            try:
                state.save(hidden(2), Saved(2, [[0.5] * 2]))
            except WriteError:
                failed = True
            else:
                failed = False
            monkeypatch.undo()
        saved, found = load(tmp_path / "s")
        assert saved is not None
        assert torch.equal(found, hidden(saved.layers))
        if not failed:
            assert saved.layers == 2
            return
        assert saved.layers in (1, 2)
        save(tmp_path / "s", 1)
    raise AssertionError("the last count is beyond the calls of a save")


@pytest.mark.parametrize("file", ["notes.txt", "out/notes.txt", "out/sub/notes.txt"])
def test_a_folder_with_other_files_is_rejected_and_unchanged(file: str, tmp_path: Path) -> None:
    """The folder of a state is removed at the end, with ``out`` in it, which is a common name of results."""
    path = tmp_path / "s" / file
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(WriteError, match=r"no part of a saved state; choose another folder .* \(--state-dir\)"):
        SavedState(tmp_path / "s", "a")
    assert [each for each in (tmp_path / "s").rglob("*") if each.is_file()] == [path]
    assert path.read_text() == "mine"


@pytest.mark.parametrize("path", ["/proc/none/s", "/dev/null/s"])
def test_a_folder_that_cannot_be_made_names_its_option(path: str) -> None:
    with pytest.raises(WriteError, match=r"\(--state-dir\)"):
        SavedState(Path(path), "a")
