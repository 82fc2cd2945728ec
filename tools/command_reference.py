"""Write docs/commands.md and the recipe of docs/api.md from the code: ``python -m tools.command_reference [--check]``.

With ``--check`` nothing is written, and a page that differs from the code is an error.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click

from nemotron_fp8.cli.main import cli
from nemotron_fp8.planning.recipe import Recipe, choices_of
from tools.pages import filled, put

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "commands.md"
API = DOCS / "api.md"
BEGIN, END = "<!-- recipe: tools/command_reference.py -->", "<!-- end of recipe -->"
INTRO = """# Commands

Made from the commands by `python -m tools.command_reference`; `nemotron-fp8 COMMAND --help` says the same.

Results go to standard output, everything else to standard error. With `--json` a command prints one JSON object.
Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted (Ctrl-C), 143 told to end (SIGTERM). All but 0
come with one line that begins with `error:`.
"""


def render() -> str:
    """Return the page."""
    names = sorted(cli.commands)
    summary = ["| command | |", "|---|---|"]
    summary += [f"| [`{name}`](#{name}) | {_text(cli.commands[name])[0]} |" for name in names]
    return "\n".join([INTRO, *summary, *(_command(name, cli.commands[name]) for name in names), ""])


def _text(command: click.Command) -> list[str]:
    """The paragraphs of a command's help, each in one line."""
    return [" ".join(paragraph.split()) for paragraph in inspect.cleandoc(command.help or "").split("\n\n")]


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command)
    params = command.get_params(context)
    arguments = [p for p in params if isinstance(p, click.Argument)]
    options = [p for p in params if isinstance(p, click.Option) and "--help" not in p.opts]
    words = ["nemotron-fp8", name, *["[OPTIONS]"] * bool(options), *(a.make_metavar(context) for a in arguments)]
    lines = ["", f"## {name}", "", "```text", " ".join(words), "```", "", "\n\n".join(_text(command))]
    if options:
        lines += ["", "| option | default | |", "|---|---|---|", *(_option(option) for option in options)]
    return "\n".join(lines)


def _option(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        value = " " + "\\|".join(map(str, option.type.choices))
    elif option.is_flag:
        value = ""
    else:
        value = f" {option.metavar or option.type.name.split(' ')[0].upper()}".replace("|", "\\|")
    help_text = " ".join((option.help or "").split())
    default = f"`{option.default}`" if option.show_default else ""
    for mark in ("[default: ", "[repeatable]"):
        if mark in help_text:
            help_text, _, rest = help_text.partition(mark)
            default = rest.rstrip("]") if mark.endswith(" ") else "may be repeated"
    *aliases, last = option.opts
    names = ", ".join([*(f"`{alias}`" for alias in aliases), f"`{last}{value}`"])
    return f"| {names} | {default} | {help_text.strip()} |"


def recipe_table() -> str:
    """Return a table of the recipe's fields."""
    lines = ["| field | values | default | |", "|---|---|---|---|"]
    for name, field in Recipe.model_fields.items():
        kind = "`True`, `False`" if isinstance(field.default, bool) else "a tuple of strings"
        values = ", ".join(f'`"{choice}"`' for choice in choices_of(name)) or kind
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        lines.append(f"| `{name}` | {values} | `{default}` | {field.description} |")
    return "\n".join(lines)


def main() -> None:
    """Write the pages, or check them."""
    wanted = {PAGE: render(), API: filled(API, BEGIN, END, recipe_table())}
    put(wanted, "the code", check="--check" in sys.argv[1:])


if __name__ == "__main__":
    main()
