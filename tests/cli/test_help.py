"""Help: sections, examples, the command ``help``, and scripts of the completion."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from nemotron_fp8.cli.commands import FILES, FOLDERS
from nemotron_fp8.cli.help_pages import COMMAND_SECTIONS, EXAMPLES, OTHER, sections_of
from nemotron_fp8.cli.main import cli
from tests.docs.commands import check
from tests.docs.pages import Block

if TYPE_CHECKING:
    from pathlib import Path

SHELLS = ("bash", "zsh", "fish")


def shown(*words: str) -> str:
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def options_of(name: str) -> list[click.Option]:
    command = cli.commands[name]
    return [param for param in command.get_params(click.Context(command)) if isinstance(param, click.Option)]


def test_every_command_and_every_option_has_a_section() -> None:
    assert sorted(name for names in COMMAND_SECTIONS.values() for name in names if name in cli.commands) == sorted(
        cli.commands
    )
    for name in cli.commands:
        names = [str(option.name) for option in options_of(name) if "--help" not in option.opts]
        sections = sections_of(name, names)
        assert OTHER not in sections, f"{name}: add {sections[OTHER]} to a section in cli/help_pages.py"
        assert sorted(each for section in sections.values() for each in section) == sorted(names)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_lists_every_option_once_and_the_examples(name: str) -> None:
    text = shown(name, "--help")
    assert shown("help", name) == text
    lines = text.splitlines()
    for option in options_of(name):
        longest = max(option.opts, key=len)
        assert sum(
            line.lstrip().removeprefix("-q, ").removeprefix("-v, ").split(" ")[0] == longest for line in lines
        ) or (longest == "--help")
    assert EXAMPLES[name]
    for _, example in EXAMPLES[name]:
        for line in example.split("\n"):
            assert f"  {line}" in lines
    for title in ("Recipe:", "Hub:", "Output:"):
        assert text.count(f"\n{title}") <= 1


@pytest.mark.parametrize(("name", "example"), [(n, e) for n in sorted(EXAMPLES) for _, e in EXAMPLES[n]])
def test_every_example_is_a_command_that_parses(name: str, example: str) -> None:
    text = example.removeprefix('eval "$(').removesuffix(')"')
    (words,) = Block(None, 1, "sh", text, None).commands()  # type: ignore[arg-type]  # of no page
    assert words[0] == "nemotron-fp8"
    assert not name or name in words or name in ("calibrate",)
    check(words)


def test_help_of_the_group() -> None:
    text = shown("help")
    assert text == shown("--help")
    for name in cli.commands:
        assert f"\n  {name} " in text
    assert text.index("Convert:") < text.index("Check:") < text.index("Measure:") < text.index("Learn:")
    assert "..." not in text.partition("Options:")[2]  # no sentence is cut
    done = CliRunner().invoke(cli, ["help", "qantize"])
    assert done.exit_code == 2
    assert "Did you mean 'quantize'?" in done.output


# ---- completion ----


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell(shell: str, tmp_path: Path) -> None:
    """It names the command and its variable; the shell, if it is here, reads it without an error."""
    script = shown("completion", shell)
    assert f"_NEMOTRON_FP8_COMPLETE={shell}_complete" in script
    assert "nemotron-fp8" in script
    if program := shutil.which(shell):
        file = tmp_path / "script"
        file.write_text(script)
        subprocess.run([program, "-n", str(file)], check=True, capture_output=True)


def test_another_shell_is_refused() -> None:
    done = CliRunner().invoke(cli, ["completion", "bsh"])
    assert done.exit_code == 2
    assert "Did you mean 'bash'?" in done.output


def test_bash_completes_commands_options_values_and_files(tmp_path: Path) -> None:
    """A real bash calls the function of the script, as on a tab."""
    bash = shutil.which("bash")
    assert bash is not None
    program = tmp_path / "nemotron-fp8"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom nemotron_fp8.cli.start import main\nmain()\n")
    program.chmod(0o755)
    (tmp_path / "script").write_text(shown("completion", "bash"))
    code = """
source script
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); compopt() { echo "files $2"; }
  _nemotron_fp8_completion "$1" "${@: -1}"; echo "${COMPREPLY[@]}"; }
ask nemotron-fp8 quan
ask nemotron-fp8 quantize --granul
ask nemotron-fp8 quantize --granularity b
ask nemotron-fp8 quantize SRC D
ask nemotron-fp8 quantize --amaxes a
"""
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([bash, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    command, option, value, *names = done.stdout.splitlines()
    assert command == "quantize"
    assert option == "--granularity"
    assert value == "block"
    assert [line for line in names if line] == ["files dirnames", "files default"]


def test_files_and_folders_are_completed_by_their_kind() -> None:
    """Every argument that names one is known to the completion; so are the options."""
    for command in cli.commands.values():
        for param in command.params:
            if isinstance(param, click.Argument) and param.name not in ("shell", "topic"):
                assert param.metavar in (*FILES, *FOLDERS), (command.name, param.metavar)
            elif param.metavar in ("FILE", "DIR", "FILE.yaml"):
                assert type(param.type).__name__ == "Name"


def test_words_of_an_example_are_quoted_as_in_a_shell() -> None:
    assert all(shlex.split(example, comments=True) for examples in EXAMPLES.values() for _, example in examples)
