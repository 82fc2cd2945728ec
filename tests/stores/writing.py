"""Conversions into a store through the public function, also in processes that a test kills."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from typing import TYPE_CHECKING

import torch

from nemotron_fp8 import quantize_repo
from nemotron_fp8.stores.listing import RECORDS
from tests.hub_server.faults import Fault
from tests.store_server.fixtures import BUCKET

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any

    from nemotron_fp8 import Progress, Recipe, Report
    from tests.hub_server.faults import Request
    from tests.store_server.server import StoreServer

TARGET = f"s3://{BUCKET}/models/target"
PREFIX = "models/target/"
ANNOUNCING = ("model.safetensors.index.json", "config.json", "nemotron_fp8.json")
"""Files by which a reader finds a result."""


def convert(
    source: Path | str,
    target: str | Path = TARGET,
    recipe: Recipe | None = None,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Report:
    """Convert through the public function."""
    return quantize_repo(source, target, recipe, "cpu", progress=progress, threads=1, **options)


def run_alone(environment: Mapping[str, str], source: str, target: str, options: Mapping[str, Any]) -> None:
    """Convert in a process of its own."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    convert(source, target, **options)


def contents(store: StoreServer, prefix: str = PREFIX) -> dict[str, bytes]:
    """Return every object of the folder, the records of a job too."""
    return store.files(BUCKET, prefix)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def observe(found: Mapping[str, bytes], result: Mapping[str, bytes]) -> bool:
    """Check what a reader sees at one moment: no result, or all of it. Return True if it sees a result.

    A file of a result that a reader does not find by its index, config or manifest is complete, too.
    """
    for name, data in found.items():
        assert name.startswith(f"{RECORDS}/") or data == result[name], name
    if not any(name in found for name in ANNOUNCING):
        return False
    missing = result.keys() - found.keys()
    assert missing <= {*ANNOUNCING}, missing
    order = [name for name in ANNOUNCING if name in result]
    seen = [name in found for name in order]
    assert seen == sorted(seen, reverse=True), seen  # a later one implies the ones before
    return True


def killed_at(
    store: StoreServer, source: Path, number: int, moment: str, options: Mapping[str, Any] | None = None
) -> bool:
    """Run a conversion in a process and kill it at its request ``number``; return False if it made fewer requests.

    Args:
        store: the server.
        source: the checkpoint.
        number: number of the request, from 0 on.
        moment: ``before`` the server acts on the request, or ``after``.
        options: of the conversion.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.stores.writing"])
    arguments = (store.environment(), str(source), TARGET, dict(options or {}))
    process = context.Process(target=run_alone, args=arguments)
    first = len(store.log)
    killed = threading.Event()

    def kill(request: Request) -> Fault | None:
        if request.number - first != number or killed.is_set():
            return None
        killed.set()
        os.kill(process.pid or 0, signal.SIGKILL)
        return Fault("reset_before")  # type: ignore[arg-type]  # of this server too

    setattr(store, moment, kill)
    process.start()
    process.join(60)
    setattr(store, moment, None)
    assert process.exitcode == (-signal.SIGKILL if killed.is_set() else 0)
    return killed.is_set()


def checkpoint_of(folder: Path, shards: int, side: Mapping[str, bytes] | None = None) -> Path:
    """Write a small checkpoint of some shards, with a tokenizer and further side files."""
    from tests.hub.conversion import checkpoint

    checkpoint(folder, shards, rows=128)
    for name, data in (side or {}).items():
        (folder / name).write_bytes(data)
    return folder


def job_of(store: StoreServer) -> dict[str, Any]:
    """Return the job file of the folder."""
    found: dict[str, Any] = json.loads(contents(store)[f"{RECORDS}/job.json"])
    return found
