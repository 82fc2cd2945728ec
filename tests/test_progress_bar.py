"""Progress as a bar: what a user sees, and that it is closed however the call ends."""

from __future__ import annotations

import builtins
import re
from typing import TYPE_CHECKING, Any

import pytest
import tqdm
import tqdm.auto
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import (
    Progress,
    Recipe,
    compare_repos,
    convert_repo,
    dequantize_repo,
    quantize_repo,
    report_repo,
    verify_repo,
)
from nemotron_fp8._progress_bar import progress_callback
from nemotron_fp8.errors import MissingExtraError, NonFiniteError
from tests.support.checkpoints import ONE, weight, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source and two results of it."""
    root = tmp_path_factory.mktemp("bar")
    shard = {f"model.layers.{i}.mlp.up_proj.weight": weight(64, 64, seed=i) for i in range(3)}
    source = write_checkpoint(root / "s", {ONE: shard})
    quantize_repo(source, root / "one")
    quantize_repo(source, root / "two", Recipe(granularity="tensor"))
    return source, root / "one", root / "two"


CALLS: dict[str, Any] = {
    "quantize: 100%": lambda s, a, b, new: quantize_repo(s, new, progress=True),
    "convert: 100%": lambda s, a, b, new: convert_repo(s, new, progress=True),
    "dequantize: 100%": lambda s, a, b, new: dequantize_repo(a, new, progress=True),
    "verify, values: 100%": lambda s, a, b, new: verify_repo(s, a, progress=True),
    "verify, digests: 100%": lambda s, a, b, new: verify_repo(None, a, progress=True),
    "one, values: 100%": lambda s, a, b, new: report_repo(a, s, progress=True),
    "two, values: 100%": lambda s, a, b, new: compare_repos(a, b, s, progress=True),
}


@pytest.mark.parametrize("shown", CALLS)
def test_a_bar_shows_stage_bytes_and_rate(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: str
) -> None:
    CALLS[shown](*folders, tmp_path / "new")
    out, err = capsys.readouterr()
    assert out == ""
    last = err.rstrip("\n").rpartition("\r")[2]
    assert shown in last
    assert re.search(r"\d+(\.\d+)?k/\d+(\.\d+)?k \[.*B/s\]", last)
    assert err.endswith("\n")
    assert not tqdm.tqdm._instances


def test_the_bytes_are_those_of_the_source(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quantized tensor is read twice, and counts once."""
    quantize_repo(folders[0], tmp_path / "new", progress=True)
    assert "| 24.0k/24.0k [" in capsys.readouterr().err


def test_no_bar_without_measuring(folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    report_repo(folders[1], progress=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [None, False])
def test_no_progress(folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], progress: Any) -> None:
    verify_repo(folders[0], folders[1], progress=progress)
    assert capsys.readouterr() == ("", "")


def test_an_error_closes_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = weight(64, 64)
    bad[3, 3] = float("nan")
    source = write_checkpoint(tmp_path / "s", {ONE: {"model.layers.0.mlp.up_proj.weight": bad}})
    with pytest.raises(NonFiniteError):
        quantize_repo(source, tmp_path / "d", progress=True)
    assert capsys.readouterr().err.endswith("\n")
    assert not tqdm.tqdm._instances


def test_an_interruption_closes_the_bar(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C arrives wherever the main thread is, even while it draws."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tqdm.auto.tqdm, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_repo(folders[0], tmp_path / "d", progress=True, threads=1)
    assert not tqdm.tqdm._instances
    monkeypatch.undo()
    assert quantize_repo(folders[0], tmp_path / "d").tensors_quantized == 3


def test_without_tqdm_the_extra_is_named(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def importing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(MissingExtraError, match=re.escape("nemotron_fp8[progress]")):
        quantize_repo(folders[0], tmp_path / "d", progress=True)
    assert not (tmp_path / "d").exists()
    assert not any(tmp_path.iterdir())


STATES = st.builds(
    Progress,
    done=st.integers(0, 1 << 44),
    total=st.integers(0, 1 << 44),
    shard=st.text(max_size=9),
    source_bytes=st.integers(0, 1 << 44),
    skipped=st.integers(0, 1 << 44),
    seconds=st.floats(0, 1e6),
    waiting=st.sampled_from(["", "8 s: owner/name: the Hub answers 503", "\x1b[2J" * 99]),
    stage=st.sampled_from(["", "digests", "values"]),
)


@given(st.lists(STATES, max_size=9))
def test_any_states_are_drawn(capsys: pytest.CaptureFixture[str], states: list[Progress]) -> None:
    """Whatever the order in which threads call: no error, no terminal codes, and late calls are ignored."""
    with progress_callback(True, "quantize") as update:
        assert update is not None
        for state in states:
            update(state)
    update(Progress(1, 2, "s"))
    assert not tqdm.tqdm._instances
    assert "\x1b" not in capsys.readouterr().err


def test_stages_and_retries_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The count restarts with a stage, and a late state of an earlier stage changes nothing."""
    drawn: list[tuple[int, int]] = []
    with progress_callback(True, "verify") as update:
        assert update is not None
        bar: Any = update.__self__._bar  # type: ignore[attr-defined]  # a bound method
        for state in (
            Progress(90, 100, "", source_bytes=100, stage="digests"),
            Progress(40, 400, "", source_bytes=200, stage="values"),
            Progress(100, 100, "", source_bytes=100, stage="digests"),
            Progress(80, 400, "", source_bytes=200, stage="values", waiting="8 s: a/b: the Hub answers 503"),
            Progress(80, 400, "", source_bytes=200, stage="values"),
        ):
            update(state)
            drawn.append((bar.n, bar.total))
    assert drawn == [(90, 100), (20, 200), (20, 200), (40, 200), (40, 200)]
    err = capsys.readouterr().err
    assert "retrying in 8 s: a/b" in err
    assert "retrying" not in err.rpartition("\r")[2]


def test_a_widget_learns_the_total(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widgets of tqdm take another total from `reset` alone."""
    totals: list[float | None] = []
    real = tqdm.auto.tqdm.reset

    def reset(bar: Any, total: float | None = None) -> None:
        totals.append(total)
        real(bar, total)

    monkeypatch.setattr(tqdm.auto.tqdm, "reset", reset)
    quantize_repo(folders[0], tmp_path / "d", progress=True)
    verify_repo(folders[0], tmp_path / "d", progress=True)
    source = (folders[0] / ONE).stat().st_size
    digests = sum(path.stat().st_size for path in (tmp_path / "d").iterdir() if path.name != "nemotron_fp8.json")
    weights = 3 * 64 * 64 * 2
    assert source > weights
    assert totals == [weights, digests, weights]


def test_a_resumed_run_starts_where_it_was() -> None:
    """Bytes of an earlier run are done, and not part of the rate."""
    with progress_callback(True, "quantize") as update:
        assert update is not None
        bar: Any = update.__self__._bar  # type: ignore[attr-defined]  # a bound method
        update(Progress(60, 100, "s", source_bytes=50, skipped=60))
        assert (bar.n, bar.initial, bar.total) == (30, 30, 50)
