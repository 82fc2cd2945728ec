"""The emulation of what engines do to scales of blocks is what vLLM does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_fp8_kernels import reference
from tests.inference.conftest import VLLM_PYTHON
from tests.inference.in_vllm import ENVIRONMENT
from tests.support.checkpoints import same_bits
from tests.support.engine_rules import requantized

pytestmark = pytest.mark.engines


@pytest.mark.usefixtures("vllm")  # skips where vLLM cannot run
def test_the_emulated_requantization_is_that_of_vllm(tmp_path: Path) -> None:
    """Codes and scales by bits, of ragged, tiny, huge and zero blocks, with scales of both roundings."""
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for rounding in ("none", "power-of-two"):
        for number, exponent in enumerate((-120, -40, -16, -7, 0, 60, 119)):
            w = torch.randn(300, 200, generator=generator) * 2.0**exponent
            w[128:256, :128] = 0
            codes, scales = reference.quantize(w, "block", rounding=rounding)  # type: ignore[arg-type]  # a rounding
            tensors |= {f"{rounding}.{number}": codes, f"{rounding}.{number}.scale": scales}
    save_file(tensors, tmp_path / "in.safetensors")
    script = Path(__file__).with_name("requantize_in_vllm.py")
    command = [VLLM_PYTHON, script, tmp_path / "in.safetensors", tmp_path / "out.safetensors"]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, timeout=600)
    found = load_file(tmp_path / "out.safetensors")
    for name in [name for name in tensors if not name.endswith(".scale")]:
        codes, scales = requantized(tensors[name], tensors[f"{name}.scale"], "vLLM")
        assert same_bits(found[name], codes), name
        assert same_bits(found[f"{name}.scale"], scales), name
        if name.startswith("power-of-two"):
            values = [
                reference.dequantize(*pair, "block")
                for pair in ((codes, scales), (tensors[name], tensors[f"{name}.scale"]))
            ]
            assert torch.equal(*values), name
