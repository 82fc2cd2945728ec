"""Recipe files: what is written reads back as an equal recipe; what is wrong is named with file and field."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe
from nemotron_fp8.cli.main import cli
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.recipe import choices_of
from tests.docs.pages import ROOT, blocks

if TYPE_CHECKING:
    from pathlib import Path


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """A recipe with any fields that fit together, and patterns of any text."""
    given_fields: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if not draw(st.booleans()):
            continue
        if isinstance(field.default, bool):
            given_fields[name] = draw(st.booleans())
        elif isinstance(field.default, tuple):
            text = st.text(max_size=12).map(re.escape) | st.sampled_from(
                [r"layers\.\d+", "null", "~", "1_000", "- a", "#"]
            )
            given_fields[name] = tuple(draw(st.lists(text, max_size=3)))
        else:
            given_fields[name] = draw(st.sampled_from(choices_of(name)))
    while True:
        try:
            return Recipe(**given_fields)
        except RecipeError:
            given_fields.pop(draw(st.sampled_from(sorted(given_fields))))


@given(recipes())
@settings(max_examples=150, deadline=None)
def test_a_written_recipe_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    text = recipe.to_yaml()
    assert text.isascii()
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(text)
    assert Recipe.from_file(file) == recipe
    assert Recipe.from_file(str(file)).to_yaml() == text


def test_a_written_recipe_has_every_field_below_its_description() -> None:
    lines = Recipe(ignore=("a", "b")).to_yaml().splitlines()
    for name, field in Recipe.model_fields.items():
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}:")]
        above = []
        while lines[at - 1].startswith("# "):
            at -= 1
            above.append(lines[at].removeprefix("# "))
        assert " ".join(reversed(above)) == " ".join((field.description or "").split())
    assert all(len(line) <= 100 for line in lines)


def test_a_file_names_some_fields_only(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("")
    assert Recipe.from_file(file) == Recipe()
    file.write_text('granularity: block\nstats: Yes\nignore: [q_proj, "k"]\nnonfinite: keep\n')
    expected = Recipe(granularity="block", stats=True, ignore=("q_proj", "k"), nonfinite="keep")
    assert Recipe.from_file(file) == expected


def test_the_file_of_the_documentation_reads(tmp_path: Path) -> None:
    (block,) = [b for b in blocks(ROOT / "docs" / "commands.md") if b.language == "yaml"]
    (tmp_path / "r.yaml").write_text(block.text)
    assert Recipe.from_file(tmp_path / "r.yaml") == Recipe(granularity="block", stats=True, ignore=("self_attn",))


WRONG: dict[str, tuple[str, str]] = {
    "unknown key": ("granularty: block\n", "no field 'granularty' (did you mean 'granularity'?)"),
    "unknown value": ("granularity: blok\n", "granularity is 'blok', not 'tensor', 'channel', 'block' or 'mx'"),
    "nearest value": ("format: fp-8\n", "(did you mean 'fp8'?)"),
    "number": ("granularity: 128\n", "granularity is '128', not"),
    "null": ("kv_cache:\n", "kv_cache is None, not 'none' or 'fp8'"),
    "list for a word": ("activations: [dynamic]\n", "activations is ['dynamic'], not 'dynamic'"),
    "text for a flag": ('stats: "true"\n', "stats is 'true', not true or false"),
    "null for a flag": ("stats: ~\n", "stats is null, not true or false"),
    "text for a list": ("ignore: q_proj\n", "ignore is 'q_proj', not a list of regular expressions"),
    "mapping in a list": ("select: [{a: b}]\n", "select is [{'a': 'b'}], not a list"),
    "null in a list": ("select: [a, null]\n", "select is ['a', None], not a list"),
    "no expression": ("select: ['(']\n", "'(' is not a regular expression"),
    "key twice": ("stats: true\nstats: true\n", "the key 'stats' twice"),
    "no mapping": ("- granularity\n", "not a mapping"),
    "two documents": ("a: b\n---\na: b\n", "more than one document"),
    "alias": ("ignore: &a [x]\nselect: *a\n", "an alias"),
    "tag": (
        "ignore: !!python/object/apply:os.system [ls]\n",
        "the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    "depth": ("a: " + "[" * 100 + "]" * 100 + "\n", "nested deeper than 32 levels"),
    "nodes": ("ignore: [" + "a," * 30_000 + "a]\n", "over the limit of 20,000 nodes"),
    "size": ("# " + "x" * 300_000 + "\n", "bytes of YAML; the limit is 262,144"),
    "syntax": ("granularity: [\n", "not YAML"),
    "contradiction": ("granularity: tensor\nscales: best\n", "scales 'best' needs granularity 'channel'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_file_and_the_field(tmp_path: Path, checkpoint: Path, case: str) -> None:
    """The same from Python and on the command line, where it is one line and nothing is written."""
    text, says = WRONG[case]
    file = tmp_path / "my recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_file(file)
    assert str(caught.value).startswith(f"recipe file {str(file)!r}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    done = CliRunner().invoke(cli, ["quantize", str(checkpoint), str(tmp_path / "dst"), "--recipe", str(file)])
    assert done.exit_code == 1
    assert says in str(done.exception)
    assert str(file) in str(done.exception)
    assert not (tmp_path / "dst").exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("gone.yaml", "", "pipe", "nul\0"):
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.from_file(tmp_path / name if name != "nul\0" else name)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not YAML"):
        Recipe.from_file(tmp_path / "bytes")


def test_fields_that_contradict_those_of_a_file_name_it(tmp_path: Path, checkpoint: Path) -> None:
    """The command line goes before the file; a contradiction names both."""
    file = tmp_path / "r.yaml"
    file.write_text(Recipe(granularity="tensor", share_scales=True, ignore=("o_proj",)).to_yaml())

    def plan(*words: str) -> Any:
        return CliRunner().invoke(cli, ["plan", str(checkpoint), "--no-estimate", "--recipe", str(file), *words])

    assert plan().exit_code == 0
    failed = plan("--granularity", "channel")
    assert failed.exit_code == 1
    assert f"share_scales of {file}" in str(failed.exception)
    done = plan("--granularity", "channel", "--no-share-scales", "--ignore", "up_proj")
    assert done.exit_code == 0
    assert "matches --ignore up_proj" in done.stdout
    assert "o_proj" not in done.stdout.partition("keep:")[2].partition("not ")[0]


def test_a_saved_recipe_gives_the_same_result(tmp_path: Path, checkpoint: Path) -> None:
    """The file that plan writes is read by quantize; another recipe is replaced, another file is not."""
    file, other = tmp_path / "recipe.yaml", tmp_path / "notes.txt"
    options = ["--granularity", "tensor", "--format", "fp8", "--ignore", "layers.0"]
    invoke = CliRunner().invoke
    planned = invoke(cli, ["plan", str(checkpoint), "--no-estimate", "--save-recipe", str(file), *options])
    assert planned.exit_code == 0
    assert f"note: {file} written" in planned.stderr
    assert Recipe.from_file(file) == Recipe(granularity="tensor", format="fp8", ignore=("layers.0",))
    for name, words in (("a", options), ("b", ["--recipe", str(file)])):
        assert invoke(cli, ["quantize", str(checkpoint), str(tmp_path / name), *words, "-q"]).exit_code == 0
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert invoke(cli, ["plan", str(checkpoint), "--no-estimate", "--save-recipe", str(file)]).exit_code == 0
    assert Recipe.from_file(file) == Recipe()
    file.write_text(edited := file.read_text() + "# my own remark\n")
    kept = invoke(cli, ["plan", str(checkpoint), "--no-estimate", "--save-recipe", str(file)])
    assert (kept.exit_code, kept.stdout) == (1, "")
    assert "exists and was edited" in str(kept.exception)
    assert file.read_text() == edited
    other.write_text("dear diary: nothing happened\n")
    refused = invoke(cli, ["plan", str(checkpoint), "--no-estimate", "--save-recipe", str(other)])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "exists and is not a recipe" in str(refused.exception)
    assert other.read_text() == "dear diary: nothing happened\n"
