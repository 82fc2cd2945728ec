"""Output of ``plan``: the decision for every tensor and its reason, memory, disk and time."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8._utils import format_bytes, listed
from nemotron_fp8.cli.output import (
    engines_json,
    note,
    print_json,
    print_table,
    put,
    say,
    shape_text,
    share_json,
    show_notices,
    warn_of_low_share,
    write_page,
)
from nemotron_fp8.cli.progress_line import clock_time
from nemotron_fp8.cli.show_needs import needs_json, show_needs
from nemotron_fp8.errors import RecipeError, WriteError
from nemotron_fp8.planning.engine_support import support_text
from nemotron_fp8.planning.kv_cache import has_cache_scales
from nemotron_fp8.planning.recipe_file import is_unedited, read_fields
from nemotron_fp8.untrusted import yaml_text
from nemotron_fp8.untrusted.regular_files import read_start

if TYPE_CHECKING:
    from nemotron_fp8.cli.show_needs import PredictedNeeds
    from nemotron_fp8.conversion.estimate import Needs
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.planning.tensor_plan import TensorPlan


SHOWN_TENSORS = 200
"""Largest plan whose tensors are listed one by one; a larger plan is summarized by reason."""


def plan_and_show(
    source: str,
    recipe: Recipe,
    amaxes: str | None,
    *,
    device: str,
    max_memory: str,
    max_device_memory: str | None,
    threads: int | None,
    shard_size: str | None,
    hub: HubOptions,
    quiet: bool,
    as_json: bool,
    calibrates: bool = False,
    estimate: bool = True,
    evaluation: tuple[int | None, int | None] | None = None,
    save_recipe: str | None = None,
    destination: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> None:
    """Plan a conversion and print the plan, for ``plan`` and ``quantize --dry-run``.

    Args:
        source: name of the source.
        recipe: settings of the quantization.
        amaxes: file of the amaxes of a calibration.
        device: devices of the conversion.
        max_memory: limit of the working buffers.
        max_device_memory: limit of the memory on each device.
        threads: worker threads.
        shard_size: size of a shard, for a NeMo checkpoint.
        hub: options for the Hub.
        quiet: print nothing but errors, and the object of ``as_json``.
        as_json: print one JSON object.
        calibrates: True if a calibration would precede the conversion. The plan is then without scales of keys and
            values, whose number only the calibration shows.
        estimate: True to measure the speed of this machine.
        evaluation: sequences and length of an evaluation whose needs are shown; None without one.
        save_recipe: file to write the recipe to.
        destination: destination of the conversion; None if it is not known.
        overwrite, restart: options of the conversion.

    Raises:
        WriteError: the recipe cannot be written; nothing is printed then.
        DestinationExistsError, OverlapError: the conversion would refuse the destination.
    """
    from nemotron_fp8.api import plan_source
    from nemotron_fp8.cli.show_needs import predicted_needs
    from nemotron_fp8.conversion.estimate import needs_of
    from nemotron_fp8.planning.amaxes import as_amaxes
    from nemotron_fp8.sources.open import open_source

    if destination is not None:
        from nemotron_fp8.destinations.open import refuse_occupied

        refuse_occupied(source, destination, overwrite)
    opened = open_source(source, shard_size, hub)
    if calibrates:
        from nemotron_fp8.cli.calibrate_first import check_recipe

        made = check_recipe(opened, recipe, max_memory, threads)
    else:
        made = plan_source(opened, recipe, max_memory, threads, as_amaxes(amaxes))
    found: list[str] = []
    if destination is not None and not calibrates:  # whose scales are not known
        from nemotron_fp8.cli.dry_run import findings_at

        found = findings_at(destination, opened, made, hub, overwrite=overwrite, restart=restart)
    needs = needs_of(made, opened, device, max_memory, max_device_memory, threads, estimate and not quiet)
    predicted = None
    if evaluation is not None:
        predicted = predicted_needs(opened, recipe, *evaluation, threads, estimate)
    if save_recipe is not None:
        write_recipe(save_recipe, recipe)
    show_plan(made, needs, predicted, as_json, quiet, destination)
    for each in found * (not quiet):
        note(f"note: {each}")
    if save_recipe is not None and not quiet:
        note(f"note: {save_recipe} written")


def write_recipe(path: str, recipe: Recipe) -> None:
    """Write a recipe file, whole or not at all. Another recipe file is replaced as long as nobody has edited it.

    Raises:
        WriteError: the file cannot be written, is no recipe, or was edited.
    """
    if Path(path).is_file():
        try:
            fields = read_fields(path, type(recipe))
            there = type(recipe)(**fields)
        except RecipeError:
            raise WriteError(path, "exists and is not a recipe; name another file", errno.EEXIST) from None
        if not is_unedited(read_start(Path(path), yaml_text.MAX_BYTES), there):
            problem = "exists and was edited, or is of another version; name another file, or remove this one first"
            raise WriteError(path, problem, errno.EEXIST)
    elif Path(path).is_dir():
        raise WriteError(path, "is a folder; name a file", errno.EISDIR)
    write_page(path, recipe.to_yaml())


def show_plan(
    plan: Plan,
    needs: Needs,
    evaluation: PredictedNeeds | None,
    as_json: bool,
    quiet: bool = False,
    destination: str | None = None,
) -> None:
    """Print a plan, and the needs of an evaluation if they are given; a quiet one only as JSON."""
    if quiet:
        if as_json:
            print_json(_plan_json(plan, needs, evaluation))
        return
    show_notices(plan.notices)
    warn_of_low_share(plan.share)
    for name, reason in plan.inventory.left_out:
        note(f"note: {name} would not be copied: {reason}")
    if as_json:
        print_json(_plan_json(plan, needs, evaluation))
        return
    if len(plan.tensors) <= SHOWN_TENSORS:
        _list_tensors(plan)
        put()
    _list_reasons(plan)
    put()
    quantized = sum(t.quantize for t in plan.tensors)
    say(f"{quantized:,} tensors become FP8, {len(plan.tensors) - quantized:,} are left unquantized")
    if any(plan.recoding):
        say(f"source   quantized: {_recoding_text(plan)}")
    if plan.amaxes is not None and not plan.amaxes.runs:
        say(f"scales   {len(plan.stored_scales):,} of activations, from the calibration that precedes; those of an FP8")
        say("         KV cache are not counted here")
    elif plan.amaxes is not None:
        tokens = sum(run.tokens for run in plan.amaxes.runs)
        sources = listed(sorted({run.source for run in plan.amaxes.runs}))
        cached = sum(has_cache_scales([name]) for name in plan.stored_scales)
        stored = f"{len(plan.stored_scales) - cached:,} of activations and {cached:,} of the KV cache"
        say(f"scales   {stored}, from a calibration of {sources} with {tokens:,} tokens")
    share, *left = plan.share.lines()
    say(f"linear   {share}")
    for line in left:
        say(f"  {line}")
    say(f"engines  {support_text(plan.engines)}")
    ratio = f" ({plan.bytes_out / plan.bytes_in:.0%})" if plan.bytes_in else ""
    say(f"tensors  {format_bytes(plan.bytes_in)} -> {format_bytes(plan.bytes_out)}{ratio}")
    from nemotron_fp8.destinations.open import store_note

    to_store = None if destination is None else store_note(destination)
    what = f"{format_bytes(plan.disk_bytes)} in {len(plan.shard_tasks):,} shards and small files"
    say(f"disk     {what}" if to_store is None else f"upload   {what}; {to_store}")
    _show_needs(plan, needs)
    if evaluation is not None:
        put()
        show_needs(evaluation)


def _plan_json(plan: Plan, needs: Needs, evaluation: PredictedNeeds | None) -> dict[str, Any]:
    """Return a plan for ``--json``."""
    further = {} if evaluation is None else {"evaluation": needs_json(evaluation)}
    return {
        "quantize": [_tensor_json(t) for t in plan.tensors if t.quantize],
        "keep": [_tensor_json(t) for t in plan.tensors if not t.quantize],
        "linear": share_json(plan.share),
        "engines": engines_json(plan.engines),
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "recoding": plan.recoding._asdict(),
        "stored_scales": len(plan.stored_scales),
        "buffer_bytes": plan.buffer_bytes,
        "disk_bytes": plan.disk_bytes,
        "peak_host_bytes": needs.peak_host_bytes,
        "peak_device_bytes": needs.peak_device_bytes,
        "seconds": needs.seconds,
        "fetched_bytes": needs.fetched,
        "cache_bytes": needs.cache,
        **further,
    }


def _recoding_text(plan: Plan) -> str:
    """Return what happens to the weights of a quantized source."""
    rounds = plan.recipe.weight_format.numbers.scale_rounding != "none"
    condition = " where their scales are powers of two" * rounds
    kept, again, dequantized = plan.recoding
    others = f"{again:,} are quantized again, {dequantized:,} are dequantized"
    return f"{kept:,} weights keep their codes{condition}, {others}"


def _list_tensors(plan: Plan) -> None:
    """List every tensor, grouped by reason."""
    groups: dict[tuple[bool, str], list[TensorPlan]] = {}
    for t in plan.tensors:
        groups.setdefault((t.quantize, t.reason), []).append(t)
    for (quantize, reason), tensors in sorted(groups.items(), key=lambda item: not item[0][0]):
        say(f"{'fp8' if quantize else 'keep'}: {reason}")
        rows = [(t.dtype, shape_text(t.shape), format_bytes(t.bytes_in), t.name) for t in tensors]
        print_table(rows, right=(2,), indent=2)


def _list_reasons(plan: Plan) -> None:
    """Print the number and the bytes of the tensors by reason."""
    rows = [
        (
            "fp8" if each.quantize else "keep",
            f"{each.tensors:,}",
            format_bytes(each.bytes_in),
            format_bytes(each.bytes_out),
            each.reason,
        )
        for each in plan.reasons
    ]
    print_table([("", "tensors", "before", "after", "why"), *rows], right=(1, 2, 3))


def _show_needs(plan: Plan, needs: Needs) -> None:
    memory = f"{format_bytes(plan.buffer_bytes)} of buffers"
    if needs.peak_host_bytes is not None:
        memory = f"about {format_bytes(needs.peak_host_bytes)}, including {memory}"
    say(f"memory   {memory}")
    if needs.devices[0] != "cpu":
        peak = needs.peak_device_bytes
        each = "up to 80% of the free memory" if peak is None else format_bytes(peak)
        say(f"device   {each} on each of {', '.join(needs.devices)}")
    if needs.fetched:
        place = "the store, by range and without files here" if needs.by_range else "the Hub"
        say(f"transfer {format_bytes(needs.fetched)} from {place}, which determines the time")
    if needs.twice:
        say(f"         {format_bytes(needs.twice)} of it a second time: a scale of a whole tensor needs two passes")
    if needs.cache:
        both = needs.cache + 2 * _largest(plan)
        say(f"cache    {format_bytes(needs.cache)} for shards in transfer (--cache-dir);")
        say(f"         {format_bytes(both)} in total if the result goes to the Hub")
    if needs.seconds is not None and needs.disk_rate is not None:
        say(f"time     about {clock_time(needs.seconds)} on this machine, measured on a sample;")
        say(f"         longer if the disk writes less than {format_bytes(needs.disk_rate)}/s")


def _largest(plan: Plan) -> int:
    """Return the bytes of the largest shard of the result."""
    return max(shard_task.layout.file_size for shard_task in plan.shard_tasks)


def _tensor_json(t: TensorPlan) -> dict[str, Any]:
    return {
        "name": t.name,
        "shard": t.shard,
        "dtype": t.dtype,
        "shape": list(t.shape),
        "bytes_in": t.bytes_in,
        "bytes_out": t.bytes_out,
        "reason": t.reason,
    }
