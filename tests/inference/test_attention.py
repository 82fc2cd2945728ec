"""Keys and values of attention: a function sees them where an engine caches them, and may change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8.inference.transformers_api import Transformers
from tests.families import zoo
from tests.inference.conftest import CACHE
from tests.inference.layer_by_layer import whole_model

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.engines

IDS = torch.randint(10, 500, (1, 24), generator=torch.Generator().manual_seed(5))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def cached(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values of each layer with attention that transformers caches."""
    with torch.no_grad():
        layers = model(input_ids=IDS, use_cache=True).past_key_values.layers
    return [(each.keys, each.values) for each in layers if getattr(each, "keys", None) is not None]


@pytest.mark.parametrize("name", ["llama", "nemotron", "qwen3_moe", "gemma2", "gpt_oss", "nemotron_h", "gpt2"])
def test_what_is_seen_is_what_is_cached(name: str) -> None:
    """After rotary embedding, before heads are repeated, with attention that is fused or not."""
    known = {each.name: each for each in zoo.specimens()}
    model, _ = whole_model(zoo.built(CACHE / "zoo", known[name]))
    seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def see(module: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((module, key.clone(), value.clone()))
        return key, value

    before = logits_of(model)
    with Transformers().attention(see):
        assert torch.equal(logits_of(model), before)
    expected = cached(model)
    assert len(seen) == len(expected) > 0
    modules = set(model.modules())
    for (module, key, value), (cached_key, cached_value) in zip(seen, expected, strict=True):
        assert module in modules
        assert torch.equal(key, cached_key)
        assert torch.equal(value, cached_value)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_changed_keys_and_values_are_used(name: str) -> None:
    known = {each.name: each for each in zoo.specimens()}
    model, _ = whole_model(zoo.built(CACHE / "zoo", known[name]))
    plain = logits_of(model)

    def changed(handler: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        with Transformers().attention(handler):
            return logits_of(model)

    without_values = changed(lambda _, key, value: (key, torch.zeros_like(value)))
    without_keys = changed(lambda _, key, value: (torch.zeros_like(key), value))
    assert not torch.equal(without_values, plain)
    assert not torch.equal(without_keys, plain)
    assert not torch.equal(without_keys, without_values)
    assert torch.equal(changed(lambda _, key, value: (key.clone(), value.clone())), plain)
    with pytest.raises(ZeroDivisionError):
        changed(lambda *_: 1 // 0)  # type: ignore[arg-type, return-value]
    assert torch.equal(logits_of(model), plain)  # nothing stays behind
