"""The model card of a result: its front matter field by field, what it keeps of the source's, that it is the same."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, _version, convert_repo, dequantize_repo, plan_repo, quantize_repo
from nemotron_fp8._utils import code
from nemotron_fp8.checkpoint.inventory import CARD, MAX_CARD_BYTES
from nemotron_fp8.cli.main import cli
from nemotron_fp8.documents import model_card
from nemotron_fp8.documents.manifest import read_manifest
from nemotron_fp8.documents.model_card import BEGIN, END, install_lines, split_card, stated_recipe
from nemotron_fp8.errors import RecipeError
from tests.support.checkpoints import ONE, contents, model, weight, write_checkpoint
from tests.support.nemo_writer import Sizes, hf_tensors, write_nemo
from tests.support.recipes import PUBLISHED

if TYPE_CHECKING:
    from pathlib import Path

SOURCE_CARD = """---
license: other
license_name: nvidia-open-model-license
license_link: LICENSE
language:
- en
tags:
- nvidia
- fp8
datasets: nvidia/HelpSteer2
library_name: transformers
---

# Theirs

Their text, with a `---` in it:

---
"""

# What the Hub documents: of these keys, these values (or kinds of value). Source: its model card specification.
ALLOWED: dict[str, Any] = {
    "base_model": re.compile(r"[\w.-]+/[\w.-]+"),
    "base_model_relation": {"quantized"},
    "license": re.compile(r"[a-z0-9.-]+"),
    "license_name": re.compile(r"[a-z0-9.-]+"),
    "license_link": re.compile(r"\S+"),
    "language": list,
    "tags": list,
    "datasets": (str, list),
    "library_name": {"transformers", "vllm"},
    "pipeline_tag": {"text-generation"},
}

LAYOUTS = [
    Recipe(),
    PUBLISHED,
    Recipe(format="fp8"),
    Recipe(format="compressed-tensors", granularity="block", activations="none", stats=True),
    Recipe(format="fp8", granularity="tensor", share_scales=True, stats=True),
    Recipe(numerics="original", ignore=(r"layers\.0\.", r"it's|layers\.0")),
    Recipe(format="mxfp8"),
    Recipe(format="modelopt", kv_cache="fp8", stats=True),
]


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / CARD).read_text(encoding="utf-8"))


def wide(folder: Path) -> Path:
    """A checkpoint whose weights divide into blocks."""
    shard = {f"model.layers.{i}.self_attn.o_proj.weight": weight(128, 256, seed=i) for i in range(2)}
    return write_checkpoint(folder, {ONE: shard})


@pytest.mark.parametrize("recipe", LAYOUTS, ids=str)
@pytest.mark.parametrize("theirs", [None, SOURCE_CARD])
def test_every_field_of_the_front_matter_is_one_the_hub_knows(
    tmp_path: Path, recipe: Recipe, theirs: str | None
) -> None:
    """It parses with the Hub's own class, and every key has a value that the Hub documents."""
    source = wide(tmp_path / "s")
    if theirs:
        (source / CARD).write_text(theirs)
    quantize_repo(source, tmp_path / "d", recipe, base_model="nvidia/Tiny")
    fields = card_of(tmp_path / "d").data.to_dict()
    assert fields.keys() <= ALLOWED.keys()
    for key, value in fields.items():
        allowed = ALLOWED[key]
        if isinstance(allowed, set):
            assert value in allowed
        elif isinstance(allowed, re.Pattern):
            assert allowed.fullmatch(value)
        else:
            assert isinstance(value, allowed)
    assert fields["base_model"] == "nvidia/Tiny"
    assert fields["base_model_relation"] == "quantized"
    assert len(set(fields["tags"])) == len(fields["tags"])
    assert {"fp8", "nemotron_fp8"} <= set(fields["tags"])
    # A layout that transformers loads without its scales must not be offered with transformers' snippet.
    unscaled = recipe.format == "modelopt" or (recipe.format == "fp8" and recipe.granularity == "tensor")
    assert fields["library_name"] == ("vllm" if unscaled else "transformers")
    if theirs:
        assert fields["license"] == "other"
        assert fields["license_name"] == "nvidia-open-model-license"
        assert fields["license_link"] == "LICENSE"
        assert fields["datasets"] == "nvidia/HelpSteer2"
        assert fields["tags"][:2] == ["nvidia", "fp8"]
    else:
        assert "license" not in fields  # none is made up


THEIRS = {
    "license": "other",
    "license_name": "nvidia-open-model-license",
    "license_link": "LICENSE",
    "language": ["en"],
    "tags": ["nvidia"],
    "datasets": "nvidia/HelpSteer2",
    "library_name": "transformers",
}
TEXT = "pipeline_tag", "text-generation"


