"""Run in vLLM's environment: requantize blocks as vLLM does on loading (``python requantize_in_vllm.py IN OUT``).

Tensors ``NAME`` and ``NAME.scale`` of the file IN are codes and float32 scales of blocks of 128 x 128.
"""

from __future__ import annotations

import sys

from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.fp8_utils import requant_weight_ue8m0_inplace

if __name__ == "__main__":
    tensors = load_file(sys.argv[1])
    for name in [name for name in tensors if not name.endswith(".scale")]:
        requant_weight_ue8m0_inplace(tensors[name], tensors[f"{name}.scale"])
    save_file(tensors, sys.argv[2])
