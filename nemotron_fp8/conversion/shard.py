"""Carry out one unit: amaxes, what they decide, then the shard's bytes into a sink."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.checkpoint.header import serialize
from nemotron_fp8.engines.base import INF_BITS, as_bytes, scale_of_group
from nemotron_fp8.engines.error_stats import gather
from nemotron_fp8.engines.nonfinite import count_nonfinite
from nemotron_fp8.errors import NemotronFp8Error, NonFiniteError
from nemotron_fp8.planning.receipt import NonFinite, ShardReceipt
from nemotron_fp8.sources.reader import TORCH_DTYPES, Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.destinations.base import Sink, Staging
    from nemotron_fp8.engines.base import Engine
    from nemotron_fp8.planning.layouts import Output
    from nemotron_fp8.planning.receipt import TensorStats
    from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask, TensorTask
    from nemotron_fp8.sources.files import Opener


SMALL_SCALE = 2.0**-15
"""Smallest scale that survives vLLM's merging of fused tensors: below, code times scale underflows in fp16."""


def execute(
    shard_task: ShardTask,
    opener: Opener,
    staging: Staging,
    engine: Engine,
    advance: Callable[[int], None] | None = None,
) -> ShardReceipt:
    """Make one output shard and return what became of it.

    Args:
        unit: what to make.
        opener: opens the source's files.
        staging: where the shard is staged.
        engine: what computes it.
        advance: called with the input bytes that errors are measured on; the engine tells of its own work.

    Raises:
        NonFiniteError: a tensor to be quantized holds NaN or Inf, and the recipe does not keep such tensors.
        UnrepresentableError: the original numerics cannot quantize a tensor.
        SourceReadError, SourceChangedError: the source fails, or changes while it is read.
        DestinationError: the destination fails.
    """
    with Reader(opener) as reader:
        if not shard_task.recipe.stats:  # which take the amaxes
            with suppress(_NotFiniteError):
                return _straight(shard_task, reader, staging, engine)
        # Out of the handler: the error's frames hold buffers that an engine may want to free.
        return _in_two_phases(shard_task, reader, staging, engine, advance)


class _NotFiniteError(NemotronFp8Error):
    """A scale group is not finite. Never leaves this module: it ends the straight way."""

    group: str
    message = "{group}"


def _straight(shard_task: ShardTask, reader: Reader, staging: Staging, engine: Engine) -> ShardReceipt:
    """Make the shard in one go, on the assumption that every value is finite."""
    small: list[str] = []
    shared = _Shared(shard_task)
    groups = {group.id: group for group in shard_task.groups}
    members: defaultdict[str, list[TensorView]] = defaultdict(list)
    for tensor_task in shard_task.tensor_tasks:
        if tensor_task.group is not None:
            members[tensor_task.group].append(tensor_task.view)
    with staging.stage(shard_task.name, shard_task.layout.file_size) as sink:
        put = _Writer(shard_task.layout, sink)

        def settle(group: str, scale: torch.Tensor) -> None:
            if not bool(torch.isfinite(scale).all()):
                raise _NotFiniteError(group)
            for view in members[group]:
                put.scale(shard_task.weight_format.scale_of(view), scale)
            shared.note(group, scale)
            if is_small(groups[group], scale):
                small.append(group)

        engine.convert(put.in_order(shard_task.tensor_tasks), shard_task, reader, settle, put.emit)
        staged = sink.finish()
    return ShardReceipt(
        staged.name, staged.size, staged.sha256, small_scales=tuple(sorted(small)), shared=shared.found()
    )


def _in_two_phases(
    shard_task: ShardTask, reader: Reader, staging: Staging, engine: Engine, advance: Callable[[int], None] | None
) -> ShardReceipt:
    """Take all amaxes first: they decide what stays, and so where every byte of the shard belongs."""
    return make(shard_task, measure(shard_task, reader, engine), reader, staging, engine, advance)


@dataclass(frozen=True, slots=True)
class Measured:
    """What phase 1 finds out about a unit.

    Attributes:
        amaxes: of every scale group, int32 bits of float32, by group id.
        nonfinite: the tensors of those groups that hold NaN or Inf.
    """

    amaxes: Mapping[str, torch.Tensor]
    nonfinite: tuple[NonFinite, ...]

    def unquantized(self, shard_task: ShardTask) -> frozenset[str]:
        """The bundles that stay as they are because a member is not finite."""
        return frozenset(group.fused_module for group in shard_task.groups if _worst(self.amaxes[group.id]) >= INF_BITS)

    def scales(self, shard_task: ShardTask) -> dict[str, torch.Tensor]:
        """The scales of the finite groups, by group id.

        Raises:
            UnrepresentableError: see `execute`.
        """
        unquantized = self.unquantized(shard_task)
        return {
            g.id: scale_of_group(g, self.amaxes[g.id], shard_task.recipe)
            for g in shard_task.groups
            if g.fused_module not in unquantized
        }


