"""Measure the error of each layout, on SmolLM2 and a random Nemotron, and write docs/errors.md.

    .venv-engines/bin/python -m tools.error_figures

Every figure is of the folder that the pipeline writes, dequantized with the safetensors library alone.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.common import read
from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.errors import NothingSelectedError
from tests.inference.in_transformers import load, load_by_hand, logits
from tests.inference.layouts import LAYOUTS, MXFP8, dequantized_state, quantized_names, read_folder
from tests.inference.models import smollm2, tiny_nemotron
from tests.support.engine_rules import requantized
from tools.errors_page import PAGE, RECIPES, RESULTS, render

if TYPE_CHECKING:
    from collections.abc import Callable

CACHE = Path(".cache/engines")
TEXT = (
    "Water boils at a lower temperature on a mountain than at the sea, because the air above it is thinner and"
    " presses on it less. Cooks who live high up therefore leave rice and beans on the fire for longer. The same"
    " law lets a pressure cooker work the other way: it keeps the steam in, the pressure rises, and the food is"
    " done in half of the time."
)
UNROUNDED, IN_VLLM = "fp8, block, scales not rounded", "requantized by vLLM"
MODELS: dict[str, Callable[[Path], Path]] = {"SmolLM2-135M": smollm2, "random Nemotron": tiny_nemotron}


def recipes() -> dict[str, Recipe]:
    """Every layout, the shared scale and the original numerics, by the name that the table has for them.

    How activations are treated does not show in the weights: each format and granularity is measured once.
    """
    found = {
        f"{x.format}, {x.granularity}": Recipe(format=x.format, granularity=x.granularity, activations=x.activations)
        for x in (*LAYOUTS, MXFP8)
    }
    found[UNROUNDED] = Recipe(format="fp8", scale_rounding="none")
    found["fp8, tensor, shared scales"] = Recipe(format="fp8", granularity="tensor", share_scales=True)
    found["fp8, tensor, original numerics"] = Recipe(numerics="original")
    return found


def requantize(folder: Path, target: Path) -> None:
    """Write a folder of blocks as vLLM with DeepGEMM holds it in memory."""
    shutil.copytree(folder, target)
    for shard in target.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name, each in tensors.items() if each.dtype == torch.float8_e4m3fn]:
            scale = f"{name}_scale_inv"
            tensors[name], tensors[scale] = requantized(tensors[name], tensors[scale], "vLLM")
        save_file(tensors, shard, {"format": "pt"})


def sqnr(plain: torch.Tensor, restored: torch.Tensor) -> float:
    """Signal to quantization noise in dB: 10 log10(sum w^2 / sum (w - w')^2), in float64."""
    signal, noise = plain.double(), plain.double() - restored.double()
    return 10 * math.log10(float(signal.square().sum()) / float(noise.square().sum()))


def perplexity(scores: torch.Tensor, tokens: list[int]) -> float:
    """exp of the mean negative log-likelihood of every token but the first; scores are [1, tokens, vocabulary]."""
    wanted = torch.tensor(tokens[1:])
    return math.exp(float(torch.nn.functional.cross_entropy(scores[0, :-1].float(), wanted)))


def tokens_of(folder: Path) -> list[int]:
    """Return the tokens of the text; without a tokenizer its bytes, which are below the vocabulary of 512."""
    if (folder / "tokenizer.json").exists():
        return list(transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])
    return list(TEXT.encode())[:250]


def measure(name: str, source: Path, scratch: Path) -> list[dict[str, Any]]:
    """One line for the plain model and one for each layout that takes any of its weights."""
    model, _ = load(source)
    tokens = tokens_of(source)
    plain, originals = logits(model, [tokens]).float(), read_folder(source)
    lines: list[dict[str, Any]] = [{"model": name, "layout": "bf16", "perplexity": perplexity(plain, tokens)}]
    del model
    for layout, recipe in recipes().items():
        folder = scratch / layout.replace(", ", "-").replace(" ", "-")
        try:
            quantize_repo(source, folder, recipe, device="cpu")
        except NothingSelectedError:
            continue
        folders = {layout: folder}
        if layout in ("fp8, block", UNROUNDED):
            folders[f"{layout}, {IN_VLLM}"] = folder.with_name(f"{folder.name}-in-vllm")
            requantize(folder, folders[f"{layout}, {IN_VLLM}"])
        for shown, each in folders.items():
            restored = dequantized_state(each)
            ratios = [sqnr(originals[weight], restored[weight]) for weight in sorted(quantized_names(each))]
            found = logits(load_by_hand(source, each), [tokens]).float()
            lines.append(
                {
                    "model": name,
                    "layout": shown,
                    "tensors": len(ratios),
                    "sqnr_min": min(ratios),
                    "sqnr_median": statistics.median(ratios),
                    "relative_l2": float((found - plain).norm() / plain.norm()),
                    "perplexity": perplexity(found, tokens),
                }
            )
    return lines


def main() -> None:
    """Measure all and write the results and the page."""
    lines: list[dict[str, Any]] = []
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "words": len(TEXT.split())}
    for name, build in MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            lines += [line | versions for line in measure(name, build(CACHE), Path(scratch))]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    PAGE.write_text(render(lines, read(RECIPES)), encoding="utf-8")


if __name__ == "__main__":
    main()
