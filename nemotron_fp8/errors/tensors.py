"""Errors of a source with valid files, but with tensors that cannot be converted as requested."""

from __future__ import annotations

from typing import ClassVar

from nemotron_fp8.errors.base import SourceError


class AlreadyQuantizedError(SourceError):
    """The source is already quantized; a second quantization would destroy the weights.

    Attributes:
        source: the checkpoint.
        evidence: the setting or tensor that shows the quantization.
        fp8: True if the weights are FP8, which can be dequantized.
    """

    source: str
    evidence: str
    fp8: bool
    message = "{source}: already quantized ({evidence}); start from the original checkpoint{_otherwise}"

    @property
    def _otherwise(self) -> str:
        if self.fp8:
            return (
                ", write it in another layout with quantize_repo and a destination (nemotron-fp8 quantize SRC DST), or"
                " dequantize it first with dequantize_repo (nemotron-fp8 dequantize)"
            )
        return "; if its tensors are unquantized, remove what states the quantization"


class PackedWeightsError(AlreadyQuantizedError):
    """The weights of the source are packed in a format that is not read.

    Attributes:
        format: name of the format.
        tool: tool that undoes it; empty if none is known.
    """

    format: str
    tool: str
    message = (
        "{source}: its weights are {format} ({evidence}), which is not read; {_undo}start from the original checkpoint"
    )

    @property
    def _undo(self) -> str:
        return f"undo it with {self.tool}, or " if self.tool else ""


class ScaleError(SourceError, ValueError):
    """A scale of a quantized source is not a positive finite number.

    Attributes:
        tensor: name of the tensor of scales.
        position: index of the first such scale, one number for each dimension.
        value: the scale, as text.
    """

    tensor: str
    position: tuple[int, ...]
    value: str
    message = (
        "tensor {tensor!a}: the scale at {position} is {value}, must be positive and finite; fetch the checkpoint"
        " again, or start from the original checkpoint"
    )


class NoResultError(SourceError):
    """A checkpoint is no result of a quantization, so that there is nothing to report.

    Attributes:
        source: the checkpoint.
        tensors: number of tensors in the checkpoint.
    """

    source: str
    tensors: int
    message = (
        "{source}: not a result: none of {tensors:,} tensors is FP8, and there is no nemotron_fp8.json; for its tensors"
        " use inspect, and to quantize it use quantize"
    )


class NotQuantizedError(SourceError):
    """The source has no FP8 weight to dequantize.

    Attributes:
        source: the checkpoint.
        tensors: number of tensors in the checkpoint.
        evidence: the setting or tensor that shows a quantization to another format; None without one.
    """

    source: str
    tensors: int
    evidence: str | None
    message = "{source}: none of {tensors:,} tensors is FP8; {_why}"

    @property
    def _why(self) -> str:
        if self.evidence is None:
            return "there is nothing to dequantize"
        return f"it is quantized to another format ({self.evidence}); start from the original checkpoint"


class LayoutError(SourceError, ValueError):
    """A quantized tensor fits no known layout.

    Attributes:
        tensor: name of the tensor.
    """

    tensor: str
    problem: str
    message = "tensor {tensor!a}: {problem}"


class StackedExpertsError(SourceError):
    """A stack of experts cannot be split into single experts: it is named for quantization, or its parts exist.

    Attributes:
        tensor: name of the stack.
        shape: shape of the stack.
        reason: reason why it cannot be split.
    """

    tensor: str
    shape: tuple[int, ...]
    reason: str
    message = (
        "tensor {tensor!a} {shape}: {reason}; leave it unquantized with ignore (--ignore {_pattern!a}), or save the"
        " checkpoint with one tensor for each expert"
    )

    @property
    def _pattern(self) -> str:
        # With the name of the module that holds the stack: down_proj alone is a weight of dense layers, too.
        return ".".join(self.tensor.removesuffix(".weight").rsplit(".", 2)[-2:])


class NothingSelectedError(SourceError):
    """The recipe selects no tensor for FP8.

    Attributes:
        source: the checkpoint.
        tensors: number of tensors in the checkpoint.
        hint: reasons, and the option to change.
    """

    source: str
    tensors: int
    hint: str
    message = "{source}: none of {tensors:,} tensors is selected for FP8; {hint}"


class NonFiniteError(SourceError, ValueError):
    """A selected tensor contains NaN or Inf.

    Attributes:
        tensor: name of the tensor.
        count: number of elements that are NaN or Inf.
        position: index of the first such element, one number for each dimension.
        value: the first such element, as text.
    """

    tensor: str
    count: int
    position: tuple[int, ...]
    value: str
    message = (
        "tensor {tensor!a}: {count:,} values are NaN or Inf, the first ({value}) at {position}; nonfinite='keep'"
        " (--nonfinite keep) leaves such tensors unquantized"
    )


class NonFiniteCodesError(NonFiniteError):
    """A quantized tensor of the source contains NaN, or overflows when it is dequantized."""

    message = (
        "tensor {tensor!a}: {count:,} values are NaN or Inf, the first ({value}) at {position}; the source is"
        " quantized, so no other values are known: fetch it again, or start from the original checkpoint"
    )


class UnrepresentableError(SourceError, ValueError):
    """The original numerics cannot quantize an fp16 tensor, because its multiplier overflows.

    Attributes:
        tensor: name of the tensor.
        amax: largest absolute value of the tensor.
    """

    tensor: str
    amax: float
    message = (
        "tensor {tensor!a}: 448 / {amax:.6g} overflows in fp16, where the original script writes wrong values; use"
        " numerics 'float32' (--numerics float32)"
    )


class UnsteadyReadError(SourceError):
    """Shards of one scale group compute different scales, in every attempt.

    Attributes:
        shard: one of the shards.
        group: the scale group.
        attempts: number of attempts.
    """

    permanent: ClassVar[bool] = False
    shard: str
    group: str
    attempts: int
    message = (
        "{shard!a}: shards still disagree about the scale of {group!a} after {attempts} attempts: suspect a faulty"
        " disk, bad memory or a proxy that alters data; fix it and run again"
    )


class UnfinishedError(SourceError):
    """The folder holds an unfinished conversion in place: only some of its shards are FP8.

    Attributes:
        source: the folder.
    """

    source: str
    message = (
        "{source}: holds an unfinished conversion in place; finish it first (nemotron-fp8 quantize {source}"
        " --in-place, with the same options)"
    )
