"""Make one output shard: amaxes, scales, layout, then the bytes of the shard."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.header import serialize
from nemotron_fp8.conversion.recoding import ChangedValues, settle
from nemotron_fp8.engines.base import SinglePassEngine, as_bytes, has_nonfinite, scale_of_group
from nemotron_fp8.engines.error_stats import TensorSums, gather
from nemotron_fp8.engines.kept_codes import nonfinite_codes, repeated_scales
from nemotron_fp8.engines.nonfinite import count_nonfinite
from nemotron_fp8.errors import NonFiniteError
from nemotron_fp8.planning.receipt import NOT_RECODED, NonFinite, ShardReceipt
from nemotron_fp8.planning.tasks import TensorTask
from nemotron_fp8.sources.files import Checked, is_ranged
from nemotron_fp8.sources.reader import Reader
from nemotron_fp8.sources.scale_values import pack_scales

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.conversion.recoding import SettledShard
    from nemotron_fp8.destinations.base import Sink, Staging
    from nemotron_fp8.engines.base import Engine
    from nemotron_fp8.planning.layouts import WeightFormat
    from nemotron_fp8.planning.receipt import TensorStats
    from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask
    from nemotron_fp8.sources.files import Opener
    from nemotron_fp8_kernels.error_sums import ErrorSums


SMALL_SCALE = 2.0**-15
"""Smallest scale that survives vLLM's merging of fused tensors; code times a smaller scale underflows in fp16."""


def make_shard(
    shard_task: ShardTask,
    opener: Opener,
    staging: Staging,
    engine: Engine,
    advance: Callable[[int], None] | None = None,
) -> ShardReceipt:
    """Make one output shard and return its receipt.

    Args:
        shard_task: task of the shard.
        opener: opens the files of the source.
        staging: place where the shard is staged.
        engine: computes amaxes and casts.
        advance: called with the input bytes whose errors were measured; the engine counts its own bytes.

    Raises:
        NonFiniteError: a tensor to quantize holds NaN or Inf, and the recipe does not keep such tensors.
        UnrepresentableError: the original numerics cannot quantize a tensor.
        SourceReadError, SourceChangedError: the source cannot be read, or changes during the read.
        DestinationError: the shard cannot be written.
    """
    if isinstance(opener, Checked):
        opener.check(tensor_task.view for tensor_task in shard_task.tensor_tasks)
    # Reading the result back from a file costs less than fetching the source a second time.
    in_order = staging.in_order and not (staging.is_file and is_ranged(opener))
    with Reader(opener) as reader:
        settled = settle(shard_task, reader)
        shard_task = settled.shard_task
        # Values that change are counted with known scales.
        if (
            not settled.requantized
            and isinstance(engine, SinglePassEngine)
            and engine.has_single_pass(shard_task, in_order)
        ):
            receipt = write_shard(shard_task, None, reader, staging, engine, advance, settled)
            if receipt is not None:
                return receipt
        measured = measure(shard_task, reader, engine)
        receipt = write_shard(shard_task, measured, reader, staging, engine, advance, settled)
        assert receipt is not None  # only a single pass returns None
        return receipt


@dataclass(frozen=True, slots=True)
class Measured:
    """Results of the first phase of a shard.

    Attributes:
        amaxes: amax of every scale group by its id: int32 bits of float32, in the shape of the group's scale.
        nonfinite: tensors of the groups that hold NaN or Inf.
    """

    amaxes: Mapping[str, torch.Tensor]
    nonfinite: tuple[NonFinite, ...]

    def unquantized(self, shard_task: ShardTask) -> frozenset[str]:
        """Return the fused modules that are left unquantized because a member is not finite."""
        return frozenset(group.fused_module for group in _nonfinite_groups(shard_task, self.amaxes))

    def scales(self, shard_task: ShardTask, unquantized: frozenset[str]) -> dict[str, torch.Tensor]:
        """Return the scale of every group outside ``unquantized``, by its id.

        Raises:
            UnrepresentableError: the original numerics cannot quantize a tensor.
        """
        return {
            group.id: scale_of_group(
                group, self.amaxes[group.id], shard_task.recipe.numerics, shard_task.numbers.scale_rounding
            )
            for group in shard_task.groups
            if group.fused_module not in unquantized
        }


