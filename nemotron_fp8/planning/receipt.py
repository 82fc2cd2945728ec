"""Receipts of finished shards, and their JSON form in journals."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8.errors import excerpt

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


LONGEST_NAME = 1 << 20
"""Most characters of a name in a receipt; the id of a scale group is longer than a tensor's name."""
LARGEST_COUNT = 1 << 512
"""Cap on every count, so that arithmetic in doubles cannot overflow."""


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Quantization error of one tensor.

    Attributes:
        name: name of the tensor.
        sqnr_db: signal-to-quantization-noise ratio, ``10 log10(sum w^2 / sum (w - q * scale)^2)``, in dB; infinite
            without any error, NaN without any signal.
        max_abs_error: largest ``|w - q * scale|``.
        clamped: values that the clamp to the largest finite element changed.
        flushed_to_zero: values other than 0 that became 0.
    """

    name: str
    sqnr_db: float
    max_abs_error: float
    clamped: int
    flushed_to_zero: int

    def row(self) -> list[Any]:
        """Return the figures for JSON; infinity and NaN become strings, because JSON has no number for them."""
        floats = [f if math.isfinite(f) else str(f) for f in (self.sqnr_db, self.max_abs_error)]
        return [self.name, *floats, self.clamped, self.flushed_to_zero]


def parse_stats(row: object) -> TensorStats:
    """Return the figures of a row that `TensorStats.row` wrote.

    Raises:
        ValueError: the row is malformed.
    """
    if type(row) is not list or len(row) != 5:
        raise ValueError(f"{excerpt(row)} is not a row of five figures")
    name, sqnr_db, max_abs_error, clamped, flushed = row
    return TensorStats(_name(name), _float(sqnr_db), _float(max_abs_error), _count(clamped), _count(flushed))


def _name(value: object) -> str:
    if type(value) is not str or len(value) > LONGEST_NAME:
        raise ValueError(f"{excerpt(value)} is not a name")
    return value


def _float(value: object) -> float:
    if value in ("inf", "-inf", "nan") or type(value) is float or (type(value) is int and abs(value) < LARGEST_COUNT):
        return float(value)
    raise ValueError(f"{excerpt(value)} is not a number")


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < LARGEST_COUNT:
        raise ValueError(f"{excerpt(value)} is not a count")
    return value


def receipt_entry(receipt: ShardReceipt) -> dict[str, Any]:
    """Return a receipt as a line of the journal."""
    return {
        "kind": "shard",
        "name": receipt.name,
        "size": receipt.size,
        "sha256": receipt.sha256,
        "kept": sorted(receipt.unquantized),
        "nonfinite": nonfinite_rows(receipt.nonfinite),
        "small_scales": list(receipt.small_scales),
        "stats": [tensor.row() for tensor in receipt.stats],
        "shared": [list(pair) for pair in receipt.shared],
        "recoded": list(receipt.recoded),
    }


def entry_receipt(entry: Mapping[str, Any]) -> ShardReceipt:
    """Return the receipt in a line of the journal.

    Raises:
        ValueError: the line is malformed.
    """
    sha256 = entry.get("sha256")
    return ShardReceipt(
        _name(entry.get("name")),
        _count(entry.get("size")),
        None if sha256 is None else _name(sha256),
        frozenset(map(_name, _list(entry.get("kept")))),
        tuple([parse_nonfinite(row) for row in _list(entry.get("nonfinite"))]),
        tuple(map(_name, _list(entry.get("small_scales")))),
        tuple([parse_stats(row) for row in _list(entry.get("stats"))]),
        tuple(map(_pair, _list(entry.get("shared", [])))),
        _recoded(entry.get("recoded", [])),
    )


def _list(value: object) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{excerpt(value)} is not a list")
    return value


def _pair(value: object) -> tuple[str, str]:
    first, second = _list(value)
    return _name(first), _name(second)


def _recoded(value: object) -> Recoded:
    counts = [_count(each) for each in _list(value)]
    if len(counts) not in (0, len(Recoded())):
        raise ValueError(f"{excerpt(value)} is not {len(Recoded())} counts")
    return Recoded(*counts)


def nonfinite_rows(findings: Iterable[NonFinite]) -> list[list[Any]]:
    """Return findings as JSON rows."""
    return [[f.tensor, f.count, list(f.position), f.value] for f in findings]


def parse_nonfinite(row: object) -> NonFinite:
    """Return the finding of a row of `nonfinite_rows`.

    Raises:
        ValueError: the row is malformed.
    """
    if type(row) is not list or len(row) != 4:
        raise ValueError(f"{excerpt(row)} is not a finding of NaN or Inf")
    return NonFinite(_name(row[0]), _count(row[1]), tuple(map(_count, _list(row[2]))), _name(row[3]))


@dataclass(frozen=True, slots=True)
class NonFinite:
    """NaN and Inf in a tensor.

    Attributes:
        tensor: name of the tensor.
        count: number of elements that are NaN or Inf.
        position: index of the first one, a number for each dimension.
        value: the first one: ``"nan"``, ``"inf"`` or ``"-inf"``.
    """

    tensor: str
    count: int
    position: tuple[int, ...]
    value: str


class Recoded(NamedTuple):
    """FP8 tensors of a quantized source, by what happened to them, and the values that changed.

    Attributes:
        kept: tensors that keep the codes of the source.
        exact: tensors that were quantized again, and every value is that of the source.
        rounded: tensors that were rounded once more.
        changed: values of these that differ from those of the source.
    """

    kept: int = 0
    exact: int = 0
    rounded: int = 0
    changed: int = 0

    def plus(self, other: Recoded) -> Recoded:
        """Return the sums of both."""
        return Recoded(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def sentence(self) -> str:
        """The counts in words; empty for an unquantized source."""
        if not self.kept + self.exact + self.rounded:
            return ""
        return (
            f"codes are kept in {self.kept:,} tensors, quantized again without a change in {self.exact:,}, and rounded"
            f" once more in {self.rounded:,} ({self.changed:,} values differ)"
        )


NOT_RECODED = Recoded()
"""Counts of an unquantized source."""


def recoded_of(receipts: Iterable[ShardReceipt]) -> Recoded:
    """Return the counts of all shards."""
    total = Recoded()
    for receipt in receipts:
        total = total.plus(receipt.recoded)
    return total


@dataclass(frozen=True, slots=True)
class ShardReceipt:
    """Result of one shard task.

    Attributes:
        name: file name of the shard.
        size: bytes of the shard.
        sha256: hexadecimal digest of the shard; None if digests are off.
        unquantized: fused modules left unquantized because a member is not finite.
        nonfinite: tensors with NaN or Inf, of this shard's scale groups.
        small_scales: scale groups of several tensors whose scale is below 2^-15, where vLLM's merging of fused
            tensors loses codes.
        stats: quantization error of each FP8 tensor of the shard, if the recipe asks for it.
        shared: for each scale group that other shards depend on too: a digest of its scale, or ``kept`` if the group
            is left unquantized. All shards must agree (`disagreeing`).
        recoded: FP8 tensors of a quantized source, and the values that changed.
        upload: handle of the uploaded shard, for the destination that created it; None for a file.
    """

    name: str
    size: int
    sha256: str | None
    unquantized: frozenset[str] = frozenset()
    nonfinite: tuple[NonFinite, ...] = ()
    small_scales: tuple[str, ...] = ()
    stats: tuple[TensorStats, ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    recoded: Recoded = NOT_RECODED
    upload: object = field(default=None, compare=False, repr=False)


def disagreeing(receipts: Mapping[str, ShardReceipt]) -> dict[str, str]:
    """Return the shards that disagree with another shard about a scale group, each with the group's id.

    Every shard measures a shared group independently and reads its own tensors as they are stored. If all shards agree,
    the scale covers every member: an undetected error requires that all shards read the same wrong bytes.
    """
    found: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for receipt in receipts.values():
        for group, value in receipt.shared:
            found[group][value].append(receipt.name)
    several = ((group, names) for group, names in found.items() if len(names) > 1)
    return {name: group for group, values in several for names in values.values() for name in names}
