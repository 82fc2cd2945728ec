"""Every fault at every request of a job: the same result, or an error of ours and the same result by a second run."""

from __future__ import annotations

import io
import logging
import traceback
from collections import Counter
from typing import TYPE_CHECKING, get_args

import pytest

from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.destinations.open import StoreFolder
from nemotron_fp8.destinations.store import staging
from nemotron_fp8.errors import NemotronFp8Error
from nemotron_fp8.errors.store_results import UploadBrokenError
from nemotron_fp8.errors.stores import StoreDeniedError, StoreError
from nemotron_fp8.stores.client import StoreClient
from nemotron_fp8.stores.listing import RECORDS
from tests.hub_server.faults import Fault
from tests.store_server.server import CANARIES, STORE_FAULTS, StoreFault
from tests.stores.conftest import QuickClock
from tests.stores.writing import PREFIX, checkpoint_of, contents, convert, files_of, observe

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8 import Progress
    from tests.hub_server.faults import Request
    from tests.store_server.server import StoreServer
    from tests.support.counts import Counted

FATAL: tuple[StoreFault, ...] = ("401", "403")
"""Faults that no retry can remove."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let half an hour of waits take a second."""

    def client(folder: StoreFolder) -> StoreClient:
        return StoreClient(folder.address, RetryPolicy(clock=QuickClock()), timeout=0.6)

    monkeypatch.setattr(StoreFolder, "_client", client)
    monkeypatch.setattr(staging, "UPLOAD_WAITS", (0.1, 0.1))


class Survivor:
    """A job that meets one fault, in a new bucket each time."""

    def __init__(self, store: StoreServer, tmp_path: Path) -> None:
        self.store = store
        self.source = checkpoint_of(tmp_path / "source", 2, {"vocab.txt": b"", "merges.txt": b"a b\n"})
        convert(self.source, tmp_path / "local")
        self.result = files_of(tmp_path / "local")
        self.log = io.StringIO()
        handler = logging.StreamHandler(self.log)
        handler.setLevel(0)
        self.loggers = [logging.getLogger(name) for name in (None, "nemotron_fp8")]
        for logger in self.loggers:
            logger.addHandler(handler)
        self.errors: Counter[str] = Counter()
        self.warned = 0

    def requests(self) -> int:
        """Return the requests of an undisturbed run."""
        self._anew()
        convert(self.source)
        return len(self.store.log)

    def _anew(self) -> None:
        self.store.faults.clear()
        self.store.reset()
        self.store.create("bucket")
        self.store.log.clear()

    def survive(self, kind: StoreFault, where: int) -> None:
        """Check one fault at one request."""
        self._anew()
        rule = self.store.faults.add(kind, skip=where, seconds=1.0 if kind.startswith("hang") else 0.1)  # type: ignore[arg-type]  # kinds of this server
        seen: list[Progress] = []
        try:
            convert(self.source, progress=seen.append)
        except NemotronFp8Error as error:
            assert isinstance(error, StoreError), (kind, where)
            assert isinstance(error, StoreDeniedError) == (kind in FATAL), (kind, where, error)
            self.errors[type(error).__name__] += 1
            self._without_canaries("".join(traceback.format_exception(error)), repr(vars(error)))
            observe(contents(self.store), self.result)
            convert(self.source)
        assert rule.hits == 1, (kind, where)
        if f"{RECORDS} could not be deleted" in self.log.getvalue():  # the result is complete nevertheless
            self.warned += 1
            assert kind in FATAL
            assert observe(contents(self.store), self.result)
            assert convert(self.source).unchanged
            self.log.truncate(0)
        assert contents(self.store) == self.result, (kind, where)
        self._without_canaries(self.log.getvalue(), *(progress.waiting for progress in seen))

    def _without_canaries(self, *texts: str) -> None:
        stored = [data.decode("latin-1") for data in contents(self.store).values()]
        for canary in CANARIES:
            assert not [text for text in (*texts, *stored) if canary in text]


def test_a_fault_at_every_third_request(store: StoreServer, tmp_path: Path) -> None:
    """One of the faults, in turn; the long test below covers all of them at every request."""
    survivor = Survivor(store, tmp_path)
    for turn, where in enumerate(range(0, survivor.requests(), 3)):
        survivor.survive(STORE_FAULTS[turn % len(STORE_FAULTS)], where)


@pytest.mark.faults
@pytest.mark.parametrize("kind", STORE_FAULTS)
def test_every_fault_at_every_request(store: StoreServer, tmp_path: Path, kind: StoreFault, counted: Counted) -> None:
    survivor = Survivor(store, tmp_path)
    requests = survivor.requests()
    for where in range(requests):
        survivor.survive(kind, where)
    counted("faults", requests)
    counted("complete results whose records could not be deleted, by the next run", survivor.warned)
    counted("runs that ended with an error of ours, completed by a second one", dict(survivor.errors))


def test_a_shard_whose_upload_breaks_is_made_again(
    store: StoreServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The body of each answer to a completed upload breaks, twice; the third attempt at the shard succeeds."""
    survivor = Survivor(store, tmp_path)
    store.reset()
    store.create("bucket")
    broken: list[Request] = []

    def before(request: Request) -> Fault | None:
        if request.method == "PUT" and "partNumber" in request.query and len(broken) < 2:
            broken.append(request)
            return Fault("corrupt")
        return None

    store.before = before
    assert convert(survivor.source).resumed == 0
    assert contents(store) == survivor.result
    assert [record.getMessage() for record in caplog.records if "is made again" in record.getMessage()] == [
        record.getMessage() for record in caplog.records if "XAmzContentSHA256Mismatch" in record.getMessage()
    ]
    assert len(broken) == 2


def test_an_upload_that_breaks_always(store: StoreServer, tmp_path: Path) -> None:
    survivor = Survivor(store, tmp_path)
    store.reset()
    store.create("bucket")
    attempts: list[Request] = []

    def corrupt(request: Request) -> Fault | None:
        if "partNumber" not in request.query:
            return None
        attempts.append(request)
        return Fault("corrupt")

    store.before = corrupt
    with pytest.raises(UploadBrokenError, match="finished shards are kept"):
        convert(survivor.source)
    assert len(attempts) == 3
    store.before = None
    assert not observe(contents(store), survivor.result)
    convert(survivor.source)
    assert contents(store) == survivor.result


def test_the_kinds_of_faults() -> None:
    assert set(FATAL) < set(get_args(StoreFault))
    assert PREFIX.endswith("/")
