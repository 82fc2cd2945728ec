"""Output of the commands: text and tables, or one JSON object."""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from nemotron_fp8._filesystem import write_whole
from nemotron_fp8._utils import format_bytes, visible
from nemotron_fp8.cli.progress_line import columns_of
from nemotron_fp8.cli.streams import write_error
from nemotron_fp8.errors import WriteError
from nemotron_fp8.planning.engine_support import support_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nemotron_fp8.conversion.report import Report
    from nemotron_fp8.planning.engine_support import EngineSupport
    from nemotron_fp8.planning.linear_share import LinearShare
    from nemotron_fp8.sources.inspection import InspectedTensor, Inspection
    from nemotron_fp8.verification.verify import Verification


SHOWN_PROBLEMS = 20
NARROWEST = 20
"""Fewest columns that text is wrapped to."""


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object; a non-finite number becomes ``null``."""
    put(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def put(line: str = "") -> None:
    """Print a line of a result as it is.

    Raises:
        BrokenPipeError: the reader is gone.
        click.ClickException: the line cannot be written.
    """
    try:
        click.echo(line)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise click.ClickException(f"standard output: {error.strerror}") from None


def say(text: str) -> None:
    """Print a line of a result."""
    put(folded(visible(text), sys.stdout))


def note(text: str) -> None:
    """Print a message that is not part of a result, on stderr."""
    write_error(folded(visible(text), sys.stderr) + "\n")


def folded(text: str, stream: TextIO) -> str:
    """Return a line, wrapped between words if the stream is a terminal."""
    if not stream.isatty():
        return text
    width = max(columns_of(stream) - 1, NARROWEST)
    if len(text) <= width:
        return text
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    # Long words are names and paths to copy: do not split them.
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def note_start(destination: str | None, cluster: str | None = None) -> None:
    """Note the connection to a cluster, a destination that looks like a repository, and what a store needs."""
    from nemotron_fp8.destinations.open import repository_hint, store_note

    if cluster is not None:
        where = "the local Ray cluster" if cluster == "auto" else f"Ray at {cluster}"
        note(f"note: connecting to {where}")
    if destination is not None and (address := repository_hint(destination)):
        note(f"note: {destination} will be a folder; for a repository on the Hub, write {address}")
    if destination is not None and (needs := store_note(destination)):
        note(f"note: {needs}")


STARTED = 0.1
"""Share of the time of a conversion from which its start is told apart: it loads torch, for example."""


def show_report(report: Report, as_json: bool, quiet: bool = False, seconds: float = 0.0) -> None:
    """Print the report of a conversion.

    Args:
        report: the report.
        as_json: print one JSON object.
        quiet: print nothing else.
        seconds: time of the conversion without its start; 0 if unknown.
    """
    if not quiet:
        _show_notes(report)
    if as_json:
        counts = ("tensors_quantized", "tensors_dequantized")
        what = [key for key in counts if getattr(report, key)] or counts[:1]
        keys = ("destination", *what, "tensors_kept", "bytes_read", "bytes_written", "seconds", "peak_resident_bytes")
        value = {key: getattr(report, key) for key in (*keys, "unchanged", "resumed")}
        if report.share is not None:
            value |= {"linear": share_json(report.share), "engines": engines_json(report.engines)}
            value |= {"recoded": report.recoded._asdict()}
        print_json(value)
        return
    if quiet:
        return
    if report.unchanged:
        say(f"{report.destination} is already up to date; nothing was changed")
        return
    say(report.destination)
    done = f"{report.tensors_quantized:,} tensors quantized"
    if report.tensors_dequantized:
        also = f"{done}, " * (report.tensors_quantized > 0)
        done = f"{also}{report.tensors_dequantized:,} tensors dequantized"
    say(f"  {done}, {report.tensors_kept:,} copied")
    if report.share is not None:
        share, *left = report.share.lines()
        say(f"  {share}")
        for line in left:
            say(f"    {line}")
        say(f"  {support_text(report.engines)}")
    say(
        f"  {format_bytes(report.bytes_read)} read, {format_bytes(report.bytes_written)} written"
        f" in {report.seconds:.1f} s ({_rate_text(report, seconds)})"
    )
    if report.peak_resident_bytes is not None:
        say(f"  {format_bytes(report.peak_resident_bytes)} of memory at peak")


def _rate_text(report: Report, seconds: float) -> str:
    """Return the rate of a conversion as text: without its start, if that took a good part of the time."""
    start = report.seconds - seconds
    if not 0 < seconds < report.seconds or start < STARTED * report.seconds:
        return f"{format_bytes(report.bytes_read / report.seconds if report.seconds else 0.0)}/s read"
    return f"{start:.1f} s to start, then {format_bytes(report.bytes_read / seconds)}/s read"


def show_notices(notices: Sequence[str]) -> None:
    """Print notices; of notices that differ only in numbers, such as layers, print the first one and the count."""
    kinds: dict[str, list[str]] = {}
    for notice in notices:
        kinds.setdefault(re.sub(r"\d+", "0", notice), []).append(notice)
    for alike in kinds.values():
        more = f" ({len(alike) - 1:,} more like it)" if len(alike) > 1 else ""
        note(f"note: {alike[0]}{more}")


def warn_of_low_share(share: LinearShare) -> None:
    """Warn if less than half of the linear weights becomes FP8."""
    if share.is_low:
        note(f"warning: only {share.text()}")


def share_json(share: LinearShare) -> dict[str, Any]:
    """Return the share of linear weights that becomes FP8, and what is left, for ``--json``."""
    return {
        "quantized_bytes": share.quantized_bytes,
        "linear_bytes": share.linear_bytes,
        "share": share.share,
        "left": [left._asdict() for left in share.left],
    }


def engines_json(engines: Iterable[EngineSupport]) -> dict[str, Any]:
    """Return which engines read a result, for ``--json``."""
    return {each.engine: {"reads": each.reads, "note": each.note} for each in engines}


def _show_notes(report: Report) -> None:
    """Print the notices of a conversion."""
    show_notices(report.notices)
    if report.share is not None:
        warn_of_low_share(report.share)
    for name, reason in report.left_out:
        note(f"note: {name} was not copied: {reason}")
    for finding in report.nonfinite:
        where = ", ".join(map(str, finding.position))
        found = f"{finding.count:,} values are NaN or Inf, the first at [{where}]"
        note(f"note: {finding.tensor} is left unquantized: {found}")
    if report.resumed and not report.unchanged:
        shards = f"{report.resumed:,} shard{'s' * (report.resumed != 1)}"
        note(f"note: resumed with {shards} of an earlier run")


def show_verification(
    verification: Verification, source: str | None, destination: str, as_json: bool, quiet: bool = False
) -> None:
    """Print the result of a verification; a quiet one prints problems only."""
    if as_json:
        keys = ("name", "sqnr_db", "max_abs_error", "clamped", "flushed_to_zero")
        print_json(
            {
                "ok": verification.ok,
                "engines": list(verification.engines),
                "problems": [{"tensor": p.tensor, "problem": p.problem} for p in verification.problems],
                "tensors": [{key: getattr(t, key) for key in keys} for t in verification.tensors],
            }
        )
        return
    for problem in verification.problems[:SHOWN_PROBLEMS]:
        say(f"problem: {problem.tensor}: {problem.problem}")
    if (more := len(verification.problems) - SHOWN_PROBLEMS) > 0:
        say(f"problem: and {more:,} more (--json lists them all)")
    if quiet:
        return
    if source is None:
        if verification.ok:
            say(f"OK: every file of {destination} matches its manifest")
        quantized = f"{verification.quantized:,} FP8 tensors with their scales"
        say(f"  {quantized if verification.quantized else 'no FP8 tensor'}, {verification.kept:,} others")
        _show_proof(verification)
        return
    if verification.ok:
        say(f"OK: {destination} matches {source}")
    fp8, plain = len(verification.tensors), verification.plain
    made = f"{plain:,} tensors equal code times scale" if plain else f"{fp8:,} FP8 tensors compared code by code"
    say(f"  {made}, {verification.kept:,} other tensors equal byte for byte")
    _show_proof(verification)
    figures = sorted(t.sqnr_db for t in verification.tensors if math.isfinite(t.sqnr_db))
    if figures:
        worst = min(verification.tensors, key=lambda t: t.sqnr_db if math.isfinite(t.sqnr_db) else math.inf)
        median = figures[len(figures) // 2]
        say(f"  signal to noise: median {median:.2f} dB, worst {worst.sqnr_db:.2f} dB in")
        say(f"    {worst.name}")


def _show_proof(verification: Verification) -> None:
    if verification.engines:
        say(f"  list of unquantized modules: complete for {', '.join(verification.engines)}")
    elif verification.quantized:
        say("  list of unquantized modules: not proved for any engine")


def show_inspection(inspection: Inspection, as_json: bool) -> None:
    """Print the tensors of a checkpoint."""
    if as_json:
        print_json(inspection.to_json())
        return
    tensors: defaultdict[str, list[InspectedTensor]] = defaultdict(list)
    for tensor in inspection.tensors:
        tensors[tensor.shard].append(tensor)
    for file in inspection.files:
        say(f"{file.name}: {len(tensors[file.name]):,} tensors, {format_bytes(file.bytes)}")
        rows = [(t.dtype, shape_text(t.shape), format_bytes(t.bytes), t.name) for t in tensors[file.name]]
        print_table([("dtype", "shape", "bytes", "tensor"), *rows], right=(2,))


def shape_text(shape: tuple[int, ...]) -> str:
    """Format a shape."""
    return "x".join(map(str, shape)) or "scalar"


def print_table(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = (), indent: int = 0) -> None:
    """Print rows in columns of the width of their widest cell; the last column is not padded."""
    cells = [[visible(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        # Do not wrap: a wrapped table is harder to read than a wide one.
        put(" " * indent + "  ".join(padded).rstrip())


def write_page(path: str, text: str) -> str:
    """Write a page whole or not at all, and return its path.

    Raises:
        WriteError: the page cannot be written; a page of this name is unchanged.
    """
    data = text.encode("utf-8", "backslashreplace")
    target = Path(path)
    try:
        write_whole(target, data)
    except OSError as error:
        raise WriteError(path, error.strerror or str(error), error.errno) from error
    return path
