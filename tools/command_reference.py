"""Write docs/commands.md from the commands themselves: ``python -m tools.command_reference [--check]``.

With ``--check`` nothing is written, and a page that is not what the commands say is an error.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click

from nemotron_fp8.cli.main import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
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
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option)]
    context = click.Context(command)
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


def main() -> None:
    """Write the page, or check it."""
    wanted = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        raise SystemExit("docs/commands.md is not what the commands say: run python -m tools.command_reference")


if __name__ == "__main__":
    main()