@pytest.mark.parametrize("theirs", [None, SOURCE_CARD])
@pytest.mark.parametrize("what", ["quantize", "convert", "dequantize"])
def test_front_matter_of_every_command_and_of_nemo(tmp_path: Path, what: str, theirs: str | None) -> None:
    """Field by field: what is taken over, what is set, what is taken away. Sources are NeMo's, and ours of it."""
    sizes = Sizes(layers=1)
    source = tmp_path / "nemo"
    write_nemo(source, hf_tensors(sizes), sizes)
    if theirs:
        (source / CARD).write_text(theirs)
    recipe = Recipe(format="compressed-tensors", granularity="channel")
    if what == "convert":
        convert_repo(source, tmp_path / "d")
    else:
        quantize_repo(source, tmp_path / "q", recipe, base_model="nvidia/Nemotron-4-340B-Instruct")
        if what == "dequantize":
            dequantize_repo(tmp_path / "q", tmp_path / "d")
    card = card_of(tmp_path / ("q" if what == "quantize" else "d"))
    expected: dict[str, Any] = {**(THEIRS if theirs else {"library_name": "transformers"}), TEXT[0]: TEXT[1]}
    if what != "convert":
        expected["base_model"] = "nvidia/Nemotron-4-340B-Instruct"
    if what == "quantize":
        expected["base_model_relation"] = "quantized"
        expected["tags"] = [*expected.get("tags", []), "fp8", "nemotron_fp8", "vllm", "sglang", "compressed-tensors"]
        expected["tags"] = [tag for tag in expected["tags"] if tag != "fp8" or not theirs]
        expected["tags"][1:1] = ["fp8"] * bool(theirs)  # theirs has it already, in its place
    assert card.data.to_dict() == expected
    assert ("# Theirs" in card.text) is bool(theirs)
    assert BEGIN in card.text


def test_the_text_of_an_existing_card_is_kept_below(tmp_path: Path) -> None:
    """Every character of it, after ours; the card itself is not copied beside it."""
    source = wide(tmp_path / "s")
    (source / CARD).write_text(SOURCE_CARD)
    quantize_repo(source, tmp_path / "d")
    text = (tmp_path / "d" / CARD).read_text()
    theirs = SOURCE_CARD.split("---\n", 2)[2].lstrip("\n")
    assert text.endswith(f"{END}\n\n{theirs}")
    assert text.count("# Theirs") == 1


