"""Count what engines change in weights on loading: ``python -m benchmarks.measure.requantization [FOLDER ...]``.

Weights are quantized in blocks of 128 x 128, with scales as computed and with powers of two, and then requantized by
the rules of vLLM and SGLang with DeepGEMM (`tests.support.engine_rules`). Weights of known distributions come first,
then the matrices of the layers of each given checkpoint, whose blocks may be ragged at the edges.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from benchmarks.common import RESULTS, Recorder, machine
from nemotron_fp8_kernels import quantize, reference
from tests.support.engine_rules import THROUGH, requantized

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SIDE = 2048
TITLES = {"smollm2-135m-v1": "SmolLM2-135M"}
"""Titles of checkpoints by the names of their folders."""


def distributions() -> dict[str, torch.Tensor]:
    """Return bf16 weights [SIDE, SIDE]: normal, normal with a factor for each row, and Student's t with 4 degrees."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    student = normal(SIDE, SIDE) / (normal(4, SIDE, SIDE).square().mean(0)).sqrt()
    found = {
        "normal": normal(SIDE, SIDE),
        "normal, rows scaled": normal(SIDE, SIDE) * normal(SIDE, 1).exp(),
        "Student's t": student,
    }
    return {name: (0.02 * values).bfloat16() for name, values in found.items()}


def matrices(folder: Path) -> Iterator[torch.Tensor]:
    """Yield the matrices in the layers of a checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                if len(file.get_slice(name).get_shape()) == 2 and ".layers." in name:
                    yield file.get_tensor(name)


def measure(weights: Iterable[torch.Tensor]) -> Iterator[dict[str, Any]]:
    """Yield a record for each kind of scale and each engine, and for MX blocks, of all weights together."""
    signal, count = 0.0, 0
    noise: dict[tuple[str, str], float] = {}
    changes: dict[tuple[str, str], int] = {}
    for w in weights:
        exact = w.double()
        signal += float(exact.square().sum())
        count += w.numel()
        for scales in ("none", "power-of-two", "mx"):
            block = (1, 32) if scales == "mx" else (128, 128)
            q, scale = quantize(w, "block", block, rounding=scales)  # type: ignore[arg-type]  # a rounding
            stored = reference.dequantize(q, scale, "block", block, torch.float32)
            for engine in ("", *THROUGH) if scales != "mx" else ("",):
                served = stored
                if engine:
                    again, rounded = requantized(q, scale, engine)
                    served = reference.dequantize(again, rounded, "block", dtype=torch.float32)
                key = scales, engine
                noise[key] = noise.get(key, 0.0) + float((served.double() - exact).square().sum())
                changes[key] = changes.get(key, 0) + int((served != stored).sum())
    for (scales, engine), value in noise.items():
        error = math.sqrt(value / signal)
        yield {"scales": scales, "engine": engine, "values": count, "changed": changes[scales, engine], "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS / "requantization.jsonl")
    options = parser.parse_args()
    record = Recorder(options.out, machine("cpu"))
    cases: dict[str, Iterable[torch.Tensor]] = {name: [w] for name, w in distributions().items()}
    cases |= {folder.name: matrices(folder) for folder in options.folders}
    for name, weights in cases.items():
        for fields in measure(weights):
            record.write(weights=TITLES.get(name, name), **fields)


if __name__ == "__main__":
    main()