def measure(shard_task: ShardTask, reader: Reader, engine: Engine) -> Measured:
    """Compute the amaxes of a shard and find the tensors that are not finite.

    Raises:
        NonFiniteError: a tensor holds NaN or Inf, and the recipe does not keep such tensors.
    """
    amaxes = engine.amaxes(shard_task, reader)
    members = [view for group in _nonfinite_groups(shard_task, amaxes) for view in group.members]
    for view in members:
        if view.encoding is not None:
            raise nonfinite_codes(view, reader)
    slicing = shard_task.slicing
    counted = [count_nonfinite(view, slicing.slices(TensorTask(view, view.name)), reader) for view in members]
    nonfinite = tuple(finding for finding in counted if finding)
    if nonfinite and shard_task.recipe.nonfinite == "error":
        first = nonfinite[0]
        raise NonFiniteError(first.tensor, first.count, first.position, first.value)
    return Measured(amaxes, nonfinite)


def write_shard(
    shard_task: ShardTask,
    measured: Measured | None,
    reader: Reader,
    staging: Staging,
    engine: Engine | SinglePassEngine,
    advance: Callable[[int], None] | None = None,
    settled: SettledShard | None = None,
) -> ShardReceipt | None:
    """Write a shard in the layout that its amaxes decide, and return its receipt.

    Args:
        shard_task: task of the shard.
        measured: amaxes of the shard; None to compute them in the same pass as the casts.
        reader: reads the source.
        staging: place where the shard is staged.
        engine: computes; a `SinglePassEngine` if ``measured`` is None.
        advance: called with the input bytes whose errors were measured.
        settled: the shard of a quantized source; None for any other.

    Returns:
        The receipt. None, and no shard, if a single pass met a value that is not finite: the shard then needs
        another layout, which only `measure` can decide.

    Raises:
        UnrepresentableError: the original numerics cannot quantize a tensor.
    """
    unquantized = measured.unquantized(shard_task) if measured else frozenset[str]()
    known = measured.scales(shard_task, unquantized) if measured else {}
    tensor_tasks, layout = shard_task.tensor_tasks_without(unquantized), shard_task.header_without(unquantized)
    members: defaultdict[str, list[TensorView]] = defaultdict(list)
    for tensor_task in tensor_tasks:
        if tensor_task.group is not None:
            members[tensor_task.group].append(tensor_task.view)
    stats: tuple[TensorStats, ...] = ()
    sums: dict[str, TensorSums] = {}
    if shard_task.recipe.stats:
        if engine.measures_errors:
            sums = {task.view.name: TensorSums(task.view) for task in tensor_tasks if task.group is not None}
        elif measured:
            stats = gather(shard_task, tensor_tasks, measured.amaxes, reader, advance or (lambda _: None))
    scales: dict[str, torch.Tensor] = {}
    fine = shard_task.numbers.coverage.fine
    with staging.stage(shard_task.name, layout.file_size) as sink:
        writer = _Writer(layout, sink)

        def put_scale(group: str, scale: torch.Tensor, row: int = 0) -> bool:
            if measured is None and scale.numel() and not float(scale.max()) < math.inf:  # a maximum keeps NaN
                return False
            if not fine:
                scales[group] = scale
            for view in members[group]:
                writer.scale(shard_task.weight_format, view, scale, row)
            return True

        def put_errors(name: str, count: int, parts: list[ErrorSums]) -> None:
            sums[name].add(count, parts)
            if advance:
                advance(count * itemsizes[name])

        for tensor_task in tensor_tasks:
            for stored in tensor_task.stored_scales:
                writer.emit(stored.name, 0, memoryview(stored.data))
        if settled is not None:
            write_kept_scales(settled, reader, writer)
        values = None
        if settled is not None and (settled.kept or settled.requantized):
            values = ChangedValues(settled, scales, reader, writer.emit)
        emit = writer.emit if values is None else values.emit
        ordered = writer.in_order(tensor_tasks)
        itemsizes = {tensor_task.view.name: tensor_task.view.itemsize for tensor_task in ordered}
        errors = put_errors if sums else None
        if measured is None:
            assert isinstance(engine, SinglePassEngine)
            if not engine.convert(ordered, shard_task, reader, put_scale, emit, errors):
                return None
        else:
            for group, scale in known.items() if not fine else ():
                put_scale(group, scale)
            engine.cast(ordered, shard_task, reader, measured.amaxes, emit, errors, put_scale)
        if sums:
            stats = tuple(sums[task.view.name].stats() for task in tensor_tasks if task.group is not None)
        if settled is not None and settled.stats:
            every = {tensor.name: tensor for tensor in (*stats, *settled.stats)}
            stats = tuple(every[task.view.name] for task in tensor_tasks if task.view.name in every)
        staged = sink.finish()
    return ShardReceipt(
        staged.name,
        staged.size,
        staged.sha256,
        unquantized,
        measured.nonfinite if measured else (),
        tuple(
            sorted(group.id for group in shard_task.groups if group.id in scales and is_small(group, scales[group.id]))
        ),
        stats,
        _shared_scales(shard_task, scales, unquantized),
        NOT_RECODED if values is None else values.recoded,
        staged.upload,
    )


