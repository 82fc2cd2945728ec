"""Model cards that the Hub or its client does not take as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import plan_repo, verify_repo
from nemotron_fp8.checkpoint.inventory import CARD
from nemotron_fp8.errors import SourceNotFoundError
from nemotron_fp8.errors.hub import CardRefusedError
from tests.hub.conversion import Options, checkpoint, convert
from tests.hub.test_hub_to_hub import contents

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.hub import Hub


def test_a_card_that_is_no_utf8_is_published(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    """The client decodes a card before the last commit, so one wrong byte would fail every run at its very end."""
    card = "---\nlicense: mit\n---\nDéjà vu \N{LATIN SMALL LETTER A}".encode() + b"\xff\xc3 end\n"
    hub.store.seed("nv/source", {**checkpoint(tmp_path / "source", 2), CARD: card})
    convert(client, tmp_path / "work")
    there = contents(hub)[CARD].decode()
    assert "license: mit" in there
    assert there.endswith("Déjà vu a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} end\n")
    convert(client, tmp_path / "work", target=str(tmp_path / "local"))
    assert (tmp_path / "local" / CARD).read_text() == there
    assert verify_repo(None, "hf://me/target", hub=Options(client, tmp_path / "work")).ok


def test_a_card_that_the_hub_refuses(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", {**checkpoint(tmp_path / "source", 2), CARD: b"---\nlicense: nonsense\n---\n"})
    with pytest.raises(CardRefusedError, match=r"license.*must be one of.*correct it in the source's README\.md"):
        convert(client, tmp_path / "work")
    assert hub.store.find("me/target") is None
    assert list((tmp_path / "work").iterdir()) == []


def test_an_archive_in_a_repository(hub: Hub, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", {"model.nemo": b"x" * 100, CARD: b"# A model\n"})
    with pytest.raises(SourceNotFoundError, match=r"model\.nemo.*hf download nv/source"):
        plan_repo("hf://nv/source", hub=Options(client, tmp_path / "work"))
