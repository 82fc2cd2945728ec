"""The journal: what is appended is read again, and nothing else ever is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.destinations.journal import Journal, parse
from nemotron_fp8.destinations.run_identity import RunIdentity
from nemotron_fp8.errors.destination import DamagedJournalError, OtherRunError
from nemotron_fp8.planning.receipt import NonFinite, ShardReceipt, entry_receipt, receipt_entry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ENTRIES = st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), min_size=1, max_size=6)
NAMES = st.text(min_size=1)


def written(folder: Path, entries: Sequence[dict[str, Any]]) -> Path:
    path = folder / "journal.jsonl"
    path.unlink(missing_ok=True)
    journal = Journal.create(path, folder / "temporary", entries[0])
    for entry in entries[1:]:
        journal.append(entry)
    journal.close()
    return path


@given(entries=ENTRIES)
def test_what_is_appended_is_read_again(
    entries: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also by a run that appends to it."""
    path = written(tmp_path_factory.mktemp("journal"), entries)
    journal = Journal.open(path)
    assert journal is not None
    assert journal.entries == entries
    journal.append({"more": 1})
    journal.close()
    again = Journal.open(path)
    assert again is not None
    assert again.entries == [*entries, {"more": 1}]
    again.close()
    assert [path.name for path in path.parent.iterdir()] == ["journal.jsonl"]


@given(entries=ENTRIES, data=st.data())
def test_a_cut_drops_lines_from_the_end(
    entries: list[dict[str, Any]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The lines that are still whole are read, and the file ends with them."""
    path = written(tmp_path_factory.mktemp("journal"), entries)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    left = whole[:cut].count(b"\n")
    journal = Journal.open(path)
    if not left:
        assert journal is None
        assert not path.exists()
        return
    assert journal is not None
    assert journal.entries == entries[:left]
    journal.close()
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:left])


@given(entries=ENTRIES, data=st.data())
def test_no_line_is_read_that_was_not_written(
    entries: list[dict[str, Any]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever byte is altered: what is read is a beginning of what was written, or nothing is."""
    text = bytearray(written(tmp_path_factory.mktemp("journal"), entries).read_bytes())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] ^= data.draw(st.integers(1, 255))
    try:
        found, _, _ = parse(bytes(text), "journal")
    except DamagedJournalError:
        return
    assert found == entries[: len(found)]
    assert len(found) < len(entries)


@pytest.mark.parametrize("change", ["swapped", "dropped", "twice"])
def test_lines_are_chained(change: str, tmp_path: Path) -> None:
    """A line counts only after those that it was written after."""
    path = written(tmp_path, [{"n": n} for n in range(4)])
    lines = path.read_bytes().splitlines(keepends=True)
    lines = {
        "swapped": [lines[0], lines[2], lines[1], lines[3]],
        "dropped": [lines[0], lines[2], lines[3]],
        "twice": [lines[0], lines[1], lines[1], lines[2], lines[3]],
    }[change]
    path.write_bytes(b"".join(lines))
    with pytest.raises(DamagedJournalError, match="--restart"):
        Journal.open(path)


def test_a_journal_is_never_made_over_another(tmp_path: Path) -> None:
    """Of two runs that begin at once, one makes it."""
    written(tmp_path, [{"first": 1}])
    with pytest.raises(FileExistsError):
        Journal.create(tmp_path / "journal.jsonl", tmp_path / "temporary", {"second": 2})
    assert not (tmp_path / "temporary").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Neither to read nor to append."""
    real = written(tmp_path, [{"first": 1}])
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(DamagedJournalError, match="the journal is a link"):
        Journal.open(tmp_path / "link")


@given(
    name=NAMES,
    size=st.integers(0),
    kept=st.frozensets(NAMES),
    nonfinite=st.lists(st.builds(NonFinite, NAMES, st.integers(1), st.tuples(st.integers(0)), NAMES)),
    small=st.lists(NAMES),
)
def test_a_receipt_survives(
    name: str, size: int, kept: frozenset[str], nonfinite: list[NonFinite], small: list[str]
) -> None:
    receipt = ShardReceipt(name, size, "0" * 64, kept, tuple(nonfinite), tuple(small))
    assert entry_receipt(json.loads(json.dumps(receipt_entry(receipt)))) == receipt


TERMS = RunIdentity("plan", {"numerics": "float32"}, {"a": "1 2", "b": "3 4"})


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (RunIdentity("plan", {"numerics": "original"}, TERMS.stamps), "recipe"),
        (RunIdentity("plan", TERMS.recipe, {"a": "1 2", "b": "3 5"}), "source"),
        (RunIdentity("plan", TERMS.recipe, {"a": "1 2"}), "source"),
        (RunIdentity("other", TERMS.recipe, TERMS.stamps), "plan"),
        (RunIdentity("plan", TERMS.recipe, TERMS.stamps, mode="in-place"), "mode"),
        (RunIdentity("plan", TERMS.recipe, TERMS.stamps, version="0.0.0"), "version"),
    ],
)
def test_other_terms_are_told_apart(other: RunIdentity, what: str) -> None:
    TERMS.check(TERMS.entry(), "journal")
    with pytest.raises(OtherRunError, match="--restart") as caught:
        other.check(TERMS.entry(), "journal")
    assert caught.value.what == what
