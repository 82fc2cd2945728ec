"""Receipts: what making a shard produced, and their JSON form in journals."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What quantizing did to one tensor.

    Attributes:
        name: the tensor.
        sqnr_db: signal to quantization noise, ``10 log10(sum w^2 / sum (w - q * scale)^2)``, in dB; infinite
            where there is no error, NaN where there is no signal either.
        max_abs_error: the largest ``|w - q * scale|``.
        clamped: values that the clamp to +-448 changed.
        flushed_to_zero: values other than 0 that became 0.
    """

    name: str
    sqnr_db: float
    max_abs_error: float
    clamped: int
    flushed_to_zero: int

    def row(self) -> list[Any]:
        """The figures as JSON; what is not finite as a string, which JSON has no number for."""
        floats = [f if math.isfinite(f) else str(f) for f in (self.sqnr_db, self.max_abs_error)]
        return [self.name, *floats, self.clamped, self.flushed_to_zero]

    @classmethod
    def of_row(cls, row: Any) -> TensorStats:
        """The figures that `row` wrote.

        Raises:
            TypeError, ValueError: it did not write these.
        """
        name, sqnr_db, max_abs_error, clamped, flushed = row
        return cls(str(name), float(sqnr_db), float(max_abs_error), int(clamped), int(flushed))


def receipt_entry(receipt: ShardReceipt) -> dict[str, Any]:
    """A receipt as a line of the journal."""
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
    }


def entry_receipt(entry: Mapping[str, Any]) -> ShardReceipt:
    """A line of the journal as a receipt.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    sha256 = entry["sha256"]
    return ShardReceipt(
        str(entry["name"]),
        int(entry["size"]),
        None if sha256 is None else str(sha256),
        frozenset(map(str, entry["kept"])),
        parse_nonfinite(entry["nonfinite"]),
        tuple(map(str, entry["small_scales"])),
        tuple(map(TensorStats.of_row, entry["stats"])),
        tuple((str(group), str(value)) for group, value in entry.get("shared", ())),
    )


def nonfinite_rows(findings: Iterable[NonFinite]) -> list[list[Any]]:
    """Return findings as JSON rows."""
    return [[f.tensor, f.count, list(f.position), f.value] for f in findings]


def parse_nonfinite(rows: Iterable[Any]) -> tuple[NonFinite, ...]:
    """Parse the rows of `nonfinite_rows`.

    Raises:
        TypeError, ValueError: a row is malformed.
    """
    return tuple(
        NonFinite(str(tensor), int(count), tuple(map(int, position)), str(value))
        for tensor, count, position, value in rows
    )


@dataclass(frozen=True, slots=True)
class NonFinite:
    """NaN and Inf found in a tensor.

    Attributes:
        tensor: its name.
        count: how many of its elements are NaN or Inf.
        position: index of the first of them, one number a dimension.
        value: ``"nan"``, ``"inf"`` or ``"-inf"``, the first of them.
    """

    tensor: str
    count: int
    position: tuple[int, ...]
    value: str


@dataclass(frozen=True, slots=True)
class ShardReceipt:
    """What became of a unit.

    Attributes:
        name: file name of the shard.
        size: its bytes.
        sha256: hexadecimal digest of its bytes; None where digests are off.
        kept: bundles that stay as they are because a member is not finite.
        nonfinite: the tensors of this shard's groups that hold NaN or Inf.
        small_scales: scale groups of several tensors whose scale is under 2^-15, below which vLLM's merging of
            fused tensors loses codes.
        stats: what quantizing did to each FP8 tensor of the shard, where the recipe asks for it.
        shared: what was found out about each scale group that other shards depend on too: a digest of its scale,
            or ``unquantized``. Every shard must find the same (`disagreeing`).
        upload: handle of the uploaded shard on its way to the destination that made the handle; None for a file.
    """

    name: str
    size: int
    sha256: str | None
    unquantized: frozenset[str] = frozenset()
    nonfinite: tuple[NonFinite, ...] = ()
    small_scales: tuple[str, ...] = ()
    stats: tuple[TensorStats, ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    upload: object = field(default=None, compare=False, repr=False)


def disagreeing(receipts: Mapping[str, ShardReceipt]) -> dict[str, str]:
    """Shards that did not find out the same about a scale group as another shard did, each with the group's id.

    Every shard measures a shared group for itself, and reads its own tensors as they are stored. If all agree, the
    scale covers every member; what they agree on can only be wrong if each of them has read the same wrong bytes.
    """
    found: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for receipt in receipts.values():
        for group, value in receipt.shared:
            found[group][value].append(receipt.name)
    several = ((group, names) for group, names in found.items() if len(names) > 1)
    return {name: group for group, values in several for names in values.values() for name in names}
