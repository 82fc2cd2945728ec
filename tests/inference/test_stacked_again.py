"""Experts that were split for engines, dequantized: transformers loads every one of them where the source had it.

The reference is the source's own folder with each matrix replaced by code times scale, stacked by hand.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemotron_fp8 import Recipe, dequantize_repo, quantize_repo
from tests.families import zoo
from tests.families.by_hand import dequantized
from tests.inference.conftest import CACHE

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engines


class Stack(NamedTuple):
    """Storage of one kind of stack, and the names of its experts in the result.

    Attributes:
        ending: ending of its name.
        experts: ending of the module that holds its experts in the result.
        parts: their matrices, in order.
        transposed: True if an expert is stored ``[in, out]``.
    """

    ending: str
    experts: str
    parts: tuple[str, ...]
    transposed: bool = False


GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
GRANITE = (
    Stack("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts", GATE_UP),
    Stack("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts", DOWN),
)
LLAMA4 = (
    Stack("feed_forward.experts.gate_up_proj", "feed_forward.experts", GATE_UP, transposed=True),
    Stack("feed_forward.experts.down_proj", "feed_forward.experts", DOWN, transposed=True),
)
QWEN = (Stack("mlp.experts.gate_up_proj", "mlp.experts", GATE_UP), Stack("mlp.experts.down_proj", "mlp.experts", DOWN))
GEMMA = (Stack("experts.gate_up_proj", "experts", GATE_UP), Stack("experts.down_proj", "experts", DOWN))
STEP = tuple(Stack(f"moe.{part}_proj.weight", "moe.experts", (f"{part}_proj",)) for part in ("gate", "up", "down"))
FAMILIES = {
    "gemma4_text-experts": GEMMA,
    "mistral4": QWEN,
    "step3p7": STEP,
    "zaya": QWEN,
    "llama4": LLAMA4,
    "llama4_text": LLAMA4,
    "granitemoe": GRANITE,
    "granitemoehybrid": GRANITE,
    "qwen3_vl_moe": QWEN,
}
EXPERTS = 4


def by_hand(source: Path, result: Path, target: Path, stacks: tuple[Stack, ...]) -> int:
    """Write ``source`` with the products of ``result`` in place of its weights; return the number of stacks."""
    shutil.copytree(source, target)
    products, _ = dequantized(result)
    state = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    count = 0
    for name in state:
        stack = next((each for each in stacks if name.endswith(each.ending)), None)
        if stack is None:
            state[name] = products[name].contiguous()
            continue
        holder = name.removesuffix(stack.ending) + stack.experts
        experts = [
            torch.cat([products[f"{holder}.{number}.{part}.weight"] for part in stack.parts])
            for number in range(EXPERTS)
        ]
        whole = torch.stack(experts)
        state[name] = (whole.transpose(1, 2) if stack.transposed else whole).contiguous()
        count += 1
    for file in target.glob("*.safetensors*"):
        file.unlink()
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return count


@pytest.mark.parametrize("granularity", ["channel", "block"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert_is_code_times_scale(name: str, granularity: str, tmp_path: Path) -> None:
    known = {each.name: each for each in zoo.specimens()}
    zoo.build_all(CACHE / "zoo", [known[name]], again=False)
    source, result, back, reference = (CACHE / "zoo" / name, *(tmp_path / part for part in ("fp8", "back", "hand")))
    form = "fp8" if granularity == "block" else "compressed-tensors"
    report = quantize_repo(source, result, Recipe(format=form, granularity=granularity), "cpu")
    told = {each.engine: each for each in report.engines}["transformers"]
    # Under compressed-tensors, transformers builds the experts of Llama 4 one by one.
    assert told.reads == (name.startswith("llama4") and form == "compressed-tensors")
    assert told.reads or "dequantize the result" in told.note
    dequantize_repo(result, back)
    assert by_hand(source, result, reference, FAMILIES[name]) > 0
    auto = getattr(transformers, known[name].auto_class)
    states = []
    for folder in (back, reference):
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert {key: value for key, value in info.items() if value} == {}
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert [key for key, value in states[0].items() if not torch.equal(value, states[1][key])] == []
    config = json.loads((back / "config.json").read_text())
    assert "quantization_config" not in config
