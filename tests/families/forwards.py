"""A forward of any model on fixed inputs: text where text is enough."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

Inputs = dict[str, torch.Tensor]
TOKENS = torch.arange(10, 42).reshape(2, 16)


def candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    """List inputs a model may take, the smallest first."""
    known = inspect.signature(model.forward).parameters
    text: Inputs = {}
    if "input_ids" in known:
        text["input_ids"] = TOKENS
    if "decoder_input_ids" in known and model.config.is_encoder_decoder:
        text["decoder_input_ids"] = TOKENS
    if text:
        yield text
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    mels = field(model.config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim") or 80
    sources = field(model.config, "max_source_positions") or 128
    sizes = [side for side in (field(model.config, "image_size"), 56, 64, 224) if isinstance(side, int)]
    width = field(model.config, "d_model") or 256
    shapes_of: dict[str, list[tuple[int, ...]]] = {
        "input_features": [(mels, 2 * sources), (mels, 3000), (128, mels), (64, width)],
        "input_values": [(16000,), (1, 16000), (128, mels)],
        "pixel_values": [(3, side, side) for side in sizes],
        "flattened_patches": [(16, 770)],
        "inputs_embeds": [(16, 256)],
    }
    for name, shapes in shapes_of.items():
        if name not in known:
            continue
        for shape in shapes:
            yield {**text, name: noise(*shape).bfloat16()}
            yield {name: noise(*shape).bfloat16()}
            if name == "inputs_embeds" and model.config.is_encoder_decoder:
                yield {name: noise(*shape).bfloat16(), "decoder_input_ids": TOKENS}


def field(config: Any, *names: str) -> Any:
    """Return the first of ``names`` that a config, or a config in it, holds."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    for inner in vars(config).values():
        if hasattr(inner, "to_dict") and (value := field(inner, *names)) is not None:
            return value
    return None


@torch.no_grad()
def run(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """Return the logits of one forward."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    torch.manual_seed(0)
    answer = model(**inputs, **options)
    logits = answer.logits if getattr(answer, "logits", None) is not None else answer[0]
    assert isinstance(logits, torch.Tensor), f"logits are {type(logits).__name__}"
    return logits.float()


def logits_of(model: PreTrainedModel) -> tuple[torch.Tensor | None, str]:
    """Return the logits for the first inputs that the model takes, and what these were; or why there are none."""
    first = ""
    for inputs in candidates(model):
        try:
            return run(model, inputs), " ".join(inputs)
        except Exception as error:
            text = " ".join(str(error).split())
            first = first or f"{type(error).__name__}: {text[:200]}"
    return None, first or "no known inputs"
