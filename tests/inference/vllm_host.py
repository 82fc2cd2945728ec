"""Runs inside vLLM's environment: one JSON job a line on stdin, one JSON answer a line on stdout.

vLLM is imported once and every job runs in a fork of that process, so that a job which dies or leaves state
behind touches no other. A job is ``{"model", "prompts", "max_tokens", "vocabulary", "output"}``: it writes the
log-probabilities of every prompt to ``output`` (safetensors, ``prompt.I`` of float32 [tokens - 1, vocabulary])
and answers with the tokens generated and with the layers as the engine built them. With a vocabulary of 0 it writes
those of the prompt's own tokens alone, [tokens - 1, 1]. ``options``, if there, are further arguments of the engine.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


KERNELS = ("fp8_linear", "linear_kernel", "kernel")
"""Names under which vLLM's methods hold their kernel."""


def _layers(model: Any) -> dict[str, dict[str, Any]]:
    """Return the method, the kernel, the weight's dtype and the inputs' scale of every linear layer in the engine."""
    layers = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        weight = getattr(module, "weight", None)
        if method is None:
            continue
        if (loaded := getattr(module, "loaded_dtype", None)) is not None:  # from the plugin for experts
            layers[name] = {"method": type(method).__name__, "kernel": None, "dtype": loaded, "input_scale": None}
            continue
        if weight is None:
            continue
        owner = getattr(module, "scheme", None) or method
        kernel = next((found for name in KERNELS if (found := getattr(owner, name, None))), None)
        layers[name] = {
            "method": type(owner).__name__,
            "kernel": type(kernel).__name__ if kernel else None,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "input_scale": None if (scale := getattr(module, "input_scale", None)) is None else float(scale),
        }
    return layers


def _caches(model: Any) -> dict[str, dict[str, str | float]]:
    """Return the dtype and the scales of the cache of keys and values of every attention layer in the engine."""
    return {
        name: {"dtype": module.kv_cache_dtype, "k_scale": float(module._k_scale), "v_scale": float(module._v_scale)}
        for name, module in model.named_modules()
        if hasattr(module, "kv_cache_dtype") and hasattr(module, "_k_scale")
    }


def text_prompt(tokens: list[int]) -> dict[str, Any]:
    """Return a prompt of text."""
    return {"prompt_token_ids": tokens}


def run(
    job: dict[str, Any], prompt: Callable[[list[int]], dict[str, Any]] = text_prompt, **options: Any
) -> dict[str, Any]:
    """Give the answer to a job.

    Args:
        job: the job.
        prompt: makes the engine's prompt of a list of tokens.
        options: further arguments of the engine.
    """
    import torch
    import vllm
    from safetensors.torch import save_file

    vocabulary = job["vocabulary"]
    engine = vllm.LLM(
        model=job["model"],
        **{
            "enforce_eager": True,
            "dtype": "bfloat16",
            "max_model_len": max(64, 1 + max(map(len, job["prompts"]))),
            "max_num_seqs": 4,
            "max_logprobs": vocabulary,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            **options,
            **job.get("options", {}),
        },
    )
    wanted = vllm.SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        ignore_eos=True,
        prompt_logprobs=vocabulary,
        flat_logprobs=True,
        detokenize=False,
    )
    prompts = [prompt(tokens) for tokens in job["prompts"]]
    answers = engine.generate(prompts, wanted, use_tqdm=False)
    tables = {}
    for number, (answer, tokens) in enumerate(zip(answers, job["prompts"], strict=True)):
        flat = answer.prompt_logprobs
        spans = list(zip(flat.start_indices, flat.end_indices, strict=True))[1:]
        table = torch.full((len(spans), vocabulary or 1), float("nan"))
        for row, (start, end) in enumerate(spans):
            found = flat.token_ids[start:end]
            if vocabulary:
                table[row, torch.tensor(found)] = torch.tensor(flat.logprobs[start:end])
            else:
                table[row, 0] = flat.logprobs[start + found.index(tokens[row + 1])]
        tables[f"prompt.{number}"] = table
    save_file(tables, job["output"])
    return {
        "version": vllm.__version__,
        "generated": [list(answer.outputs[0].token_ids) for answer in answers],
        "layers": engine.apply_model(_layers)[0],
        "caches": engine.apply_model(_caches)[0],
    }


def _fork(job: dict[str, Any], work: Callable[[dict[str, Any]], dict[str, Any]], limit: float | None) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            outcome = work(job)
        except BaseException:
            outcome = {"error": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(outcome, pipe)
        os._exit(0)
    os.close(writing)
    text = _read(reading, limit)
    if text is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if text is None:
        return {"code": code, "error": f"no answer within {limit} seconds"}
    if code or not text:
        return {"code": code, "error": f"the engine ended with {code} (a negative number is a signal)"}
    answer: dict[str, Any] = json.loads(text)
    return answer


def _read(descriptor: int, limit: float | None) -> str | None:
    """Read until the other end closes, which a child that dies does too; None if that takes ``limit`` seconds."""
    end = None if limit is None else time.monotonic() + limit
    parts = []
    with os.fdopen(descriptor, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], None if end is None else max(0, end - time.monotonic()))[0]:
            if not (part := pipe.read(1 << 16)):
                return b"".join(parts).decode()
            parts.append(part)
    return None


def serve(run: Callable[[dict[str, Any]], dict[str, Any]], prepare: Callable[[], None], *, limit: float | None) -> None:
    """Import vLLM, say so, and put each job on stdin to ``run`` in a fork, until stdin ends.

    Args:
        run: gives the answer to a job.
        prepare: imports once what every job needs.
        limit: the seconds that one job may take.
    """
    # Answers have a stdout of their own: the engine prints to the usual one.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vllm

    prepare()
    # The engine collects garbage seven times a job; what is frozen here is not looked through again.
    gc.freeze()
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line), run, limit)), file=answers, flush=True)


def preload() -> None:
    """Import what every job needs and `import vllm` leaves for later: 3,000 modules, ten seconds of processor."""
    import torch
    import vllm.entrypoints.llm
    import vllm.model_executor.models.llama
    import vllm.model_executor.models.nemotron
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    # A process has to ask the kernel for AMX before its first tile, or dies of SIGILL. vLLM's attention uses tiles and
    # does not ask; a large model gets by because oneDNN did. Forks inherit the permission.
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


if __name__ == "__main__":
    serve(run, preload, limit=None)
