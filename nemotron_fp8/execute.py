"""Carry out one unit: amaxes, what they decide, then the shard's bytes into a sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.errors import NonFiniteError, UnrepresentableError
from nemotron_fp8.header import serialise
from nemotron_fp8.layouts import scale_of
from nemotron_fp8.quantize import INF_BITS, as_bytes
from nemotron_fp8.read import TORCH_DTYPES, Reader
from nemotron_fp8.unit import NonFinite, Receipt, Work
from nemotron_fp8_kernels.errors import MultiplierOverflowError
from nemotron_fp8_kernels.reference import scale_from_amax

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.quantize import Engine
    from nemotron_fp8.read import Opener
    from nemotron_fp8.unit import Unit
    from nemotron_fp8.view import TensorView
    from nemotron_fp8.write import Destination

SMALL_SCALE = 2.0**-15
"""Smallest scale that survives vLLM's merging of fused tensors: below, code times scale underflows in fp16."""


def execute(unit: Unit, opener: Opener, destination: Destination, engine: Engine) -> Receipt:
    """Make one output shard and return what became of it.

    Raises:
        NonFiniteError: a tensor to be quantised holds NaN or Inf, and the recipe does not keep such tensors.
        UnrepresentableError: the original numerics cannot quantise a tensor.
        SourceReadError, SourceChangedError: the source fails, or changes while it is read.
        DestinationError: the destination fails.
    """
    with Reader(opener) as reader:
        return make(unit, measure(unit, reader, engine), reader, destination, engine)


@dataclass(frozen=True, slots=True)
class Measured:
    """What phase 1 finds out about a unit.

    Attributes:
        amaxes: of every scale group, int32 bits of float32, by group id.
        nonfinite: the tensors of those groups that hold NaN or Inf.
    """

    amaxes: Mapping[str, torch.Tensor]
    nonfinite: tuple[NonFinite, ...]


def measure(unit: Unit, reader: Reader, engine: Engine) -> Measured:
    """Take the amaxes of a unit and settle what they decide.

    Raises:
        NonFiniteError, UnrepresentableError: see `execute`.
    """
    amaxes = engine.amaxes(unit, reader)
    nonfinite = _nonfinite(unit, reader, amaxes)
    if nonfinite and unit.recipe.nonfinite == "error":
        first = nonfinite[0]
        raise NonFiniteError(first.tensor, first.count, first.position, first.value)
    measured = Measured(amaxes, nonfinite)
    _scales(unit, unit.keeping(_kept(unit, measured)), amaxes)  # raises while nothing is written yet
    return measured


def make(unit: Unit, measured: Measured, reader: Reader, destination: Destination, engine: Engine) -> Receipt:
    """Write the shard of a unit whose amaxes are known; see `execute`."""
    amaxes, kept = measured.amaxes, _kept(unit, measured)
    works = unit.keeping(kept)
    scales = _scales(unit, works, amaxes)
    layout = unit.relayout(kept)
    offsets = {entry.name: layout.data_start + entry.start for entry in layout.entries}
    order = {entry.name: i for i, entry in enumerate(layout.entries)}
    with destination.stage(unit.name, layout.file_size) as sink:
        sink.write_at(0, memoryview(serialise(layout)))
        for name, scale in scales.items():
            sink.write_at(offsets[name], as_bytes(scale.contiguous()))

        def emit(name: str, begin: int, data: memoryview) -> None:
            sink.write_at(offsets[name] + begin, data)

        # In file order, so that a digest can follow the writes.
        engine.cast(sorted(works, key=lambda work: order[work.view.name]), unit, reader, amaxes, emit)
        staged = sink.finish()
    small = _small_scales(unit, amaxes, kept)
    return Receipt(staged.name, staged.size, staged.sha256, kept, measured.nonfinite, small)


def _kept(unit: Unit, measured: Measured) -> frozenset[str]:
    """The bundles that stay as they are because a member is not finite."""
    amaxes = measured.amaxes
    return frozenset(group.bundle for group in unit.groups if _worst(amaxes[group.id]) >= INF_BITS)


def _worst(amax: torch.Tensor) -> int:
    """The largest bits of an amax."""
    return int(amax.max()) if amax.numel() else 0


def _scales(unit: Unit, works: tuple[Work, ...], amaxes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The scales of the shard by tensor name, float32, as the layout wants them."""
    scales: dict[str, torch.Tensor] = {}
    for work in works:
        if work.group is None:
            continue
        amax = amaxes[work.group]
        try:
            _, scale = scale_from_amax(amax, unit.recipe.numerics, TORCH_DTYPES[work.view.dtype])
        except MultiplierOverflowError as error:
            raise UnrepresentableError(work.view.name, error.amax) from error
        name, _, shape = scale_of(work.view, unit.recipe)
        scales[name] = scale.reshape(shape)
    return scales


def _small_scales(unit: Unit, amaxes: Mapping[str, torch.Tensor], kept: frozenset[str]) -> tuple[str, ...]:
    """Groups of several tensors whose scale is under 2^-15: vLLM merges them in fp16 and loses codes."""
    return tuple(
        group.id
        for group in unit.groups
        if len(group.members) > 1
        and group.bundle not in kept
        and float(scale_from_amax(amaxes[group.id])[1]) < SMALL_SCALE
    )


def _nonfinite(unit: Unit, reader: Reader, amaxes: Mapping[str, torch.Tensor]) -> tuple[NonFinite, ...]:
    """Count NaN and Inf in the members of the groups whose amax shows them."""
    found: list[NonFinite | None] = []
    for group in unit.groups:
        if _worst(amaxes[group.id]) < INF_BITS:
            continue
        found += [count_nonfinite(view, unit, reader) for view in group.members]
    return tuple(finding for finding in found if finding)


def count_nonfinite(view: TensorView, unit: Unit, reader: Reader) -> NonFinite | None:
    """Count the NaN and Inf of a tensor and find the first; None where there is none."""
    count, first, value = 0, -1, ""
    for begin, end in unit.slicing.slices(Work(view, view.name)):
        start = begin // view.itemsize
        with reader.elements(view, start, end // view.itemsize) as values:
            bad = ~torch.isfinite(values)
            here = int(bad.sum())
            if here and first < 0:
                index = int(bad.to(torch.uint8).argmax())
                first, value = start + index, str(float(values[index]))
            del values
        count += here
    return NonFinite(view.name, count, unravel(first, view.shape), value) if count else None


def unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Position of a flat index in a row-major tensor, one number a dimension."""
    position = []
    for dimension in reversed(shape):
        index, rest = divmod(index, dimension)
        position.append(rest)
    return tuple(reversed(position))
