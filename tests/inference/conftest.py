"""Fixtures of the engine tests: the checkpoints, their FP8 copies, a running vLLM and the file of results."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if importlib.util.find_spec("transformers") is None:
    # `make test` runs without the engines; `make test-engines` finds no test at all and fails if they are lost.
    collect_ignore_glob = ["test_*.py"]
else:
    import torch
    import transformers

    from tests.inference import in_vllm, models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.inference.layouts import Layout

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "engines"
RESULTS = CACHE / "results.jsonl"
# Absolute, because the host starts in a folder of its own; not resolved, because the link is the environment.
VLLM_PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python")).absolute()


@pytest.fixture(scope="session")
def nemotron() -> Path:
    """A tiny random Nemotron of which every projection divides into blocks."""
    return models.tiny_nemotron(CACHE)


@pytest.fixture(scope="session")
def ragged_nemotron() -> Path:
    """The same with k and v of 64 rows, which do not divide."""
    return models.tiny_nemotron(CACHE, key_value_heads=1)


@pytest.fixture(scope="session")
def qwen3_moe() -> Path:
    """A tiny random mixture of experts, stacked."""
    return models.tiny_qwen3_moe(CACHE)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model."""
    return models.smollm2(CACHE)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Layout], Path]:
    """``quantized(source, layout)``: the folder that the pipeline writes, once in a session."""
    from nemotron_fp8 import quantize_repo
    from tests.support.amaxes import amaxes_of

    home = tmp_path_factory.mktemp("quantized")

    def folder(source: Path, layout: Layout) -> Path:
        destination = home / f"{source.name}-{layout.name}"
        if not destination.exists():
            calibrated = layout.activations == "static"
            amaxes = amaxes_of(source) if calibrated else None
            quantize_repo(source, destination, recipe=layout.recipe, amaxes=amaxes)
        return destination

    return folder


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory, nemotron: Path) -> Iterator[in_vllm.Host]:
    """A running vLLM with the plugins that its CPU build needs, shown to run the unquantized model.

    Skips where vLLM is not installed, and where it dies of an instruction on a processor without AVX-512, which it
    is compiled for. Dying so on any other processor is a failure: a skip would hide every test of vLLM.
    """
    if not VLLM_PYTHON.exists():
        pytest.skip(f"no vLLM at {VLLM_PYTHON}: make test-engines builds it")
    home = tmp_path_factory.mktemp("vllm")
    try:
        with in_vllm.host(VLLM_PYTHON, home / "log.txt") as host:
            host.run(nemotron, [[1, 2, 3]], vocabulary=512, output=home / "probe.safetensors")
            yield host
    except in_vllm.IllegalInstructionError as refusal:
        if torch.cpu._is_avx512_supported():
            raise
        pytest.skip(f"vLLM needs AVX-512, which {_capability()} lacks: {refusal}")


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability() + (" AMX" if torch.cpu._is_amx_tile_supported() else "")


def _finite(figure: Any) -> Any:
    """Return a figure as JSON can hold it. One that is not finite becomes null."""
    return None if isinstance(figure, float) and not math.isfinite(figure) else figure


@pytest.fixture(scope="session")
def _results() -> Path:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("")
    return RESULTS


@pytest.fixture
def record(_results: Path, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(engine, version, model, layout, **figures)``: one line about what an engine really did."""

    def append(engine: str, version: str, model: Path, layout: str, **figures: Any) -> None:
        line = {
            "engine": engine,
            "version": version,
            "model": model.name.rsplit("-v", 1)[0],
            "layout": layout,
            **{name: _finite(figure) for name, figure in figures.items()},
            "test": request.node.name,
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "processor": f"{platform.machine()} {_capability()}",
        }
        with _results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    return append
