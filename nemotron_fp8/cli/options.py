"""Options that several commands share, and choices that name the nearest when one is misspelled."""

from __future__ import annotations

import functools
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nemotron_fp8.planning.recipe import Recipe


F = TypeVar("F", bound="Callable[..., Any]")

CUTOFF = 0.5
"""How alike two words must be, of 1, for one to be taken for a misspelling of the other."""


def nearest(word: str, words: Iterable[str]) -> str:
    """Return the sentence that names the word most like a misspelled one; empty where none is like it."""
    found = get_close_matches(word.lower(), list(words), n=1, cutoff=CUTOFF)
    return f" Did you mean {found[0]!r}?" if found else ""


class Choice(click.Choice):  # type: ignore[type-arg]  # click before 8.2 knows no parameter
    """A choice that names the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = nearest(str(value), map(str, self.choices))
            raise click.BadParameter(error.message + hint, error.ctx, error.param) from None


class Commands(click.Group):
    """A group of commands that names the nearest."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`. Nothing is a folder or a value that is empty."""
        if "" in args:
            ctx.fail("an argument is empty: is a variable unset?")
        if not args:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See `click.Group.resolve_command`."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}.{nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


RECIPE_OPTIONS = (
    click.option(
        "--granularity",
        type=Choice(["tensor", "channel", "block"]),
        default="tensor",
        show_default=True,
        help="What one scale covers: a tensor, an output row, or a block of 128x128.",
    ),
    click.option(
        "--format",
        type=Choice(["fp8", "compressed-tensors"]),
        default="fp8",
        show_default=True,
        help="Layout of names and config on disk.",
    ),
    click.option(
        "--activations",
        type=Choice(["dynamic", "none"]),
        default="dynamic",
        show_default=True,
        help="What an engine does with activations: scale and cast them while it runs, or leave them.",
    ),
    click.option(
        "--share-scales",
        is_flag=True,
        help="One scale for the tensors that engines merge (q/k/v, gate/up).",
    ),
    click.option(
        "--numerics",
        type=Choice(["float32", "original"]),
        default="float32",
        show_default=True,
        help="Arithmetic: in float32, or as the original script ran, in the tensor's own dtype.",
    ),
    click.option(
        "--select",
        multiple=True,
        metavar="RE",
        help="Quantize tensors whose name matches, instead of *_proj.weight.  [repeatable]",
    ),
    click.option(
        "--ignore",
        multiple=True,
        metavar="RE",
        help="Leave tensors whose name matches, and what engines fuse with them, as they are.  [repeatable]",
    ),
    click.option(
        "--nonfinite",
        type=Choice(["error", "keep"]),
        default="error",
        show_default=True,
        help="On NaN or Inf: stop, or keep the tensor and what engines fuse with it as they are.",
    ),
    click.option(
        "--stats", is_flag=True, help="Measure the errors of every FP8 tensor and put them beside the result."
    ),
)
RECIPE_FIELDS = (
    "granularity",
    "format",
    "activations",
    "share_scales",
    "numerics",
    "select",
    "ignore",
    "nonfinite",
    "stats",
)
MEMORY = click.option(
    "--max-memory",
    default="256MiB",
    show_default=True,
    metavar="BYTES",
    help="What the working buffers may take, like 256MiB or 1.5GB.",
)
DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N][,...]",
    help="Where to compute; a worker process for each of several.",
)
DEVICE_MEMORY = click.option(
    "--max-device-memory",
    metavar="BYTES",
    help="What may be taken on each CUDA device.  [default: 80% of what is free there]",
)
QUIET = click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
SHARD_SIZE = click.option(
    "--shard-size",
    metavar="BYTES",
    help="Tensors in a shard of the result, like 5GB, for a NeMo checkpoint.  [default: 5GB]",
)
THREADS = click.option("--threads", type=click.IntRange(1), help="Worker threads.  [default: the cores there are]")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace DST if it holds something else.")
RESTART = click.option("--restart", is_flag=True, help="Discard what an unfinished run has left; start over.")
NO_DIGESTS = click.option("--no-digests", is_flag=True, help="Leave the SHA-256 of the files out of the manifest.")


def recipe_options(command: F) -> F:
    """Add the options of a recipe; the command gets them as one ``recipe``."""

    @functools.wraps(command)
    def wrapper(**options: Any) -> Any:
        fields = {name: options.pop(name) for name in RECIPE_FIELDS}
        return command(recipe=make_recipe(fields), **options)

    for option in reversed(RECIPE_OPTIONS):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]  # same command, with options added


def make_recipe(fields: dict[str, Any]) -> Recipe:
    """Build a recipe; what it refuses becomes an error of ours in one line."""
    from pydantic import ValidationError

    from nemotron_fp8.errors import RecipeError
    from nemotron_fp8.planning.recipe import Recipe

    try:
        return Recipe(**fields)
    except ValidationError as error:
        raise RecipeError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from None


HUB_SOURCE = (
    click.option("--revision", metavar="REV", help="Branch, tag or commit of SRC on the Hub, like SRC@REV."),
    click.option("--token-env", metavar="NAME", help="Variable with the token.  [default: your login, or HF_TOKEN]"),
)
HUB_TRANSFER = (
    click.option(
        "--cache-dir",
        metavar="DIR",
        help="Where shards on their way from and to the Hub are kept, a few at a time.  [default: in HF_HOME]",
    ),
)
HUB_DESTINATION = (
    click.option(
        "--private", is_flag=True, help="Make DST, a new repository on the Hub, private; a public one is refused."
    ),
    click.option("--pr", "pull_request", is_flag=True, help="Leave a pull request on DST instead of writing to it."),
)


def _tell_wait(reason: str, seconds: float) -> None:
    """Say why nothing happens for a while."""
    from nemotron_fp8.cli.output import note

    note(f"note: {reason}; again in {seconds:.0f} s")


def hub_options(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """Add options about the Hub; the command gets them as one ``hub``."""

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def wrapper(**options: Any) -> Any:
            from nemotron_fp8.hub.options import HubOptions

            names = ("revision", "token_env", "cache_dir", "private", "pull_request")
            given = {name: options.pop(name) for name in names if name in options}
            return command(hub=HubOptions(**given, on_wait=_tell_wait), **options)

        for option in reversed([option for group in groups for option in group]):
            wrapper = option(wrapper)
        return wrapper  # type: ignore[return-value]  # same command, with options added

    return decorate
