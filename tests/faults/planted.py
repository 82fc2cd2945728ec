"""Faults that are planted on purpose. What does not find these would not find others."""

from __future__ import annotations

import os
import random
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults import flips, power
from tests.faults.kills import kill
from tests.faults.process import calls, forked
from tests.faults.row import Outcome, Row, Share
from tests.faults.tools import STRACE
from tests.faults.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from tests.faults.world import Mode

TRIES = 60


@contextmanager
def planted(module: ModuleType | type, name: str, value: object) -> Iterator[None]:
    """Put something else in place of a function for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class Planted(Row):
    """Faults of the kinds that the other rows look for."""

    name, title = (
        "planted-faults",
        "planted faults: no sync, no re-hash, amaxes not checked, files moved one by one, a link followed",
    )
    target = "all found"
    needs = (STRACE,)

    def cases(self, share: Share) -> Iterator[object]:
        """All."""
        del share
        yield from ("shards not synced", "folders not synced", "in place, folders not synced")
        yield from ("shards not hashed again", "amaxes not checked", "published one by one")

    def run(self, case: str) -> Outcome:
        """Plant it, and look until it is found."""
        found: Callable[[], bool] = {
            "shards not synced": self._unsynced_shards,
            "folders not synced": lambda: self._unsynced_folders("folder"),
            "in place, folders not synced": lambda: self._unsynced_folders("in-place"),
            "shards not hashed again": self._unhashed,
            "amaxes not checked": self._unchecked,
            "published one by one": self._piecemeal,
        }[case]
        return Outcome([] if found() else ["not found"], {"found": 1})

    def _unsynced_shards(self) -> bool:
        from nemotron_fp8.destinations import file_sink

        def commit_file(made: Path, size: int, final: Path) -> None:
            del size
            made.rename(final)
            file_sink.sync_folder(final.parent)

        from nemotron_fp8.destinations import folder

        with planted(folder, "commit_file", commit_file):
            return _lost("folder")

    def _unsynced_folders(self, mode: Mode) -> bool:
        from nemotron_fp8.conversion import in_place
        from nemotron_fp8.destinations import file_sink, folder, partial_folder

        def nothing(path: Path) -> None:
            del path

        with (
            planted(folder, "sync_folder", nothing),
            planted(in_place, "sync_folder", nothing),
            planted(partial_folder, "sync_folder", nothing),
            planted(file_sink, "sync_folder", nothing),
        ):
            return _lost(mode)

    def _unhashed(self) -> bool:
        from nemotron_fp8.destinations import folder

        def nothing_differs(*_: Any) -> dict[str, str]:
            return {}

        row = flips.Flips()
        with planted(folder, "check_files", nothing_differs):
            return any(row.run(("staged", seed)).wrong for seed in range(TRIES))

    def _unchecked(self) -> bool:
        from nemotron_fp8.conversion import in_place
        from nemotron_fp8.conversion.shard import Measured

        def load(self: Any, shard_task: Any, saved: Any) -> Any:
            data = (self._amaxes / shard_task.name).read_bytes()
            return Measured(in_place.parse_amaxes(shard_task, data), saved.nonfinite)

        row = flips.Flips()
        with planted(in_place.InPlaceFolder, "_load", load):
            return any(row.run(("amaxes", seed)).wrong for seed in range(TRIES))

    def _piecemeal(self) -> bool:
        def prepare() -> None:
            real = os.rename

            def rename(old: Path, new: Path, **how: Any) -> None:
                if Path(new).name != "dst":
                    real(old, new, **how)
                    return
                Path(new).mkdir()
                for path in sorted(Path(old).iterdir()):
                    real(path, Path(new) / path.name)

            os.rename = rename  # type: ignore[assignment]  # planted, in the child only

        with World("folder") as world:
            found = calls(forked(world.command(), (), prepare=prepare).log, [str(world.root)])
        moves = [call for call in found if call.name == "rename" and "/dst/" in call.what.rpartition(",")[2]]
        for call in moves:
            with World("folder") as world:
                forked(world.command(), kill(call.name, call.number), prepare=prepare)
                if world.broken_now():
                    return True
        return False


def _lost(mode: Mode) -> bool:
    """Return True if any state after a loss of power is found to be wrong."""
    row = power.PowerLoss()
    states = list(row.of_mode(mode))
    random.Random(0).shuffle(states)
    return any(row.run(state).wrong for state in states)