def measure(shard_task: ShardTask, reader: Reader, engine: Engine) -> Measured:
    """Take the amaxes of a unit and settle what they decide.

    Raises:
        NonFiniteError, UnrepresentableError: see `execute`.
    """
    amaxes = engine.amaxes(shard_task, reader)
    nonfinite = _nonfinite(shard_task, reader, amaxes)
    if nonfinite and shard_task.recipe.nonfinite == "error":
        first = nonfinite[0]
        raise NonFiniteError(first.tensor, first.count, first.position, first.value)
    measured = Measured(amaxes, nonfinite)
    measured.scales(shard_task)  # raises while nothing is written yet
    return measured


def make(
    shard_task: ShardTask,
    measured: Measured,
    reader: Reader,
    staging: Staging,
    engine: Engine,
    advance: Callable[[int], None] | None = None,
) -> ShardReceipt:
    """Write the shard of a unit whose amaxes are known; see `execute`."""
    unquantized, scales = measured.unquantized(shard_task), measured.scales(shard_task)
    tensor_tasks, layout = shard_task.tensor_tasks_without(unquantized), shard_task.header_without(unquantized)
    stats: tuple[TensorStats, ...] = ()
    if shard_task.recipe.stats:
        # From the source's values alone, before they may be gone: in place, staging is the last that is seen of them.
        stats = gather(shard_task, tensor_tasks, measured.amaxes, reader, advance or (lambda _: None))
    with staging.stage(shard_task.name, layout.file_size) as sink:
        put = _Writer(layout, sink)
        for tensor_task in tensor_tasks:
            if tensor_task.group is not None:
                put.scale(shard_task.weight_format.scale_of(tensor_task.view), scales[tensor_task.group])
        engine.cast(put.in_order(tensor_tasks), shard_task, reader, measured.amaxes, put.emit)
        staged = sink.finish()
    small = tuple(sorted(g.id for g in shard_task.groups if g.id in scales and is_small(g, scales[g.id])))
    shared = _Shared(shard_task)
    for group in shard_task.groups:
        shared.note(group.id, scales.get(group.id))
    return ShardReceipt(
        staged.name, staged.size, staged.sha256, unquantized, measured.nonfinite, small, stats, shared.found()
    )


class _Shared:
    """What is found out about the scale groups that shards other than this one depend on too."""

    def __init__(self, shard_task: ShardTask) -> None:
        own = {tensor_task.view.name for tensor_task in shard_task.tensor_tasks}
        self._bundles = {
            g.fused_module for g in shard_task.groups if any(member.name not in own for member in g.members)
        }
        self._groups = {group.id for group in shard_task.groups if group.fused_module in self._bundles}
        self._found: dict[str, str] = {}

    def note(self, group: str, scale: torch.Tensor | None) -> None:
        """Note the scale of a group; None where its bundle is kept."""
        if group in self._groups:
            digest = None if scale is None else hashlib.sha256(as_bytes(scale.contiguous())).hexdigest()[:16]
            self._found[group] = digest or "kept"

    def found(self) -> tuple[tuple[str, str], ...]:
        """Pairs of group and finding, for a receipt."""
        return tuple(sorted(self._found.items()))


class _Writer:
    """Puts what a shard is made of to its place in a sink."""

    def __init__(self, layout: Header, sink: Sink) -> None:
        self._offsets = {entry.name: layout.data_start + entry.start for entry in layout.entries}
        self._order = {entry.name: i for i, entry in enumerate(layout.entries)}
        self._sink = sink
        sink.write_at(0, memoryview(serialize(layout)))

    def in_order(self, tensor_tasks: Iterable[TensorTask]) -> list[TensorTask]:
        """Tensors in the order of the shard's bytes, so that a digest can follow the writes."""
        return sorted(tensor_tasks, key=lambda tensor_task: self._order[tensor_task.view.name])

    def emit(self, name: str, begin: int, data: memoryview) -> None:
        """See `nemotron_fp8.engines.base.Emit`."""
        self._sink.write_at(self._offsets[name] + begin, data)

    def scale(self, output: Output, scale: torch.Tensor) -> None:
        """Put a scale, in the shape that its layout wants."""
        self.emit(output.name, 0, as_bytes(scale.to(TORCH_DTYPES[output.dtype]).reshape(output.shape).contiguous()))


def is_small(group: ScaleGroup, scale: torch.Tensor) -> bool:
    """Whether a scale that several tensors share is under 2^-15: vLLM merges them in fp16 and loses codes."""
    return len(group.members) > 1 and float(scale) < SMALL_SCALE


def _worst(amax: torch.Tensor) -> int:
    """The largest bits of an amax."""
    return int(amax.max()) if amax.numel() else 0


def _nonfinite(shard_task: ShardTask, reader: Reader, amaxes: Mapping[str, torch.Tensor]) -> tuple[NonFinite, ...]:
    """Count NaN and Inf in the members of the groups whose amax shows them."""
    found: list[NonFinite | None] = []
    for group in shard_task.groups:
        if _worst(amaxes[group.id]) < INF_BITS:
            continue
        found += [count_nonfinite(view, shard_task, reader) for view in group.members]
    return tuple(finding for finding in found if finding)
