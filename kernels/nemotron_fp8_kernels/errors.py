"""Errors of the kernels: a subclass of ``ValueError`` per violation, with the rejected values as attributes.

The kernels do not know the names of tensors; callers add them.
"""

from __future__ import annotations

import copyreg
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class KernelInputError(ValueError):
    """Base class of the errors that the kernels raise."""

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders; the default would call __init__ with the message alone.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]  # untyped


class UnsupportedDtypeError(KernelInputError):
    """A tensor has a dtype that the operation does not support.

    Attributes:
        argument: name of the argument.
        dtype: dtype of the tensor.
        allowed: supported dtypes.
    """

    def __init__(self, argument: str, dtype: object, allowed: Sequence[object]) -> None:
        self.argument, self.dtype, self.allowed = argument, dtype, tuple(allowed)
        names = ", ".join(str(entry) for entry in allowed)
        super().__init__(f"{argument} is {dtype}; convert it to one of {names}")


class ShapeError(KernelInputError):
    """A tensor's shape does not fit the operation or the other arguments.

    Attributes:
        argument: name of the argument.
        shape: shape of the tensor.
        problem: the mismatch.
    """

    def __init__(self, argument: str, shape: Sequence[int], problem: str) -> None:
        self.argument, self.shape, self.problem = argument, tuple(shape), problem
        super().__init__(f"{argument} has shape {list(shape)}; {problem}")


class LayoutError(KernelInputError):
    """A tensor has unsupported strides: it is neither dense nor a 2-D tensor with dense rows.

    Attributes:
        argument: name of the argument.
        shape: shape of the tensor.
        stride: strides of the tensor, in elements.
    """

    def __init__(self, argument: str, shape: Sequence[int], stride: Sequence[int]) -> None:
        self.argument, self.shape, self.stride = argument, tuple(shape), tuple(stride)
        super().__init__(
            f"{argument} of shape {list(shape)} has strides {list(stride)}; "
            "only dense tensors and 2-D tensors with dense rows are supported; call .contiguous() first"
        )


class DeviceError(KernelInputError):
    """Tensors of one call are on different devices.

    Attributes:
        argument: name of the argument on the other device.
        device: device of this argument.
        expected: device of the other tensors.
    """

    def __init__(self, argument: str, device: object, expected: object) -> None:
        self.argument, self.device, self.expected = argument, str(device), str(expected)
        super().__init__(f"{argument} is on {device}, the other tensors are on {expected}; move all to one device")


class NoDataError(KernelInputError):
    """A tensor has no data: it is a meta tensor, or a tensor of a trace."""

    def __init__(self) -> None:
        super().__init__("a tensor has no data; meta tensors, and calls inside torch.compile, are not supported")


class GranularityError(KernelInputError):
    """The granularity or its block is invalid, or other options do not support it.

    Attributes:
        granularity: the rejected granularity.
        problem: the reason.
    """

    def __init__(self, granularity: object, problem: str) -> None:
        self.granularity, self.problem = granularity, problem
        super().__init__(f"granularity {granularity!r}: {problem}")


class NumericsError(KernelInputError):
    """The numerics are unknown.

    Attributes:
        numerics: the rejected numerics.
    """

    def __init__(self, numerics: object) -> None:
        self.numerics = numerics
        super().__init__(f"numerics {numerics!r}: use 'float32' or 'original'")


class RoundingError(KernelInputError):
    """The rounding of scales is unknown, or the numerics do not support it.

    Attributes:
        rounding: the rejected rounding.
        problem: the reason.
    """

    def __init__(self, rounding: object, problem: str) -> None:
        self.rounding, self.problem = rounding, problem
        super().__init__(f"rounding {rounding!r}: {problem}")


class MultiplierOverflowError(KernelInputError):
    """The multiplier of an fp16 tensor overflows with ``numerics="original"``, because its amax is too small.

    Attributes:
        amax: largest absolute value of the tensor.
    """

    def __init__(self, amax: float) -> None:
        self.amax = amax
        super().__init__(
            f"fp16 amax {amax:.6g}: 448 / amax overflows in fp16, as for every amax up to 0.0068398; "
            "use numerics='float32', or leave this tensor unquantized"
        )


class SharedScaleError(KernelInputError):
    """The groups in ``shared`` overlap, are empty, or contain an index out of range.

    Attributes:
        problem: the invalid group or index.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"shared: {problem}")


class OutputsError(KernelInputError):
    """The outputs of a list do not fit together: their number is wrong, or their memory overlaps.

    Attributes:
        problem: the wrong number, or the tensors that overlap.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"out: {problem}")


class DeviceNotSupportedError(KernelInputError):
    """The device has no hardware E4M3 cast that is known to round to nearest even.

    Attributes:
        capability: compute capability of the device.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        super().__init__(
            f"compute capability {capability[0]}.{capability[1]}: the Triton kernels need 9.0 or later "
            "(the cast of 8.9 truncates through fp16, earlier devices have none); use the CPU path"
        )
