"""The report: reproducible figures, a self-contained page, a comparison of two results."""

from __future__ import annotations

import builtins
import json
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Invocation
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, compare_repos, inspect_repo, quantize_repo, report_repo
from nemotron_fp8.checkpoint.inventory import STATS
from nemotron_fp8.cli.main import cli
from nemotron_fp8.documents.stats_json import Figures, parse_figures, render_figures
from nemotron_fp8.errors import MalformedManifestError, MissingExtraError
from nemotron_fp8.planning.receipt import NonFinite, ShardReceipt, TensorStats, entry_receipt, receipt_entry
from nemotron_fp8.report import read_summary, render_page
from nemotron_fp8.report.contents_page import SCRIPT
from nemotron_fp8.report.png import write_pngs
from nemotron_fp8.report.series import RAMP, bins_of, color, color_range, power_ticks, row_step, size_series
from nemotron_fp8.report.summary import HALF_OCTAVES, Scales, Sizes, grid_of
from nemotron_fp8.report.text import differences
from tests.support.checkpoints import ONE, contents, read_tensors, weight, write_checkpoint
from tests.support.html_page import Page
from tests.support.recipes import PUBLISHED, SHARED

if TYPE_CHECKING:
    from pathlib import Path

LAYOUTS = [
    Recipe(),
    PUBLISHED,
    SHARED,
    Recipe(numerics="original"),
    Recipe(format="fp8", granularity="block"),
    Recipe(format="mxfp8"),
    Recipe(format="modelopt", granularity="block"),
]


def checkpoint_of(folder: Path, rows: int = 256, columns: int = 2176, extra: dict[str, Any] | None = None) -> Path:
    """Write weights that span several cells of the grid in both directions."""
    shard = {
        f"model.layers.{layer}.{name}_proj.weight": weight(rows, columns, seed=7 * layer + i)
        for layer in range(2)
        for i, name in enumerate(("self_attn.q", "self_attn.k", "mlp.up"))
    }
    return write_checkpoint(folder, {ONE: {**shard, "model.norm.weight": weight(columns), **(extra or {})}})


def run(*words: object) -> Invocation:
    return CliRunner().invoke(cli, [str(word) for word in words])


# ---- figures ----


@pytest.mark.parametrize("recipe", LAYOUTS, ids=str)
def test_figures_are_the_same_however_they_are_gathered(tmp_path: Path, recipe: Recipe) -> None:
    """Figures are equal to the last bit: while quantizing with any budget and threads, or later from the source."""
    source = checkpoint_of(tmp_path / "s")
    found = []
    for i, (memory, threads) in enumerate([("64MiB", 1), ("512MiB", 3)]):
        quantize_repo(
            source, tmp_path / f"d{i}", recipe.model_copy(update={"stats": True}), "cpu", memory, threads=threads
        )
        found.append(read_summary(tmp_path / f"d{i}").figures)
    found.append(read_summary(tmp_path / "d0", source, threads=2).figures)
    assert found[0] == found[1] == found[2]
    assert found[0] is not None
    assert len(found[0].tensors) == 6


def test_figures_are_right(tmp_path: Path) -> None:
    """Figures equal the definition in float64 over whole tensors."""
    source = checkpoint_of(tmp_path / "s")
    quantize_repo(source, tmp_path / "d", Recipe(stats=True))
    before, after = read_tensors(source / ONE), read_tensors(tmp_path / "d" / ONE)
    figures = read_summary(tmp_path / "d").figures
    assert figures is not None
    for found in figures.tensors:
        w = before[found.name].double()
        error = after[found.name].double() * after[f"{found.name}_scale"].double() - w
        assert found.sqnr_db == pytest.approx(10 * math.log10(float((w**2).sum() / (error**2).sum())), abs=1e-6)
        assert found.max_abs_error == pytest.approx(float(error.abs().max()), rel=1e-6)
        assert found.flushed_to_zero == int(((after[found.name].float() == 0) & (w != 0)).sum())


