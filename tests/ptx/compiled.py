"""Compiled kernels in the emulator, called as on a device, with the checks that every call must pass."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.support.ptxemu.driver import Emulator
    from tests.support.ptxemu.schedule import Settings

Results = tuple[torch.Tensor, torch.Tensor]


class Compiled:
    """Operations of `nemotron_fp8_kernels.gpu` on CPU tensors, by the emulator.

    Attributes:
        emulator: the device.
        ops: module of single tensors.
        many: module of lists.
        programs: CTAs of a grouped launch.
        counts: bytes compared, schedules and turns.
        stored: bytes that the last call stored.
        loaded: bytes that the last call loaded.
    """

    def __init__(self, emulator: Emulator, package: str = "nemotron_fp8_kernels") -> None:
        self.emulator = emulator
        self.ops = import_module(f"{package}.gpu.ops")
        self.many: Any = import_module(f"{package}.gpu.many")
        self.programs = 396
        self.counts: Counter[str] = Counter()
        self.stored = self.loaded = 0
        prepare = self.many.prepare

        def noted(*arguments: Any, **options: Any) -> Any:
            # The kernel reaches weights and codes through a table of addresses.
            prepared = prepare(*arguments, **options)
            half = len(prepared.held) // 2
            reachable = [(tensor, place >= half) for place, tensor in enumerate(prepared.held)]
            emulator.reachable[prepared.table.data_ptr()] = reachable
            return prepared

        self.many.prepare = noted
        self.many._programs = lambda device: self.programs

    def restart(self, settings: Settings) -> None:
        self.emulator.restart(settings)
        self.emulator.reachable.clear()
        self.emulator.equal.clear()

    def call(self, function: Callable[..., Any], *arguments: Any, equal: bool = False, **options: Any) -> Any:
        """Call an operation; with ``equal`` CTAs may store equal bytes to one place without order."""
        self.emulator.counts.clear()
        self.emulator.equal.clear()
        result = self.emulator.call(function, *arguments, **options)
        self.stored = self.emulator.counts["bytes stored"]
        self.loaded = self.emulator.counts["bytes loaded"]
        self.counts["turns"] += self.emulator.counts["turns"]
        if not equal:
            assert not self.emulator.equal, self.emulator.equal
        return result

    def same(self, found: Results, expected: Results) -> None:
        """Compare codes and scales as bytes."""
        for got, wanted in zip(found, expected, strict=True):
            self.same_bytes(got, wanted)

    def same_bytes(self, got: torch.Tensor, wanted: torch.Tensor) -> None:
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (got, wanted))
        self.counts["bytes compared"] += left.numel()
        if not torch.equal(left, right):
            wrong = (left != right).nonzero().flatten()
            size = got.element_size()
            raise AssertionError(f"{len(wrong)} of {len(left)} bytes differ, first in element {int(wrong[0]) // size}")

    def same_lists(self, found: Sequence[Results], expected: Sequence[Results]) -> None:
        for got, wanted in zip(found, expected, strict=True):
            self.same(got, wanted)

    def quantize(self, w: torch.Tensor, expected: Results, *arguments: Any, **options: Any) -> None:
        """Quantize, compare, and require that each byte of the results is stored once."""
        found = self.call(self.ops.quantize, w, *arguments, **options)
        self.same(found, expected)
        # One scale for strided rows takes the amaxes of blocks, which are stored, too.
        blocks = 4 * -(-w.shape[0] // 128) * -(-w.shape[1] // 128) if w.ndim == 2 and not w.is_contiguous() else 0
        outputs = sum(tensor.nbytes for tensor in found) if w.numel() else 0
        assert outputs <= self.stored <= outputs + blocks or options.get("numerics") == "original"

    def quantize_with_amax(
        self, w: torch.Tensor, amax: torch.Tensor, expected: Results, *more: Any, **options: Any
    ) -> None:
        """Quantize with known amaxes, and compare."""
        found = self.call(self.ops.quantize_with_amax, w, amax, *more, **options)
        self.same(found, expected)
        outputs = sum(tensor.nbytes for tensor in found) if w.numel() else 0
        assert self.stored == outputs or options.get("numerics") == "original"

    def amax_bits(self, w: torch.Tensor, expected: torch.Tensor, *arguments: Any) -> None:
        self.same_bytes(self.call(self.ops.amax_bits, w, *arguments), expected)

    def dequantize(self, q: torch.Tensor, scale: torch.Tensor, expected: torch.Tensor, *more: Any) -> None:
        """Dequantize and compare; all NaN count as equal, because their bits are not specified."""
        found = self.call(self.ops.dequantize, q, scale, *more)
        assert torch.equal(found.isnan(), expected.isnan())
        self.same_bytes(
            found.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf),
            expected.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf),
        )
        assert self.stored == found.nbytes

    def quantize_many(self, tensors: Sequence[torch.Tensor], expected: Sequence[Results], **options: Any) -> None:
        """Quantize a list and compare; tensors that share a scale may each store it."""
        found = self.call(self.many.quantize_many, tensors, equal=options.get("shared") is not None, **options)
        self.same_lists(found, expected)


def placed(values: torch.Tensor, offset: int = 0, padding: int = 0) -> torch.Tensor:
    """Return a copy of a 2-D tensor at an offset in its allocation, with ``padding`` elements between rows."""
    rows, columns = values.shape
    stride = columns + padding
    whole = torch.zeros(offset + rows * stride, dtype=values.dtype)
    view = whole.as_strided((rows, columns), (stride, 1), offset)
    return view.copy_(values)
