"""Options that select weights, and what plan and quantize say about shares and engines: typed as a user types them."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from nemotron_fp8 import Recipe, plan_repo, quantize_repo
from nemotron_fp8.cli.main import main
from nemotron_fp8.errors import RecipeError
from tests.support.checkpoints import read_tensors
from tests.support.decoders import HIDDEN, INNER, Shapes, attention, decoder, ends, mlp, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Outcome(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("warning:")]

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


Command = "Callable[[str], Outcome]"


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Outcome]:
    """Run a command line in a folder of its own, parsed as a shell does."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nemotron-fp8", *shlex.split(line)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        assert isinstance(code, int)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("verb", ["plan source", "quantize source D"])
@pytest.mark.parametrize("option", ["--select", "--also-select", "--ignore"])
def test_a_pattern_that_matches_nothing_is_one_error_line(
    tmp_path: Path, command: Callable[[str], Outcome], verb: str, option: str
) -> None:
    """auto-round 2407: the line names the option, the pattern and near names; nothing is written."""
    write(tmp_path / "source", {"model_type": "llama"}, decoder())
    done = command(f"{verb} {option} q_prj")
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: {option} 'q_prj' matches no tensor; did you mean q_proj")
    assert not (tmp_path / "D").exists()


def test_a_stack_that_is_named_and_cannot_be_split_is_one_error_line(
    tmp_path: Path, command: Callable[[str], Outcome]
) -> None:
    stacks: Shapes = {"model.layers.0.mlp.experts.gate_up_proj": (2, INNER, HIDDEN)}
    write(tmp_path / "source", {"model_type": "gpt_oss"}, {**decoder(dense=False), **stacks})
    done = command("plan source --also-select experts")
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert "'model.layers.0.mlp.experts.gate_up_proj' [2, 256, 128]" in line
    assert "--ignore 'experts.gate_up_proj'" in line
    assert command("plan source --also-select experts --ignore experts.gate_up_proj").code == 0


def test_the_offered_option_works_when_it_is_pasted(tmp_path: Path, command: Callable[[str], Outcome]) -> None:
    """Weights outside the layers, with names that a shell or a pattern would misread."""
    odd: Shapes = {f"model.{name}.weight": (HIDDEN, HIDDEN) for name in ("side.mix", "it's", "a$(b)*", "w")}
    write(tmp_path / "source", {"model_type": "unheard_of"}, {**decoder(), **odd})
    plan = command("plan source")
    assert plan.code == 0
    assert "100% of the bytes of the decoder's linear weights become FP8" in plan.out
    (sentence,) = [line for line in plan.out.splitlines() if "to take them" in line]
    option = sentence.partition("; to take them: ")[2].removesuffix(")")
    before = {t["name"] for t in command("plan source --json").json()["quantize"]}
    after = {t["name"] for t in command(f"plan source --json {option}").json()["quantize"]}
    assert after - before == odd.keys()
    done = command(f"quantize source D --json {option}")
    assert done.code == 0
    assert done.json()["tensors_quantized"] == len(after)
    held = read_tensors(tmp_path / "D" / "model.safetensors")
    assert {f"{name}_scale" for name in odd} <= held.keys()
    assert command("verify source D").code == 0


def test_a_least_share_refuses_a_plan_and_offers_the_option(tmp_path: Path, command: Callable[[str], Outcome]) -> None:
    """By plan and quantize, on the command line and in Python; nothing is written."""
    source = write(tmp_path / "source", {"model_type": "llama"}, decoder())
    for verb in ("plan source", "quantize source D", "quantize source D --dry-run", "quantize source --in-place"):
        done = command(f"{verb} --select o_proj --min-share 50")
        assert (done.code, done.out) == (1, ""), verb
        (line,) = done.err.splitlines()
        assert line.startswith("error: min_share (--min-share) is 50%, but ")
        assert "of the bytes of the decoder's linear weights become FP8; unquantized: " in line
        assert "to take them: --also-select " in line
    assert not (tmp_path / "D").exists()
    with pytest.raises(RecipeError, match="min_share"):
        quantize_repo(source, tmp_path / "D", Recipe(select=("o_proj",)), min_share=50)
    option = shlex.split(line.partition("; to take them: ")[2].partition("'); ")[0] + "'")
    assert plan_repo(source, Recipe(select=("o_proj",), also_select=(option[1],)), min_share=100).share.share == 1
    assert command("quantize source D --min-share 100").code == 0


GPT_OSS: Shapes = {
    **decoder(dense=False),
    "model.layers.0.mlp.experts.gate_up_proj": (4, HIDDEN, 2 * INNER),
    "model.layers.0.mlp.experts.down_proj": (4, INNER, HIDDEN),
    "model.layers.0.mlp.router.weight": (4, HIDDEN),
}


@pytest.mark.parametrize("verb", ["plan source", "quantize source D", "plan source --json", "quantize source D --json"])
def test_a_low_share_is_a_warning(tmp_path: Path, command: Callable[[str], Outcome], verb: str) -> None:
    """gpt-oss in bf16: the attention alone becomes FP8; exit code 0, and one line on stderr that says what is left."""
    write(tmp_path / "source", {"model_type": "gpt_oss", "hidden_size": HIDDEN}, GPT_OSS)
    done = command(verb)
    assert done.code == 0
    (line,) = done.warnings
    assert line.startswith("warning: only 25% of the bytes of the decoder's linear weights become FP8; unquantized: ")
    assert "mlp.experts.gate_up_proj, mlp.experts.down_proj (768.0 KiB: a stack of experts" in line
    if "--json" in verb:
        assert done.json()["linear"]["share"] < 0.5