def test_stats_change_no_weight_and_leave_nothing_out(tmp_path: Path) -> None:
    """Shards are the same with and without statistics."""
    source = checkpoint_of(tmp_path / "s")
    quantize_repo(source, tmp_path / "a")
    quantize_repo(source, tmp_path / "b", Recipe(stats=True))
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert b.keys() - a.keys() == {STATS}
    assert a[ONE] == b[ONE]


def test_stats_in_place_are_those_of_a_new_folder(tmp_path: Path) -> None:
    """In place, errors are measured before the originals are replaced."""
    source = checkpoint_of(tmp_path / "s")
    shutil.copytree(source, tmp_path / "c")
    quantize_repo(source, tmp_path / "d", Recipe(stats=True))
    quantize_repo(tmp_path / "c", recipe=Recipe(stats=True), in_place=True)
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


floats = st.floats(allow_nan=True, allow_infinity=True)
stats = st.builds(TensorStats, st.text(), floats, floats, st.integers(0, 1 << 60), st.integers(0, 1 << 60))
nonfinite = st.builds(
    NonFinite,
    st.text(),
    st.integers(0, 1 << 40),
    st.lists(st.integers(0, 99)).map(tuple),
    st.sampled_from(["nan", "inf"]),
)


@given(st.lists(stats, max_size=5), st.lists(nonfinite, max_size=3))
def test_figures_survive_their_file_and_the_journal(tensors: list[TensorStats], found: list[NonFinite]) -> None:
    """Every bit of every figure survives, including non-finite ones."""
    again = parse_figures(render_figures(tensors, found))
    assert repr(again) == repr(Figures(tuple(tensors), tuple(found)))  # repr: NaN is not equal to itself
    receipt = ShardReceipt("s", 1, None, stats=tuple(tensors))
    assert repr(entry_receipt(json.loads(json.dumps(receipt_entry(receipt))))) == repr(receipt)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"schema": 2}',
        '{"schema": 1}',
        '{"schema": 1, "tensors": [[1]], "nonfinite": []}',
        '{"schema": 1, "tensors": [["a", "b", 1, 1, 1]], "nonfinite": []}',
        '{"schema": 1, "tensors": 3, "nonfinite": []}',
    ],
)
def test_a_file_of_figures_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(MalformedManifestError, match=re.escape(STATS)):
        parse_figures(text.encode())


def test_nan_and_inf_are_found_with_stats_and_with_the_source(tmp_path: Path) -> None:
    bad = weight(64, 64)
    bad[5, 7], bad[9, 0] = float("inf"), float("nan")
    source = checkpoint_of(tmp_path / "s", 64, 64, {"model.layers.0.mlp.down_proj.weight": bad})
    quantize_repo(source, tmp_path / "d", Recipe(nonfinite="keep", stats=True))
    found = NonFinite("model.layers.0.mlp.down_proj.weight", 2, (5, 7), "inf")
    for figures in (read_summary(tmp_path / "d").figures, read_summary(tmp_path / "d", source).figures):
        assert figures is not None
        assert figures.nonfinite == (found,)
        assert found.tensor not in {t.name for t in figures.tensors}
    assert f"{found.tensor}: 2 values, the first (inf) at [5, 7]" in render_page([read_summary(tmp_path / "d")])


def test_nan_in_stacked_experts_is_found_with_stats_and_with_the_source(tmp_path: Path) -> None:
    stack = torch.stack([weight(8, 16, seed=e) for e in range(3)])
    stack[1, 2, 3] = float("nan")
    tensors = {
        "model.layers.0.mlp.experts.down_proj": stack,
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack([weight(32, 8, seed=e) for e in range(3)]),
        "model.layers.0.self_attn.o_proj.weight": weight(8, 8),
    }
    source = write_checkpoint(tmp_path / "s", {ONE: tensors}, config={"model_type": "qwen3_moe"})
    quantize_repo(source, tmp_path / "d", Recipe(nonfinite="keep", stats=True))
    found = NonFinite("model.layers.0.mlp.experts.1.down_proj.weight", 1, (2, 3), "nan")
    for figures in (read_summary(tmp_path / "d").figures, read_summary(tmp_path / "d", source).figures):
        assert figures is not None
        assert figures.nonfinite == (found,)


