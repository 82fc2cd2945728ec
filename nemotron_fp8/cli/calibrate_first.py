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
from nemotron_fp8.api import plan_source
from nemotron_fp8.calibration.calibrate import calibrate, write_amaxes
from nemotron_fp8.checkpoint.json_text import compact_json
from nemotron_fp8.cli.output import note, show_notices
from nemotron_fp8.cli.progress_line import ProgressLine
from nemotron_fp8.errors import CalibrationError, SourceError
from nemotron_fp8.inference.sample import MAX_TEXT_BYTES
from nemotron_fp8.inference.session import state_root
from nemotron_fp8.planning.amaxes import Amaxes, read_amaxes
from nemotron_fp8.planning.stacked_experts import single_experts
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.untrusted.regular_files import read_start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.sources.base import Source


FINISHED = "finished"
"""Name of the folder of amaxes whose conversions are not done, among the saved states of calibrations."""


@contextmanager
def calibrated(
    source: str,
    recipe: Recipe,
    text: str,
    *,
    device: str,
    restart: bool,
    threads: int | None,
    shard_size: str | None,
    hub: HubOptions,
    quiet: bool,
) -> Iterator[Amaxes]:
    """Calibrate a source with a text, and yield its amaxes; they are kept until the context ends without an error.

    The recipe is checked against the source before, since a calibration can take hours.
    """
    opened = open_source(source, shard_size, hub)
    _check_recipe(opened, recipe)
    kept = state_root(None, "calibrations") / FINISHED / f"{_key(opened, text)}.json"
    amaxes = None if restart else _kept(kept)
    if amaxes is not None and not quiet:
        note("note: the amaxes of the calibration before are used; pass --restart to calibrate again")
    if amaxes is None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with ProgressLine(sys.stderr, quiet=quiet) as line:
            found = calibrate(
                source, text=text, device=device, restart=restart, threads=threads, hub=hub, progress=line.update
            )
        if not quiet:
            show_notices(list(found.notices))
        amaxes = found.amaxes
        write_amaxes(kept, amaxes)
    yield amaxes
    with suppress(OSError):
        kept.unlink()


def _check_recipe(source: Source, recipe: Recipe) -> None:
    """Raise an error for a recipe that cannot be carried out on a source, or does not use amaxes."""
    if recipe.activations != "static" and recipe.kv_cache != "none":
        plan_source(source, recipe.model_copy(update={"kv_cache": "none"}))
        return
    names = [view.name for view in source.inventory.views] + single_experts(source.inventory)
    ones = Amaxes({name.removesuffix(".weight"): 1.0 for name in names}, {}, {}, ())
    plan_source(source, recipe.model_copy(update={"kv_cache": "none"}), amaxes=ones)


def _kept(path: Path) -> Amaxes | None:
    """Return the amaxes of an earlier run; None without a usable file."""
    with suppress(SourceError, CalibrationError):
        return read_amaxes(path) if path.exists() else None
    return None


def _key(source: Source, text: str) -> str:
    """Return a digest of everything that the amaxes depend on."""
    sample = hashlib.sha256(read_start(Path(text), MAX_TEXT_BYTES)).hexdigest()
    where = [os.fspath(source.inventory.source), sorted(dict(source.stamps).items())]
    return hashlib.sha256(compact_json([__version__, sample, where])).hexdigest()[:32]
