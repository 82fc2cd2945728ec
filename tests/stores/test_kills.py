"""Kills of a run at its requests: a reader sees nothing or everything, and the next run ends with the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.stores.writing import checkpoint_of, contents, convert, files_of, killed_at, observe

if TYPE_CHECKING:
    from pathlib import Path

    from tests.store_server.server import StoreServer
    from tests.support.counts import Counted

PARTS = 6


def kill_and_resume(
    store: StoreServer, tmp_path: Path, numbers: range, moment: str, again: range = range(0)
) -> tuple[int, int]:
    """Kill runs at requests with these numbers, and resume each; return kills, and results that a reader saw.

    Args:
        store: the server.
        tmp_path: folder of the test.
        numbers: requests to kill at.
        moment: ``before`` or ``after`` the server acts on them.
        again: requests of the resumed run to kill at, one of them after each kill, in turn.
    """
    source = checkpoint_of(tmp_path / "source", 2)
    convert(source, tmp_path / "local")
    result, seen, kills = files_of(tmp_path / "local"), 0, 0
    for number in numbers:
        store.reset()
        store.create("bucket")
        if not killed_at(store, source, number, moment):
            assert contents(store) == result
            return kills, seen
        kills += 1
        seen += observe(contents(store), result)
        if again and killed_at(store, source, again[kills % len(again)], moment):
            kills += 1
            seen += observe(contents(store), result)
        convert(source)
        assert contents(store) == result, number
        assert convert(source).unchanged
    raise AssertionError("a run makes more requests than this test is prepared for")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_before_and_after_every_14th_request(store: StoreServer, tmp_path: Path, moment: str) -> None:
    kills, _ = kill_and_resume(store, tmp_path, range(4, 500, 14), moment)
    assert kills >= 2


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_before_and_after_every_request(
    store: StoreServer, tmp_path: Path, moment: str, part: int, counted: Counted
) -> None:
    kills, seen = kill_and_resume(store, tmp_path, range(part, 500, PARTS), moment)
    assert kills >= 36 // PARTS
    counted("kills", kills)
    counted("kills after which a reader saw a complete result", seen)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_again_while_a_killed_run_is_resumed(
    store: StoreServer, tmp_path: Path, moment: str, part: int, counted: Counted
) -> None:
    kills, _ = kill_and_resume(store, tmp_path, range(part, 500, PARTS), moment, range(2 * part, 40, 3))
    assert kills >= 48 // PARTS
    counted("kills, two in a row", kills)