# ---- what a report is made of ----


@pytest.mark.parametrize("recipe", LAYOUTS, ids=str)
def test_sizes_and_scales_add_up(tmp_path: Path, recipe: Recipe) -> None:
    """Bytes by kind equal those of the tensors on disk, and every scale is in the histogram."""
    source = checkpoint_of(tmp_path / "s")
    quantize_repo(source, tmp_path / "d", recipe)
    result, tensors = read_summary(tmp_path / "d"), read_tensors(tmp_path / "d" / ONE)
    scales = torch.cat([t.flatten() for name, t in tensors.items() if "_scale" in name])
    assert result.sizes.result == sum(t.nbytes for t in tensors.values())
    assert result.sizes.codes == sum(t.nbytes for t in tensors.values() if t.dtype == torch.float8_e4m3fn)
    assert result.sizes.scales == scales.nbytes
    if scales.dtype == torch.uint8:  # exponents
        scales = 2.0 ** (scales.float() - 127)
    assert result.sizes.source == (source / ONE).stat().st_size
    assert result.scales.count == sum(result.scales.bins.values()) == scales.numel()
    assert (result.scales.smallest, result.scales.largest) == (float(scales.min()), float(scales.max()))
    for place, count in result.scales.bins.items():
        low, high = 2.0 ** (place / 2), 2.0 ** ((place + 1) / 2)
        assert count == int(((scales.double() >= low) & (scales.double() < high)).sum())
    assert result.figures is None


def figures_of(*names: str) -> Figures:
    return Figures(tuple(TensorStats(f"{name}.weight", 30.0 + i, 0.1, 0, 0) for i, name in enumerate(names)), ())


def test_a_grid_by_layer_and_projection() -> None:
    """Rows are layer numbers, columns the last words that distinguish projections; experts show the worst."""
    grid = grid_of(
        figures_of(
            "model.layers.10.mlp.experts.1.up_proj",
            "model.layers.10.mlp.experts.0.up_proj",
            "model.layers.2.mlp.shared_experts.up_proj",
            "model.layers.2.self_attn.q_proj",
        )
    )
    assert grid.rows == ["2", "10"]
    assert grid.columns == ["*.up_proj", "shared_experts.up_proj", "q_proj"]
    assert grid.cells == {(1, 0): 30.0, (0, 1): 32.0, (0, 2): 33.0}
    assert grid.names[1, 0] == "model.layers.10.mlp.experts.1.up_proj.weight"


def test_a_grid_of_two_stems_and_none() -> None:
    """Encoder and decoder are distinguished; a weight outside of layers has its own row."""
    grid = grid_of(figures_of("encoder.0.q_proj", "decoder.0.q_proj", "bridge_proj"))
    assert grid.rows == ["other", "decoder.0", "encoder.0"]
    assert len(grid.cells) == 3


@given(st.floats(allow_nan=False), st.floats(-50, 50), st.floats(0.1, 100))
def test_colors_are_colors_and_ends_are_ends(value: float, low: float, width: float) -> None:
    assert re.fullmatch("#[0-9a-f]{6}", color(value, low, low + width))
    assert color(low - 1, low, low + width) == RAMP[0]
    assert color(low + width + 1, low, low + width) == RAMP[-1]


def test_colors_of_two_results_mean_the_same() -> None:
    a, b = grid_of(figures_of("layers.0.a")), grid_of(figures_of("layers.0.a", "layers.1.a"))
    assert color_range([a, b]) == color_range([b, a])
    low, high = color_range([a, b])
    assert low <= min(a.cells.values())
    assert high >= max(b.cells.values())


