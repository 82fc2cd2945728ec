"""The tests' end of ``vllm_host.py``: start it in vLLM's own environment and put jobs to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    # The plugins are found by their entry points, the host by its name.
    "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent / "vllm_plugins"), str(ROOT))),
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Threads that are bound to a core and spin there lose it to whatever else the machine does.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "KMP_BLOCKTIME": "1",
    # One process, so that a job's fork is the whole engine and its layers can be looked at.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # Of processors with AMX: it leaves the activations in bf16, where this layout casts them to FP8 elsewhere.
    "VLLM_DISABLED_KERNELS": "CPUFp8PerTensorScaledMMLinearKernel",
    # Blocks of 32 stay FP8 in the engine, where its layers can be looked at, and are dequantized in each step.
    "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD": "0",
    # enforce_eager leaves the sampler compiled: half a minute of C++ compiler for each job.
    "TORCHDYNAMO_DISABLE": "1",
}


class EngineRefusedError(Exception):
    """vLLM did not run a model; the message is its traceback or how its process ended."""


class IllegalInstructionError(EngineRefusedError):
    """vLLM's process died of an instruction that the processor refused."""


def _refusal(code: int, message: str) -> EngineRefusedError:
    return (IllegalInstructionError if code == -signal.SIGILL else EngineRefusedError)(message)


@dataclass(frozen=True)
class Answer:
    """The output of vLLM for a model, and its linear layers.

    Attributes:
        logprobs: for each prompt float32 [tokens - 1, vocabulary]: row i is about the token behind token i.
        generated: for each prompt the tokens that greedy decoding added.
        layers: for each linear layer as vLLM names it, its ``method``, ``kernel``, weight ``dtype`` and
            ``input_scale``, None for inputs without a stored scale.
        caches: for each attention layer, ``dtype`` of its cache, and ``k_scale`` and ``v_scale``.
    """

    logprobs: list[torch.Tensor]
    generated: list[list[int]]
    layers: dict[str, dict[str, Any]]
    caches: dict[str, dict[str, Any]]


class Host:
    """A running host process: ``vllm_host.py`` or another module that serves jobs as it does."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self.version: str = self._answer()["version"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise _refusal(code, f"vLLM's process ended with {code}:\n{self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Put a job and wait for its answer.

        Raises:
            EngineRefusedError: vLLM refused the job or died of it.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise _refusal(answer.get("code", 0), answer["error"])
        return answer

    def run(
        self,
        model: Path,
        prompts: list[list[int]],
        *,
        vocabulary: int,
        output: Path,
        max_tokens: int = 1,
        **options: Any,
    ) -> Answer:
        """Load ``model``, score ``prompts`` over the whole vocabulary and add ``max_tokens`` tokens to each.

        ``options`` are further arguments of the engine.

        Raises:
            EngineRefusedError: vLLM refused the model or died of it.
        """
        job = {
            "model": str(model),
            "prompts": prompts,
            "vocabulary": vocabulary,
            "output": str(output),
            "max_tokens": max_tokens,
            "options": options,
        }
        answer = self.ask(job)
        tables = load_file(output)
        output.unlink()
        logprobs = [tables[f"prompt.{number}"] for number in range(len(prompts))]
        return Answer(logprobs, answer["generated"], answer["layers"], answer["caches"])


@contextlib.contextmanager
def host(python: Path, log: Path, *, plugins: bool = True, module: str = "tests.inference.vllm_host") -> Iterator[Host]:
    """Start vLLM under the interpreter ``python``; what it prints goes to the file ``log``.

    With ``plugins`` false it runs as it was installed, without the plugins of ``vllm_plugins``. ``module`` is what
    the process runs; its jobs and answers are its own.
    """
    environment = os.environ | ENVIRONMENT | {"VLLM_CACHE_ROOT": str(log.parent / "vllm-cache")}
    if not plugins:
        environment["VLLM_PLUGINS"] = ""
    with contextlib.ExitStack() as stack:
        errors: IO[str] = stack.enter_context(log.open("w"))
        process = stack.enter_context(
            subprocess.Popen(
                [python, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=log.parent,
            )
        )
        # Closing stdin is how the host is told to stop; Popen's own exit does that and waits.
        yield Host(process, log)
