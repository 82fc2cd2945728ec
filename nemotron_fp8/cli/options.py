"""Options that several commands share; an error about a misspelled word suggests the nearest one."""

from __future__ import annotations

import functools
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


F = TypeVar("F", bound="Callable[..., Any]")

CUTOFF = 0.5
"""Least similarity of two words, from 0 to 1, for a suggestion."""


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a sentence that suggests the word most similar to a misspelled one; empty if no word is similar."""
    found = get_close_matches(word.lower(), list(words), n=1, cutoff=CUTOFF)
    return f" Did you mean {found[0]!r}?" if found else ""


class Choice(click.Choice):  # type: ignore[type-arg]  # not generic before click 8.2
    """A choice whose error names the nearest value."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = nearest(str(value), map(str, self.choices))
            raise click.BadParameter(error.message + hint, error.ctx, error.param) from None


class Commands(click.Group):
    """A group whose error names the nearest command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "" in args:
            ctx.fail("an argument is empty; is a variable unset?")
        if not args:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}.{nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


MEMORY = click.option(
    "--max-memory",
    default="256MiB",
    show_default=True,
    metavar="BYTES",
    help="Limit of the working buffers, like 256MiB or 1.5GB.",
)
DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N][,...]",
    help="Device, or several: one worker process for each.",
)
DEVICE_MEMORY = click.option(
    "--max-device-memory",
    metavar="BYTES",
    help="Limit of the memory on each CUDA device.  [default: 80% of the free memory]",
)
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
SHARD_SIZE = click.option(
    "--shard-size",
    metavar="BYTES",
    help="Size of a shard of the result, like 5GB, for a NeMo checkpoint.  [default: 5GB]",
)
THREADS = click.option("--threads", type=click.IntRange(1), help="Worker threads.  [default: all available cores]")
AMAXES = click.option(
    "--amaxes", metavar="FILE", help="Amaxes of a calibration of SRC, for static scales and those of an FP8 KV cache."
)
SEQUENCES = click.option(
    "--sequences", type=click.IntRange(1), metavar="N", help="Sequences of the sample.  [default: 16]"
)
LENGTH = click.option("--length", type=click.IntRange(2), metavar="N", help="Tokens of a sequence.  [default: 512]")
TEXT = click.option("--text", metavar="FILE", help="Text, UTF-8.  [default: the language reference of Python]")
TOKENS = click.option(
    "--tokens", metavar="FILE", help="Token ids instead of a text: JSON, a list of equally long lists."
)
ONE_DEVICE = click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Device.")
RUN_MEMORY = click.option(
    "--max-memory", metavar="BYTES", help="Limit of the buffers, like 8GiB.  [default: half of the free memory]"
)
SPILL = click.option("--spill", is_flag=True, help="Keep hidden states in a file instead of memory.")
STATE_DIR = click.option(
    "--state-dir", metavar="DIR", help="Folder for the state of an unfinished run.  [default: in ~/.cache]"
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace DST if it holds other files.")
RESTART = click.option("--restart", is_flag=True, help="Discard an unfinished run and start over.")
RESULT = click.option(
    "--result", metavar="NAME", help="Name of DST in the evaluation, if it is not that of the folder."
)
NO_DIGESTS = click.option("--no-digests", is_flag=True, help="Leave the SHA-256 of the files out of the manifest.")


DERIVED = {
    "granularity": "best of the format",
    "format": "compressed-tensors",
    "scale_rounding": "power-of-two for block and mx, else none",
    "scale_dtype": "e8m0 for mx, else float32",
}
"""Fields of the recipe whose default depends on other fields, each with the text of its default."""


class RecipeCommand(click.Command):
    """A command with an option for each field of the recipe; its function gets them as one ``recipe``.

    The options are created when the command is used: importing pydantic would slow down ``--help`` of other commands.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from nemotron_fp8.planning.layouts import layout_names

        params = super().get_params(ctx)
        arguments = [param for param in params if isinstance(param, click.Argument)]
        return [*arguments, *recipe_options(layout_names()), *(param for param in params if param not in arguments)]

    def invoke(self, ctx: click.Context) -> Any:
        from nemotron_fp8.planning.recipe import Recipe

        chosen = {name: ctx.params.pop(name) for name in Recipe.model_fields}
        # A choice that is not made depends on the others: the recipe fills it in.
        ctx.params["recipe"] = Recipe(**{name: value for name, value in chosen.items() if value is not None})
        return super().invoke(ctx)


@functools.cache
def recipe_options(layouts: tuple[str, ...]) -> tuple[click.Option, ...]:
    """Return an option for each field of the recipe: names, values, defaults and help come from the fields.

    Args:
        layouts: names of the registered layouts; the options are created again once another layout is registered.
    """
    from nemotron_fp8.planning.recipe import Recipe, choices_of

    options = []
    for name, field in Recipe.model_fields.items():
        more: dict[str, Any] = {"help": field.description, "default": field.default}
        if isinstance(field.default, bool):
            more["is_flag"] = True
        elif isinstance(field.default, tuple):
            more |= {"multiple": True, "metavar": "RE", "help": f"{field.description}  [repeatable]"}
        else:
            more |= {"type": Choice(choices_of(name)), "show_default": True}
            if name in DERIVED:
                more |= {"default": None, "show_default": DERIVED[name]}
        options.append(click.Option(["--" + name.replace("_", "-")], **more))
    return tuple(options)


HUB_TOKEN = (
    click.option(
        "--token-env", metavar="NAME", help="Environment variable with the token.  [default: your login, or HF_TOKEN]"
    ),
)
HUB_SOURCE = (
    click.option("--revision", metavar="REV", help="Branch, tag or commit of SRC on the Hub, like SRC@REV."),
    *HUB_TOKEN,
)
HUB_TRANSFER = (
    click.option(
        "--cache-dir",
        metavar="DIR",
        help="Folder for shards in transfer from and to the Hub, a few at a time.  [default: in HF_HOME]",
    ),
)
HUB_DESTINATION = (
    click.option("--private", is_flag=True, help="Create DST on the Hub as a private repository; reject a public one."),
    click.option("--pr", "pull_request", is_flag=True, help="Open a pull request on DST instead of writing to it."),
)


def _note_wait(reason: str, seconds: float) -> None:
    """Print the reason and the delay of a retry."""
    from nemotron_fp8.cli.output import note

    note(f"note: {reason}; retrying in {seconds:.0f} s")


def hub_options(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """Add options for the Hub; the command gets them as one ``hub``."""

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def wrapper(**options: Any) -> Any:
            from nemotron_fp8.hub.options import HubOptions

            names = ("revision", "token_env", "cache_dir", "private", "pull_request")
            given = {name: options.pop(name) for name in names if name in options}
            return command(hub=HubOptions(**given, on_wait=_note_wait), **options)

        for option in reversed([option for group in groups for option in group]):
            wrapper = option(wrapper)
        return wrapper  # type: ignore[return-value]  # same command, with options added

    return decorate
