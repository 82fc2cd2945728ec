"""Calibrate a source: run it layer by layer on a text, and measure the amaxes of its activations."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemotron_fp8._display import Part, display, one_line
from nemotron_fp8._filesystem import as_write_error, remove_stale, sync_folder, temporary_name
from nemotron_fp8._progress_bar import progress_callback
from nemotron_fp8._utils import check_arguments, format_bytes, listed, peak_resident_bytes, short_name, visible
from nemotron_fp8._version import __version__
from nemotron_fp8.calibration.observer import Measuring
from nemotron_fp8.destinations.file_sink import write_file
from nemotron_fp8.errors import AmaxesFileError, DestinationExistsError, RecipeError, SourceError, WriteError
from nemotron_fp8.events import logged
from nemotron_fp8.inference.layer_loop import LayerLoop
from nemotron_fp8.inference.session import check_sample, session_of
from nemotron_fp8.planning.amaxes import (
    LONGEST,
    Amaxes,
    CalibrationRun,
    check_percentile,
    merge_amaxes,
    read_amaxes,
)
from nemotron_fp8.sources.open import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nemotron_fp8.calibration.observer import Unseen
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.inference.session import Session
    from nemotron_fp8.progress import Progress


@dataclass(frozen=True, slots=True, repr=False)
class Calibration:
    """Result of a calibration.

    Attributes:
        amaxes: the amaxes.
        experts: number of experts of all layers.
        unseen_experts: number of those that no token reached.
        notices: caveats for the user.
        device: device that computed.
        seconds: wall time of the run that finished the calibration.
        peak_resident_bytes: peak memory of the process; None if unknown.
    """

    amaxes: Amaxes
    experts: int
    unseen_experts: int
    notices: tuple[str, ...]
    device: str
    seconds: float
    peak_resident_bytes: int | None = None

    def __repr__(self) -> str:
        return one_line("Calibration", "", [repr(self.amaxes), *([self._unseen] if self.experts else []), self._time])

    def _repr_html_(self) -> str:
        facts = [
            ("experts", self._unseen if self.experts else ""),
            ("time", self._time),
            ("memory at peak", "" if self.peak_resident_bytes is None else format_bytes(self.peak_resident_bytes)),
        ]
        notices = Part("Notices", [(notice,) for notice in self.notices])
        return display("Calibration", "", facts, [notices]) + self.amaxes._repr_html_()

    @property
    def _unseen(self) -> str:
        return f"{self.experts:,} experts, of which {self.unseen_experts:,} saw no token"

    @property
    def _time(self) -> str:
        return f"{self.seconds:.1f} s on {self.device}"


def calibrate_repo(
    source: str | os.PathLike[str],
    amaxes_file: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    *,
    tokens: str | os.PathLike[str] | None = None,
    sequences: int | None = None,
    length: int | None = None,
    percentile: float | None = None,
    factor: float = 1.0,
    device: str = "auto",
    max_memory: str | int | None = None,
    spill: bool = False,
    state_dir: str | os.PathLike[str] | None = None,
    restart: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    hub: HubOptions | None = None,
    progress: Callable[[Progress], None] | bool | None = None,
) -> Amaxes:
    """Measure the amaxes of the activations of a source, one decoder layer in memory at a time.

    Args:
        source: a checkpoint in any place and format of `quantize_repo`. Quantized weights are decoded.
        amaxes_file: file to write, of which a file of amaxes is replaced; None to write none.
        text: a text file, UTF-8; None for the language reference of Python.
        tokens: a file of token ids instead of a text: JSON, a list of equally long lists.
        sequences: sequences to run; None for 16 of a text, or all lists of ``tokens``.
        length: tokens of a sequence; None for 512 of a text, or whole lists of ``tokens``.
        percentile: percentage of the values of a module that are at most its amax, from 50 to 100; None for all.
        factor: number from 0.01 to 100 that every amax is multiplied by for a scale.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        max_memory: bytes of all buffers, as a number or like ``"8GiB"``; None for half of the free memory.
        spill: True to keep hidden states in a file, which the system writes to disk when memory is short.
        state_dir: folder for the saved state, from which the same call resumes; None for one in the user's cache.
        restart: True to discard the state of an interrupted calibration.
        overwrite: True to replace a file that is no file of amaxes.
        threads: threads that read and decode; None for one on each available core.
        hub: options for reading from the Hub.
        progress: called with the progress; True for a bar of tqdm.

    Returns:
        The amaxes.

    Raises:
        MissingExtraError: transformers is not installed.
        TransformersVersionError: the installed version of transformers is too old, or too new.
        UnsupportedArchitectureError: the model cannot be run layer by layer.
        SampleError: the text or the tokens are unusable.
        NonFiniteOutputError: the source computes NaN or infinity.
        EvaluationBudgetError: the buffers exceed ``max_memory``.
        EvaluationStateError, EvaluationBusyError: the saved state is damaged, or in use.
        DestinationExistsError, WriteError: the file exists and is no file of amaxes, or cannot be written.
        SourceError, HubError, AddressError: the source cannot be read.
        RecipeError, DeviceError: an argument has an unsupported value.
    """
    return calibrate(
        source,
        amaxes_file,
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
        progress=progress,
    ).amaxes


@logged("calibrate")
def calibrate(
    source: str | os.PathLike[str],
    amaxes_file: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    *,
    tokens: str | os.PathLike[str] | None = None,
    sequences: int | None = None,
    length: int | None = None,
    percentile: float | None = None,
    factor: float = 1.0,
    device: str = "auto",
    max_memory: str | int | None = None,
    spill: bool = False,
    state_dir: str | os.PathLike[str] | None = None,
    restart: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    hub: HubOptions | None = None,
    progress: Callable[[Progress], None] | bool | None = None,
) -> Calibration:
    """Measure as `calibrate_repo` does, and return the amaxes with what to know of them."""
    check_arguments(source=source, threads=threads, progress=progress)
    check_sample(tokens, text, sequences, length)
    _check_numbers(percentile, factor)
    share = None if percentile is None else float(percentile)
    target = None if amaxes_file is None else check_output(amaxes_file, overwrite)
    name = os.fspath(source)
    with (
        progress_callback(progress, "calibrate") as callback,
        session_of(
            lambda: [(name, open_source(source, hub=hub))],
            "calibrations",
            ["calibrate", share],
            text,
            tokens=tokens,
            sequences=sequences,
            length=length,
            as_served=False,
            device=device,
            max_memory=max_memory,
            spill=spill,
            state_dir=state_dir,
            restart=restart,
            threads=threads,
            progress=callback,
        ) as session,
    ):
        loop = LayerLoop(session, predicts=False)
        measuring = Measuring(session, share)
        hidden = loop.run(measuring)
        loop.finish(hidden)
        measuring.head(hidden[0], loop.target)
        amaxes = Amaxes(**measuring.tables, runs=(_run_of(session),), percentile=share, factor=float(factor))
        if target is not None:
            write_amaxes(target, amaxes)
        unseen = measuring.unseen()
        return Calibration(
            amaxes,
            unseen.experts,
            unseen.unreached,
            _notices(session, amaxes, unseen),
            device="cpu" if session.device is None else session.device.name,
            seconds=loop.seconds,
            peak_resident_bytes=peak_resident_bytes(),
        )


def _check_numbers(percentile: float | None, factor: float) -> None:
    """Raise RecipeError for a percentile or a factor that no file of amaxes may have."""
    name = "percentile"
    try:
        if percentile is not None:
            check_percentile("", percentile)
        name = "factor"
        Amaxes({}, {}, {}, ()).times(factor)
    except AmaxesFileError as error:
        problem = error.problem.replace(name, f"{name} (--{name})", 1)
        raise RecipeError(problem, (name,)) from None


def _run_of(session: Session) -> CalibrationRun:
    """Return the record of a calibration: names without folders."""
    source, sample = session.streams[0].weights.source, session.drawn.sample
    label = session.streams[0].label
    return CalibrationRun(
        source=_name(str(Path(label).resolve()) if source.is_local else label),
        text=_name(sample.name),
        sha256=sample.sha256,
        sequences=sample.sequences,
        length=sample.length,
        version=__version__,
        torch=torch.__version__,
        transformers=session.api.version,
    )


def _name(path: str) -> str:
    return visible(short_name(path))[:LONGEST]


def _notices(session: Session, amaxes: Amaxes, unseen: Unseen) -> tuple[str, ...]:
    """Return what to know before the amaxes are used."""
    found = []
    if notice := session.skeleton.too_long(session.drawn.sample.length):
        found.append(notice)
    if unseen.modules:
        found.append(
            f"no product with {listed(unseen.modules, 3)} was seen: their inputs have no amax, so that they cannot have"
            " static scales"
        )
    if unseen.unreached:
        found.append(
            f"no token reached {unseen.unreached:,} of {unseen.experts:,} experts: they have no amax, and take that of"
            " the other experts of their layers; calibrate on more text, and merge both (--merge)"
        )
    if not amaxes.k:
        found.append("no keys and values of attention were seen: an FP8 KV cache cannot have calibrated scales")
    return tuple(found)


def merge_files(
    files: Sequence[str | os.PathLike[str]], amaxes_file: str | os.PathLike[str], overwrite: bool = False
) -> Amaxes:
    """Write the largest amaxes of several files, as `merge_amaxes` merges them.

    Args:
        files: files of amaxes.
        amaxes_file: file to write; it may be one of them.
        overwrite: True to replace a file that is no file of amaxes.

    Raises:
        AmaxesFileError: a file is not one that ``calibrate`` wrote, or they cannot be merged.
        DestinationExistsError, WriteError: the file exists and is no file of amaxes, or cannot be written.
        SourceError: a file cannot be read.
    """
    target = check_output(amaxes_file, overwrite)
    merged = merge_amaxes([(os.fspath(file), read_amaxes(file)) for file in files])
    write_amaxes(target, merged)
    return merged


def check_output(file: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the path of a file to write, once it is known that it can be replaced.

    Raises:
        DestinationExistsError: it exists and is no file of amaxes.
        WriteError: it is a folder or a device, or its folder does not exist or cannot be written.
    """
    check_arguments(amaxes_file=file)
    path = Path(file)
    if path.is_dir():
        raise WriteError(str(path), "is a folder; name a file", errno.EISDIR)
    if path.exists() and not path.is_file():
        raise WriteError(str(path), "is no regular file; name another one", errno.EEXIST)
    if not path.parent.is_dir():
        raise WriteError(str(path), "no such folder; create it first", errno.ENOENT)
    if not overwrite and os.path.lexists(path):
        try:
            read_amaxes(path)
        except (AmaxesFileError, SourceError) as error:
            raise DestinationExistsError(str(path), "exists and is no file of amaxes") from error
    probe = path.resolve().with_name(temporary_name())
    try:  # before hours of work
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        problem = f"cannot be written: {error.strerror}; name a file in another folder"
        raise WriteError(str(path), problem, error.errno) from error
    return path


def write_amaxes(path: Path, amaxes: Amaxes) -> None:
    """Write a file of amaxes whole or not at all.

    Raises:
        WriteError: the file cannot be written; a file of this name is unchanged.
    """
    whole = path.resolve()  # the target of a link is replaced, not the link
    with as_write_error(path):
        remove_stale(whole.parent)
        write_file(whole, iter([amaxes.render()]), whole.with_name(temporary_name()))
        sync_folder(whole.parent)
