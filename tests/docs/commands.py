"""Checks of the commands of a page without running them: names and options exist."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

import nemotron_fp8
from nemotron_fp8 import _version
from nemotron_fp8.cli.commands import RecipeCommand
from nemotron_fp8.cli.main import cli
from nemotron_fp8.planning.recipe import Recipe
from tests.docs.pages import ROOT

if TYPE_CHECKING:
    from pathlib import Path

TARGET = re.compile(r"^([\w-]+):", re.MULTILINE)
ARGUMENT = re.compile(r"""add_argument\(\s*["'](--[\w-]+)["']""")
PYTHON = re.compile(r"(\S*/)?python[\d.]*")


def check(words: list[str]) -> None:
    """Parse a command like its program, without running it."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["nemotron-fp8"]:
        parse(words[1:])
    elif words[:1] == ["make"]:
        wanted = {word for word in words[1:] if "=" not in word}
        assert wanted <= targets(), f"no such target: {wanted - targets()}"
    elif PYTHON.fullmatch(words[0]) and words[1:2] == ["-m"]:
        module(words[2], words[3:])
    elif words[:2] == ["pip", "install"]:
        for word in words[2:]:
            unreleased = word.startswith("nemotron_fp8") and not _version.RELEASED
            assert not unreleased, f"{word}: nobody has published it; install from a clone"
            for extra in re.findall(r"(?:^\.|^nemotron_fp8)\[([\w,]+)\]", word):
                assert set(extra.split(",")) <= extras(), f"no such extra: {extra}"


def parse(arguments: list[str], *, complete: bool = True) -> None:
    """Parse arguments of ``nemotron-fp8`` and its recipe; an incomplete mention may lack arguments."""
    if not arguments or arguments[0].startswith("-"):
        assert set(arguments) <= {"--help", "-h", "--version"}, arguments
        return
    assert arguments[0] in cli.commands, f"no such command: {arguments[0]}"
    command = cli.commands[arguments[0]]
    if "--help" in arguments:
        return
    try:
        context = command.make_context(arguments[0], list(arguments[1:]))
    except click.MissingParameter:
        if complete:
            raise
        return
    if isinstance(command, RecipeCommand):
        chosen = {name: context.params[name] for name in Recipe.model_fields}
        Recipe(**{name: value for name, value in chosen.items() if value is not None})


def module(name: str, arguments: list[str]) -> None:
    """Check that a module exists, and that a module of this project has the options in its source."""
    assert find_spec(name) is not None, f"no module {name}"
    source = ROOT.joinpath(*name.split("."))
    paths = [source.with_suffix(".py")] if source.with_suffix(".py").exists() else sorted(source.glob("*.py"))
    if paths:
        known = {option for path in paths for option in _options(path)}
        used = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert used <= known, f"{name} has no option {used - known}"


def call(text: str) -> None:
    """Check that every call of a public function in this Python code binds to its signature."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        public: Any = getattr(nemotron_fp8, node.func.id, None) if node.func.id in nemotron_fp8.__all__ else None
        if callable(public):
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(public).bind(*node.args, **keywords)


@cache
def targets() -> set[str]:
    return set(TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))


@cache
def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    _, _, rest = text.partition("[project.optional-dependencies]\n")
    return set(re.findall(r"^(\w+) = ", rest.partition("\n[")[0], re.MULTILINE))


@cache
def options() -> set[str]:
    """Return the options of every command and of every script of the project."""
    commands = cli.commands.values()
    params = [param for command in commands for param in command.get_params(click.Context(command))]
    ours = {name for param in params for name in (*param.opts, *param.secondary_opts)}
    scripts = [path for folder in ("benchmarks", "tools", "tests", "kernels") for path in (ROOT / folder).rglob("*.py")]
    return {"--help", "--version"} | ours | {name for path in scripts for name in _options(path)}


def _options(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    return set(ARGUMENT.findall(text)) | {name for name in ("--check",) if f'"{name}"' in text}
