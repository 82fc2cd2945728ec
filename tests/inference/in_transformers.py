"""The model, its logits and the next token, as transformers computes them from a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from tests.inference.layouts import dequantized_state, stack_experts

if TYPE_CHECKING:
    from pathlib import Path

    from tests.inference.layouts import Layout

KEYS_LOST = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load(folder: Path, **options: Any) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """The model in bf16 and what transformers says of keys it missed, did not expect or could not use."""
    # transformers' annotations leave out that output_loading_info makes the answer a pair.
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = read(folder, dtype=torch.bfloat16, output_loading_info=True, **options)
    return model.eval(), {key: info[key] for key in KEYS_LOST if info.get(key)}


def options_for(layout: Layout) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that make it read ``layout`` and dequantize it."""
    if layout.format == "compressed-tensors":
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    # Its `fp8` method knows the block layout alone and looks for the scale under the block layout's name.
    return {"key_mapping": {r"weight_scale$": "weight_scale_inv"}} if layout.granularity == "tensor" else {}


def load_by_hand(source: Path, quantized: Path) -> transformers.PreTrainedModel:
    """The model of ``source`` with the weights of ``quantized`` dequantized by hand, without any quantizer."""
    config = transformers.AutoConfig.from_pretrained(source)
    build: Any = transformers.AutoModelForCausalLM.from_config
    model: transformers.PreTrainedModel = build(config, dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(stack_experts(dequantized_state(quantized)), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not unexpected, unexpected
    assert set(missing) <= tied, missing
    model.tie_weights()
    model.train(False)
    return model


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, tokens: list[list[int]]) -> torch.Tensor:
    """Logits of a batch of equally long prompts: [prompts, tokens, vocabulary] in the model's dtype."""
    answer: torch.Tensor = model(torch.tensor(tokens)).logits
    return answer


def next_text(model: transformers.PreTrainedModel, folder: Path, prompt: str) -> str:
    """The likeliest next token behind ``prompt``, as text, with the tokenizer that lies in ``folder``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    best = logits(model, [tokenizer(prompt)["input_ids"]])[0, -1].argmax()
    return str(tokenizer.decode([int(best)]))
