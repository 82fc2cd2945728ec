"""Time and peak memory of NeMo conversions: ``python -m benchmarks.measure.nemo FOLDER --gigabytes 6``.

Writes a NeMo checkpoint into FOLDER unless it exists (one chunk per layer, outputs and inputs split by 8), quantizes
it and converts it to a Hugging Face folder, each in its own process, and writes one JSON line per run to
``results/nemo.jsonl``. The page cache stays as the writing left it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import RESULTS, Recorder, machine

BLOCK = 1 << 22
"""Elements of the block of random values that every chunk repeats from another offset."""
SPLIT = 8
CONFIG = """\
num_layers: {layers}
hidden_size: {hidden}
ffn_hidden_size: {inner}
num_attention_heads: {heads}
num_query_groups: {groups}
kv_channels: null
encoder_seq_length: 4096
max_position_embeddings: 4096
normalization: layernorm1p
layernorm_epsilon: 1.0e-05
activation: squared-relu
bias: false
position_embedding_type: rope
rotary_percentage: 0.5
share_embeddings_and_output_weights: false
"""


def write_checkpoint(root: Path, gigabytes: float, hidden: int = 4608) -> int:
    """Write a Nemotron-4 of about ``gigabytes`` (1e9 bytes) in the NeMo layout; return the bytes of its chunks."""
    heads, groups, inner, vocabulary = 24, 8, 4 * hidden, 32_000
    size = hidden // heads
    rows = (heads + 2 * groups) * size
    layer_bytes = 2 * (rows * hidden + hidden * hidden + 2 * inner * hidden)
    layers = max(1, math.ceil((gigabytes * 1e9 - 4 * vocabulary * hidden) / layer_bytes))
    decoder = "model.decoder.layers."
    norms = [
        f"{decoder}{part}.layer_norm_{kind}"
        for part in ("self_attention.linear_qkv", "mlp.linear_fc1")
        for kind in ("weight", "bias")
    ]
    arrays = {
        "model.embedding.word_embeddings.weight": ((vocabulary, hidden), (vocabulary // SPLIT, hidden)),
        f"{decoder}self_attention.linear_qkv.weight": ((layers, rows, hidden), (1, rows // SPLIT, hidden)),
        f"{decoder}self_attention.linear_proj.weight": ((layers, hidden, hidden), (1, hidden, hidden // SPLIT)),
        f"{decoder}mlp.linear_fc1.weight": ((layers, inner, hidden), (1, inner, hidden)),
        f"{decoder}mlp.linear_fc2.weight": ((layers, hidden, inner), (1, hidden, inner // SPLIT)),
        **dict.fromkeys(norms, ((layers, hidden), (1, hidden))),
        "model.decoder.final_layernorm.weight": ((hidden,), (hidden,)),
        "model.decoder.final_layernorm.bias": ((hidden,), (hidden,)),
        "model.output_layer.weight": ((vocabulary, hidden), (vocabulary // SPLIT, hidden)),
    }
    total = sum(2 * math.prod(shape) for shape, _ in arrays.values())
    if (root / "model_config.yaml").exists():
        return total
    shutil.rmtree(root, ignore_errors=True)
    torch.manual_seed(0)
    block = (torch.randn(BLOCK) * 0.02).bfloat16()
    pool = memoryview(torch.cat([block, block]).view(torch.uint8).numpy())
    written = 0
    for name, (shape, chunks) in arrays.items():
        folder = root / "model_weights" / name
        folder.mkdir(parents=True)
        meta = {"zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": "bfloat16", "order": "C"}
        meta |= {"compressor": None, "filters": None, "fill_value": None}
        (folder / ".zarray").write_text(json.dumps(meta))
        counts = [side // chunk for side, chunk in zip(shape, chunks, strict=True)]
        for flat in range(math.prod(counts)):
            index, rest = [], flat
            for count in reversed(counts):
                rest, at = divmod(rest, count)
                index.insert(0, at)
            written += 1
            with (folder / ".".join(map(str, index))).open("wb") as file:
                left, start = 2 * math.prod(chunks), written * 977 % BLOCK * 2
                while left:
                    piece = pool[start : start + min(left, 2 * BLOCK)]
                    file.write(piece)
                    left -= len(piece)
    text = CONFIG.format(layers=layers, hidden=hidden, inner=inner, heads=heads, groups=groups)
    (root / "model_config.yaml").write_text(text)
    return total


def run(command: str, source: Path, destination: Path, memory: str) -> dict[str, float]:
    """Run a command in its own process; return its report, which includes VmHWM."""
    shutil.rmtree(destination, ignore_errors=True)
    line = [sys.executable, "-m", "nemotron_fp8", command, str(source), str(destination)]
    if command == "quantize":
        line += ["--format", "fp8", "--granularity", "tensor"]
    done = subprocess.run([*line, "--max-memory", memory, "--json"], check=True, capture_output=True, text=True)
    shutil.rmtree(destination)
    report: dict[str, float] = json.loads(done.stdout)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--max-memory", default="256MiB")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    source = arguments.folder / f"nemo-{arguments.gigabytes:g}"
    total = write_checkpoint(source, arguments.gigabytes)
    recorder = Recorder(RESULTS / "nemo.jsonl", machine("cpu"))
    for command in ("quantize", "convert"):
        for sample in range(arguments.repeat):
            report = run(command, source, arguments.folder / "result", arguments.max_memory)
            recorder.write(
                benchmark=f"nemo-{command}",
                sample=sample,
                bytes_in=total,
                bytes_out=report["bytes_written"],
                seconds=report["seconds"],
                gigabytes_per_second=total / report["seconds"] / 1e9,
                peak_resident_bytes=report["peak_resident_bytes"],
                max_memory=arguments.max_memory,
            )


if __name__ == "__main__":
    main()
