"""Results with stored scales are evaluated as engines serve them, to the bit: inputs, keys and values are cast to FP8.

The other side is the dequantized result in one piece, with a cast before each product and before attention that is
written here anew.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from nemotron_fp8 import Recipe, calibrate_repo, dequantize_repo, quantize_repo
from nemotron_fp8.evaluation.evaluate import evaluate_repo
from tests.inference import layer_by_layer
from tests.inference.layer_by_layer import difference, evaluated, whole, write_tokens
from tests.inference.layouts import config_of, read_folder
from tests.inference.test_evaluation import IDS, specimen, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["specimen", "tokens"]
pytestmark = pytest.mark.engines

STATIC = {"granularity": "tensor", "activations": "static", "share_scales": True}
CALIBRATION = torch.randint(10, 500, (1, 32), generator=torch.Generator().manual_seed(9))


@dataclass
class Served:
    """A whole model as an engine serves it.

    Attributes:
        scales: tensors of the result of one element, by name, and 1.0 for what is cached without one.
        values, clipped: numbers of values that were cast, and of those beyond the range.
    """

    scales: dict[str, float]
    exact: bool
    values: int = 0
    clipped: int = 0
    _seen: list[tuple[torch.Tensor, float]] = field(default_factory=list)

    def cast(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return ((x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)

    def count(self, x: torch.Tensor, scale: float) -> None:
        """Count the values of a tensor once, however many weights it is multiplied by."""
        if not any(one is x and other == scale for one, other in self._seen):
            self._seen.append((x, scale))
            self.values += x.numel()
            self.clipped += int((x.float().abs() > 448 * scale * (1 + 1e-6)).sum())

    def matrices(self, model: Any) -> dict[int, float]:
        """Return the scale of each matrix, by its address."""
        found = {}
        for name, parameter in model.named_parameters():
            stem = name.removesuffix(".weight")
            if parameter.dim() == 3:
                stem, _, last = stem.rpartition(".")
                part = {"gate_up_proj": "up_proj"}.get(last, last)
                for number, matrix in enumerate(parameter):
                    if scale := self._of(f"{stem}.{number}.{part}.input_scale"):
                        found[matrix.data_ptr()] = scale
            elif scale := self._of(f"{stem}.input_scale"):
                found[parameter.data_ptr()] = scale
        return found

    def _of(self, name: str) -> float | None:
        return self.scales.get(name, self.scales.get(f"backbone.{name.removeprefix('model.')}"))

    def cache_scale(self, layer: int, letter: str) -> float:
        found = [
            value
            for name, value in self.scales.items()
            if f"layers.{layer}." in name and name.endswith(f"{letter}_scale")
        ]
        value = torch.tensor(found[0] if found else 1.0)
        return float(value if self.exact else value.bfloat16())


@contextmanager
def served(result: Path, with_cache: bool) -> Iterator[Served]:
    """Cast what every whole model multiplies and attends to, with the scales of a result."""
    stored = {name: float(each) for name, each in read_folder(result).items() if each.numel() == 1}
    method = config_of(result)["quantization_config"]["quant_method"]
    found = Served(stored, method == "compressed-tensors")
    current = [-1]
    linear, attention = torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention
    latents: dict[int, Any] = {}
    scales: dict[int, float] = {}

    def load(*given: Any, **named: Any) -> Any:
        model, layers = whole_model(*given, **named)
        scales.update(found.matrices(model))
        for number, layer in enumerate(model.get_submodule(layers)):
            layer.register_forward_pre_hook(lambda *_, number=number: current.__setitem__(0, number))
            for module in layer.modules():
                if hasattr(module, "kv_b_proj"):
                    latents[number] = module
                    latents[module.kv_b_proj.weight.data_ptr()] = module
        return model, layers

    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if with_cache and weight.data_ptr() in latents:
            found.count(x, 1.0)
            x = found.cast(x, 1.0)
        if (scale := scales.get(weight.data_ptr())) is not None:
            found.count(x, scale)
            x = found.cast(x, scale)
        return linear(x, weight, bias)

    def attend(query: Any, key: Any, value: Any, *given: Any, **named: Any) -> Any:
        module = latents.get(current[0])
        heads = key if module is None else key[..., -module.qk_rope_head_dim :]
        k, v = (1.0, 1.0) if module is not None else (found.cache_scale(current[0], letter) for letter in "kv")
        found.count(heads, k)
        heads = found.cast(heads, k)
        if module is None:
            found.count(value, v)
            return attention(query, heads, found.cast(value, v), *given, **named)
        key = torch.cat((key[..., : -module.qk_rope_head_dim], heads), -1)
        return attention(query, key, value, *given, **named)

    whole_model = layer_by_layer.whole_model
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(layer_by_layer, "whole_model", load))
        stack.enter_context(mock.patch.object(torch.nn.functional, "linear", multiply))
        if with_cache:
            stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend))
        yield found


CASES = [
    *((model, {"format": "fp8", "kv_cache": "fp8", **STATIC}) for model in ("nemotron", "llama", "phi3", "qwen3_moe")),
    *((model, {"format": "fp8", "kv_cache": "fp8", **STATIC}) for model in ("nemotron_h", "tiny_qwen3_moe", "qwen2")),
    ("nemotron", {"format": "fp8", **STATIC}),
    ("llama", {"format": "compressed-tensors", "kv_cache": "fp8", **STATIC}),
    ("llama", {"format": "modelopt", "kv_cache": "fp8", **STATIC}),
    # Without scales: 1.0.
    ("llama", {"kv_cache": "fp8", "activations": "none"}),
    ("deepseek_v3", {"kv_cache": "fp8", "activations": "none"}),
]


@pytest.mark.parametrize(
    ("model", "settings"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_states_and_logits_are_those_of_the_whole_model_with_casts(
    model: str,
    settings: dict[str, Any],
    specimen: Callable[[str], Path],
    nemotron: Path,
    qwen3_moe: Path,
    tokens: Path,
    tmp_path: Path,
) -> None:
    """A calibration on few tokens, with a small factor, so that values clip."""
    source = {"nemotron": nemotron, "tiny_qwen3_moe": qwen3_moe}.get(model) or specimen(model)
    result, back = tmp_path / "result", tmp_path / "back"
    amaxes = None
    if settings["activations"] == "static":
        calibration = write_tokens(tmp_path / "calibration.json", CALIBRATION)
        amaxes = calibrate_repo(source, tokens=calibration, factor=0.5, device="cpu", state_dir=tmp_path / "state")
    quantize_repo(source, result, Recipe(**settings), amaxes=amaxes, device="cpu")
    dequantize_repo(result, back)
    evaluation, states = evaluated(source, [result], tokens, "as-served")
    has_cache = settings.get("kv_cache") == "fp8"
    with served(result, has_cache) as expected:
        assert difference(states.of(1), whole(back, IDS)) == ""
    figures = evaluation.results[0]
    assert (figures.clipped_values, figures.static_values) == (expected.clipped, expected.values)
    assert ("FP8 cache of keys and values" in figures.activations) == has_cache
    assert ("a stored scale" in figures.activations) == (amaxes is not None)
    assert not figures.notices
    if amaxes is not None:
        assert figures.clipped_values > 0
        assert sum(each.clipped for each in figures.clipped) <= figures.clipped_values
    (source_figures,) = [evaluation.source]
    assert source_figures.static_values == 0
    plain = evaluate_repo(
        source, [back], tokens=tokens, activations="as-served", device="cpu", state_dir=tmp_path / "plain"
    )
    assert plain.results[0].static_values == 0
    assert plain.results[0].sequence_nll != figures.sequence_nll
