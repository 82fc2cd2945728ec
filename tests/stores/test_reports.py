"""Reports, comparisons and inspections of results in a store say what those of the folders say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8 import Recipe, compare_repos, inspect_repo, quantize_repo, report_repo
from tests.stores.conversion import SOURCE, checkpoint, seed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.store_server.server import StoreServer


def test_reports_of_a_store_are_those_of_the_folder(store: StoreServer, tmp_path: Path) -> None:
    """Only the date is missing: a store's time is that of the upload."""
    checkpoint(tmp_path / "source", rows=128)
    recipes = {"a": Recipe(stats=True), "b": Recipe(granularity="tensor", stats=True)}
    seed(store, tmp_path / "source")
    for name, recipe in recipes.items():
        quantize_repo(tmp_path / "source", tmp_path / name, recipe, "cpu")
        seed(store, tmp_path / name, f"nv/{name}")
    local, remote = report_repo(tmp_path / "a", tmp_path / "source"), report_repo("s3://bucket/nv/a", SOURCE)
    assert local.summary.made is not None
    assert remote.summary == replace(local.summary, made=None)
    comparison = compare_repos("s3://bucket/nv/a", "s3://bucket/nv/b")
    assert comparison.differences == compare_repos(tmp_path / "a", tmp_path / "b").differences
    assert "nv" not in comparison.to_html()
    inspected = inspect_repo("s3://bucket/nv/a")
    assert inspected.tensors == inspect_repo(tmp_path / "a").tensors
    assert "s3://bucket/nv/a" in repr(inspected)
