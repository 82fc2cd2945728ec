"""Runs that are stopped from outside: signals at the command line, a source that is cut short while it is mapped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from nemotron_fp8.errors import MalformedHeaderError, SourceNotFoundError, UnfinishedError, WriteError
from nemotron_fp8.errors.destination import OtherRunError
from tests.support.checkpoints import Shards, weight, write_checkpoint
from tests.support.doubles import HANG, wait_for

if TYPE_CHECKING:
    from pathlib import Path

FIRST, SECOND = (f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
COMMAND = """
import signal, sys
from pathlib import Path
from nemotron_fp8.cli.main import main
from nemotron_fp8.conversion import in_place
from nemotron_fp8.destinations import folder
from tests.support.doubles import HangingStaging
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started us may have it ignored
flag = Path(sys.argv.pop(1))
for kind in (folder.FolderDestination, in_place.InPlaceFolder):
    staging = kind.staging.fget
    kind.staging = property(
        lambda self, staging=staging: HangingStaging(
            staging(self).folder, "model-00002-of-00002.safetensors", flag, digests=True
        )
    )
main()
"""
"""The command line, with a second shard that is begun and never comes to an end."""
CUT = """
import os, sys
from nemotron_fp8 import quantize_repo
from nemotron_fp8.sources import files
source, destination = sys.argv[1:]
window = files.MappedFile.window
def cut(self, offset, length):
    found = window(self, offset, length)
    if self.path.name == "model-00002-of-00002.safetensors":
        os.truncate(self.path, 100)
    return found
files.MappedFile.window = cut
quantize_repo(source, destination, threads=1)
"""
"""A run whose second shard loses its end just after it was mapped."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two shards of many pages."""
    shards: Shards = {
        FIRST: {"model.layers.0.mlp.down_proj.weight": weight(96, 256)},
        SECOND: {"model.layers.1.mlp.down_proj.weight": weight(96, 256, seed=2)},
    }
    return write_checkpoint(tmp_path / "source", shards)


def run(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


STOPS = {
    signal.SIGINT: (130, "error: interrupted; run the same command again to resume\n"),
    signal.SIGTERM: (143, "error: terminated by SIGTERM; run the same command again to resume\n"),
    signal.SIGKILL: (-9, ""),
}


def test_who_started_over_is_told_not_to_do_so_again(source: Path, tmp_path: Path) -> None:
    command = ("quantize", source, tmp_path / "out", "--restart", "--threads", "1", "--quiet")
    process = run(COMMAND, tmp_path / "flag", *command)
    wait_for(tmp_path / "flag", process=process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG)
    assert err.lstrip("\n") == "error: interrupted; run the same command again, without --restart, to resume\n"


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_leaves_the_partial_folder_alone_and_says_what_to_do(
    source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    quantize_repo(source, tmp_path / "expected", threads=1)
    before = names(tmp_path)
    process = run(COMMAND, tmp_path / "flag", "quantize", source, tmp_path / "out", "--threads", "1", "--quiet")
    wait_for(tmp_path / "flag", process=process)
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG)
    assert (process.returncode, err.lstrip("\n"), out) == (*STOPS[number], "")  # after the terminal's ^C
    assert names(tmp_path) == before | {"flag", "out.partial"}
    if number != signal.SIGKILL:  # which gives no time to tidy up
        assert names(tmp_path / "out.partial") == {"journal.jsonl", "lock", "out"}
    with pytest.raises(SourceNotFoundError, match="unfinished; rerun the conversion to resume it"):
        verify_repo(None, tmp_path / "out")
    report = quantize_repo(source, tmp_path / "out", threads=1)
    assert report.resumed == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert names(tmp_path) == before | {"flag", "out"}


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_half_way_in_place(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The folder says what it is to whoever asks, and can only be finished as it was begun."""
    shutil.copytree(source, tmp_path / "copy")
    quantize_repo(source, tmp_path / "expected", threads=1)
    process = run(COMMAND, tmp_path / "flag", "quantize", source, "--in-place", "--threads", "1", "--quiet")
    wait_for(tmp_path / "flag", process=process)
    process.send_signal(number)
    _, err = process.communicate(timeout=HANG)
    assert (process.returncode, err.lstrip("\n")) == STOPS[number]
    for other in (None, tmp_path / "copy"):
        with pytest.raises(UnfinishedError):
            verify_repo(other, source)
    with pytest.raises(OtherRunError, match="cannot be started over") as caught:
        quantize_repo(source, None, Recipe(ignore=("layers.0",)), in_place=True)
    assert caught.value.final
    assert "--restart" not in str(caught.value)
    quantize_repo(source, None, in_place=True, threads=1)
    assert contents(source) == contents(tmp_path / "expected")


def test_a_source_cut_short_while_it_is_mapped(source: Path, tmp_path: Path) -> None:
    """The system kills the process, as reading past the end of a mapped file is a fault of it. That is a kill like any
    other: nothing of the destination shows, a run on the short file is refused, and when the file is whole again the
    same command carries on and ends with the same bytes.
    """
    quantize_repo(source, tmp_path / "expected", threads=1)
    shutil.copy2(source / SECOND, tmp_path / "whole")
    process = run(CUT, source, tmp_path / "out")
    process.communicate(timeout=HANG)
    assert process.returncode == -signal.SIGBUS
    assert (source / SECOND).stat().st_size == 100
    assert not (tmp_path / "out").exists()
    with pytest.raises(MalformedHeaderError):
        quantize_repo(source, tmp_path / "out", threads=1)
    assert (tmp_path / "out.partial" / "out" / FIRST).exists()  # kept: the file may come back
    shutil.copy2(tmp_path / "whole", source / SECOND)
    assert quantize_repo(source, tmp_path / "out", threads=1).resumed == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not (tmp_path / "out.partial").exists()


def test_a_file_where_a_folder_must_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = names(tmp_path)
    with pytest.raises(WriteError, match="is not a folder, or lies below a file; choose another destination"):
        quantize_repo(source, tmp_path / "file" / "below" / "out")
    assert names(tmp_path) == before


def test_names_that_no_file_can_have(source: Path, tmp_path: Path) -> None:
    """One line each, whatever the command; nothing is made."""
    long = "x" * 300
    before = names(tmp_path)
    for command in (["quantize", source, long], ["quantize", long, "out"], ["verify", long], ["inspect", long]):
        process = run("from nemotron_fp8.cli.main import main; main()", *command)
        out, err = process.communicate(timeout=HANG)
        assert (process.returncode, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith("error: ")
        assert "name too long" in err
    assert names(tmp_path) == before
