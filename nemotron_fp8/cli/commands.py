"""Classes of the commands: help in sections with examples, variables of the environment, hints at misspelled words."""

from __future__ import annotations

import functools
import os
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from nemotron_fp8._process import command as running
from nemotron_fp8._secrets import masked
from nemotron_fp8._utils import listed, plain_path, shell_word
from nemotron_fp8.cli.environment import (
    has_unknown,
    name_variables,
    origin_of,
    taken,
    unknown_variables,
)
from nemotron_fp8.cli.help_pages import COMMAND_SECTIONS, EXAMPLES, VARIABLES, sections_of
from nemotron_fp8.errors import NemotronFp8Error, RecipeError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from click.shell_completion import CompletionItem

CUTOFF = 0.5
"""Least similarity of two words, from 0 to 1, for a suggestion."""
FILES = ("FILE", "FILE.yaml", "SRC AMAXES.json", "SRC", "NEMO", "PATH", "[SRC] DST")
FOLDERS = ("DIR", "[DIR]", "DST", "[DST]", "DST...", "A", "B")
"""Names of values that a shell completes with files and folders, or with folders."""


def nearest(word: str, words: Iterable[str], cutoff: float = CUTOFF) -> str:
    """Return a sentence that suggests the word most similar to a misspelled one; empty if no word is similar."""
    found = get_close_matches(word.lower(), list(words), n=1, cutoff=cutoff)
    return f" Did you mean {found[0]!r}?" if found else ""


def typed(ctx: click.Context, *names: str) -> bool:
    """Return True if one of the options is on the command line."""
    return any(ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in names)


STDIN = "/dev/stdin"


def refuse_dash(option: str, name: str | None) -> None:
    """Refuse ``-`` as the name of a file to write: stdout has the text of the command.

    Args:
        option: the option with the name.
        name: the name; None without one.

    Raises:
        UsageError: the name is ``-``.
    """
    if name == "-":
        raise click.UsageError(
            f"{option} needs the name of a file; for stdout, write {option} /dev/stdout with --quiet"
        )


def path_hint(words: Iterable[str]) -> str:
    """Return how to write a path that was taken for an option; empty if no word looks like one."""
    for word in words:
        if re.match(r"-[^-]..", word) or (word.startswith("-") and os.path.lexists(word)):
            return f"; a path that begins with - needs ./ before it: {shell_word(plain_path(word))}"
    return ""


def _other_commands(ctx: click.Context, option: str) -> str:
    """Return which other commands have an option; empty if none has."""
    group = ctx.find_root().command
    others = group.commands.items() if isinstance(group, click.Group) else ()
    found = [
        name
        for name, command in others
        if any(option in param.opts for param in command.get_params(click.Context(command)))
    ]
    return f"; {option} is an option of {listed(found)}" if found else ""


class Choice(click.Choice):  # type: ignore[type-arg]  # not generic before click 8.2
    """A choice whose error names the nearest value.

    Attributes:
        cutoff: least similarity of the nearest value, from 0 to 1.
    """

    cutoff = CUTOFF

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = nearest(str(value), map(str, self.choices), self.cutoff)
            raise click.BadParameter(error.message + hint, error.ctx, error.param) from None


class Shell(Choice):
    """A choice of a shell. Their names are short and alike: csh is no misspelled zsh."""

    cutoff = 0.7


class Name(click.ParamType):  # type: ignore[type-arg]  # not generic in every version of click
    """A name of a file or a folder, or an address, which the shell completes; it is not checked here.

    Args:
        kind: ``file``, which includes folders, or ``dir``.
    """

    name = "text"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"Name({self.kind!r})"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type=self.kind)]


MONITOR = "nemotron_fp8.monitor."
"""Start of the keys of ``ctx.meta`` with the files for log and metrics."""


def _start_monitor(ctx: click.Context) -> None:
    """Start log and metrics, if the command has any."""
    log, metrics = (ctx.meta.get(f"{MONITOR}{name}") for name in ("log_json", "metrics"))
    if log is not None or metrics is not None:
        from nemotron_fp8.cli import monitor
        from nemotron_fp8.cli.monitor_files import check_files

        check_files(log, metrics, _places(ctx))
        if log is not None:
            monitor.current.start_log(log)
        if metrics is not None:
            monitor.current.start_metrics(metrics)


def _places(ctx: click.Context) -> list[str]:
    """Return the arguments of a command, which are its sources and destinations."""
    found: list[str] = []
    for param in ctx.command.params:
        if isinstance(param, click.Argument):
            value = ctx.params.get(str(param.name))
            found += [value] if isinstance(value, str) else [str(each) for each in value or ()]
    return found


