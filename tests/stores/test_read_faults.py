"""Faults of the network while a store is read: the right bytes, or an error of its own class, within a bound."""

from __future__ import annotations

import logging
import pickle
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo
from nemotron_fp8.errors import NemotronFp8Error
from nemotron_fp8.errors.stores import (
    StoreAnswerError,
    StoreDeniedError,
    StoreNoProgressError,
    StoreUnreachableError,
)
from nemotron_fp8.sources import store as source_module
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.stores.client import StoreClient
from tests.hub_server.faults import Fault, Request
from tests.store_server.server import CANARIES, STORE_FAULTS
from tests.stores.conftest import QuickClock
from tests.stores.conversion import SOURCE, checkpoint, contents, seed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8._retry import RetryPolicy
    from nemotron_fp8.stores.address import StoreAddress
    from tests.store_server.server import StoreServer
    from tests.support.counts import Counted

LOST = ("401", "403")
"""Faults that end a run at once: a retry would not help."""
UNSEEN = ("corrupt",)
"""A wrong bit of a range; TLS detects it, which this server does not speak."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reasons of the waits of all clients, which have a quick clock and give up a connection after 0.4 s."""
    found: list[str] = []

    def quick(
        address: StoreAddress, policy: RetryPolicy, on_wait: Callable[[str, float], None] | None = None
    ) -> StoreClient:
        def wait(reason: str, seconds: float) -> None:
            found.append(reason)
            if on_wait is not None:
                on_wait(reason, seconds)

        return StoreClient(address, replace(policy, clock=QuickClock()), on_wait=wait, timeout=0.4)

    monkeypatch.setattr(source_module, "StoreClient", quick)
    return found


@pytest.fixture
def source(store: StoreServer, tmp_path: Path) -> dict[str, bytes]:
    """Files of the result of a checkpoint in the store, made from its folder."""
    checkpoint(tmp_path / "source", shards=2)
    (tmp_path / "source" / "README.md").write_text("# A model\n")
    seed(store, tmp_path / "source")
    quantize_repo(tmp_path / "source", tmp_path / "wanted", device="cpu", threads=1)
    return contents(tmp_path / "wanted")


def leaked(error: BaseException, waits: list[str], caplog: pytest.LogCaptureFixture) -> list[str]:
    """Credentials that an error, its causes, its pickle, the waits or the log hold."""
    texts = ["".join(traceback.format_exception(error)), repr(vars(error)), *waits, caplog.text]
    data = pickle.dumps(error)
    return [secret for secret in CANARIES if any(secret in text for text in texts) or secret.encode() in data]


def requests_of(store: StoreServer, target: Path) -> list[Request]:
    """Requests of one conversion."""
    before = len(store.log)
    quantize_repo(SOURCE, target, device="cpu", threads=1)
    return store.log[before:]


def hit(store: StoreServer, number: int, kind: str) -> None:
    """Hit the request with this number from now on, counted from 0."""
    first = len(store.log)

    def before(request: Request) -> Fault | None:
        return Fault(kind, 0.6) if request.number == first + number else None  # type: ignore[arg-type]  # of the store

    store.before = before


def check_every_request(
    store: StoreServer, wanted: dict[str, bytes], folder: Path, kinds: list[str], caplog: pytest.LogCaptureFixture
) -> int:
    """Hit every request of a conversion, each with the next of some faults; return the number of faults."""
    asked = requests_of(store, folder / "plain")
    assert contents(folder / "plain") == wanted
    faults = 0
    for number, request in enumerate(asked):
        kind = kinds[number % len(kinds)]
        if kind in UNSEEN and request.path.endswith(".safetensors"):
            continue
        faults += 1
        hit(store, number, kind)
        target = folder / f"{kind}-{number}"
        try:
            quantize_repo(SOURCE, target, device="cpu", threads=1)
        except NemotronFp8Error as error:
            assert kind in (*LOST, *UNSEEN), (number, kind, error)
            assert isinstance(error, StoreDeniedError) or kind in UNSEEN, (number, kind, error)
            assert not leaked(error, [], caplog)
            store.before = None
            quantize_repo(SOURCE, target, device="cpu", threads=1)
        else:
            assert kind not in LOST, (number, kind)
        store.before = None
        assert contents(target) == wanted, (number, kind)
    return faults


def test_a_fault_at_every_request(
    store: StoreServer, source: dict[str, bytes], waits: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    check_every_request(store, source, tmp_path, ["reset_body", "503", "403", "hang_body", "wrong_range"], caplog)
    assert waits
    assert not [secret for secret in CANARIES if secret in caplog.text or any(secret in text for text in waits)]


@pytest.mark.faults
@pytest.mark.parametrize("kind", STORE_FAULTS)
def test_every_fault_at_every_request(
    store: StoreServer,
    source: dict[str, bytes],
    waits: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    counted: Counted,
) -> None:
    caplog.set_level(logging.DEBUG)
    faults = check_every_request(store, source, tmp_path, [kind], caplog)
    assert faults >= 8
    counted("faults", faults)
    assert not [secret for secret in CANARIES if secret in caplog.text or any(secret in text for text in waits)]


ENDLESS = {
    "refused": StoreNoProgressError,
    "reset_before": StoreNoProgressError,
    "reset_body": StoreNoProgressError,
    "early_end": StoreNoProgressError,
    "hang": StoreNoProgressError,
    "408": StoreNoProgressError,
    "429": StoreNoProgressError,
    "500": StoreNoProgressError,
    "503": StoreNoProgressError,
    "answer_lost": StoreNoProgressError,
    "answer_lost_504": StoreNoProgressError,
    "ignore_range": StoreAnswerError,
    "wrong_range": StoreAnswerError,
    "401": StoreDeniedError,
    "403": StoreDeniedError,
}
"""The error of a fault that does not end."""


@pytest.mark.parametrize("kind", ["503", "403", "wrong_range"])
def test_a_fault_without_end(
    store: StoreServer, source: dict[str, bytes], waits: list[str], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    del source
    check_endless(store, waits, caplog, kind)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ENDLESS)
def test_every_fault_without_end(
    store: StoreServer, source: dict[str, bytes], waits: list[str], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    del source
    check_endless(store, waits, caplog, kind)


def check_endless(store: StoreServer, waits: list[str], caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """Hit every request but the first listings with a fault."""
    caplog.set_level(logging.DEBUG)
    path = r"/bucket/nv/source/" if kind in ("ignore_range", "wrong_range") else ""
    store.faults.add(kind, path=path, seconds=0.05, times=None)  # type: ignore[arg-type]  # of the store
    with pytest.raises(ENDLESS[kind]) as caught:
        open_source(SOURCE)
    assert "s3://bucket/nv/source: could not" in str(caught.value)
    assert not leaked(caught.value, waits, caplog)
    if ENDLESS[kind] is StoreNoProgressError:
        assert 5 < len(waits) < 100
        assert isinstance(caught.value, StoreNoProgressError)
        assert caught.value.seconds <= 1800


def test_a_store_that_nobody_serves(store: StoreServer, waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises((StoreNoProgressError, StoreUnreachableError), match="the connection failed"):
        open_source(SOURCE)
    assert waits


def test_a_wrong_bit_of_a_small_file_is_fetched_again(store: StoreServer, waits: list[str], tmp_path: Path) -> None:
    checkpoint(tmp_path / "source", shards=1)
    seed(store, tmp_path / "source")
    rule = store.faults.add("corrupt", path="config.json")
    assert open_source(SOURCE).inventory.config == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert rule.hits == 1
