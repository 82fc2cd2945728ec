"""The default result, as a new user gets it and loads it: without any further argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import transformers

from nemotron_fp8 import quantize_repo
from tests.inference import in_transformers, models
from tests.inference.layouts import config_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.inference.in_vllm import Host

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def result(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, quantized without a recipe."""
    folder = tmp_path_factory.mktemp("default") / "result"
    report = quantize_repo(smollm2, folder)
    assert {each.engine for each in report.engines if each.reads} == {"vLLM", "SGLang", "transformers"}
    assert report.share is not None
    assert report.share.share == 1
    return folder


def test_transformers_answers(smollm2: Path, result: Path, record: Callable[..., None]) -> None:
    """Plain ``from_pretrained``: no dtype, no config, no key mapping."""
    read = transformers.AutoModelForCausalLM.from_pretrained
    answer = in_transformers.next_text(read(result), result, models.PROMPT)
    record("transformers", transformers.__version__, smollm2, "default", logits="plain load", answer=answer)
    assert answer == models.ANSWER


def test_vllm_answers(smollm2: Path, result: Path, vllm: Host, record: Callable[..., None], tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(result)
    vocabulary = config_of(result)["vocab_size"]
    assert isinstance(vocabulary, int)
    prompts = [tokenizer(models.PROMPT)["input_ids"]]
    found = vllm.run(result, prompts, vocabulary=vocabulary, output=tmp_path / "logprobs.safetensors")
    assert tokenizer.decode(found.generated[0]) == models.ANSWER
    assert any(layer["dtype"] == "float8_e4m3fn" for layer in found.layers.values())
