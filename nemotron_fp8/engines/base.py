"""Amaxes and casts of a unit, slice by slice: the only stage that computes.

Phase 1 fills the amaxes of the unit's scale groups, phase 2 casts. Between them stands everything that the
amaxes decide: NaN and Inf, the multiplier, the layout of the shard. Where every value is finite the layout is the
planned one, and an engine may cast one tensor while it takes the amax of the next.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from nemotron_fp8.errors import UnrepresentableError
from nemotron_fp8.sources.reader import TORCH_DTYPES
from nemotron_fp8_kernels.errors import MultiplierOverflowError
from nemotron_fp8_kernels.reference import scale_from_amax

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.number_format import Coverage
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask, TensorTask
    from nemotron_fp8.sources.reader import Reader


INF_BITS = 0x7F80_0000
"""float32 bits of Inf; an amax at or over it has met Inf or NaN."""
EMPTY_BITS = 0x4180_0000
"""float32 bits of 16.0, the amax of a group without elements (what the original script took)."""


class Emit(Protocol):
    """Takes the finished bytes of a tensor; called from any thread, in any order."""

    def __call__(self, name: str, begin: int, data: memoryview) -> None:
        """Put ``data`` at byte ``begin`` of the output tensor ``name``."""


class Settle(Protocol):
    """Takes the scale of a scale group as soon as its amax is complete; what it raises ends the conversion."""

    def __call__(self, group: str, scale: torch.Tensor) -> None:
        """Note the scale of ``group``: float32 on the CPU, of ``scale_shape``; NaN or Inf where a member is."""


class Engine(Protocol):
    """What carries out the two phases of a unit, on some device: in one go, or one by one."""

    def convert(
        self, tensor_tasks: Iterable[TensorTask], shard_task: ShardTask, reader: Reader, settle: Settle, emit: Emit
    ) -> None:
        """Carry out both phases where no amax can move a byte of the output, tensor by tensor if that is better.

        Args:
            works: the tensors of the shard, in the order of its bytes.
            unit: what they belong to.
            reader: reads them.
            settle: called once for every scale group of the unit, from any thread, before any byte of a member is
                emitted.
            emit: takes the output bytes.

        Raises:
            UnrepresentableError: the original numerics cannot quantize a tensor.
        """

    def amaxes(self, shard_task: ShardTask, reader: Reader) -> dict[str, torch.Tensor]:
        """Return the amax of every scale group of the unit: int32 bits of float32, by group id."""

    def cast(
        self,
        tensor_tasks: Iterable[TensorTask],
        shard_task: ShardTask,
        reader: Reader,
        amaxes: Mapping[str, torch.Tensor],
        emit: Emit,
    ) -> None:
        """Emit the output bytes of ``tensor_tasks``: cast with their group's amax, or copied without one."""


def scale_of_group(group: ScaleGroup, amax: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the scale of a group from its amax: float32, of the same shape; NaN or Inf where the amax is.

    Raises:
        UnrepresentableError: the original numerics have no finite multiplier for it.
    """
    first = group.members[0]
    try:
        return scale_from_amax(amax, recipe.numerics, TORCH_DTYPES[first.dtype])[1]
    except MultiplierOverflowError as error:
        raise UnrepresentableError(first.name, error.amax) from error


def blank_amax(group: ScaleGroup, coverage: Coverage) -> torch.Tensor:
    """Return the amax of a group before any slice was seen: int32, in the shape of its scales."""
    first = group.members[0]
    empty = not any(member.numel for member in group.members)
    return torch.full(coverage.scale_shape(first.shape), EMPTY_BITS if empty else 0, dtype=torch.int32)


def matrix(values: torch.Tensor, view: TensorView, coverage: Coverage) -> torch.Tensor:
    """Return flat elements as whole rows of their tensor, where scales belong to rows."""
    return values if coverage.granularity == "tensor" else values.view(-1, view.row_elements)


def scale_rows(scales: torch.Tensor, view: TensorView, coverage: Coverage, begin: int, end: int) -> torch.Tensor:
    """Return the scales (or amaxes) of the rows that lie in bytes ``[begin, end)`` of a tensor; a view of them."""
    if coverage.rows is None:
        return scales
    panel = view.row_bytes * coverage.rows
    return scales[begin // panel : -(-end // panel)]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous tensor on the CPU, uncopied; they live as long as the tensor does."""
    if not tensor.numel():
        return memoryview(b"")
    array = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # a ctypes array takes attributes, and must keep the memory
    return memoryview(array).cast("B")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch from starting threads of its own inside ours: a slice is too small to be worth them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
