"""A conversion from the Hub to the Hub as the pipeline makes it; also for processes that are to be killed."""

from __future__ import annotations

import json
import os
import random
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from nemotron_fp8.budget import parse_bytes
from nemotron_fp8.conversion import with_manifest
from nemotron_fp8.execute import execute
from nemotron_fp8.hub.address import Address
from nemotron_fp8.hub.client import HubClient
from nemotron_fp8.hub.destination import HubDestination
from nemotron_fp8.hub.job import job_digest, steps_of
from nemotron_fp8.hub.prefetch import Prefetch
from nemotron_fp8.hub.retry import Patience
from nemotron_fp8.hub.source import HubOpener, read_repo
from nemotron_fp8.hub.staging import Staging
from nemotron_fp8.journal import Terms, plan_digest
from nemotron_fp8.plan import make_plan
from nemotron_fp8.quantize import CpuEngine
from nemotron_fp8.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = Address("nv/source")


def checkpoint(folder: Path, shards: int = 4) -> dict[str, bytes]:
    """A small sharded checkpoint; returns its files."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {
            f"model.layers.{shard}.mlp.up_proj.weight": torch.randn(64, 128, generator=generator).bfloat16(),
            f"model.layers.{shard}.input_layernorm.weight": torch.ones(128, dtype=torch.bfloat16),
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(random.Random(3).randbytes(5000))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def convert(client: HubClient, work: Path, stop_after: int | None = None) -> None:
    """What the pipeline does: plan, then fetch, quantise and upload a shard at a time, then publish."""
    source = read_repo(client, SOURCE)
    recipe = Recipe()
    plan = make_plan(source.inventory, recipe, parse_bytes("64MiB"), 1)
    opener = HubOpener(client, source.listing, work)
    terms = Terms(plan_digest(plan), recipe.model_dump(mode="json"), source.stamps)
    staging = Staging(client, "me/target", job_digest(terms), str(SOURCE))
    work.mkdir(exist_ok=True)
    with (
        HubDestination(staging, work) as destination,
        Prefetch(opener, work, steps_of(plan.units), check=source.check_start) as prefetch,
    ):
        receipts = dict(destination.finished())
        engine = CpuEngine()
        for number, unit in enumerate(plan.units):
            if unit.name in receipts or staging.published:
                continue
            if number == stop_after:
                destination.wait()
                raise KeyboardInterrupt
            prefetch.step(number)
            receipts[unit.name] = execute(unit, opener, destination, engine)
            destination.record(receipts[unit.name])
        copies = {}
        for file in plan.inventory.side_files:

            def pieces(file: str = file.name, size: int = file.size) -> object:
                opened = opener.open(file)
                buffer = bytearray(size)
                opened.read_into(0, memoryview(buffer))
                opened.close()
                yield bytes(buffer)

            copies[file.name] = pieces
        documents = with_manifest(plan, receipts, copies, True)  # type: ignore[arg-type]  # generators
        destination.publish(receipts, documents, copies)  # type: ignore[arg-type]  # generators


def run_alone(endpoint: str, token: str, work: Path) -> None:
    """A whole conversion in a process of its own."""
    from huggingface_hub import constants

    os.environ["TEST_HUB_TOKEN"] = token
    constants.HF_HUB_DISABLE_XET = True
    torch.set_num_threads(1)
    convert(HubClient("TEST_HUB_TOKEN", endpoint, Patience(first=0.05), timeout=5), work)