@pytest.mark.parametrize("verb", ["plan source", "quantize source D"])
def test_a_high_share_is_no_warning(tmp_path: Path, command: Callable[[str], Outcome], verb: str) -> None:
    """Mixtral: 14% became FP8 once, without a word; now it is nearly all."""
    experts = {
        f"model.layers.{i}.block_sparse_moe.experts.0.w{j}.weight": (INNER, INNER) for i in (0, 1) for j in (1, 2, 3)
    }
    router: Shapes = {"model.layers.0.block_sparse_moe.gate.weight": (8, HIDDEN)}
    write(tmp_path / "source", {"model_type": "mixtral"}, {**decoder(dense=False), **experts, **router})
    done = command(verb)
    assert (done.code, done.warnings) == (0, [])
    assert "99.8% of the bytes of the decoder's linear weights become FP8" in done.out


@pytest.mark.parametrize(
    "options", ["", "--select self_attn", "--ignore experts", "--format fp8", "--selection nvidia"]
)
def test_the_plan_in_json_has_a_reason_for_every_tensor(
    tmp_path: Path, command: Callable[[str], Outcome], options: str
) -> None:
    shapes = {**decoder(), **GPT_OSS, "model.layers.0.mixer.q_proj.weight": (HIDDEN, HIDDEN)}
    shapes["model.layers.1.mixer.in_proj.weight"] = (HIDDEN, HIDDEN)
    write(tmp_path / "source", {"model_type": "unheard_of", "hidden_size": HIDDEN}, shapes)
    plan = command(f"plan source --json {options}").json()
    tensors = plan["quantize"] + plan["keep"]
    assert {t["name"] for t in tensors} == shapes.keys()
    assert all(t["reason"] for t in tensors)
    linear = plan["linear"]
    assert linear.keys() == {"quantized_bytes", "linear_bytes", "share", "left"}
    assert linear["share"] == linear["quantized_bytes"] / linear["linear_bytes"]
    fields = {"reason", "tensors", "bytes", "names", "in_decoder", "option"}
    assert all(each.keys() == fields for each in linear["left"])
    left = sum(each["bytes"] for each in linear["left"] if each["in_decoder"])
    assert linear["quantized_bytes"] + left == linear["linear_bytes"]
    assert sum(each["tensors"] for each in linear["left"]) <= len(plan["keep"])
    assert plan["engines"].keys() == {"vLLM", "SGLang", "transformers"}
    assert all(each.keys() == {"reads", "note"} for each in plan["engines"].values())


@pytest.mark.parametrize("options", ["--format fp8", "--granularity block"])
def test_the_tensor_parallel_size_of_blocks_is_told(
    tmp_path: Path, command: Callable[[str], Outcome], options: str
) -> None:
    """vllm 54178: experts of 768 columns have 6 blocks; those of 320 stay."""
    shapes: Shapes = {
        **ends(hidden=512),
        "model.layers.0.input_layernorm.weight": (512,),
        **attention("model.layers.0.self_attn.", 512),
        **mlp("model.layers.0.mlp.experts.0.", 512, 768),
        **mlp("model.layers.1.mlp.experts.0.", 512, 320),
    }
    write(tmp_path / "source", {"model_type": "qwen3_moe", "num_attention_heads": 4}, shapes)
    note = "with a tensor-parallel size of at most 2"
    plan = command(f"plan source {options} --json").json()
    assert plan["engines"]["vLLM"] == {"reads": True, "note": note}
    kept = {t["name"]: t["reason"] for t in plan["keep"]}
    assert kept["model.layers.1.mlp.experts.0.up_proj.weight"] == "320x512 does not divide into blocks of 128x128"
    for verb in ("plan source", "quantize source D"):
        assert f"read by vLLM ({note})" in command(f"{verb} {options}").out


def test_select_force_and_also_select(tmp_path: Path, command: Callable[[str], Outcome]) -> None:
    """S5: ``--select '.*'`` made routers FP8, and --select alone dropped what the default takes."""
    shapes = {
        **decoder(dense=False),
        "model.layers.0.mlp.gate.weight": (4, HIDDEN),
        **mlp("model.layers.0.mlp.experts.0."),
    }
    write(tmp_path / "source", {"model_type": "qwen3_moe", "num_experts": 4}, shapes)

    def taken(options: str) -> set[str]:
        return {t["name"] for t in command(f"plan source --json {options}").json()["quantize"]}

    linear = {name for name in shapes if name.endswith("_proj.weight")}
    router = {"model.layers.0.mlp.gate.weight"}
    assert taken("") == taken("--select '.*'") == taken("--also-select '.*'") == linear
    assert taken("--select '.*' --force-select") == linear | router
    assert taken(r"--also-select 'mlp\.gate\.' --force-select") == linear | router
    assert taken("--select self_attn") == {name for name in linear if "self_attn" in name}
    assert taken("--select self_attn --also-select experts") == linear
    assert command("plan source --force-select").code == 1


def test_nvidias_selection_on_another_family_is_one_error_line(
    tmp_path: Path, command: Callable[[str], Outcome]
) -> None:
    write(tmp_path / "source", {"model_type": "llama"}, decoder())
    done = command("quantize source D --selection nvidia")
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert "'nemotron_h'" in line
    assert "selection 'default'" in line