def test_series_of_the_plots() -> None:
    """SVG and PNG draw the same bars, bins and ticks."""
    sizes = Sizes(100, 40, 4, 6, None)
    assert size_series(sizes) == {"source": {"source": 100}, "result": {"FP8": 40, "scales": 4, "other": 6}}
    assert list(size_series(Sizes(None, 1, 2, 3, None))) == ["result"]
    assert bins_of([]) is None
    assert bins_of([Scales(2, 1.0, 8.0, {0: 1, 6: 1}), Scales(1, 0.5, 0.5, {-2: 1})]) == (-2, 6)
    assert (row_step(48), row_step(49)) == (1, 4)


@given(st.integers(-400, 400), st.integers(0, 600), st.integers(1, 20))
def test_ticks_are_powers_of_two_within_their_room(first: int, bins: int, room: int) -> None:
    ticks = power_ticks(first, first + bins, room)
    assert all(first <= place <= first + bins + 1 and place == HALF_OCTAVES * k for place, k in ticks.items())
    assert len(ticks) <= room
    assert ticks or bins == 0


# ---- the page ----


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source and two results of it, the second without figures."""
    root = tmp_path_factory.mktemp("two")
    source = checkpoint_of(root / "s", 128, 128)
    quantize_repo(source, root / "tensor", PUBLISHED.model_copy(update={"stats": True}))
    quantize_repo(source, root / "channel", Recipe(format="compressed-tensors", granularity="channel"))
    return source, root / "tensor", root / "channel"


def test_a_page_stands_alone(two: tuple[Path, Path, Path]) -> None:
    """The page loads nothing, fits a phone, and has all sections."""
    source, tensor, _ = two
    text = render_page([read_summary(tensor)])
    page = Page(text)
    assert text.count(SCRIPT) == 1
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script|<link|<iframe", text.replace(SCRIPT, ""))
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in page.tags
    for word in ("Summary", "Sizes", "Errors by layer and projection", "Worst tensors", "NaN and Inf", "Scales"):
        assert word in page.text
    for word in ("values clamped", "values that became 0", "nemotron_fp8", "float32"):
        assert word in page.text
    assert sum(tag == "rect" and attrs.get("class") == "cell" for tag, attrs in page.tags) == 6
    assert sum(tag == "rect" and attrs.get("class") == "bar" for tag, attrs in page.tags) >= 1
    assert str(source) not in text


def test_a_page_without_errors_says_how_to_get_them(two: tuple[Path, Path, Path]) -> None:
    page = Page(render_page([read_summary(two[2])]))
    assert "--stats" in page.text
    assert "Errors by layer" not in page.text
    assert "768 scales" in page.text


def test_untrusted_names_are_escaped(tmp_path: Path) -> None:
    name = 'model.layers.0.<script>alert("1")</script>&x_proj.weight'
    source = write_checkpoint(tmp_path / "s", {ONE: {name: weight(64, 64)}})
    quantize_repo(source, tmp_path / "d", Recipe(stats=True))
    (tmp_path / "d").rename(tmp_path / "<b>")
    text = render_page([read_summary(tmp_path / "<b>")])
    page = Page(text)
    assert not any(tag in {"script", "b"} and attrs for tag, attrs in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == text.count(SCRIPT) == 1
    assert '<script>alert("1")</script>&x_proj' in page.text


# ---- the commands ----


def test_report_of_a_changed_result_fails_and_names_the_tensor(tmp_path: Path) -> None:
    """With its source, a report also verifies."""
    source = checkpoint_of(tmp_path / "s", 128, 128)
    quantize_repo(source, tmp_path / "d")
    data = bytearray((tmp_path / "d" / ONE).read_bytes())
    data[-1] ^= 1
    (tmp_path / "d" / ONE).write_bytes(data)
    done = run("report", tmp_path / "d", "--source", source, "--html", tmp_path / "r.html")
    assert done.exit_code == 1
    assert "problem" in done.output
    assert "Does not match its source" in Page((tmp_path / "r.html").read_text()).text


def test_report_prints_and_writes(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, tensor, _ = two
    done = run("report", tensor, "--html", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    assert "worst tensors" in done.stdout
    assert (tmp_path / "r.html").read_text() == render_page([read_summary(tensor)])
    with_stats = json.loads(run("report", tensor, "--json").stdout)
    from_source = json.loads(run("report", tensor, "--source", source, "--json").stdout)
    assert (with_stats.pop("source"), from_source.pop("source")) == (None, source.name)
    assert with_stats == from_source
    assert with_stats["tensors_quantized"] == len(with_stats["tensors"]) == 6


def test_compare_shows_both_and_what_differs(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, tensor, channel = two
    done = run("compare", tensor, channel, "--source", source, "--html", tmp_path / "c.html")
    assert done.exit_code == 0, done.output
    assert re.search(r"layout +fp8, tensor +compressed-tensors, channel", done.stdout)
    page = Page((tmp_path / "c.html").read_text())
    assert sum(tag == "rect" and attrs.get("class") == "cell" for tag, attrs in page.tags) == 12
    a, b = (read_summary(folder, source) for folder in (tensor, channel))
    gaps = [abs(x.sqnr_db - y.sqnr_db) for x, y in differences(a, b)]
    assert gaps == sorted(gaps, reverse=True)
    assert {x.name for x, _ in differences(a, b)} <= {t.name for t in a.figures.tensors}  # type: ignore[union-attr]
    both = json.loads(run("compare", tensor, channel, "--json").stdout)["results"]
    assert [r["name"] for r in both] == ["tensor", "channel"]
    assert both[1]["sqnr_db_median"] is None


def test_commands_print_what_the_functions_return(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A figure of the command line is the same in Python, and on the page."""
    source, tensor, channel = two
    report, comparison = report_repo(tensor, source), compare_repos(tensor, channel, source)
    words = ("report", tensor, "--source", source)
    assert json.loads(run(*words, "--json").stdout) == json.loads(json.dumps(report.to_json()))
    assert run(*words, "--html", tmp_path / "r.html").exit_code == 0
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == report.to_html()
    words = ("compare", tensor, channel, "--source", source)
    assert json.loads(run(*words, "--json").stdout) == json.loads(json.dumps(comparison.to_json()))
    assert run(*words, "--html", tmp_path / "c.html").exit_code == 0
    assert (tmp_path / "c.html").read_text(encoding="utf-8") == comparison.to_html()
    assert json.loads(run("inspect", channel, "--json").stdout) == inspect_repo(channel).to_json()


