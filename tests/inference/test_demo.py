"""demo --real: the checkpoint that transformers reads from the same file, and words from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

from nemotron_fp8.cli.main import cli
from tests.inference.models import ANSWER, PROMPT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engines

NAME = "SmolLM2-135M-Instruct"
TEXT = "It's 2024: naive or na\u00efve, \u6771\u4eac?\n\n  x = foo(bar)  <|im_end|>"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def test_the_trained_model_of_the_demo(smollm2: Path, tmp_path: Path) -> None:
    """Tensors bit for bit, tokens, and the answer of source and result; the package is installed here."""
    done = CliRunner().invoke(cli, ["demo", "--real", str(tmp_path / "try")])
    assert done.exit_code == 0, done.output
    assert "nothing is downloaded" in done.stdout
    made, expected = weights(tmp_path / "try" / NAME), weights(smollm2)
    assert made.keys() == expected.keys()
    assert [name for name in made if not torch.equal(made[name], expected[name])] == []
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "try" / NAME)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids
    assert ours.decode(ours(TEXT).input_ids) == TEXT
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    for name in (NAME, f"{NAME}-FP8"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "try" / name, dtype=torch.bfloat16)
        tokens = model.generate(**ours(PROMPT, return_tensors="pt"), max_new_tokens=1, do_sample=False)
        assert ours.decode(tokens[0]) == PROMPT + ANSWER, name
