"""Without a network: a name that may be a mistyped folder fails soon, an address is retried."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from nemotron_fp8 import plan_repo
from nemotron_fp8.cli.main import cli
from nemotron_fp8.cli.options import Duration
from nemotron_fp8.errors import SourceNotFoundError
from nemotron_fp8.errors.hub import NoProgressError, OfflineError
from nemotron_fp8.hub.client import HubClient
from nemotron_fp8.hub.options import HubOptions
from nemotron_fp8.sources.open import open_source
from tests.hub.conversion import Options, checkpoint, convert
from tests.hub.test_command import command

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.conftest import QuickClock
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer


@pytest.fixture
def waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reasons of the client's waits; the working folder has no folder of any repository's name."""
    monkeypatch.chdir(tmp_path)
    return []


@pytest.fixture
def client(client: HubClient, waits: list[str]) -> HubClient:
    """The client of the other tests, with its waits in ``waits``."""
    return client.with_options(on_wait=lambda reason, _seconds: waits.append(reason))


def lose_the_network(monkeypatch: pytest.MonkeyPatch, times: int | None = None) -> None:
    """Fail name resolution ``times`` times; None for always."""
    original, asked = socket.getaddrinfo, 0

    def getaddrinfo(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if times is None or asked <= times:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return original(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def waited(client: HubClient) -> float:
    clock: QuickClock = client.policy.clock  # type: ignore[assignment]  # the fixture's
    return clock.time


def test_a_plain_name_is_given_up_after_one_more_try(
    client: HubClient, tmp_path: Path, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_the_network(monkeypatch)
    both = r"^nv/source: no such folder; as a repository on the Hub: .*the Hub cannot be reached.*\(ConnectError\)"
    with pytest.raises(SourceNotFoundError, match=both):
        plan_repo("nv/source", hub=Options(client, tmp_path / "work"))
    assert len(waits) == 1
    assert waited(client) <= 1


def test_nobody_listens(client: HubClient, server: HubServer, tmp_path: Path, waits: list[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = HubClient(None, f"http://127.0.0.1:{closed.getsockname()[1]}", client.policy, 5, client.on_wait)
        with pytest.raises(SourceNotFoundError, match=r"no such folder.*cannot be reached"):
            plan_repo("nv/source", hub=Options(away, tmp_path / "work"))
    assert len(waits) == 1


def test_an_address_is_retried(
    client: HubClient, tmp_path: Path, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_the_network(monkeypatch)
    with pytest.raises(NoProgressError, match=r"^hf://nv/source: could not list"):
        plan_repo("hf://nv/source", hub=Options(client, tmp_path / "work"))
    assert len(waits) > 10
    assert waited(client) > 1700


def test_the_time_of_retries_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the command line and of Python, for the real clock; 0 tries once."""
    lose_the_network(monkeypatch)
    began = time.monotonic()
    failed = CliRunner().invoke(cli, ["quantize", "hf://nv/source", str(tmp_path / "dst"), "--retry-time", "2s"])
    assert 0 < time.monotonic() - began < 10
    assert failed.exit_code == 1
    assert isinstance(failed.exception, NoProgressError)
    waited_for: list[str] = []
    options = HubOptions(retry_seconds=0, on_wait=lambda reason, _seconds: waited_for.append(reason))
    for name, kind in (("hf://nv/source", NoProgressError), ("nv/source", SourceNotFoundError)):
        with pytest.raises(kind):
            plan_repo(name, hub=options)
    assert waited_for == []
    for text, seconds in (("90", 90.0), ("90s", 90.0), ("1.5 min", 90.0), ("2h", 7200.0), ("0", 0.0)):
        assert Duration().convert(text, None, None) == seconds
    wrong = CliRunner().invoke(cli, ["plan", "hf://nv/source", "--retry-time", "soon"])
    assert wrong.exit_code == 2
    assert "'soon' is not a time; write it like 90s" in wrong.output


def test_a_plain_name_is_found_at_the_second_try_and_read_with_the_usual_policy(
    hub: Hub, client: HubClient, tmp_path: Path, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    lose_the_network(monkeypatch, times=1)
    opened = open_source("nv/source", hub=Options(client, tmp_path / "work"))
    assert len(waits) == 1
    later = opened.opener.client.policy  # type: ignore[attr-defined]  # a HubOpener
    assert (later.seconds, later.max_connects) == (client.policy.seconds, None)


def test_a_plain_name_that_the_hub_does_not_answer_for(
    hub: Hub, client: HubClient, tmp_path: Path, waits: list[str]
) -> None:
    """A Hub that answers is retried for half a minute."""
    hub.faults.add("503", times=None)
    with pytest.raises(SourceNotFoundError, match=r"no such folder.*503"):
        plan_repo("nv/source", hub=Options(client, tmp_path / "work"))
    assert len(waits) > 3
    assert 10 < waited(client) <= 30


# -- offline ------------------------------------------------------------------------------------------------


def test_offline_with_a_plain_name(
    hub: Hub, client: HubClient, tmp_path: Path, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SourceNotFoundError, match=r"^nv/source: no such folder; as a repository on the Hub: .*HF_HUB_OFFLINE"
    ):
        plan_repo("nv/source", hub=Options(client, tmp_path / "work"))
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
        plan_repo("hf://nv/source", hub=Options(client, tmp_path / "work"))
    assert (hub.log, waits) == ([], [])


def test_offline_with_a_destination_before_the_source_is_read(
    hub: Hub, client: HubClient, tmp_path: Path, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="could not write to the repository: HF_HUB_OFFLINE"):
        convert(client, tmp_path / "work", source=str(tmp_path / "no source"))
    assert (hub.log, waits) == ([], [])
    assert not (tmp_path / "work").exists()


def test_the_command_offline(
    hub: Hub, server: HubServer, tmp_path: Path, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    process = command(server, tmp_path / "home", "plan", "nv/source")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(
        "error: nv/source: no such folder; as a repository on the Hub: hf://nv/source: could not list"
    )
    assert "HF_HUB_OFFLINE is set" in line
    assert hub.log == []
