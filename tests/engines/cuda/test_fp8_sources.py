"""Quantized sources on a device: the bytes of the CPU, whatever the tensors, the recipe and the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe
from tests.engines.cuda.test_ring import run_on, run_on_cpu
from tests.support.checkpoints import ONE, weight, write_checkpoint
from tests.support.fake_device import FakeDevice
from tests.support.fp8_sources import EMBEDDING, TARGETS
from tests.support.quantized import KINDS, checkpoint_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("target", ["tensor", "channel", "best channel", "fp8 block", "mx"])
def test_same_bytes_as_the_cpu(tmp_path: Path, target: str) -> None:
    """Kept, rounded, dequantized and copied, larger than a slot and smaller."""
    made = {}
    for i, kind in enumerate(("tensor", "channel", "DeepSeek V4", "MXFP8", "MXFP4 of DeepSeek V4")):
        made[f"model.layers.{i}.mlp.down_proj"] = KINDS[kind].make(256, 384, i)
        made[f"model.layers.{i}.self_attn.o_proj"] = KINDS[kind].make(128, 128, i)
    made["model.layers.0.self_attn.o_proj"] = KINDS["MXFP4 of DeepSeek V4"].make(1024, 512, 9)
    tensors = {**checkpoint_of(made), EMBEDDING: weight(64, 384)}
    source = write_checkpoint(tmp_path / "source", {ONE: tensors}, config={"model_type": "llama"})
    chosen = Recipe(scales="best") if target == "best channel" else TARGETS[target][0]
    recipe = chosen.model_copy(update={"ignore": (r"layers\.4\.",)})
    receipts = run_on(source, tmp_path / "device", Recipe.model_validate(recipe.model_dump()), FakeDevice(1), 2 << 20)
    expected = run_on_cpu(source, tmp_path / "cpu", recipe)
    assert [receipt.recoded for receipt in receipts] == [receipt.recoded for receipt in expected]
    assert (tmp_path / "device" / ONE).read_bytes() == (tmp_path / "cpu" / ONE).read_bytes()
