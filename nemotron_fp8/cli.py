"""The ``nemotron-fp8`` command: parse, call, print. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 refused or failed (one ``error:`` line), 2 usage, 130 interrupted. Imports stay inside
the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nemotron_fp8 import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.recipe import Recipe

F = TypeVar("F", bound="Callable[..., Any]")

RECIPE_OPTIONS = (
    click.option(
        "--granularity",
        type=click.Choice(["tensor", "channel", "block"]),
        default="tensor",
        show_default=True,
        help="What one scale covers: a tensor, an output row, or a block of 128x128.",
    ),
    click.option(
        "--format",
        type=click.Choice(["fp8", "compressed-tensors"]),
        default="fp8",
        show_default=True,
        help="Layout of names and config on disk.",
    ),
    click.option(
        "--activations",
        type=click.Choice(["dynamic", "none"]),
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
        type=click.Choice(["float32", "original"]),
        default="float32",
        show_default=True,
        help="Arithmetic: in float32, or as the original script ran, in the tensor's own dtype.",
    ),
    click.option(
        "--select",
        multiple=True,
        metavar="RE",
        help="Quantise tensors whose name matches, instead of *_proj.weight.  [repeatable]",
    ),
    click.option(
        "--ignore",
        multiple=True,
        metavar="RE",
        help="Leave tensors whose name matches, and what engines fuse with them, as they are.  [repeatable]",
    ),
    click.option(
        "--nonfinite",
        type=click.Choice(["error", "keep"]),
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
    click.option("--private", is_flag=True, help="Make DST private if it is a new repository on the Hub."),
    click.option("--pr", "pull_request", is_flag=True, help="Leave a pull request on DST instead of writing to it."),
)


def hub_options(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """Add options about the Hub; the command gets them as one ``hub``."""

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def wrapper(**options: Any) -> Any:
            from nemotron_fp8.hub.options import HubOptions

            names = ("revision", "token_env", "cache_dir", "private", "pull_request")
            return command(hub=HubOptions(**{name: options.pop(name) for name in names if name in options}), **options)

        for option in reversed([option for group in groups for option in group]):
            wrapper = option(wrapper)
        return wrapper  # type: ignore[return-value]  # same command, with options added

    return decorate


def make_recipe(fields: dict[str, Any]) -> Recipe:
    """Build a recipe; what it refuses becomes an error of ours in one line."""
    from pydantic import ValidationError

    from nemotron_fp8.errors import RecipeError
    from nemotron_fp8.recipe import Recipe

    try:
        return Recipe(**fields)
    except ValidationError as error:
        raise RecipeError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nemotron-fp8")
def cli() -> None:
    """Turn huge Hugging Face checkpoints into FP8: streaming, exact, at bounded memory."""


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="[DST]", required=False)
@recipe_options
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N][,...]",
    help="Where to compute; a worker process for each of several.",
)
@MEMORY
@click.option(
    "--max-device-memory",
    metavar="BYTES",
    help="What may be taken on each CUDA device.  [default: 80% of what is free there]",
)
@THREADS
@SHARD_SIZE
@OVERWRITE
@click.option("--in-place", is_flag=True, help="Replace the shards of SRC itself, one by one. No DST then.")
@RESTART
@NO_DIGESTS
@click.option(
    "--ray",
    "cluster",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Let the nodes of a Ray cluster make the shards: HOST:PORT, ray://HOST:PORT, or without a value the cluster"
    " that Ray finds. What --max-memory and --threads give is then for each shard in the making.",
)
@hub_options(HUB_SOURCE, HUB_DESTINATION, HUB_TRANSFER)
@QUIET
@JSON
def quantize(
    source: str,
    destination: str | None,
    recipe: Recipe,
    device: str,
    max_memory: str,
    max_device_memory: str | None,
    threads: int | None,
    shard_size: str | None,
    overwrite: bool,
    in_place: bool,
    restart: bool,
    no_digests: bool,
    cluster: str | None,
    hub: HubOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """Quantise the checkpoint SRC into DST, which appears all at once.

    SRC is a folder of safetensors shards, a .safetensors file, hf://OWNER/NAME[@REVISION], or a NeMo checkpoint: a
    folder or a .nemo archive. DST is a folder, or hf://OWNER/NAME[@BRANCH]. A run that was stopped is carried on by
    the same command; with DST on the Hub, on any machine.
    """
    if in_place == (destination is not None):
        raise click.UsageError("name a destination DST, or convert SRC --in-place")
    from nemotron_fp8.pipeline import quantize_repo
    from nemotron_fp8.progress import ProgressLine
    from nemotron_fp8.show import show_report

    with ProgressLine(sys.stderr, quiet=quiet) as line:
        report = quantize_repo(
            source,
            destination,
            recipe,
            device,
            max_memory,
            line.update,
            overwrite=overwrite,
            in_place=in_place,
            restart=restart,
            threads=threads,
            digests=not no_digests,
            max_device_memory=max_device_memory,
            shard_size=shard_size,
            hub=hub,
            cluster=cluster,
        )
    show_report(report, as_json)


@cli.command()
@click.argument("source", metavar="NEMO")
@click.argument("destination", metavar="DST")
@MEMORY
@THREADS
@SHARD_SIZE
@OVERWRITE
@RESTART
@NO_DIGESTS
@hub_options(HUB_SOURCE, HUB_DESTINATION, HUB_TRANSFER)
@QUIET
@JSON
def convert(
    source: str,
    destination: str,
    max_memory: str,
    threads: int | None,
    shard_size: str | None,
    overwrite: bool,
    restart: bool,
    no_digests: bool,
    hub: HubOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert a NeMo checkpoint to a Hugging Face checkpoint DST; nothing is quantised, every tensor keeps its dtype.

    DST is what it is for quantize.
    """
    from nemotron_fp8.pipeline import convert_repo
    from nemotron_fp8.progress import ProgressLine
    from nemotron_fp8.show import show_report

    with ProgressLine(sys.stderr, quiet=quiet) as line:
        report = convert_repo(
            source,
            destination,
            max_memory,
            line.update,
            overwrite=overwrite,
            restart=restart,
            threads=threads,
            digests=not no_digests,
            shard_size=shard_size,
            hub=hub,
        )
    show_report(report, as_json, quiet)


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="What FP8 weights become.",
)
@MEMORY
@THREADS
@OVERWRITE
@RESTART
@NO_DIGESTS
@hub_options(HUB_SOURCE, HUB_DESTINATION, HUB_TRANSFER)
@QUIET
@JSON
def dequantize(
    source: str,
    destination: str,
    dtype: str,
    max_memory: str,
    threads: int | None,
    overwrite: bool,
    restart: bool,
    no_digests: bool,
    hub: HubOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make the FP8 checkpoint SRC plain again in DST: code times scale, the scales gone.

    SRC and DST are what they are for quantize.
    """
    from nemotron_fp8.pipeline import dequantize_repo
    from nemotron_fp8.progress import ProgressLine
    from nemotron_fp8.show import show_report

    with ProgressLine(sys.stderr, quiet=quiet) as line:
        report = dequantize_repo(
            source,
            destination,
            dtype,
            max_memory,
            line.update,
            overwrite=overwrite,
            restart=restart,
            threads=threads,
            digests=not no_digests,
            hub=hub,
        )
    show_report(report, as_json, quiet)


@cli.command()
@click.argument("source", metavar="SRC")
@recipe_options
@MEMORY
@THREADS
@SHARD_SIZE
@hub_options(HUB_SOURCE)
@JSON
def plan(
    source: str,
    recipe: Recipe,
    max_memory: str,
    threads: int | None,
    shard_size: str | None,
    hub: HubOptions,
    as_json: bool,
) -> None:
    """Say what would become of every tensor of SRC, and what it takes. Writes nothing.

    Of a repository on the Hub only the headers are fetched.
    """
    from nemotron_fp8.pipeline import plan_repo
    from nemotron_fp8.show import show_plan

    show_plan(plan_repo(source, recipe, max_memory, threads, shard_size, hub), as_json)


@cli.command()
@click.argument("folders", metavar="[SRC] DST", nargs=-1, required=True)
@MEMORY
@THREADS
@SHARD_SIZE
@JSON
def verify(
    folders: tuple[str, ...], max_memory: str, threads: int | None, shard_size: str | None, as_json: bool
) -> None:
    """Check the result DST against its source SRC: every tensor, every byte, index and config.

    Without SRC, check it against its own manifest: the SHA-256 of every file.
    """
    from nemotron_fp8.show import show_verification
    from nemotron_fp8.verify import verify_repo

    if len(folders) > 2:
        raise click.UsageError("name SRC and DST, or DST alone")
    source, destination = (None, folders[0]) if len(folders) == 1 else folders
    verification = verify_repo(source, destination, max_memory, threads, shard_size)
    show_verification(verification, source, destination, as_json)
    if not verification.ok:
        count = len(verification.problems)
        raise click.ClickException(f"{destination}: {count} problem{'s' * (count != 1)} found")


@cli.command()
@click.argument("path", metavar="PATH")
@JSON
def inspect(path: str, as_json: bool) -> None:
    """List the tensors of a shard or folder, from headers alone."""
    from nemotron_fp8.show import show_inspection
    from nemotron_fp8.source import inspect_path

    show_inspection(inspect_path(path), as_json)


@cli.command()
@click.argument("folder", metavar="[DIR]", required=False)
def demo(folder: str | None) -> None:
    """Make a small Nemotron checkpoint, quantise it, verify it, and say what happened.

    In DIR, which must not exist yet, or in a temporary folder that is removed at the end.
    """
    from nemotron_fp8.show import run_demo

    run_demo(folder)


def main() -> None:
    """Entry point: run the command, print what goes wrong as one ``error:`` line."""
    from nemotron_fp8.errors import NemotronFp8Error

    # Read when the client is imported: its bars would be drawn over ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        cli(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        fail(error.message)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted; the same command carries on", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except NemotronFp8Error as error:
        fail(str(error))


def fail(message: str, code: int = 1) -> None:
    """Print one ``error:`` line and exit."""
    from nemotron_fp8.show import visible

    click.echo("error: " + visible(" ".join(message.split())), err=True)
    sys.exit(code)
