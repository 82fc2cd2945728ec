"""Evaluations without a model: realistic ones by a seed, and any by Hypothesis."""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from nemotron_fp8.evaluation.figures import CheckpointFigures, ClippedModule
from nemotron_fp8.evaluation.result import BUCKETS, Evaluation
from nemotron_fp8.inference.sample_record import Sample

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ("the layer", "of a model", "predicts", "what comes next", "from all", "that came", "before it", "in this text")
SOURCE = "models/SmolLM2-135M"
CLIPPED: dict[str, Any] = {
    "static_values": 1_000_000,
    "clipped_values": 1_234,
    "clipped": (
        ClippedModule("model.layers.3.mlp.down_proj", 1_000, 40_000),
        ClippedModule("model.layers.0.self_attn (keys)", 234, 20_000),
    ),
}
"""Figures of a checkpoint some of whose values clip."""


def figures_of(
    name: str, kl: float, sequences: int = 16, layers: int = 30, seed: int = 0, **more: Any
) -> CheckpointFigures:
    """Figures of a checkpoint whose divergence is about ``kl``; the noise of a sequence is the same for every name."""
    shared, own = random.Random(seed), random.Random(f"{seed} {name}")
    source_nll = [2.7 + 0.4 * shared.gauss(0, 1) for _ in range(sequences)]
    hard = [math.exp(0.4 * shared.gauss(0, 1)) for _ in range(sequences)]
    sequence_kl = [kl * h * math.exp(0.05 * own.gauss(0, 1)) for h in hard]
    changes = [each * 1.1 + kl * 0.8 * own.gauss(0, 1) if kl else 0.0 for each in sequence_kl]
    errors = [kl * 2 * (1 + number / layers) + (2 * kl if number >= 0.8 * layers else 0) for number in range(layers)]
    values: dict[str, Any] = {
        "name": name,
        "weights": "FP8 E4M3, one scale for each output row, compressed-tensors" if kl else "bfloat16",
        "activations": "FP8, dynamic for each token" if kl else "16 bits",
        "perplexity": math.exp(_mean([a + b for a, b in zip(source_nll, changes, strict=True)])),
        "perplexity_change": math.expm1(_mean(changes)),
        "perplexity_error": _error(changes),
        "kl": _mean(sequence_kl),
        "kl_error": _error(sequence_kl),
        "top1": 1 - 4 * kl,
        "top1_error": 0.1 * kl,
        "layers": tuple(errors),
        "sequence_kl": tuple(sequence_kl),
        "sequence_nll": tuple(a + b for a, b in zip(source_nll, changes, strict=True)),
        "position_kl": tuple(kl * (1 + 2 / (at + 1)) for at in range(BUCKETS)),
    }
    return CheckpointFigures(**{**values, **more})


def evaluation_of(*results: CheckpointFigures, sequences: int = 16, layers: int = 30, **more: Any) -> Evaluation:
    """Evaluation of these results; of one, if none is passed."""
    chooser = random.Random(1)
    sample = Sample(
        "pydoc_data.topics",
        "0a1b2c3d4e5f" * 5 + "abcd",
        sequences,
        220,
        512,
        tuple(sorted(chooser.sample(range(220), sequences))) if sequences <= 220 else tuple(range(sequences)),
        tuple(" ".join(chooser.choices(WORDS, k=12)) for _ in range(sequences)),
    )
    values: dict[str, Any] = {
        "source": figures_of(SOURCE, 0.0, sequences, layers, top1=1.0),
        "results": results or (figures_of("out/tensor", 0.0174, sequences, layers),),
        "sample": sample,
        "version": "0.1.0",
        "libraries": {"torch": "2.13.0", "transformers": "5.24.0"},
        "device": "cpu",
        "seconds": 754.2,
        "peak_resident_bytes": 666 << 20,
    }
    return Evaluation(**{**values, **more})


def write_figures(evaluation: Evaluation, path: Path) -> Path:
    """Write the file that ``evaluate --json`` prints."""
    path.write_text(json.dumps(evaluation.to_json()), encoding="utf-8")
    return path


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _error(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((each - mean) ** 2 for each in values) / (len(values) - 1) / len(values))


# ---- any evaluation that a file may hold ----

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["", "x" * 300, "<script>alert(1)</script>", "a`|b](c)", "\u202e", "hf://me/a@main", "a/b/", "源" * 90]
)
NUMBERS = st.floats(-1e30, 1e30) | st.floats(0, 1) | st.integers(-9, 9) | st.sampled_from([0.0, 1e30, 5e-324])


@st.composite
def evaluations(draw: st.DrawFn) -> Evaluation:
    """Any evaluation that `parse_evaluation` accepts."""
    sequences, layers = draw(st.integers(1, 6)), draw(st.integers(0, 5))

    def many(count: int) -> st.SearchStrategy[tuple[float, ...]]:
        return st.lists(NUMBERS, min_size=count, max_size=count).map(tuple)

    counts = st.integers(0, 1 << 60)
    checkpoint = st.builds(
        CheckpointFigures,
        name=TEXT,
        weights=TEXT,
        activations=TEXT,
        **dict.fromkeys(
            ("perplexity", "perplexity_change", "perplexity_error", "kl", "kl_error", "top1", "top1_error"), NUMBERS
        ),
        layers=many(layers),
        sequence_kl=many(sequences),
        sequence_nll=many(sequences),
        position_kl=st.lists(NUMBERS, max_size=BUCKETS).map(tuple),
        notices=st.lists(TEXT, max_size=2).map(tuple),
        static_values=counts,
        clipped_values=counts,
        clipped=st.lists(st.builds(ClippedModule, name=TEXT, clipped=counts, values=counts), max_size=3).map(tuple),
    )
    sample = st.builds(
        Sample,
        name=TEXT,
        sha256=TEXT,
        sequences=st.just(sequences),
        available=counts,
        length=st.integers(2, 1 << 60),
        indices=st.lists(counts, min_size=sequences, max_size=sequences).map(tuple),
        excerpts=st.just(()) | st.lists(TEXT, min_size=sequences, max_size=sequences).map(tuple),
    )
    return draw(
        st.builds(
            Evaluation,
            source=checkpoint,
            results=st.lists(checkpoint, min_size=1, max_size=8).map(tuple),
            sample=sample,
            version=TEXT,
            libraries=st.dictionaries(TEXT, TEXT, max_size=3),
            device=TEXT,
            seconds=NUMBERS,
            peak_resident_bytes=st.none() | counts,
        )
    )
