"""Amaxes for tiny checkpoints: a value for each group of weights with one input, and for each attention module."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.planning.amaxes import Amaxes, CalibrationRun
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.stacked_experts import single_experts
from nemotron_fp8.sources.open import open_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RUN = CalibrationRun("tiny", "words.txt", "0123456789abcdef" * 4, 4, 32, "1.0", "2.13.0", "5.23.0")


def value_of(name: str) -> float:
    """A float32 amax between 0.5 and 64 that depends on a name."""
    return float(torch.tensor(0.5 + 63.5 * (zlib.crc32(name.encode()) / 2**32), dtype=torch.float32))


def amaxes_of(
    folder: Path, *, seen: Callable[[str], bool] = lambda _: True, attention: tuple[str, ...] = ("self_attn", "mixer")
) -> Amaxes:
    """Amaxes of every matrix of a checkpoint, and of every attention module with projections of keys and values.

    Args:
        folder: the checkpoint.
        seen: returns False for a module that no token reaches.
        attention: last names of attention modules.
    """
    inventory = open_source(folder).inventory
    family = family_of(inventory.config)
    names = [view.name for view in inventory.views if len(view.shape) == 2] + single_experts(inventory)
    inputs, keys, values = {}, {}, {}
    for name in names:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and seen(module):
            inputs[module] = value_of(family.fused_matrix_of(name))
        above, _, last = module.rpartition(".")
        if last == "k_proj" and above.rpartition(".")[2] in attention and seen(above):
            keys[above], values[above] = value_of(f"{above} k"), value_of(f"{above} v")
    return Amaxes(inputs, keys, values, (RUN,))
