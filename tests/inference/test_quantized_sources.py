"""Results of FP8 and MXFP4 sources load as results of unquantized ones do, and compute what they hold."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from nemotron_fp8 import quantize_repo
from tests.inference import in_transformers
from tests.inference.layouts import LAYOUTS, MXFP8, Layout, block_layout, config_of, quantized_names, read_folder
from tests.inference.test_vllm import BF16_ACTIVATIONS, compare

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.inference.in_vllm import Host

pytestmark = pytest.mark.engines

BLOCKS, WEIGHTS = block_layout("fp8"), Layout("compressed-tensors", "channel", "none")
CASES = [
    (BLOCKS, MXFP8),  # codes are kept
    (BLOCKS, WEIGHTS),  # rounded once more
    (LAYOUTS[0], WEIGHTS),  # one scale for a tensor, repeated for rows
]
TOKENS = [[1, 5, 9, 200, 17, 33, 64, 511]]
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.mark.parametrize(("first", "second"), CASES, ids=lambda layout: layout.name)
def test_a_result_made_of_a_result_computes_what_it_holds(
    first: Layout, second: Layout, nemotron: Path, quantized: Callable[[Path, Layout], Path], tmp_path: Path
) -> None:
    """transformers computes with the weights of the second folder; kept codes leave those of the first."""
    source = quantized(nemotron, first)
    quantize_repo(source, tmp_path / "again", second.recipe)
    assert quantized_names(tmp_path / "again") == quantized_names(source)
    loaded, lost = in_transformers.load(tmp_path / "again", **in_transformers.options_for(second))
    assert not lost
    found = in_transformers.logits(loaded, TOKENS)
    by_hand = in_transformers.logits(in_transformers.load_by_hand(nemotron, tmp_path / "again"), TOKENS)
    assert torch.equal(found, by_hand)
    before = in_transformers.logits(in_transformers.load_by_hand(nemotron, source), TOKENS)
    assert torch.equal(found, before) == ((first, second) != (BLOCKS, WEIGHTS))


def as_mxfp4(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write a model with its projections as MXFP4, packed as those of DeepSeek V4; return their values."""
    folder.mkdir()
    tensors, values = {}, {}
    for name, tensor in read_folder(source).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        groups = tensor.float().view(tensor.shape[0], -1, 32)
        exponents = groups.abs().amax(-1).log2().floor().clamp(min=-20) - 2
        scaled = groups / 2.0 ** exponents[..., None]
        codes = (scaled.abs()[..., None] - torch.tensor(VALUES)).abs().argmin(-1) | (scaled < 0).long() << 3
        flat = codes.view(tensor.shape).to(torch.uint8)
        tensors[name] = (flat[:, ::2] | flat[:, 1::2] << 4).view(torch.int8)
        tensors[name.removesuffix("weight") + "scale"] = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        signs = 1 - 2 * (codes >> 3)
        values[name] = (torch.tensor(VALUES)[codes & 7] * signs * 2.0 ** exponents[..., None]).view(tensor.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_of(source) | {"expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    for side in source.glob("*.json"):
        if side.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(side, folder)
    return values


@pytest.mark.parametrize("layout", [BLOCKS, MXFP8], ids=lambda layout: layout.name)
def test_mxfp4_becomes_fp8_without_a_change(layout: Layout, nemotron: Path, tmp_path: Path) -> None:
    """The engine computes with the values of the packed weights, to the bit."""
    values = as_mxfp4(nemotron, tmp_path / "packed")
    report = quantize_repo(tmp_path / "packed", tmp_path / "out", layout.recipe)
    assert (report.recoded.exact, report.recoded.changed) == (len(values), 0)
    loaded, lost = in_transformers.load(tmp_path / "out")
    assert not lost
    state = {name: tensor for name, tensor in loaded.state_dict().items() if name in values}
    assert state.keys() == values.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor.float(), values[name]), name


def test_vllm_serves_blocks_that_became_rows(
    nemotron: Path, quantized: Callable[[Path, Layout], Path], tmp_path: Path, vllm: Host
) -> None:
    quantize_repo(quantized(nemotron, BLOCKS), tmp_path / "rows", WEIGHTS.recipe)
    by_hand = in_transformers.load_by_hand(nemotron, tmp_path / "rows")
    _, apart = compare(vllm, "nemotron", tmp_path / "rows", by_hand, tmp_path / "logprobs.safetensors")
    assert apart.within(BF16_ACTIVATIONS["tiny"])
