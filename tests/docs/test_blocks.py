"""Every command and every Python block of the README and of docs/ runs, in the order of its page.

A block that cannot run has a comment above it with the reason, ``<!-- not run: needs a cluster -->``. Its commands,
options and Python calls must exist, too.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
import yaml
from huggingface_hub import constants

from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.cli.demo import write_checkpoint
from nemotron_fp8.cli.main import main
from nemotron_fp8.errors import RecipeError
from tests.docs.commands import call, check, options, parse
from tests.docs.pages import LANGUAGES, PAGES, ROOT, SHELL, WHOLE, Block, blocks, spans
from tests.hub.conftest import TOKEN, hub, server
from tests.support.nemo_writer import Sizes, hf_tensors, write_nemo

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer

__all__ = ["hub", "server"]  # fixtures, which pytest finds by their names in this module

RUN = [page for page in PAGES if any(not b.not_run and b.language in (*SHELL, "python") for b in blocks(page))]
REPOSITORY = re.compile(r"hf://([\w.-]+/[\w.-]+)")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the demo, made once."""
    folder = tmp_path_factory.mktemp("made") / "checkpoint"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def world(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[Block]], None]:
    """Create the files of a reader: ``SRC``, ``NEMO``, and the Hub with the repositories that a page names."""

    def make(found: list[Block]) -> None:
        folder = tmp_path / "world"
        folder.mkdir()
        monkeypatch.chdir(folder)
        text = "".join(block.text for block in found if block.not_run is None)
        if "SRC" in text:
            shutil.copytree(checkpoint, "SRC")
        if "NEMO" in text:
            sizes = Sizes()
            write_nemo(Path("NEMO"), hf_tensors(sizes), sizes)
        if repositories := set(REPOSITORY.findall(text)):
            on_hub: Hub = request.getfixturevalue("hub")
            served: HubServer = request.getfixturevalue("server")
            monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
            monkeypatch.setenv("HF_TOKEN", TOKEN)
            files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
            for repository in sorted(repositories):
                if not repository.startswith("me/"):
                    on_hub.store.seed(repository, files)

    return make


@pytest.fixture
def run_blocks(
    world: Callable[[list[Block]], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[Block]], None]:
    """Run the blocks of a page one after another in one folder, like a reader."""

    def run(found: list[Block]) -> None:
        world(found)
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in found:
            if block.not_run is not None:
                continue
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", dont_inherit=True)
                exec(code, names)
                continue
            for words in block.commands():
                assert words[0] == "nemotron-fp8", f"{block.where}: {words[0]} is not run: say why above the block"
                monkeypatch.setattr(sys, "argv", words)
                try:
                    main()
                except SystemExit as stop:
                    assert not stop.code, f"{block.where}: {' '.join(words)}: {capsys.readouterr().err}"

    return run


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_blocks_run_in_the_order_of_their_page(page: Path, run_blocks: Callable[[list[Block]], None]) -> None:
    run_blocks([block for block in blocks(page) if block.language in (*SHELL, "python")])


def test_blocks_really_run(run_blocks: Callable[[list[Block]], None], tmp_path: Path) -> None:
    """Files of a block exist for the next one; a failing command or Python block is reported."""
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\nnemotron-fp8 quantize SRC DST  # in a moment\n```\n```python\nfrom pathlib import Path\n"
        f"assert (Path('DST') / '{MANIFEST}').exists()\n```\n"
        "<!-- not run: it would fail -->\n```sh\nfalse\n```\n```console\n$ nemotron-fp8 verify NONE\nwords\n```\n"
    )
    found = [Block(ROOT / "page.md", b.line, b.language, b.text, b.not_run) for b in blocks(page)]
    with pytest.raises(AssertionError, match=r"page\.md:13: nemotron-fp8 verify NONE: (?s:.*)error: NONE: "):
        run_blocks(found)
    assert (Path("DST") / MANIFEST).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_options_exist(page: Path) -> None:
    """Commands, options, make targets, modules and arguments exist, in blocks and in the text."""
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: a block of {block.language or 'no language'}"
        try:
            if block.language in WHOLE:
                assert block.not_run, "a whole file is not run: say why above the block"
            if block.language == "yaml":
                assert list(yaml.safe_load_all(block.text))
            if block.language in (*SHELL, *WHOLE):
                for words in block.commands():
                    check(words)
            elif block.language == "python":
                call(block.text)
        except Exception as error:
            raise AssertionError(f"{block.where}: {error}") from error
    for line, span in spans(page):
        try:
            _check_span(span)
        except Exception as error:
            raise AssertionError(f"{page.name}:{line}: {span}: {error}") from error


def _check_span(span: str) -> None:
    words = span.split()
    if words[0].startswith("--") and re.fullmatch(r"--[a-z][\w-]*", words[0].partition("=")[0]):
        assert words[0].partition("=")[0] in options(), "no such option"
    elif words[0] == "nemotron-fp8" and words[1:] and words[1] != "COMMAND":
        parse(words[1:], complete=False)
    elif words[0] in ("make", "pip") or "-m" in words[:3]:
        check(words)
    elif re.fullmatch(r"\w+\(.*=.*\)", span):
        call(span)


@pytest.mark.parametrize(
    "text",
    [
        "nemotron-fp8 quantze SRC DST",
        "nemotron-fp8 quantize SRC DST --granularty block",
        "nemotron-fp8 quantize SRC DST --granularity rows",
        "nemotron-fp8 quantize SRC DST --select (",
        "nemotron-fp8 verify",
        "make sandwich",
        "python -m benchmarks.measure.nothing",
        "python -m benchmarks.tables.memory --chek",
        "pip install .[gpu]",
    ],
)
def test_a_mistake_in_a_block_is_found(text: str) -> None:
    with pytest.raises((AssertionError, click.UsageError, RecipeError, ModuleNotFoundError)):
        check(text.split())


def test_a_wrong_argument_is_found() -> None:
    with pytest.raises(TypeError):
        call("quantize_repo('SRC', 'DST', memory='1GB')")
