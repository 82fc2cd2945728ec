"""Description of the saved state of a run layer by layer: reading it needs neither torch nor transformers."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8._filesystem import JOURNAL, LOCK, OUT
from nemotron_fp8.destinations.lock_record import read_record, time_of
from nemotron_fp8.destinations.status import Pace, Status, advice_for, in_future, life_of
from nemotron_fp8.errors import EvaluationStateError
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded
from nemotron_fp8.untrusted.regular_files import read_start

if TYPE_CHECKING:
    from pathlib import Path

STATE = "state.json"
SCHEMA = 2


def described(path: Path) -> dict[str, Any]:
    """Return the description of a saved state.

    Raises:
        EvaluationStateError: it is damaged, or of another version.
        SourceReadError: it cannot be read.
    """
    found = strict_json.load_object(read_start(path, strict_json.MAX_BYTES), str(path), EvaluationStateError)
    if type(schema := found.get("schema")) is not int or schema != SCHEMA:
        raise EvaluationStateError(str(path), "not a state that this version reads")
    return found


def is_state(folder: Path) -> bool:
    """Return True if a folder is that of a saved state, or of a run that has not saved one yet."""
    if os.path.lexists(folder / JOURNAL):
        return False
    return os.path.lexists(folder / OUT / STATE) or (os.path.lexists(folder / LOCK) and (folder / OUT).is_dir())


def saved_status(folder: Path, named: str) -> Status:
    """Return the state of an evaluation or a calibration by the folder of its saved state.

    Raises:
        EvaluationStateError: the saved state is damaged.
        SourceReadError: it cannot be read.
    """
    record = read_record(folder / LOCK)
    state, process = life_of(record)
    path = folder / OUT / STATE
    found = described(path) if os.path.lexists(path) else {}
    with guarded(lambda _: EvaluationStateError(str(path), "not a state that this version writes")):
        layers, total, first = found.get("layers", 0), found.get("of"), found.get("first", 0)
        saved, begun = time_of(found.get("time")), time_of(found.get("begun"))
        if any(type(each) is not int or each < 0 for each in (layers, first, 0 if total is None else total)):
            raise TypeError("not a number of layers")
    status = Status(
        named,
        "evaluation",
        state,
        process,
        shards_done=layers,
        shards_total=total,
        last=saved,
        command=record.command if record else "",
        error=record.error if record and state == "stopped" else "",
    )
    known = saved is not None and begun is not None and begun < saved and not in_future(saved)
    seconds = saved - begun if known else None  # type: ignore[operator]  # known
    pace = Pace(seconds, shards_per_second=(layers - first) / seconds if seconds else None)
    idle = status.idle_seconds if state == "running" else None
    left = pace.left(status.shards_left, None, idle)
    return replace(status, seconds=seconds, seconds_left=left, advice=advice_for(status, record))
