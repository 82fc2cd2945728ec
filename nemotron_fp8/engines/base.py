"""Interface of an engine: amaxes and casts of a shard.

Phase 1 computes the amaxes of a shard's scale groups, phase 2 casts. The amaxes decide everything in between: the
finite tensors, their multipliers, and the layout of the shard.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from nemotron_fp8.errors import UnrepresentableError
from nemotron_fp8.sources.reader import TORCH_DTYPES
from nemotron_fp8_kernels.cpu import amax_bits, best_amax_bits
from nemotron_fp8_kernels.errors import MultiplierOverflowError
from nemotron_fp8_kernels.reference import scale_from_amax

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.number_format import Coverage, ScaleChoice, ScaleRounding
    from nemotron_fp8.planning.recipe import Numerics
    from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask, TensorTask
    from nemotron_fp8.sources.reader import Reader
    from nemotron_fp8_kernels.error_sums import ErrorSums


INF_BITS = 0x7F80_0000
"""float32 bits of Inf; an amax of at least these bits comes from Inf or NaN."""
EMPTY_BITS = 0x4180_0000
"""float32 bits of 16.0, the amax of a group without elements, as in the original script."""


class Emit(Protocol):
    """Receives the finished bytes of a tensor; called from any thread, in any order."""

    def __call__(self, name: str, begin: int, data: memoryview) -> None:
        """Write ``data`` at byte ``begin`` of the output tensor ``name``."""


class PutScale(Protocol):
    """Receives the scales of a scale group as soon as their amaxes are complete; called from any thread."""

    def __call__(self, group: str, scale: torch.Tensor, row: int = 0, /) -> bool:
        """Write the scale of ``group``: float32 on the CPU, of ``scale_shape``.

        Where a tensor has too many scales to hold (`Coverage.fine`), a call brings those of a few rows, from the row of
        scales ``row`` on.

        Returns:
            False if the scale is not finite: the pass must stop.
        """


class PutErrors(Protocol):
    """Receives the error sums of a slice; called from any thread."""

    def __call__(self, name: str, count: int, parts: list[ErrorSums], /) -> None:
        """Add the sums of the rows of ``count`` elements of the tensor ``name``."""


class Engine(Protocol):
    """Computes a shard on one device, in two phases: first the amaxes, then the casts.

    Attributes:
        measures_errors: True if casts can measure the quantization error, too.
    """

    measures_errors: bool

    def amaxes(self, shard_task: ShardTask, reader: Reader) -> dict[str, torch.Tensor]:
        """Return the amax of every scale group of a shard: int32 bits of float32, by group id.

        Their shape is that of the scales, or ``[]`` where a tensor has too many scales to hold (`Coverage.held`). Those
        of best scales are the chosen candidates (`nemotron_fp8_kernels.reference.best_amax_bits`).
        """

    def cast(
        self,
        tensor_tasks: Iterable[TensorTask],
        shard_task: ShardTask,
        reader: Reader,
        amaxes: Mapping[str, torch.Tensor],
        emit: Emit,
        put_errors: PutErrors | None = None,
        put_scale: PutScale | None = None,
    ) -> None:
        """Emit the output bytes of tensors: cast with the amax of their group, dequantized, or copied.

        Args:
            tensor_tasks: the tensors, in the order of their bytes in the shard.
            shard_task: task of the shard.
            reader: reads the source.
            amaxes: amax of every group of ``tensor_tasks``, by its id: int32 bits of float32.
            emit: receives the output bytes.
            put_errors: receives the error sums of the quantized tensors; only of engines that measure errors.
            put_scale: receives the scales of tensors that have too many to hold; needed for those only.
        """


@runtime_checkable
class SinglePassEngine(Engine, Protocol):
    """An engine that can compute amaxes and casts of some shards in one pass, so that tensors are read once.

    A single pass assumes the planned layout, so every value must be finite.
    """

    def has_single_pass(self, shard_task: ShardTask, in_order: bool) -> bool:
        """Return True if `convert` makes this shard, and costs less than `amaxes` and `cast`.

        Args:
            shard_task: task of the shard.
            in_order: whether bytes should be emitted in their order in the shard; a single pass emits scales late.
        """

    def convert(
        self,
        tensor_tasks: Iterable[TensorTask],
        shard_task: ShardTask,
        reader: Reader,
        put_scale: PutScale,
        emit: Emit,
        put_errors: PutErrors | None = None,
    ) -> bool:
        """Compute amaxes and casts in one pass.

        Args:
            tensor_tasks: the tensors, in the order of their bytes in the shard.
            shard_task: task of the shard.
            reader: reads the source.
            put_scale: called once for every scale group, or for every slice where there are too many scales to hold.
            emit: receives the output bytes.
            put_errors: receives the error sums of the quantized tensors; only of engines that measure errors.

        Returns:
            False if ``put_scale`` rejected a scale, or a value is not finite, and the pass was stopped.

        Raises:
            UnrepresentableError: the original numerics cannot quantize a tensor.
        """


def scale_of_group(group: ScaleGroup, amax: torch.Tensor, numerics: Numerics, rounding: ScaleRounding) -> torch.Tensor:
    """Return the scale of a group from its amax: float32, of the same shape; NaN or Inf for an amax of NaN or Inf.

    Raises:
        UnrepresentableError: the original numerics have no finite multiplier for the amax.
    """
    first = group.members[0]
    try:
        return scale_from_amax(amax, numerics, TORCH_DTYPES[first.dtype], rounding)[1]
    except MultiplierOverflowError as error:
        raise UnrepresentableError(first.name, error.amax) from error


def has_nonfinite(amax: torch.Tensor) -> bool:
    """Return True if amaxes, int32 bits of float32, come from NaN or Inf."""
    return bool(amax.numel()) and int(amax.max()) >= INF_BITS


def blank_amax(group: ScaleGroup, coverage: Coverage) -> torch.Tensor:
    """Return the initial amax of a group: int32 bits, in the shape of the amaxes that are held for it."""
    first = group.members[0]
    empty = not any(member.numel for member in group.members)
    return torch.full(coverage.held.scale_shape(first.shape), EMPTY_BITS if empty else 0, dtype=torch.int32)


def matrix(values: torch.Tensor, view: TensorView, coverage: Coverage) -> torch.Tensor:
    """Return flat elements as whole rows of their tensor if scales belong to rows."""
    return values if coverage.whole else values.view(-1, view.row_elements)


def slice_amax(
    values: torch.Tensor, view: TensorView, coverage: Coverage, choice: ScaleChoice = "amax"
) -> torch.Tensor:
    """Return the amaxes of a slice of a tensor, as bits: one for each scale that covers a part of the slice.

    Best scales are larger amaxes of rows. A slice holds whole rows, so that the choice depends on no other slice.
    """
    rows = matrix(values, view, coverage)
    if choice == "best":
        return best_amax_bits(rows)
    return amax_bits(rows, coverage.granularity, coverage.block)


def merge_amax(
    amaxes: torch.Tensor, found: torch.Tensor, view: TensorView, coverage: Coverage, begin: int, end: int
) -> None:
    """Merge the amaxes of bytes ``[begin, end)`` into the amaxes of their tensor, by the maximum."""
    part = scale_rows(amaxes, view, coverage, begin, end)
    torch.maximum(part, found, out=part)


def scale_row(view: TensorView, coverage: Coverage, begin: int) -> int:
    """Return the row of scales that covers the row of a tensor at byte ``begin``."""
    return begin // (view.row_bytes * (coverage.rows or 1)) if begin else 0


def scale_rows(scales: torch.Tensor, view: TensorView, coverage: Coverage, begin: int, end: int) -> torch.Tensor:
    """Return a view of the scales (or amaxes) of the rows in bytes ``[begin, end)`` of a tensor."""
    if coverage.rows is None:
        return scales
    return scales[scale_row(view, coverage, begin) : -(-end // (view.row_bytes * coverage.rows))]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy; the view keeps the tensor's memory alive."""
    if not tensor.numel():
        return memoryview(b"")
    array = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # a ctypes array accepts attributes; this one keeps the memory alive
    return memoryview(array).cast("B")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads inside a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_torch_thread() -> AbstractContextManager[None]:
    """Limit torch to one thread: a slice is too small for threads of its own."""
    return torch_threads(1)
