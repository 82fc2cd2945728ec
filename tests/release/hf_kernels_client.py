"""Load a repository of kernels with Hugging Face's `kernels`, quantize, and print digests; run by test_hf_kernels.py.

    python hf_kernels_client.py REPOSITORY {torch,triton}

With ``triton`` the Triton kernels run in Triton's interpreter, on tensors of the CPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import torch
from kernels._rust import Digest, DigestAlgorithm

from kernels import get_loaded_kernels, get_local_kernel

GRANULARITIES = ("tensor", "channel", "block")
ROUNDINGS = ("none", "power-of-two")


def digest(*tensors: torch.Tensor) -> str:
    data = b"".join(bytes(tensor.flatten().view(torch.uint8).tolist()) for tensor in tensors)
    return hashlib.sha256(data).hexdigest()


def correct_interpreter() -> None:
    """Replace the conversion of Triton's interpreter as the kernel tests do."""
    path = Path(__file__).resolve().parents[1] / "kernels" / "interpreter.py"
    spec = importlib.util.spec_from_file_location("interpreter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


def weights() -> torch.Tensor:
    return torch.randn(130, 300, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)


def main() -> None:
    repository, way = Path(sys.argv[1]), sys.argv[2]
    module = get_local_kernel(repository)
    (loaded,) = get_loaded_kernels()
    metadata = loaded.metadata
    variant = Path(str(module.__file__)).parent
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    quantize = module.quantize
    if way == "triton":
        correct_interpreter()
        quantize = importlib.import_module(f"{module.__name__}.gpu.ops").quantize
    found = {
        f"{granularity}, {rounding}": digest(*quantize(weights(), granularity, rounding=rounding))
        for granularity in GRANULARITIES
        for rounding in ROUNDINGS
    }
    ours = sorted(name for name in sys.modules if name.startswith("nemotron_fp8"))
    print(json.dumps({"variant": variant.name, "version": metadata.version, "ours": ours, "digests": found}))


if __name__ == "__main__":
    main()
