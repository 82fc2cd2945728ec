"""Hidden states and logits of an evaluation, and those of the whole model that transformers loads from the folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import transformers

from nemotron_fp8.evaluation import evaluate, run
from nemotron_fp8.evaluation.comparison import Comparison
from nemotron_fp8.inference import session
from nemotron_fp8.inference.state import Saved, SavedState
from tests.inference.layouts import config_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nemotron_fp8.evaluation.comparison import TokenFigures
    from nemotron_fp8.evaluation.result import Evaluation


@dataclass
class States:
    """Everything that a model computes for some sequences.

    Attributes:
        layers: hidden states after each layer, ``[..., sequences, length, hidden size]``.
        final: hidden states after the final norm, of the same shape.
        logits: float32 ``[..., sequences, length - 1, words]``.
    """

    layers: list[torch.Tensor] = field(default_factory=list)
    final: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def of(self, checkpoint: int) -> States:
        """Return what one checkpoint of an evaluation computed."""
        return States([each[checkpoint] for each in self.layers], self.final[checkpoint], self.logits[checkpoint])


def difference(found: States, expected: States) -> str:
    """Return the first place at which two models differ, bit by bit; empty if there is none."""
    if len(found.layers) != len(expected.layers):
        return f"{len(found.layers)} layers, not {len(expected.layers)}"
    named = [(f"layer {number}", *pair) for number, pair in enumerate(zip(found.layers, expected.layers, strict=True))]
    named += [("the final norm", found.final, expected.final), ("the logits", found.logits, expected.logits)]
    for name, own, right in named:
        if own.shape != right.shape or own.dtype != right.dtype:
            return f"after {name}: {own.dtype} {list(own.shape)}, not {right.dtype} {list(right.shape)}"
        if not torch.equal(own, right):
            apart = (own.double() - right.double()).abs()
            return f"after {name}: {float((apart > 0).double().mean()):.2%} of values differ, by {float(apart.max()):g}"
    return ""


def write_tokens(path: Path, ids: torch.Tensor) -> Path:
    """Write sequences as ``evaluate_repo`` reads them."""
    path.write_text(json.dumps(ids.tolist()))
    return path


def evaluated(
    source: Path, results: Sequence[Path], tokens: Path, activations: str = "none", **options: Any
) -> tuple[Evaluation, States]:
    """Evaluate results, and return what all checkpoints computed: the source first, then the results."""
    states = States()

    class Watched(SavedState):
        def save(self, hidden: torch.Tensor, saved: Saved, of: int | None = None) -> None:
            states.layers.append(hidden.clone())
            states.final = hidden  # the evaluation overwrites it by the hidden states after the final norm
            super().save(hidden, saved, of)

    parts: dict[int, dict[int, list[torch.Tensor]]] = {}

    class Heard(Comparison):
        def add(self, sequence: int, word: int, logits: list[torch.Tensor]) -> None:
            parts.setdefault(sequence, {})[word] = [each.clone() for each in logits]
            super().add(sequence, word, logits)

    with mock.patch.object(session, "SavedState", Watched), mock.patch.object(run, "Comparison", Heard):
        found = evaluate.evaluate_repo(
            source,
            results,
            tokens=tokens,
            activations=activations,
            device="cpu",
            state_dir=tokens.parent / "state",
            **options,
        )
    by_sequence = [
        torch.stack(
            [torch.cat([parts[number][word][which] for word in sorted(parts[number])], -1) for number in sorted(parts)]
        )
        for which in range(1 + len(results))
    ]
    states.logits = torch.stack(by_sequence)
    return found, states


def predicted(source: Path, results: Sequence[Path], tokens: Path, activations: str) -> list[TokenFigures]:
    """Evaluate results, and return the figures of every prediction: of the source, then of each result."""
    made: list[Comparison] = []

    class Kept(Comparison):
        def __init__(self, ids: torch.Tensor, results: int) -> None:
            super().__init__(ids, results)
            made.append(self)

    with mock.patch.object(run, "Comparison", Kept):
        evaluate.evaluate_repo(
            source, results, tokens=tokens, activations=activations, device="cpu", state_dir=tokens.parent / "state"
        )
    return [made[0].source(), *made[0].results()]


def whole_model(folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, str]:
    """Return the model of ``from_pretrained``, and the name of the list of its layers."""
    read: Any = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(folder)
    if type(config) not in read._model_mapping:
        read = transformers.AutoModelForImageTextToText
    stated = config_of(folder)
    dtype = dtype or getattr(torch, str(stated.get("dtype") or stated.get("torch_dtype")))
    model = _load(read, folder, dtype)
    count = model.config.get_text_config().num_hidden_layers
    name = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and "vis" not in name
    )
    return model, name


@torch.no_grad()
def whole(folder: Path, ids: torch.Tensor, dtype: torch.dtype | None = None) -> States:
    """Return what the model of ``from_pretrained`` computes, one sequence at a time."""
    model, name = whole_model(folder, dtype)
    layers = model.get_submodule(name)
    after: list[list[torch.Tensor]] = [[] for _ in layers]
    normed: list[torch.Tensor] = []

    def keep(kept: list[torch.Tensor]) -> Any:
        return lambda _module, _given, out: kept.append((out[0] if isinstance(out, (tuple, list)) else out)[0].clone())

    for layer, kept in zip(layers, after, strict=True):
        layer.register_forward_hook(keep(kept))
    body = model.get_submodule(name.rpartition(".")[0])
    body.register_forward_hook(lambda _module, _given, out: normed.append(out[0][0].clone()))
    logits = [model(input_ids=row[None], use_cache=False).logits[0, :-1].float() for row in ids]
    return States([torch.stack(each) for each in after], torch.stack(normed), torch.stack(logits))


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Load a model with the attention that an evaluation uses."""
    given = {"dtype": dtype, "experts_implementation": "eager"}
    try:
        return kind.from_pretrained(folder, attn_implementation="sdpa", **given).eval()
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return kind.from_pretrained(folder, attn_implementation="eager", **given).eval()