def test_a_card_is_not_wrapped_twice(tmp_path: Path) -> None:
    """Made plain again and quantized again, a card has one block of ours; FP8's tags go and come."""
    source = wide(tmp_path / "s")
    (source / CARD).write_text("---\nlicense: mit\ntags: [mine]\n---\n# Theirs\n")
    quantize_repo(source, tmp_path / "a")
    dequantize_repo(tmp_path / "a", tmp_path / "b")
    plain = card_of(tmp_path / "b").data.to_dict()
    assert plain == {
        "license": "mit",
        "tags": ["mine"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
    }
    quantize_repo(tmp_path / "b", tmp_path / "c")
    text = (tmp_path / "c" / CARD).read_text()
    assert text.count(BEGIN) == text.count(END) == text.count("# Theirs") == 1
    assert card_of(tmp_path / "c").data.to_dict() == card_of(tmp_path / "a").data.to_dict()


@pytest.mark.parametrize(
    "front",
    [
        "---\n- a list\n---\n",
        "---\na: [1\n---\n",
        "---\na: &x [1]\nb: *x\n---\n",
        "---\n1: 2\n---\n",
        "---\n" + "a: " + "[" * 5000 + "\n---\n",
        "---\nnever closed\n",
        "---\n" + "k: v\n" * 60000 + "---\n",
        "\ufeff# only text\n",
    ],
    ids=["list", "broken", "alias", "number", "deep", "open", "long", "mark"],
)
def test_a_front_matter_that_cannot_be_used_is_left_in_the_text(tmp_path: Path, front: str) -> None:
    """Nothing of a stranger's card is lost or expanded, and the result has a front matter of its own."""
    source = wide(tmp_path / "s")
    (source / CARD).write_text(front + "# Theirs\n", encoding="utf-8")
    quantize_repo(source, tmp_path / "d", PUBLISHED)
    assert card_of(tmp_path / "d").data.to_dict()["library_name"] == "vllm"
    text = (tmp_path / "d" / CARD).read_text(encoding="utf-8")
    assert text.endswith(front.lstrip("\ufeff") + "# Theirs\n")


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_can_be_a_card(data: bytes) -> None:
    """A card that is no text is kept byte for byte, but for line breaks at its beginning."""
    metadata, text = split_card(data)
    if not metadata and not data.lstrip().startswith(b"---") and not data.startswith(b"\xef\xbb\xbf"):
        assert text.encode("utf-8", "surrogateescape") == data.lstrip(b"\r\n")


def test_a_card_over_the_cap_is_left_out_and_named(tmp_path: Path) -> None:
    source = wide(tmp_path / "s")
    (source / CARD).write_bytes(b"x" * (MAX_CARD_BYTES + 1))
    report = quantize_repo(source, tmp_path / "d")
    assert CARD in dict(report.left_out)
    assert len((tmp_path / "d" / CARD).read_bytes()) < 10_000


def test_same_source_and_recipe_same_bytes(tmp_path: Path) -> None:
    """Budget, threads, place and time do not show, in no file of the result; stats neither."""
    source = write_checkpoint(tmp_path / "s", model())
    recipe = Recipe(stats=True)
    quantize_repo(source, tmp_path / "a", recipe, max_memory="64MiB", threads=1)
    (tmp_path / "elsewhere").mkdir()
    source.rename(tmp_path / "elsewhere" / "moved")
    quantize_repo(tmp_path / "elsewhere" / "moved", tmp_path / "b", recipe, max_memory="512MiB", threads=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, ""),
        ({"activations": "none"}, "--activations none "),
        ({"activations": "none", "scales": "best"}, "--activations none --scales best "),
        ({"granularity": "block"}, "--granularity block "),
        ({"format": "fp8"}, "--format fp8 "),
        ({"format": "fp8", "granularity": "tensor"}, "--granularity tensor --format fp8 "),
        ({"numerics": "original"}, "--numerics original "),
        ({"format": "mxfp8"}, "--format mxfp8 "),
        ({"granularity": "mx", "kv_cache": "fp8"}, "--granularity mx --kv-cache fp8 "),
        ({"format": "modelopt", "granularity": "block"}, "--granularity block --format modelopt "),
        ({"format": "fp8", "scale_rounding": "none"}, "--format fp8 --scale-rounding none "),
        ({"format": "fp8", "scale_dtype": "e8m0"}, "--format fp8 --scale-dtype e8m0 "),
        ({"also_select": ("o_proj",), "force_select": True}, ""),
    ],
    ids=str,
)
def test_the_command_on_the_card_makes_the_same_result(tmp_path: Path, fields: dict[str, Any], options: str) -> None:
    """Run as it stands there, but for the two places; options that others imply are left out."""
    source = wide(tmp_path / "s")
    recipe = Recipe(**fields, ignore=(r"layers\.0\.", r"it's|layers\.0"), stats=True)
    quantize_repo(source, tmp_path / "a", recipe)
    line = next(x for x in (tmp_path / "a" / CARD).read_text().splitlines() if x.startswith("nemotron-fp8 quantize"))
    assert line.startswith(f"nemotron-fp8 quantize SRC DST {options}--stats ")
    words = shlex.split(line)[1:]
    words[words.index("SRC")], words[words.index("DST")] = str(source), str(tmp_path / "b")
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_digests_are_those_of_the_manifest(checkpoint: Path, destination: Path) -> None:
    """Every shard with its bytes and SHA-256; the manifest covers the card itself."""
    quantize_repo(checkpoint, destination)
    manifest = read_manifest(destination)
    assert manifest is not None
    text = (destination / CARD).read_text()
    for shard in destination.glob("*.safetensors"):
        file = manifest.files[shard.name]
        assert f"| {shard.name} | {file.size:,} | `{file.sha256}` |" in text
    assert CARD in manifest.files


def test_without_digests_the_card_says_so(checkpoint: Path, destination: Path) -> None:
    quantize_repo(checkpoint, destination, digests=False)
    assert "`not taken`" in (destination / CARD).read_text()


