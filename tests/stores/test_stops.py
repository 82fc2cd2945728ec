"""SIGTERM while a store does not answer: the command ends within ten seconds, and is resumed by the same command."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.store_server.fixtures import BUCKET
from tests.stores.writing import TARGET, checkpoint_of, contents, convert, files_of
from tests.support.doubles import wait_until
from tests.support.ends import Command

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub_server.faults import FaultKind
    from tests.store_server.server import StoreServer

SECONDS = 60.0
"""Time for which the store hangs: far longer than the end of the command may take."""
PLACES: dict[str, tuple[FaultKind, str, int]] = {
    "an upload": ("hang", "PUT", 2),
    "the list": ("hang", "GET", 0),
    "a wait of a retry": ("503", "PUT", 2),
}


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=() if place == "an upload" else pytest.mark.faults) for place in PLACES]
)
def test_a_destination_that_hangs(store: StoreServer, tmp_path: Path, place: str) -> None:
    source = checkpoint_of(tmp_path / "source", 2)
    kind, method, skip = PLACES[place]
    rule = store.faults.add(kind, method, skip=skip, times=None, seconds=SECONDS)
    command = Command.start("quantize", source, TARGET, "-q", "--threads", "1")
    wait_until(lambda: rule.hits > 0 or command.process.poll() is not None, 60)
    time.sleep(0.3)
    command.end()
    store.faults.clear()
    convert(source)
    convert(source, tmp_path / "local")
    assert contents(store) == files_of(tmp_path / "local")


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["hang", "hang_body"])
@pytest.mark.parametrize("skip", [1, 8])
def test_a_source_that_hangs(store: StoreServer, tmp_path: Path, kind: FaultKind, skip: int) -> None:
    source = checkpoint_of(tmp_path / "source", 2)
    for path in source.iterdir():
        store.put(BUCKET, f"models/source/{path.name}", path.read_bytes())
    rule = store.faults.add(kind, "GET", skip=skip, times=None, seconds=SECONDS)
    command = Command.start("quantize", f"s3://{BUCKET}/models/source", tmp_path / "out", "-q", "--threads", "1")
    wait_until(lambda: rule.hits > 0 or command.process.poll() is not None, 60)
    time.sleep(0.3)
    command.end()
    store.faults.clear()
    convert(f"s3://{BUCKET}/models/source", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
