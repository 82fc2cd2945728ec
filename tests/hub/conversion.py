"""Conversions from and to the Hub through the public function, also in processes that a test kills."""

from __future__ import annotations

import json
import os
import random
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from nemotron_fp8 import HubOptions, quantize_repo, verify_repo
from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.hub.address import Address
from nemotron_fp8.hub.client import HubClient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8 import Progress, Recipe, Report

SOURCE = Address("nv/source")


def checkpoint(folder: Path, shards: int = 4, rows: int = 64, columns: int = 128) -> dict[str, bytes]:
    """Write a small sharded checkpoint and return its files."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {
            f"model.layers.{shard}.mlp.up_proj.weight": torch.randn(rows, columns, generator=generator).bfloat16(),
            f"model.layers.{shard}.input_layernorm.weight": torch.ones(columns, dtype=torch.bfloat16),
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(random.Random(3).randbytes(5000))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Options(HubOptions):
    """Options with the client and the work folder of a test."""

    def __init__(self, client: HubClient, work: Path, **options: object) -> None:
        super().__init__(cache_dir=work, **options)  # type: ignore[arg-type]  # of the tests
        object.__setattr__(self, "made", client)

    def client(self) -> HubClient:
        made: HubClient = self.made  # type: ignore[attr-defined]  # set above
        return HubClient(made.token_env, made.endpoint, made.policy, made.timeout, made.on_wait)


def convert(
    client: HubClient,
    work: Path,
    source: str = str(SOURCE),
    target: str = "hf://me/target",
    progress: Callable[[Progress], None] | None = None,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    restart: bool = False,
    **options: object,
) -> Report:
    """Convert through the public function."""
    return quantize_repo(
        source,
        target,
        recipe,
        "cpu",
        progress=progress,
        threads=1,
        overwrite=overwrite,
        restart=restart,
        hub=Options(client, work, **options),
    )


def wanted(client: HubClient, folder: Path, **options: Any) -> dict[str, bytes]:
    """Return the expected files: those of a verified conversion into a folder."""
    target = folder / "wanted"
    convert(client, folder / "wanted-work", target=str(target), **options)
    assert verify_repo(None, target).ok
    return {path.name: path.read_bytes() for path in target.iterdir()}


def run_alone(
    endpoint: str,
    token: str,
    work: Path,
    source: str = str(SOURCE),
    target: str = "hf://me/target",
    overwrite: bool = False,
) -> None:
    """Convert in a process of its own."""
    from huggingface_hub import constants

    os.environ["TEST_HUB_TOKEN"] = token
    constants.HF_HUB_DISABLE_XET = True
    torch.set_num_threads(1)
    convert(
        HubClient("TEST_HUB_TOKEN", endpoint, RetryPolicy(first=0.05), timeout=5),
        work,
        source,
        target,
        overwrite=overwrite,
    )
