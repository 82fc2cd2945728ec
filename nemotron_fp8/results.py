"""What a caller is told: how far a conversion is, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nemotron_fp8.unit import NonFinite


Direction = Literal["download", "upload"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """How much of a file has come from the Hub, or gone there.

    Attributes:
        direction: ``download`` or ``upload``.
        name: the file.
        done, total: bytes.
    """

    direction: Direction
    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """How far one shard is.

    Attributes:
        name: the output file.
        done, total: input bytes, counted as in `Progress`.
    """

    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is.

    Attributes:
        done: input bytes worked on; a tensor that is quantised is read twice and counts twice (or more, where
            other shards depend on its amax).
        total: input bytes to work on.
        shard: the output file that has just come further.
        active: the output files in the making, one for each worker.
        source_bytes: bytes of the source's tensors, each counted once.
        skipped: of ``done``, what an earlier run had finished.
        seconds: wall time since the conversion began.
        transfers: what is on its way from and to the Hub meanwhile.
        waiting: in how many seconds a transfer is tried again, and why: ``8 s: owner/name: the Hub answers 503``; empty
            while none waits.
        stage: what is done with the bytes, of a check that goes over them in stages; ``done`` and ``seconds`` begin
            anew with each.
    """

    done: int
    total: int
    shard: str
    active: tuple[ShardProgress, ...] = ()
    source_bytes: int = 0
    skipped: int = 0
    seconds: float = 0.0
    transfers: tuple[Transfer, ...] = ()
    waiting: str = ""
    stage: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did.

    Attributes:
        destination: where the result is.
        tensors_quantized: tensors that became FP8.
        tensors_kept: tensors that stayed as they were.
        bytes_read: bytes of the source's shards.
        bytes_written: bytes of all files of the result; 0 where it was there already.
        seconds: wall time.
        peak_resident_bytes: the most memory that this process has had resident; None where the system does
            not tell.
        unchanged: whether the destination was this very result already.
        resumed: shards that an earlier run had finished, checked and taken over.
        nonfinite: tensors kept because they, or what is fused with them, hold NaN or Inf.
        notices: what a person should know.
        left_out: files of the source that were not copied, each with the reason.
        tensors_dequantized: tensors that were FP8 and are plain now.
    """

    destination: str
    tensors_quantized: int
    tensors_kept: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_resident_bytes: int | None
    unchanged: bool
    resumed: int
    nonfinite: tuple[NonFinite, ...]
    notices: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    tensors_dequantized: int = 0