def write_kept_scales(settled: SettledShard, reader: Reader, writer: _Writer) -> None:
    """Write the scales of tensors that keep their codes: those of the source, repeated."""
    weight_format = settled.shard_task.weight_format
    for view in settled.kept:
        for row, scale in repeated_scales(view, weight_format.numbers, reader):
            writer.scale(weight_format, view, scale, row)


def _nonfinite_groups(shard_task: ShardTask, amaxes: Mapping[str, torch.Tensor]) -> list[ScaleGroup]:
    """Return the scale groups whose amax shows NaN or Inf."""
    return [group for group in shard_task.groups if has_nonfinite(amaxes[group.id])]


def _shared_scales(
    shard_task: ShardTask, scales: Mapping[str, torch.Tensor], unquantized: frozenset[str]
) -> tuple[tuple[str, str], ...]:
    """Return a digest of the scale of every group that other shards depend on too.

    It is ``kept`` for a group that is left unquantized, and ``finite`` where a tensor has too many scales to hold: of
    such a group, other shards depend on that decision alone.
    """
    own = {tensor_task.view.name for tensor_task in shard_task.tensor_tasks}
    shared = {g.fused_module for g in shard_task.groups if any(member.name not in own for member in g.members)}
    found = {}
    for group in shard_task.groups:
        if group.fused_module in shared:
            scale = scales.get(group.id)
            if scale is not None:
                found[group.id] = hashlib.sha256(as_bytes(scale.contiguous())).hexdigest()[:16]
            else:
                found[group.id] = "kept" if group.fused_module in unquantized else "finite"
    return tuple(sorted(found.items()))


class _Writer:
    """Writes header, codes and scales of a shard at their offsets in a sink."""

    def __init__(self, layout: Header, sink: Sink) -> None:
        self._offsets = {entry.name: layout.data_start + entry.start for entry in layout.entries}
        self._order = {entry.name: i for i, entry in enumerate(layout.entries)}
        self._sink = sink
        sink.write_at(0, memoryview(serialize(layout)))

    def in_order(self, tensor_tasks: Iterable[TensorTask]) -> list[TensorTask]:
        """Return tensors in the order of their bytes in the shard, so that a digest can follow the writes."""
        return sorted(tensor_tasks, key=lambda tensor_task: self._order[tensor_task.view.name])

    def emit(self, name: str, begin: int, data: memoryview) -> None:
        """Write bytes at an offset of an output tensor."""
        self._sink.write_at(self._offsets[name] + begin, data)

    def scale(self, weight_format: WeightFormat, view: TensorView, scale: torch.Tensor, row: int = 0) -> None:
        """Write scales of a weight, from a row of scales on."""
        packed = pack_scales(scale, weight_format.numbers.scale)
        begin = row * scale.shape[-1] * packed.itemsize if row else 0
        self.emit(view.name + weight_format.scale_suffix, begin, as_bytes(packed.contiguous()))


def is_small(group: ScaleGroup, scale: torch.Tensor) -> bool:
    """Return True if several tensors share a scale under 2^-15: vLLM merges them in fp16 and loses codes."""
    return len(group.members) > 1 and float(scale) < SMALL_SCALE