class Command(click.Command):
    """A command whose options have variables of the environment, and whose help has sections and examples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name_variables(str(self.name), self.params)
        for param in self.params:
            if param.metavar in (*FILES, *FOLDERS):
                param.type = Name("file" if param.metavar in FILES else "dir")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)  # click consumes them
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if hint := path_hint(words) or _other_commands(ctx, error.option_name):
                raise click.UsageError(f"{error.format_message().removesuffix('.')}{hint}", ctx) from None
            raise
        except click.UsageError as error:
            text = error.format_message().replace("values: , ", "values: ")  # click lists the empty word for a flag
            if origin := origin_of(ctx, text):
                raise click.UsageError(f"{text.removesuffix('.')}{origin}", ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        running.variables = {name: masked(value) for _, name, value in taken(ctx)}
        _start_monitor(ctx)
        _choose_loudness(ctx)
        if not ctx.params.get("quiet"):
            _note_variables(ctx)
        try:
            self.prepare(ctx)
            return super().invoke(ctx)
        except click.UsageError as error:
            if origin := origin_of(ctx, error.format_message()):
                raise click.UsageError(f"{error.format_message().removesuffix('.')}{origin}", ctx) from None
            error.ctx = error.ctx or ctx
            raise
        except NemotronFp8Error as error:
            arguments = error.arguments if isinstance(error, RecipeError) else ()
            # The fields of the error stay as they are.
            if origin := origin_of(ctx, str(error), arguments) or _of_file(ctx, str(error)):
                error.args = (f"{error}{origin}",)
            raise

    def prepare(self, ctx: click.Context) -> None:
        """Complete the parameters before the function is called."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections, and examples."""
        params = {_name_of(param): param for param in self.get_params(ctx) if isinstance(param, click.Option)}
        for title, names in sections_of(str(self.name), list(params)).items():
            found = [params[name].get_help_record(ctx) for name in names]
            with formatter.section(title):
                formatter.write_dl([record for record in found if record is not None])
        _write_examples(formatter, EXAMPLES.get(str(self.name), ()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if any(isinstance(param, click.Option) and param.envvar for param in self.get_params(ctx)):
            formatter.write_paragraph()
            formatter.write_text(VARIABLES)


def _name_of(option: click.Option) -> str:
    """Return the name of an option; that of --help depends on the version of click."""
    return "help" if "--help" in option.opts else str(option.name)


def _write_examples(formatter: click.HelpFormatter, examples: Iterable[tuple[str, str]]) -> None:
    """Write commands with their purposes. They are not wrapped: people copy them."""
    rows = list(examples)
    if rows:
        with formatter.section("Examples"):
            for number, (purpose, command) in enumerate(rows):
                if number:
                    formatter.write("\n")
                formatter.write(f"{' ' * formatter.current_indent}# {purpose}\n")
                for line in command.split("\n"):
                    formatter.write(f"{' ' * formatter.current_indent}{line}\n")


def _choose_loudness(ctx: click.Context) -> None:
    """Let the command line go before the environment if one wants a quiet command and the other a verbose one.

    Raises:
        UsageError: both are wanted in the same place.
    """
    if not (ctx.params.get("quiet") and ctx.params.get("verbose")):
        return
    if typed(ctx, "quiet") == typed(ctx, "verbose"):
        raise click.UsageError("--quiet and --verbose exclude each other", ctx)
    ctx.params["quiet" if typed(ctx, "verbose") else "verbose"] = False


def _note_variables(ctx: click.Context) -> None:
    """Note the options that the environment sets, and variables that look like those of an option."""
    from nemotron_fp8.cli.output import note

    used = [f"{name}={value}" for name, value in running.variables.items()]
    if used:
        note(f"note: from the environment: {', '.join(used)}")
    group = ctx.find_root().command
    if isinstance(group, Commands) and has_unknown(group.variables(with_recipe=False), os.environ):
        for text in unknown_variables(group.variables(), os.environ):
            note(f"note: {text}")


class Commands(click.Group):
    """A group whose help lists the commands in sections, and whose error names the nearest command."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # for the completion
            return super().parse_args(ctx, args)
        if "" in args:
            ctx.fail("an argument is empty; is a variable unset?")
        if not args:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in ("-v", "-V"):
                raise click.UsageError("No such option: -v; for the version use --version", ctx) from None
            if others := _other_commands(ctx, error.option_name):
                hint = f"{others}: write it after the command"
                raise click.UsageError(f"{error.format_message().removesuffix('.')}{hint}", ctx) from None
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}.{nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in sections, and examples."""
        width = max(map(len, self.commands))
        listed = {name for names in COMMAND_SECTIONS.values() for name in names}
        others = tuple(name for name in sorted(self.commands) if name not in listed)
        for title, names in {**COMMAND_SECTIONS, "Others": others}.items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(200))
                for name in names
                if name in self.commands
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        _write_examples(formatter, EXAMPLES[""])

    def variables(self, *, with_recipe: bool = True) -> dict[str, list[tuple[str, str]]]:
        """Return the variables of all options, each with the commands and the options that it sets.

        Args:
            with_recipe: True to include the options of the recipe, whose fields take time to import.
        """
        found: dict[str, list[tuple[str, str]]] = {}
        for name, command in sorted(self.commands.items()):
            params = command.get_params(click.Context(command)) if with_recipe else command.params
            for param in params:
                for variable in param.envvar or () if isinstance(param, click.Option) else ():
                    found.setdefault(variable, []).append((name, max(param.opts, key=len)))
        return found


FILE = "nemotron_fp8.recipe_file"
"""Key of ``ctx.meta`` with the recipe file, and the fields that it sets."""


def _of_file(ctx: click.Context, message: str) -> str:
    """Return the end of an error message: the patterns of a recipe file that it is about; empty if there are none."""
    file, fields = ctx.meta.get(FILE, ("", ()))
    names = [name for name in fields if f"--{name.replace('_', '-')} " in message]
    return f" ({', '.join(names)} of {printable(file)[1:-1]})" if names else ""


DERIVED = {
    "granularity": "best of the format",
    "format": "compressed-tensors",
    "scale_rounding": "power-of-two for block and mx, else none",
    "scale_dtype": "e8m0 for mx, else float32",
}
"""Fields of the recipe whose default depends on other fields, each with the text of its default."""


class RecipeCommand(Command):
    """A command with an option for each field of the recipe; its function gets them as one ``recipe``.

    The options are created when the command is used: importing pydantic would slow down ``--help`` of other commands.
    A field is taken from the command line, else from the environment, else from the file of ``--recipe``.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from nemotron_fp8.planning.layouts import layout_names

        params = super().get_params(ctx)
        arguments = [param for param in params if isinstance(param, click.Argument)]
        fields = recipe_options(str(self.name), layout_names())
        return [*arguments, *fields, *(param for param in params if param not in arguments)]

    def prepare(self, ctx: click.Context) -> None:
        """Put the recipe in the place of its fields.

        Raises:
            RecipeError: the file cannot be read, or the fields do not fit together.
        """
        from nemotron_fp8.planning.recipe import Recipe

        file = ctx.params.pop("recipe_file")
        stored: dict[str, Any] = {}
        if file is not None:
            from nemotron_fp8.planning.recipe_file import read_fields

            stored = read_fields(STDIN if file == "-" else file, Recipe)
        given = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
        values = {name: ctx.params.pop(name) for name in Recipe.model_fields}
        # A choice that is not made depends on the others: the recipe fills it in.
        chosen = {name: value for name, value in values.items() if ctx.get_parameter_source(name) in given}
        if file is not None:
            ctx.meta[FILE] = file, [name for name in stored if name not in chosen]
            if not stored and not ctx.params.get("quiet"):
                from nemotron_fp8.cli.output import note

                note(f"note: {file} names no field of a recipe; every field has its default")
        try:
            ctx.params["recipe"] = Recipe(**{**stored, **chosen})
        except RecipeError as error:
            places = [name for name in stored if name not in chosen and re.search(rf"\b{name}\b", error.problem)]
            if places:
                error.args = (f"{error} ({', '.join(places)} of {printable(file)[1:-1]})",)
            raise


@functools.cache
def recipe_options(command: str, layouts: tuple[str, ...]) -> tuple[click.Option, ...]:
    """Return an option for each field of the recipe: names, values, defaults and help come from the fields.

    Args:
        command: name of the command.
        layouts: names of the registered layouts; the options are created again once another layout is registered.
    """
    from nemotron_fp8.planning.recipe import Recipe, choices_of

    options = []
    for name, field in Recipe.model_fields.items():
        word = name.replace("_", "-")
        names = [f"--{word}"]
        more: dict[str, Any] = {"help": field.description, "default": field.default}
        if isinstance(field.default, bool):
            # The second name overrides a file or the environment.
            names = [f"--{word}/--no-{word}"]
        elif isinstance(field.default, tuple):
            more |= {"multiple": True, "metavar": "RE", "help": f"{field.description}  [repeatable]"}
        else:
            more |= {"type": Choice(choices_of(name)), "show_default": True}
            if name in DERIVED:
                more |= {"default": None, "show_default": DERIVED[name]}
        options.append(click.Option(names, **more))
    name_variables(command, options)
    return tuple(options)
