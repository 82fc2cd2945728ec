"""Environment variables of the options: values, precedence, and what is said about them."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner, Result

from nemotron_fp8.cli.environment import OWN
from nemotron_fp8.cli.main import cli

if TYPE_CHECKING:
    from pathlib import Path


def run(*words: object, **variables: str) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)), env=variables)


def test_every_option_of_every_command_has_its_variables() -> None:
    """One of the command, one of all commands with the option; no variable belongs to two options."""
    owners: dict[str, set[str]] = {}
    for name, command in cli.commands.items():
        for param in command.get_params(click.Context(command)):
            if isinstance(param, click.Option) and "--help" not in param.opts:
                longest = max(param.opts, key=len)
                word = longest.lstrip("-").upper().replace("-", "_")
                expected = [f"NEMOTRON_FP8_{name.upper()}_{word}", f"NEMOTRON_FP8_{word}"]
                assert param.envvar == expected[: 1 if (name, longest) in OWN else 2]
                for variable in param.envvar:
                    owners.setdefault(variable, set()).add(longest)
    assert [variable for variable, options in owners.items() if len(options) > 1] == []


def test_one_variable_means_the_same_in_all_commands() -> None:
    """Options that share a variable take the same values."""
    kinds: dict[str, Counter[str]] = {}
    for command in cli.commands.values():
        for param in command.get_params(click.Context(command)):
            if isinstance(param, click.Option) and len(param.envvar or ()) == 2:
                # --device takes several devices in some commands, which the others reject by name
                kind = repr(param.type) if param.envvar[1] != "NEMOTRON_FP8_DEVICE" else "device"
                kinds.setdefault(param.envvar[1], Counter())[f"{kind} {param.is_flag} {param.multiple}"] += 1
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_values_flags_and_lists(checkpoint: Path) -> None:
    done = run(
        "plan",
        checkpoint,
        "--json",
        NEMOTRON_FP8_GRANULARITY="tensor",
        NEMOTRON_FP8_IGNORE="o_proj up_proj",
        NEMOTRON_FP8_NO_ESTIMATE="1",
        NEMOTRON_FP8_STATS="false",
        NEMOTRON_FP8_THREADS="",
    )
    assert done.exit_code == 0, done.output
    kept = {tensor["reason"] for tensor in json.loads(done.stdout)["keep"]}
    assert {"matches --ignore o_proj", "matches --ignore up_proj"} <= kept
    assert json.loads(done.stdout)["seconds"] is None  # not measured
    (note,) = done.stderr.splitlines()[:1]
    assert note.startswith("note: from the environment: ")
    assert "NEMOTRON_FP8_GRANULARITY=tensor" in note
    assert "NEMOTRON_FP8_THREADS" not in note


def test_precedence(checkpoint: Path, tmp_path: Path) -> None:
    """Command line, variable of the command, variable of all commands, recipe file, default."""
    file = tmp_path / "recipe.yaml"
    file.write_text("nonfinite: keep\n")

    def chosen(*words: str, **variables: str) -> str:
        saved = tmp_path / "saved.yaml"
        done = run("plan", checkpoint, *words, "--save-recipe", saved, "--no-estimate", **variables)
        assert done.exit_code == 0, done.output
        (line,) = [line for line in saved.read_text().splitlines() if line.startswith("nonfinite:")]
        return line.removeprefix("nonfinite: ")

    variables = {"NEMOTRON_FP8_RECIPE": str(file)}
    assert chosen() == "error"
    assert chosen(**variables) == "keep"
    variables["NEMOTRON_FP8_NONFINITE"] = "error"
    assert chosen(**variables) == "error"
    variables["NEMOTRON_FP8_PLAN_NONFINITE"] = "keep"
    assert chosen(**variables) == "keep"
    assert chosen("--nonfinite", "error", **variables) == "error"
    assert chosen(NEMOTRON_FP8_QUANTIZE_NONFINITE="keep") == "error"  # of another command


@pytest.mark.parametrize(
    ("words", "variable", "value", "code"),
    [
        (["plan", "SRC"], "NEMOTRON_FP8_THREADS", "many", 2),
        (["plan", "SRC"], "NEMOTRON_FP8_PLAN_THREADS", "0", 2),
        (["plan", "SRC"], "NEMOTRON_FP8_GRANULARITY", "chanel", 2),
        (["plan", "SRC"], "NEMOTRON_FP8_STATS", "perhaps", 2),
        (["plan", "SRC"], "NEMOTRON_FP8_MAX_MEMORY", "plenty", 1),
        (["plan", "SRC"], "NEMOTRON_FP8_MAX_MEMORY", "1KiB", 1),
        (["plan", "SRC"], "NEMOTRON_FP8_SCALES", "best", 1),
        (["plan", "SRC"], "NEMOTRON_FP8_SELECT", "nothing_like_it", 1),
        (["plan", "SRC"], "NEMOTRON_FP8_DEVICE", "tpu", 1),
        (["plan", "SRC"], "NEMOTRON_FP8_RECIPE", "gone.yaml", 1),
        (["quantize", "SRC", "DST", "--amaxes", "a"], "NEMOTRON_FP8_CALIBRATE", "text.txt", 2),
        (["quantize", "SRC", "DST"], "NEMOTRON_FP8_IN_PLACE", "true", 2),
        (["report", "SRC"], "NEMOTRON_FP8_RESULT", "x", 2),
    ],
)
def test_an_error_names_the_variable(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str, value: str, code: int
) -> None:
    """Of a value that is rejected when it is parsed, when it is used, or beside other options."""
    monkeypatch.chdir(checkpoint.parent)
    names = [str(checkpoint) if word == "SRC" else word for word in words]
    if variable == "NEMOTRON_FP8_SCALES":
        names += ["--granularity", "tensor"]
    done = run(*names, "-q", **{variable: value}) if words[0] != "report" else run(*names, **{variable: value})
    assert done.exit_code == code
    message = str(done.exception) if code == 1 else done.output
    assert f"({variable} of the environment)" in message
    without = run(*names)
    assert "of the environment" not in str(without.exception) + without.output


def test_a_variable_that_is_not_to_blame_is_not_named(checkpoint: Path) -> None:
    done = run("plan", checkpoint, "--max-memory", "1KiB", NEMOTRON_FP8_THREADS="1", NEMOTRON_FP8_STATS="1")
    assert done.exit_code == 1
    assert "of the environment" not in str(done.exception)


def test_options_for_another_command_do_no_harm(checkpoint: Path) -> None:
    """Variables for evaluate leave plan alone, which takes them only with --evaluate."""
    done = run("plan", checkpoint, "--no-estimate", NEMOTRON_FP8_SEQUENCES="4", NEMOTRON_FP8_LENGTH="64")
    assert done.exit_code == 0


def test_a_variable_like_that_of_an_option_is_noted(checkpoint: Path) -> None:
    done = run("inspect", checkpoint, NEMOTRON_FP8_MAX_MEMROY="1GiB", NEMOTRON_FP8_XYZZY="1", OTHER_MAX_MEMORY="1")
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [
        "note: NEMOTRON_FP8_MAX_MEMROY of the environment belongs to no option; did you mean NEMOTRON_FP8_MAX_MEMORY?"
    ]
    known = run(
        "inspect", checkpoint, NEMOTRON_FP8_NATIVE="1", NEMOTRON_FP8_MAX_MEMORY="1GiB", NEMOTRON_FP8_FORMAT="fp8"
    )
    assert known.stderr == ""  # inspect has no such options, and they are spelled right
    quiet = run("verify", checkpoint, "-q", NEMOTRON_FP8_MAX_MEMROY="1GiB")
    assert "MEMROY" not in quiet.stderr


def test_help_lists_the_variables() -> None:
    text = run("help", "environment").stdout
    assert max(map(len, text.splitlines())) <= 80
    for command in cli.commands.values():
        for param in command.get_params(click.Context(command)):
            if isinstance(param, click.Option) and len(param.envvar or ()) == 2:
                assert f"\n{param.envvar[1]} " in text
    assert "NEMOTRON_FP8_MAX_MEMORY" in run("quantize", "--help").stdout
