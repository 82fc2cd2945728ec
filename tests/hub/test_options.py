"""Options beside an address: the token's variable and the revision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import HubOptions, plan_repo
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.errors.hub import AddressError
from tests.hub.conftest import TOKEN
from tests.hub.conversion import Options

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub


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