def test_nan_and_figures_are_told(tmp_path: Path) -> None:
    shard = {f"model.layers.{i}.mlp.down_proj.weight": weight(64, 64, seed=i) for i in range(3)}
    shard["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    source = write_checkpoint(tmp_path / "s", {ONE: shard})
    quantize_repo(source, tmp_path / "d", Recipe(nonfinite="keep", stats=True))
    text = (tmp_path / "d" / CARD).read_text()
    assert "* `model.layers.1.mlp.down_proj.weight`: 1 values, the first (nan) at [3, 5]" in text
    assert re.search(r"\d+\.\d\d dB in the median tensor", text)
    assert "2 of 3 tensors are FP8" in text


@pytest.mark.parametrize("name", ["", "tiny", "a/b/c", "a b/c", "hf://a/b", "a/b\n"])
def test_a_base_model_is_a_name_on_the_hub(checkpoint: Path, destination: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="owner/name"):
        quantize_repo(checkpoint, destination, base_model=name)


def test_names_from_files_are_shown_and_not_obeyed() -> None:
    assert code("a`b|<i>\n[x](y)") == "a\\u0060b\\u007c\\u003ci\\u003e\\u000a\\u005bx\\u005d(y)"
    assert code("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"


def test_how_to_serve_names_the_engines_of_the_layout(tmp_path: Path) -> None:
    """SGLang and vLLM read no weight-only blocks; that is said, and nobody is told to try."""
    source = wide(tmp_path / "s")
    recipe = Recipe(format="compressed-tensors", granularity="block", activations="none")
    quantize_repo(source, tmp_path / "a", recipe)
    quantize_repo(source, tmp_path / "b")
    without, with_both = ((tmp_path / x / CARD).read_text() for x in "ab")
    assert "vllm serve" not in without
    assert "sglang.launch_server" not in without
    assert "vLLM does not load this layout." in without
    assert "SGLang does not load this layout." in without
    assert not {"vllm", "sglang"} & set(card_of(tmp_path / "a").data.to_dict()["tags"])
    assert "vllm serve" in with_both
    assert "sglang.launch_server" in with_both


def test_how_to_serve_says_what_an_engine_misreads(tmp_path: Path) -> None:
    """Layouts that one of the engines reads, and the notices of the plan."""
    source = wide(tmp_path / "s")
    for form in ("mxfp8", "modelopt"):
        recipe = Recipe(format=form)
        report = quantize_repo(source, tmp_path / form, recipe)
        text = (tmp_path / form / CARD).read_text()
        assert ("vllm serve" in text) is (form == "modelopt")
        assert ("sglang.launch_server" in text) is (form == "mxfp8")
        assert all(notice[1:] in text for notice in report.notices if "format" in notice)
    card = (tmp_path / "mxfp8" / CARD).read_text()
    assert "vLLM reads format 'mxfp8' only of models whose code renames the scales" in card
    assert "SGLang serves it with a tensor-parallel size of at most 8." in card
    assert "transformers ignores this layout" in (tmp_path / "modelopt" / CARD).read_text()


@pytest.mark.parametrize("code", [False, True])
def test_code_of_the_model_needs_an_option_of_the_engine(tmp_path: Path, code: bool) -> None:
    config: dict[str, Any] = {"model_type": "own"}
    if code:
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    write_checkpoint(tmp_path / "src", model(), config=config)
    (tmp_path / "src" / "modeling_own.py").write_text("class OwnForCausalLM: pass\n")
    quantize_repo(tmp_path / "src", tmp_path / "dst")
    assert ("--trust-remote-code" in card_of(tmp_path / "dst").text) == code


def test_a_plan_knows_the_size_of_the_card(checkpoint: Path, destination: Path) -> None:
    """The space that the plan requires on the disk equals the bytes that the run writes."""
    plan = plan_repo(checkpoint)
    report = quantize_repo(checkpoint, destination)
    assert plan.disk_bytes == report.bytes_written
    assert json.loads((destination / "nemotron_fp8.json").read_text())["recipe"]["stats"] is False


ADDRESS = "https://example.com/me/nemotron-fp8"
INSTALLS = {
    "a released version": ("1.2.0", "", True, ["pip install nemotron_fp8==1.2.0"]),
    "a version between releases": ("1.3.0.dev0", "", False, ["# nemotron_fp8 1.3.0.dev0"]),
    "a version between releases, of a public repository": (
        "1.3.0.dev0",
        ADDRESS,
        False,
        [
            "# nemotron_fp8 1.3.0.dev0, from its repository:",
            f"pip install 'git+{ADDRESS}#subdirectory=kernels' 'git+{ADDRESS}'",
        ],
    ),
}


@pytest.mark.parametrize("name", INSTALLS)
def test_a_card_names_a_version_only_if_it_can_be_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise whoever registers the name runs code on the machines of its readers; either card states its recipe."""
    version, address, released, lines = INSTALLS[name]
    assert install_lines(version, address, released=released) == lines
    monkeypatch.setattr(model_card, "__version__", version)
    monkeypatch.setattr(model_card, "REPOSITORY", address)
    monkeypatch.setattr(model_card, "RELEASED", released)
    quantize_repo(wide(tmp_path / "src"), tmp_path / "dst", Recipe(granularity="block"))
    card = (tmp_path / "dst" / CARD).read_bytes()
    assert "\n".join(["```sh", *lines, "nemotron-fp8 quantize SRC DST --granularity block"]) in card.decode()
    assert card.count(b"pip install") == "".join(lines).count("pip install")
    stated = stated_recipe(card)
    assert stated is not None
    assert (stated.version, stated.recipe) == (version, Recipe(granularity="block"))


def test_only_versions_between_releases_are_not_released() -> None:
    assert ("dev" in _version.__version__) != _version.RELEASED
