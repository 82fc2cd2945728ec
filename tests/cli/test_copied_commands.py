"""Commands that are printed to be copied: they work when a shell runs them, whatever the names are."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from nemotron_fp8.cli.main import cli
from nemotron_fp8.status import status_of

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["-dash", "two words", "it's", "new\nline", "\x1b[31mred", "größe"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="the quotes are those of bash")
def test_a_shell_reads_the_names_of_the_next_commands(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a terminal of ASCII too; ``nemotron-fp8`` is replaced by a command that prints its words."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        done = CliRunner(charset="ascii").invoke(cli, ["quantize", str(checkpoint), "-q", "--", name])
        assert done.exit_code == 0
        for charset in ("ascii", "utf-8"):
            again = CliRunner(charset=charset).invoke(cli, ["verify", str(checkpoint), "--", name])
            lines = [line for line in again.stderr.partition("next:\n")[2].splitlines() if "nemotron-fp8" in line]
            assert lines
            for line in lines:
                script = f"nemotron-fp8() {{ printf '%s\\0' \"$@\"; }}\n{line}"
                words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.split(b"\0")
                assert os.fsencode(f"./{name}" if name.startswith("-") else name) in words
            assert not any(line.startswith("  Auto") for line in again.stderr.splitlines())
    assert status_of("-dash").advice == "check it: nemotron-fp8 verify ./-dash"


@pytest.mark.parametrize(("words", "path"), [("quantize -dash D", "./-dash"), ("verify -d", ""), ("verify -da", "")])
def test_a_path_that_is_taken_for_an_option_is_written_otherwise(words: str, path: str) -> None:
    done = CliRunner().invoke(cli, shlex.split(words))
    assert done.exit_code == 2
    hint = f"a path that begins with - needs ./ before it: {path}"
    assert (hint in done.stderr) == bool(path)


def test_a_page_for_a_pipe_that_nothing_reads_is_one_error(checkpoint: Path, destination: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert CliRunner().invoke(cli, ["quantize", str(checkpoint), str(destination), "-q"]).exit_code == 0
    for words in (["report", str(destination), "--html"], ["plan", str(checkpoint), "--no-estimate", "--save-recipe"]):
        done = CliRunner().invoke(cli, [*words, str(tmp_path / "pipe")])
        assert done.exit_code == 1
        assert "pipe: a pipe that nothing reads" in str(done.exception)
    page = subprocess.run(
        [sys.executable, "-m", "nemotron_fp8", "report", str(destination), "-q", "--html", "/dev/stdout"],
        capture_output=True,
        check=True,
    )
    assert page.stdout.startswith(b"<!doctype html>")
