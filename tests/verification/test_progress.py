"""A check of hundreds of gigabytes says how far it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, dequantize_repo, quantize_repo, verify_repo
from nemotron_fp8.cli.demo import write_checkpoint
from nemotron_fp8.cli.progress_line import describe
from nemotron_fp8.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, what was quantized from it and what was made plain from that."""
    home = tmp_path_factory.mktemp("made")
    write_checkpoint(home / "source")
    quantize_repo(home / "source", home / "fp8", Recipe())
    dequantize_repo(home / "fp8", home / "plain")
    return {path.name: path for path in home.iterdir()}


@pytest.mark.parametrize(
    ("source", "result", "stages"),
    [
        (None, "fp8", ["digests"]),
        ("source", "fp8", ["digests", "values"]),
        ("fp8", "plain", ["digests", "values"]),
    ],
)
def test_every_stage_begins_at_nothing_and_ends_at_all(
    made: dict[str, Path], source: str | None, result: str, stages: list[str]
) -> None:
    seen: dict[str, list[Progress]] = {}
    found = verify_repo(
        made[source] if source else None,
        made[result],
        threads=1,  # several call in any order
        progress=lambda progress: seen.setdefault(progress.stage, []).append(progress),
    )
    assert found.ok
    assert list(seen) == stages
    for states in seen.values():
        done = [state.done for state in states]
        assert done == sorted(done)
        assert 0 < done[0] < done[-1]
        assert {state.total for state in states} == {done[-1]}
    on_disk = sum(path.stat().st_size for path in made[result].iterdir() if path.name != "nemotron_fp8.json")
    assert seen["digests"][-1].done == on_disk
    if "values" in seen:
        read = made[source or ""] if result == "fp8" else made[result]
        # Headers and the small files hold no values.
        shards = sum(path.stat().st_size for path in read.glob("*.safetensors"))
        assert 0.9 * shards < seen["values"][-1].source_bytes <= shards


def test_the_line_names_the_stage() -> None:
    state = Progress(1 << 20, 4 << 20, "", source_bytes=2 << 20, stage="values")
    assert describe(state, 1 << 20) == "values   25%  512.0 KiB of 2.0 MiB  512.0 KiB/s  0:03 left"
