"""What is said about the Hub beside an address: where the token is, which revision; and who draws bars."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from nemotron_fp8 import HubOptions, plan_repo
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.errors.hub import AddressError
from nemotron_fp8.hub.progress_bars import without_bars
from tests.hub.conftest import TOKEN
from tests.hub.conversion import Options, checkpoint, convert

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer


@pytest.mark.parametrize("given", [TOKEN, "Bearer " + TOKEN, "", "a=b", "eyJhbGciOi.J9-x"])
def test_a_token_in_the_place_of_its_variable_is_not_repeated(given: str) -> None:
    with pytest.raises(RecipeError, match="the name of the variable") as caught:
        HubOptions(token_env=given).client()
    assert not given or given not in str(caught.value)


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(RecipeError, match="'MY_TOKEN'"):
        HubOptions(token_env="MY_TOKEN").client()
    monkeypatch.setenv("hf_token", "x")
    assert HubOptions(token_env="hf_token").client().token() == "x"


@pytest.mark.parametrize("revision", ["", "a b", "../x", "main?x=1", "-x", "main@x"])
def test_a_revision_beside_the_address_follows_the_same_rules(
    hub: Hub, client: HubClient, tmp_path: Path, revision: str
) -> None:
    with pytest.raises(AddressError, match="not a revision"):
        plan_repo("hf://nv/source", hub=Options(client, tmp_path / "work", revision=revision))
    assert not hub.log


@pytest.fixture
def bars(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client as it is by default, which the server's fixture has changed: it draws."""
    said(monkeypatch, None)


def said(monkeypatch: pytest.MonkeyPatch, value: bool | None) -> None:
    """Set what the client has read from ``HF_HUB_DISABLE_PROGRESS_BARS``, in both places."""
    for module in (constants, sys.modules["huggingface_hub.utils.tqdm"]):
        monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", value)


@pytest.mark.usefixtures("bars")
def test_an_upload_over_xet_draws_nothing(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.xet_enabled = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    convert(client, tmp_path / "work")
    assert capfd.readouterr().err == ""
    assert not are_progress_bars_disabled()


@pytest.mark.usefixtures("bars")
def test_bars_come_back_after_the_last_conversion() -> None:
    inner, outer = threading.Event(), threading.Event()

    def other() -> None:
        with without_bars():
            inner.set()
            outer.wait()

    thread = threading.Thread(target=other)
    with without_bars():
        thread.start()
        inner.wait()
    assert are_progress_bars_disabled()
    outer.set()
    thread.join()
    assert not are_progress_bars_disabled()


def test_what_the_environment_says_of_bars_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (True, False):
        said(monkeypatch, value)
        with without_bars():
            assert are_progress_bars_disabled() is value
