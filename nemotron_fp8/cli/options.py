"""Options that several commands share."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nemotron_fp8.cli.commands import MONITOR

if TYPE_CHECKING:
    from collections.abc import Callable


F = TypeVar("F", bound="Callable[..., Any]")

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
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors, and the object of --json.")
VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Print what is done, too, on stderr.")


def _keep(ctx: click.Context, param: click.Parameter, name: str | None) -> None:
    """Keep the file of an option for the monitor, which starts when the command is called."""
    if name is not None:
        ctx.meta[f"{MONITOR}{param.name}"] = name


LOG_JSON = click.option(
    "--log-json",
    metavar="FILE",
    expose_value=False,
    callback=_keep,
    help="Append a log of JSON lines to FILE; with - write it to stderr, instead of everything else there.",
)
METRICS = click.option(
    "--metrics",
    metavar="FILE.prom",
    expose_value=False,
    callback=_keep,
    help="Write metrics for the textfile collector of Prometheus to FILE.prom, every few seconds.",
)


def watched(command: F) -> F:
    """Add the options for other programs that watch a long command."""
    return LOG_JSON(METRICS(command))


RECIPE_FILE = click.option(
    "--recipe",
    "recipe_file",
    metavar="FILE.yaml",
    help="Recipe file, as plan --save-recipe writes it. Options given beside it go before.",
)
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
MIN_SHARE = click.option(
    "--min-share",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    help="Refuse to quantize if less of the bytes of the decoder's linear weights would become FP8.",
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


class Duration(click.ParamType):  # type: ignore[type-arg]  # not generic in every version of click
    """A time like 90s, 10min or 1.5h, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h)?", str(value), re.ASCII)
        if found is None:
            self.fail(f"{value!r} is not a time; write it like 90s, 10min or 1h", param, ctx)
        return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2] or "s"]


HUB_TOKEN = (
    click.option(
        "--retry-time",
        "retry_seconds",
        type=Duration(),
        metavar="TIME",
        help="Time without progress after which a request fails, like 10min; 0 for no retry.  [default: 30min]",
    ),
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

            names = ("revision", "token_env", "cache_dir", "private", "pull_request", "retry_seconds")
            found = {name: options.pop(name) for name in names if name in options}
            given = {name: value for name, value in found.items() if value is not None}
            return command(hub=HubOptions(**given, on_wait=_note_wait), **options)

        for option in reversed([option for group in groups for option in group]):
            wrapper = option(wrapper)
        return wrapper  # type: ignore[return-value]  # same command, with options added

    return decorate
