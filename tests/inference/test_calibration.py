"""Amaxes of a calibration are, to the bit, those of the whole model: inputs of every matrix, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8.calibration.calibrate import calibrate
from tests.families import zoo
from tests.inference.conftest import CACHE
from tests.inference.layer_by_layer import write_tokens
from tests.inference.test_evaluation import IDS, Kind, changed
from tests.inference.whole_model_amaxes import measure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.calibration.calibrate import Calibration

pytestmark = pytest.mark.engines

ATTENTION = "model.layers.{}.self_attn"
KINDS = [
    (Kind("nemotron"), ATTENTION),
    (Kind("nemotron_h"), "backbone.layers.{}.mixer"),
    (Kind("llama"), ATTENTION),
    (Kind("llama-tied"), ATTENTION),
    (Kind("llama", dtype="float16"), ATTENTION),
    (Kind("llama-tied", dtype="float32"), ATTENTION),
    (Kind("qwen3_moe"), ATTENTION),  # single experts
    (Kind("tiny_qwen3_moe"), ATTENTION),  # stacked
    (Kind("granitemoe"), ATTENTION),  # stacked under other names
    (Kind("mixtral"), ATTENTION),
    (Kind("deepseek_v3"), ATTENTION),
    (Kind("gemma2", {"sliding_window": 16}), ATTENTION),  # eager attention
    (Kind("gemma3_text", {"sliding_window": 16}), ATTENTION),
    (Kind("gemma3"), "language_model.model.layers.{}.self_attn"),
    (Kind("qwen3_next"), ATTENTION),
    (Kind("gpt2"), "transformer.h.{}.attn"),
    (Kind("gpt_oss", {"sliding_window": 16}), ATTENTION),
    (Kind("llama4_text"), ATTENTION),
    (Kind("phi3"), ATTENTION),
    (Kind("granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}), ATTENTION),
    (Kind("bamba"), ATTENTION),
    (Kind("falcon_h1"), ATTENTION),
    (Kind("opt"), "model.decoder.layers.{}.self_attn"),
]
"""Tiny models, each with the name of its attention modules in the checkpoint."""


def of_checkpoint(folder: Path, tokens: Path, **options: Any) -> Calibration:
    """Calibrate with the options of a test, and the defaults of the command for others."""
    given: dict[str, Any] = {"percentile": None, "factor": 1.0, "max_memory": None, "spill": False, "restart": False}
    given |= {"sequences": None, "length": None, "overwrite": False, "threads": None, "hub": None, "progress": None}
    given |= {"state_dir": tokens.parent / "state", **options}
    return calibrate(folder, None, None, tokens=tokens, device="cpu", **given)


@pytest.fixture(scope="session")
def specimen() -> Callable[[str], Path]:
    """``specimen(name)``: the folder of a tiny model of the zoo."""
    known = {each.name: each for each in zoo.specimens()}
    return lambda name: zoo.built(CACHE / "zoo", known[name])


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A file of `IDS`."""
    return write_tokens(tmp_path / "tokens.json", IDS)


def by_layer(attention: dict[int, float], name: str) -> dict[str, float]:
    return {name.format(number): amax for number, amax in attention.items()}


@pytest.mark.parametrize(("kind", "attention"), KINDS, ids=lambda value: getattr(value, "title", ""))
def test_amaxes_are_those_of_the_whole_model(
    kind: Kind, attention: str, specimen: Callable[[str], Path], qwen3_moe: Path, tokens: Path, tmp_path: Path
) -> None:
    source = qwen3_moe if kind.name == "tiny_qwen3_moe" else specimen(kind.name)
    if kind.config or kind.dtype != "bfloat16":
        source = changed(source, tmp_path / "changed", kind.dtype, **kind.config)
    amaxes = of_checkpoint(source, tokens).amaxes
    expected = measure(source, IDS)
    assert amaxes.inputs == expected.amaxes("inputs")
    assert amaxes.k == by_layer(expected.amaxes("k"), attention)
    assert amaxes.v == by_layer(expected.amaxes("v"), attention)
    assert amaxes.inputs
    assert amaxes.k
