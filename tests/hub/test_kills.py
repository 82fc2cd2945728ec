"""Kills of a run at its requests: main is empty or complete, and another machine resumes the job."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from tests.hub.conftest import TOKEN, our_client
from tests.hub.conversion import checkpoint, convert, run_alone, wanted
from tests.hub.test_hub_to_hub import contents
from tests.hub_server.faults import Fault

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.faults import Request
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer
    from tests.support.counts import Counted

    Files = dict[str, bytes]

OLD = {"model.safetensors": b"old weights", "config.json": b"{}", "notes.txt": b"mine"}
"""Files of the destination before: weights that are replaced, and notes that remain."""
PARTS = 8


def killed_at(hub: Hub, server: HubServer, work: Path, number: int, moment: str, overwrite: bool) -> bool:
    """Run a conversion in a process and kill it at its request ``number``; return False if it made fewer requests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hub.conversion"])
    process = context.Process(target=run_alone, args=(server.endpoint, TOKEN, work), kwargs={"overwrite": overwrite})
    first = len(hub.log)
    killed = threading.Event()

    def kill(request: Request) -> Fault | None:
        if request.number - first != number or killed.is_set():
            return None
        killed.set()
        os.kill(process.pid or 0, signal.SIGKILL)
        return Fault("reset_before")  # applied before the request is handled

    setattr(hub, moment, kill)
    process.start()
    process.join(60)
    setattr(hub, moment, None)
    assert process.exitcode == (-signal.SIGKILL if killed.is_set() else 0)
    return killed.is_set()


def kill_and_resume(hub: Hub, server: HubServer, tmp_path: Path, numbers: range, moment: str, old: Files) -> int:
    """Kill runs at requests with these numbers; check that main is unchanged or complete and that a new run finishes.

    Returns:
        Number of kills.
    """
    files = checkpoint(tmp_path / "source", 2)
    hub.store.seed("nv/source", files)
    result = wanted(our_client(server, timeout=5), tmp_path) | {n: old[n] for n in old if n == "notes.txt"}
    for kills, number in enumerate(numbers):
        if old:
            hub.store.seed("me/target", old)
        work = tmp_path / "work"
        work.mkdir()
        killed = killed_at(hub, server, work, number, moment, bool(old))
        shutil.rmtree(work)
        if hub.store.find("me/target") is not None:
            assert contents(hub) in (old, result), number
        if not killed:
            assert contents(hub) == result
            return kills
        convert(our_client(server, timeout=5), work, overwrite=bool(old))
        assert contents(hub) == result, number
        assert len(hub.store.repo("me/target").refs) == 1
        shutil.rmtree(work)
        shutil.rmtree(hub.store.repo("me/target").folder)
    raise AssertionError("a run makes more requests than this test is prepared for")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("old", [{}, OLD], ids=["new", "old"])
def test_kill_before_and_after_every_24th_request(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, moment: str, old: Files, counted: Counted
) -> None:
    kills = kill_and_resume(hub, server, tmp_path, range(5, 500, 24), moment, old)
    assert kills >= 2
    counted("kills", kills)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("old", [{}, OLD], ids=["new", "old"])
def test_kill_before_and_after_every_request(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, moment: str, old: Files, part: int, counted: Counted
) -> None:
    kills = kill_and_resume(hub, server, tmp_path, range(part, 500, PARTS), moment, old)
    assert kills >= 40 // PARTS
    counted("kills, the work folder deleted after each", kills)
