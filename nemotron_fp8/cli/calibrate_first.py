"""``quantize --calibrate``: calibrate the source first, and keep the amaxes until the conversion is done.

A run that is interrupted in its conversion finds the amaxes again, and does not calibrate a second time.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._version import __version__
from nemotron_fp8.api import DEFAULT_MEMORY, plan_source
from nemotron_fp8.calibration.calibrate import calibrate, write_amaxes
from nemotron_fp8.checkpoint.json_text import compact_json
from nemotron_fp8.cli.output import note, show_notices
from nemotron_fp8.cli.progress_line import ProgressLine
from nemotron_fp8.errors import CalibrationError, SourceError
from nemotron_fp8.inference.sample import MAX_TEXT_BYTES, MAX_TOKENS_BYTES
from nemotron_fp8.inference.session import state_root
from nemotron_fp8.planning.amaxes import Amaxes, read_amaxes
from nemotron_fp8.planning.linear_share import check_share
from nemotron_fp8.planning.stacked_experts import single_experts
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.untrusted.regular_files import read_start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.sources.base import Source


FINISHED = "finished"
"""Name of the folder of amaxes whose conversions are not done, among the saved states of calibrations."""


@contextmanager
def calibrated(
    source: str,
    recipe: Recipe,
    text: str | None,
    *,
    tokens: str | None,
    sequences: int | None,
    length: int | None,
    device: str,
    restart: bool,
    threads: int | None,
    shard_size: str | None,
    hub: HubOptions,
    quiet: bool,
    verbose: bool,
    min_share: float | None = None,
) -> Iterator[Amaxes]:
    """Calibrate a source with a sample, and yield its amaxes; they are kept until the context ends without an error.

    The recipe is checked against the source before, since a calibration can take hours.
    """
    opened = open_source(source, shard_size, hub)
    check_share(check_recipe(opened, recipe).share, min_share)
    kept = state_root(None, "calibrations") / FINISHED / f"{_key(opened, text, tokens, sequences, length)}.json"
    amaxes = None if restart else _kept(kept)
    if amaxes is not None and not quiet:
        note("note: the amaxes of the calibration before are used; pass --restart to calibrate again")
    if amaxes is None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
            found = calibrate(
                source,
                text=text,
                tokens=tokens,
                sequences=sequences,
                length=length,
                device=device,
                restart=restart,
                threads=threads,
                hub=hub,
                progress=line.update,
            )
        if not quiet:
            show_notices(list(found.notices))
        amaxes = found.amaxes
        write_amaxes(kept, amaxes)
    yield amaxes
    with suppress(OSError):
        kept.unlink()


def check_recipe(
    source: Source, recipe: Recipe, max_memory: str | int = DEFAULT_MEMORY, threads: int | None = None
) -> Plan:
    """Return the plan of a recipe before its calibration: with amaxes of 1.0 for activations, and none of the KV cache.

    Args:
        source: the source.
        recipe: settings of the quantization.
        max_memory: limit of the working buffers.
        threads: worker threads.

    Raises:
        RecipeError: the recipe does not use amaxes.
        NemotronFp8Error: the recipe cannot be carried out on the source; the subclass names the cause.
    """
    uncached = recipe.model_copy(update={"kv_cache": "none"})
    if recipe.activations != "static" and recipe.kv_cache != "none":
        return plan_source(source, uncached, max_memory, threads)
    names = [view.name for view in source.inventory.views] + single_experts(source.inventory)
    ones = Amaxes({name.removesuffix(".weight"): 1.0 for name in names}, {}, {}, ())
    return plan_source(source, uncached, max_memory, threads, ones)


def _kept(path: Path) -> Amaxes | None:
    """Return the amaxes of an earlier run; None without a usable file."""
    with suppress(SourceError, CalibrationError):
        return read_amaxes(path) if path.exists() else None
    return None


def _key(source: Source, text: str | None, tokens: str | None, sequences: int | None, length: int | None) -> str:
    """Return a digest of everything that the amaxes depend on."""
    kind, most = ("text", MAX_TEXT_BYTES) if tokens is None else ("tokens", MAX_TOKENS_BYTES)
    sample = hashlib.sha256(read_start(Path(text or tokens or ""), most)).hexdigest()
    where = [os.fspath(source.inventory.source), sorted(dict(source.stamps).items())]
    return hashlib.sha256(compact_json([__version__, kind, sample, sequences, length, where])).hexdigest()[:32]
