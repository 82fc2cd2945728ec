"""Errors of the kernels: one ``ValueError`` per violation, with the numbers of the case as attributes.

Kernels know no tensor names; their callers add them.
"""

from __future__ import annotations

import copyreg
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class KernelInputError(ValueError):
    """Base of every error that the kernels raise on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders; the default would call __init__ with the message alone.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]  # untyped


class UnsupportedDtypeError(KernelInputError):
    """A tensor has a dtype that the operation does not support.

    Attributes:
        argument: the argument's name.
        dtype: its dtype.
        allowed: the supported dtypes.
    """

    def __init__(self, argument: str, dtype: object, allowed: Sequence[object]) -> None:
        self.argument, self.dtype, self.allowed = argument, dtype, tuple(allowed)
        names = ", ".join(str(entry) for entry in allowed)
        super().__init__(f"{argument} is {dtype}; convert it to one of {names}")


class ShapeError(KernelInputError):
    """A tensor's shape does not fit the operation or the other arguments.

    Attributes:
        argument: the argument's name.
        shape: its shape.
        problem: the required shape.
    """

    def __init__(self, argument: str, shape: Sequence[int], problem: str) -> None:
        self.argument, self.shape, self.problem = argument, tuple(shape), problem
        super().__init__(f"{argument} has shape {list(shape)}; {problem}")


class LayoutError(KernelInputError):
    """A tensor's strides are not supported: only dense tensors, and dense rows at any row stride, are.

    Attributes:
        argument: the argument's name.
        shape: its shape.
        stride: its strides, in elements.
    """

    def __init__(self, argument: str, shape: Sequence[int], stride: Sequence[int]) -> None:
        self.argument, self.shape, self.stride = argument, tuple(shape), tuple(stride)
        super().__init__(
            f"{argument} of shape {list(shape)} has strides {list(stride)}; "
            "only dense tensors and 2-D tensors with dense rows are supported: call .contiguous() first"
        )


class DeviceError(KernelInputError):
    """Tensors of one call are on different devices.

    Attributes:
        argument: the argument that differs.
        device: its device.
        expected: the device of the other tensors.
    """

    def __init__(self, argument: str, device: object, expected: object) -> None:
        self.argument, self.device, self.expected = argument, str(device), str(expected)
        super().__init__(f"{argument} is on {device}, the other tensors on {expected}; move it there")


class GranularityError(KernelInputError):
    """The granularity is unknown, or cannot be combined with the other options.

    Attributes:
        granularity: the requested granularity.
        problem: what is wrong with it.
    """

    def __init__(self, granularity: object, problem: str) -> None:
        self.granularity, self.problem = granularity, problem
        super().__init__(f"granularity {granularity!r}: {problem}")


class NumericsError(KernelInputError):
    """The numerics are unknown.

    Attributes:
        numerics: the requested numerics.
    """

    def __init__(self, numerics: object) -> None:
        self.numerics = numerics
        super().__init__(f"numerics {numerics!r}: use 'float32' or 'original'")


class MultiplierOverflowError(KernelInputError):
    """``numerics="original"`` has no finite multiplier for an fp16 tensor with an amax this small.

    Attributes:
        amax: the tensor's largest absolute value.
    """

    def __init__(self, amax: float) -> None:
        self.amax = amax
        super().__init__(
            f"fp16 amax {amax:.6g} makes 448 / amax overflow in fp16 (up to 0.0068398 does); "
            "use numerics='float32', or leave this tensor unquantized"
        )


class SharedScaleError(KernelInputError):
    """The groups given as ``shared`` do not partition the tensors of the call.

    Attributes:
        problem: what is wrong.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"shared: {problem}")


class DeviceNotSupportedError(KernelInputError):
    """The device has no hardware E4M3 cast that is known to round to nearest even.

    Attributes:
        capability: its compute capability.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        super().__init__(
            f"compute capability {capability[0]}.{capability[1]}: the Triton kernels need 9.0 or later "
            "(the 8.9 cast truncates through fp16, earlier ones have none); use the CPU path"
        )
