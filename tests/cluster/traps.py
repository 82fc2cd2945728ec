"""Staging that notes what is begun, and hangs in the middle of a shard so that a test can kill what it likes."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8.destinations.folder_staging import AttemptStaging, FolderStaging, SharedSink
from nemotron_fp8.destinations.hub.upload import UploadSink, UploadStaging
from nemotron_fp8.destinations.store.staging import StoreStaging
from tests.cluster.ray_cluster import NODE
from tests.support.doubles import announce

if TYPE_CHECKING:
    import pytest

    from nemotron_fp8.destinations.base import Staged
    from nemotron_fp8.destinations.file_sink import FileSink
    from nemotron_fp8.destinations.store.sink import StoreSink


@dataclass(frozen=True, slots=True)
class Setting:
    """A trap for all shards of a run.

    Attributes:
        folder: where it keeps its log and its flag.
        shard: the shard that hangs; empty for any.
        node: number of the node that it hangs on; empty for any.
        again: whether every attempt hangs; else nothing hangs once the flag is there.
    """

    folder: Path
    shard: str = ""
    node: str = ""
    again: bool = False

    @property
    def flag(self) -> Path:
        """Gets the process id of the worker that hangs."""
        return self.folder / "flag"

    def begun(self) -> list[str]:
        """Names of the shards that were begun, once for each time."""
        return (self.folder / "log").read_text().split()

    def of_folder(self, staging: FolderStaging, tag: str) -> Trap:
        """In place of `FolderStaging.for_attempt`."""
        return Trap(staging.folder / tag, staging.digests, self)

    def of_uploads(self, staging: UploadStaging, _tag: str) -> UploadTrap:
        """In place of `UploadStaging.for_attempt`."""
        return UploadTrap(staging.client, staging.repo, staging.ref, staging.parent, setting=self)

    def of_store(self, staging: StoreStaging, _tag: str) -> StoreTrap:
        """In place of `StoreStaging.for_attempt`."""
        return StoreTrap(staging.client, staging.job, staging.digests, setting=self)

    def set(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        """Set it in this process, for the time of a test or for good."""
        put = setattr if monkeypatch is None else monkeypatch.setattr
        # A bound method in a class does not get the instance; a function does.
        put(FolderStaging, "for_attempt", lambda staging, tag: self.of_folder(staging, tag))  # noqa: PLW0108
        put(UploadStaging, "for_attempt", lambda staging, tag: self.of_uploads(staging, tag))  # noqa: PLW0108
        put(StoreStaging, "for_attempt", lambda staging, tag: self.of_store(staging, tag))  # noqa: PLW0108

    def spring(self, name: str, sink: FileSink | StoreSink) -> None:
        """Note a shard that is begun; hang in the middle of it where that is asked for."""
        if name == "probe":
            return
        with (self.folder / "log").open("a") as log:
            log.write(f"{name}\n")
        here = self.node in ("", os.environ[NODE]) and self.shard in ("", name)
        if here and (self.again or not self.flag.exists()):
            sink.write_at(0, memoryview(b"half a shard"))
            announce(self.flag)
            time.sleep(600)


@dataclass(frozen=True, slots=True)
class Trap(AttemptStaging):
    """Stages in a folder as it should, but for one shard."""

    setting: Setting

    def stage(self, name: str, size: int) -> SharedSink:
        sink = AttemptStaging.stage(self, name, size)
        self.setting.spring(name, sink)
        return sink


@dataclass(frozen=True, slots=True)
class UploadTrap(UploadStaging):
    """Uploads as it should, but for one shard."""

    setting: Setting = field(kw_only=True)

    def stage(self, name: str, size: int) -> UploadSink:
        sink = UploadStaging.stage(self, name, size)
        self.setting.spring(name, sink)
        return sink


@dataclass(frozen=True, slots=True)
class StoreTrap(StoreStaging):
    """Uploads to a store as it should, but for one shard."""

    setting: Setting = field(kw_only=True)

    def stage(self, name: str, size: int) -> TrappedSink:
        # Each attempt begins its upload before it hangs.
        real = StoreStaging.stage(self, name, size)
        return TrappedSink(real, name, self.setting)


class TrappedSink:
    """Sink that hangs once its upload has begun."""

    def __init__(self, real: StoreSink, name: str, setting: Setting) -> None:
        self._real, self._name, self._setting = real, name, setting

    def __enter__(self) -> TrappedSink:
        self._real.__enter__()
        self._setting.spring(self._name, self._real)
        return self

    def __exit__(self, *error: Any) -> None:
        self._real.__exit__(*error)

    def write_at(self, offset: int, data: memoryview) -> None:
        self._real.write_at(offset, data)

    def finish(self) -> Staged:
        return self._real.finish()


def main_trapped(folder: str, shard: str, again: str, *arguments: str) -> None:
    """The command in a process that is to be killed or interrupted; its shard ``shard`` hangs."""
    from nemotron_fp8.cli.main import main

    Setting(Path(folder), shard, again=again == "again").set()
    sys.argv[1:] = arguments
    main()


def quantize_trapped(address: str, source: str, out: str, folder: str, shard: str) -> None:
    """A run in a process that is to be killed; its shard ``shard`` hangs."""
    from nemotron_fp8 import quantize_repo

    Setting(Path(folder), shard, again=True).set()
    quantize_repo(source, out, cluster=address, threads=1)


def quantize_store_trapped(address: str, source: str, target: str, folder: str, shard: str) -> None:
    """The same from one folder of a store to another; the credentials are in the environment."""
    from nemotron_fp8 import quantize_repo

    Setting(Path(folder), shard, again=True).set()
    quantize_repo(source, target, cluster=address, threads=1)


def quantize_hub_trapped(address: str, endpoint: str, target: str, folder: str, shard: str) -> None:
    """The same from the Hub to the Hub; the token is in the environment."""
    from huggingface_hub import constants

    from nemotron_fp8 import quantize_repo
    from nemotron_fp8._retry import RetryPolicy
    from nemotron_fp8.hub.client import HubClient
    from tests.hub.conversion import SOURCE, Options

    constants.HF_HUB_DISABLE_XET = True
    Setting(Path(folder), shard, again=True).set()
    client = HubClient("TEST_HUB_TOKEN", endpoint, RetryPolicy(first=0.05), timeout=30)
    quantize_repo(str(SOURCE), target, cluster=address, threads=1, hub=Options(client, Path(folder, "work")))
