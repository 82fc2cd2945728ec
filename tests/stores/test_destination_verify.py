"""Verifying a result in a store, and converting one again."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from nemotron_fp8 import dequantize_repo, quantize_repo, status_of, verify_repo
from nemotron_fp8.cli.main import cli, main
from nemotron_fp8.errors import SourceNotFoundError
from nemotron_fp8.errors.destination import DamagedJournalError
from nemotron_fp8.stores.listing import JOB_FILE
from tests.store_server.fixtures import BUCKET
from tests.stores.test_destination import NAMES, StoppedError, stop_at
from tests.stores.writing import PREFIX, TARGET, checkpoint_of, contents, convert, files_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.store_server.server import StoreServer


@pytest.fixture
def source(store: StoreServer, tmp_path: Path) -> Path:
    """A checkpoint of four shards whose result is in the store."""
    source = checkpoint_of(tmp_path / "source", 4, {"vocab.txt": b""})
    convert(source)
    return source


def test_a_sound_result(store: StoreServer, source: Path) -> None:
    alone, beside = verify_repo(None, TARGET), verify_repo(source, TARGET)
    assert (alone.problems, beside.problems) == ((), ())
    assert alone.ok
    assert beside.ok


@pytest.mark.parametrize("name", [NAMES[1], "tokenizer.model", "config.json", "README.md"])
def test_a_flipped_bit_is_found(store: StoreServer, source: Path, name: str) -> None:
    damaged = bytearray(contents(store)[name])
    damaged[-5] ^= 1
    store.put(BUCKET, PREFIX + name, bytes(damaged))
    verification = verify_repo(None, TARGET)
    assert not verification.ok
    assert any(name in str(problem) for problem in verification.problems)


def test_missing_and_additional_files(store: StoreServer, source: Path) -> None:
    store.remove(BUCKET, PREFIX + NAMES[2])
    store.put(BUCKET, f"{PREFIX}more.safetensors", b"more")
    problems = " ".join(map(str, verify_repo(None, TARGET).problems))
    assert NAMES[2] in problems
    assert "more.safetensors" in problems


def test_an_unfinished_result_is_no_source(store: StoreServer, tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "source", 4)
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[2]))
    for read in (
        lambda: verify_repo(None, TARGET),
        lambda: verify_repo(source, TARGET),
        lambda: quantize_repo(TARGET, tmp_path / "out", device="cpu"),
        lambda: dequantize_repo(TARGET, tmp_path / "out"),
    ):
        with pytest.raises(SourceNotFoundError, match="unfinished; rerun the conversion"):
            read()


def test_records_beside_a_complete_result_are_no_part_of_it(store: StoreServer, source: Path) -> None:
    store.put(BUCKET, f"{PREFIX}.nemotron-fp8/job.json", b"left behind")
    assert verify_repo(source, TARGET).ok


def test_from_store_to_store(store: StoreServer, source: Path, tmp_path: Path) -> None:
    """A result is the source of the next conversion, and no file is on the disk in between."""
    dequantize_repo(TARGET, f"s3://{BUCKET}/bf16", threads=1)
    convert(source, tmp_path / "fp8")
    dequantize_repo(tmp_path / "fp8", tmp_path / "bf16", threads=1)
    assert contents(store, "bf16/") == files_of(tmp_path / "bf16")
    convert(f"s3://{BUCKET}/bf16", f"s3://{BUCKET}/again")
    convert(tmp_path / "bf16", tmp_path / "again")
    wanted = files_of(tmp_path / "again")
    found = contents(store, "again/")
    assert found.keys() == wanted.keys()
    assert {name for name in found if found[name] != wanted[name]} <= {"README.md", "nemotron_fp8.json"}
    assert verify_repo(f"s3://{BUCKET}/bf16", f"s3://{BUCKET}/again").ok


def test_the_command(
    store: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(checkpoint_of(tmp_path / "source", 2))
    plan = CliRunner().invoke(cli, ["quantize", source, TARGET, "--dry-run", "--device", "cpu"])
    assert re.search(
        r"^upload   .* no disk, and up to 240.0 MiB of memory for each at a time$", plan.stdout, re.MULTILINE
    )
    assert contents(store) == {}
    done = CliRunner().invoke(cli, ["quantize", source, TARGET, "--device", "cpu"])
    assert "note: shards are sent while they are made: no disk" in done.stderr
    assert (done.exit_code, done.stderr.count("error:")) == (0, 0)
    assert TARGET in done.stdout
    checked = CliRunner().invoke(cli, ["verify", source, TARGET, "--json"])
    assert json.loads(checked.stdout)["ok"]
    again = CliRunner().invoke(cli, ["quantize", source, TARGET, "--device", "cpu"])
    assert "up to date" in again.stdout
    before = contents(store)
    for arguments, message in (
        (["quantize", source, TARGET, "--overwrite"], "name a new folder"),
        (["quantize", source, TARGET, "--granularity", "tensor"], "holds a result: of another conversion"),
        (["quantize", source, f"s3://nobucket/{PREFIX}"], "no bucket 'nobucket'"),
        (["card", TARGET, "--remove"], "object store"),
        (["quantize", "--in-place", TARGET], "object store"),
    ):
        monkeypatch.setattr(sys, "argv", ["nemotron-fp8", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
        assert ended.value.code in (1, 2)
        assert line.startswith("error: ")
        assert message in line
    assert contents(store) == before


def test_status(store: StoreServer, tmp_path: Path) -> None:
    """Before, during and after, by records alone: nothing is written, and no shard is read."""
    assert (status_of(TARGET).state, status_of(TARGET).kind) == ("none", "")
    source = checkpoint_of(tmp_path / "source", 4)
    with pytest.raises(StoppedError):
        convert(source, progress=stop_at(NAMES[2]))
    before, done = contents(store), sum(len(contents(store)[name]) for name in NAMES[:2])
    store.log.clear()
    status = status_of(TARGET)
    assert (status.kind, status.state, status.source) == ("store", "stopped", str(source))
    assert status.process is not None
    assert (status.process.pid, status.error) == (os.getpid(), "StoppedError: ")
    assert (status.shards_done, status.shards_total, status.shards_left) == (2, 4, 2)
    assert (status.bytes_done, status.bytes_total) == (done, 2 * done)
    assert status.recipe["granularity"] == "channel"
    assert "run the same command again to resume" in status.advice
    assert [request.method for request in store.log] == ["GET", "GET", "GET"]
    assert contents(store) == before
    convert(source)
    status = status_of(TARGET)
    assert (status.state, status.shards_done, status.bytes_done) == ("complete", 4, 2 * done)
    shown = CliRunner().invoke(cli, ["status", TARGET])
    assert shown.exit_code == 0
    assert "complete" in shown.stdout
    store.remove(BUCKET, PREFIX + NAMES[1])
    assert "1 files are missing" in status_of(TARGET).notices[0]
    store.put(BUCKET, "other/notes.txt", b"mine")
    assert "only other files are there" in status_of(f"s3://{BUCKET}/other").advice


def test_the_status_of_a_damaged_job_is_an_error(store: StoreServer, source: Path) -> None:
    store.put(BUCKET, f"other/{JOB_FILE}", b"{}")
    with pytest.raises(DamagedJournalError, match=r"job\.json"):
        status_of(f"s3://{BUCKET}/other")
