"""Output of ``calibrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemotron_fp8._display import counted
from nemotron_fp8._utils import format_bytes, listed
from nemotron_fp8.cli.output import note, print_json, say, show_notices
from nemotron_fp8.cli.progress_line import clock_time
from nemotron_fp8.evaluation.wording import DIGEST

if TYPE_CHECKING:
    from nemotron_fp8.calibration.calibrate import Calibration
    from nemotron_fp8.planning.amaxes import Amaxes


def show_calibration(file: str, calibration: Calibration, as_json: bool, quiet: bool = False) -> None:
    """Print a summary of a calibration.

    Args:
        file: the file of amaxes.
        calibration: the calibration.
        as_json: print one JSON object.
        quiet: print no notices, and no text.
    """
    amaxes = calibration.amaxes
    if not quiet:
        show_notices(list(calibration.notices))
    if as_json:
        more = {
            "experts": calibration.experts,
            "unseen_experts": calibration.unseen_experts,
            "notices": list(calibration.notices),
            "device": calibration.device,
            "seconds": calibration.seconds,
            "peak_resident_bytes": calibration.peak_resident_bytes,
        }
        print_json({**_summary(file, amaxes), **more})
        return
    if quiet:
        return
    _show_written(file, amaxes)
    if calibration.experts:
        say(f"  experts  {calibration.experts:,}, of which {calibration.unseen_experts:,} saw no token")
    memory = calibration.peak_resident_bytes
    peak = "" if memory is None else f", {format_bytes(memory)} of memory at peak"
    say(f"{clock_time(calibration.seconds)} on {calibration.device}{peak}")


def show_merged(file: str, amaxes: Amaxes, count: int, as_json: bool, quiet: bool = False) -> None:
    """Print a summary of merged amaxes.

    Args:
        file: the file that was written.
        amaxes: the amaxes in it.
        count: number of files that were merged.
        as_json: print one JSON object.
        quiet: print no notices, and no text.
    """
    sources = sorted({run.source for run in amaxes.runs})
    if len(sources) > 1 and not quiet:
        note(f"note: the calibrations are of {listed(sources)}; merge those of one checkpoint only")
    if as_json:
        print_json({**_summary(file, amaxes), "merged": count})
        return
    if quiet:
        return
    _show_written(file, amaxes)
    say(f"  merged   {count:,} files of {counted(len(amaxes.runs), 'calibration')}")


def _summary(file: str, amaxes: Amaxes) -> dict[str, Any]:
    return {
        "file": file,
        "sha256": amaxes.sha256,
        "inputs": len(amaxes.inputs),
        "k": len(amaxes.k),
        "v": len(amaxes.v),
        "tokens": sum(run.tokens for run in amaxes.runs),
        "runs": [run._asdict() for run in amaxes.runs],
        "percentile": amaxes.percentile,
        "factor": amaxes.factor,
    }


def _show_written(file: str, amaxes: Amaxes) -> None:
    say(f"{file} written")
    cached = f", keys and values of {counted(len(amaxes.k), 'attention module')}" if amaxes.k else ""
    say(f"  amaxes   inputs of {counted(len(amaxes.inputs), 'module')}{cached}")
    say(f"  each     {amaxes.kind}")
    for run in amaxes.runs:
        sample = f"{run.tokens:,} tokens in {counted(run.sequences, 'sequence')} of {run.length:,}"
        say(f"  sample   {run.text} (SHA-256 {run.sha256[:DIGEST]}), {sample}")
