"""A run is killed at its requests; main is empty or complete, and another machine goes on."""

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
from tests.hub.faults import Fault
from tests.hub.test_hub_to_hub import contents

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub.conftest import Counted
    from tests.hub.faults import Request
    from tests.hub.hub import Hub
    from tests.hub.server import HubServer


def killed_at(hub: Hub, server: HubServer, work: Path, number: int, moment: str) -> bool:
    """Run a conversion in a process and kill it at its request ``number``; whether it got as far as that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hub.conversion"])
    process = context.Process(target=run_alone, args=(server.endpoint, TOKEN, work))
    first = len(hub.log)
    killed = threading.Event()

    def kill(request: Request) -> Fault | None:
        if request.number - first != number or killed.is_set():
            return None
        killed.set()
        os.kill(process.pid or 0, signal.SIGKILL)
        return Fault("reset_before")  # heeded before the request is acted on

    setattr(hub, moment, kill)
    process.start()
    process.join(60)
    setattr(hub, moment, None)
    assert process.exitcode == (-signal.SIGKILL if killed.is_set() else 0)
    return killed.is_set()


def kill_and_go_on(hub: Hub, server: HubServer, tmp_path: Path, step: int, moment: str) -> int:
    """Kill at every ``step``-th request; each time main is empty or complete, and another machine finishes."""
    files = checkpoint(tmp_path / "source", 2)
    hub.store.seed("nv/source", files)
    result = wanted(our_client(server, timeout=5), tmp_path)
    number = 0
    while True:
        work = tmp_path / "work"
        work.mkdir()
        killed = killed_at(hub, server, work, number, moment)
        shutil.rmtree(work)
        if hub.store.find("me/target") is not None:
            assert contents(hub) in ({}, result), number
        if not killed:
            break
        convert(our_client(server, timeout=5), work)
        assert contents(hub) == result, number
        assert len(hub.store.repo("me/target").refs) == 1
        shutil.rmtree(work)
        shutil.rmtree(hub.store.repo("me/target").folder)
        number += step
    assert contents(hub) == result
    return number


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_some_requests(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, moment: str, counted: Counted
) -> None:
    number = kill_and_go_on(hub, server, tmp_path, 16, moment)
    assert number > 32
    counted("kills", number // 16)


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_request(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, moment: str, counted: Counted
) -> None:
    number = kill_and_go_on(hub, server, tmp_path, 1, moment)
    assert number > 40
    counted("kills, the work folder deleted after each", number)