@pytest.mark.parametrize("order", [1, -1])
def test_compare_takes_no_errors_from_another_source(two: tuple[Path, Path, Path], tmp_path: Path, order: int) -> None:
    """A result of the first result is no result of its source: its errors would be those of other scales."""
    source, tensor, channel = two
    second = tmp_path / "second"
    quantize_repo(channel, second, Recipe(granularity="mx"), device="cpu")
    done = run("compare", *[tensor, second][::order], "--source", source)
    assert done.exit_code == 1
    assert re.search(rf"{second}: does not match {source} \([0-9]+ problems found\)", done.output)
    assert run("compare", *[tensor, second][::order]).exit_code == 0


@pytest.mark.parametrize("words", [["report", "missing"], ["compare", "missing", "missing"]])
def test_what_is_not_there_is_refused(words: list[str]) -> None:
    done = run(*words)
    assert done.exit_code != 0


def test_a_page_that_cannot_be_written_is_an_error(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    done = run("report", two[1], "--html", tmp_path / "no" / "such" / "folder.html")
    assert done.exit_code != 0


# ---- pictures ----


def test_pictures(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Three PNG files with errors, two without; the same bytes in every run."""
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    written = write_pngs(read_summary(two[1]), tmp_path / "a")
    assert sorted(path.name for path in written) == ["scales.png", "sizes.png", "sqnr.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in written)
    write_pngs(read_summary(two[1]), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(write_pngs(read_summary(two[2]), tmp_path / "c")) == 2


def test_without_matplotlib_the_extra_is_named(two: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else needs matplotlib."""
    real = builtins.__import__

    def importing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(MissingExtraError, match=re.escape("nemotron_fp8[report]")):
        write_pngs(read_summary(two[1]), "anywhere")
    assert "svg" in render_page([read_summary(two[1])])
