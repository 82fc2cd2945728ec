"""Runs inside vLLM's environment: forwards of families whose tiny models lack processors and fields of published ones.

Jobs and answers are those of ``tests.inference.vllm_host``; what stands between these checkpoints and vLLM is cured as
in ``tests.families.vllm_host``. Models of text and images get text alone, so that no processor is needed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tests.families import vllm_host
from tests.inference.vllm_host import run, serve

SECONDS, RATE = 2, 16_000
"""Length and samples a second of the sound that a speech model hears."""


def _run(job: dict[str, Any]) -> dict[str, Any]:
    folder = Path(job["model"])
    overrides = functools.partial(vllm_host.completed, folder=folder, quantization=None)
    if json.loads((folder / "config.json").read_text())["model_type"] != "whisper":
        return run(job, hf_overrides=overrides, enable_prefix_caching=False)
    from vllm.config import ModelConfig

    ModelConfig._supports_multimodal_inputs = lambda self: True
    return run(job, _with_sound, skip_tokenizer_init=False, max_num_batched_tokens=2048, enable_prefix_caching=False)


def _with_sound(tokens: list[int]) -> dict[str, Any]:
    import numpy

    sound = numpy.sin(0.05 * numpy.arange(SECONDS * RATE)).astype(numpy.float32)
    heard = {"prompt": "", "multi_modal_data": {"audio": (sound, RATE)}}
    return {"encoder_prompt": heard, "decoder_prompt": {"prompt_token_ids": tokens}}


def _prepare() -> None:
    vllm_host.prepare()
    from vllm.config import ModelConfig

    ModelConfig._supports_multimodal_inputs = lambda self: False


if __name__ == "__main__":
    serve(_run, _prepare, limit=None)
