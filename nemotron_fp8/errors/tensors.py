"""A source whose files are sound and whose tensors cannot be converted as asked."""

from __future__ import annotations

from nemotron_fp8.errors.base import SourceError, printable


class AlreadyQuantizedError(SourceError):
    """The source is quantized already; quantizing codes again would destroy it.

    Attributes:
        evidence: what shows it.
    """

    def __init__(self, source: str, evidence: str) -> None:
        self.evidence = evidence
        super().__init__(
            f"{source}: already quantized ({evidence}); start from the original checkpoint, or make it plain first"
            " with dequantize_repo (nemotron-fp8 dequantize)"
        )


class NotQuantizedError(SourceError):
    """The source holds no FP8 weight to make plain.

    Attributes:
        tensors: how many tensors there are.
    """

    def __init__(self, source: str, tensors: int) -> None:
        self.tensors = tensors
        super().__init__(f"{source}: none of {tensors:,} tensors is F8_E4M3; there is nothing to dequantize")


class LayoutError(SourceError, ValueError):
    """A quantized tensor is laid out as no known format lays it out.

    Attributes:
        tensor: its name.
    """

    def __init__(self, tensor: str, problem: str) -> None:
        self.tensor = tensor
        super().__init__(f"tensor {printable(tensor)}: {problem}")


class StackedExpertsError(SourceError):
    """The experts of a layer are stacked in one tensor, and no engine's names for single ones are known.

    Attributes:
        tensor: the stack.
        shape: its shape.
    """

    def __init__(self, tensor: str, shape: tuple[int, ...]) -> None:
        self.tensor, self.shape = tensor, shape
        super().__init__(
            f"tensor {printable(tensor)} {list(shape)}: stacked experts of a family whose names for single experts are"
            f" not known; leave them as they are with ignore (--ignore '{tensor.rsplit('.', 1)[-1]}'), or save the"
            " checkpoint with one tensor for each expert"
        )


class NothingSelectedError(SourceError):
    """No tensor would be quantized.

    Attributes:
        tensors: how many tensors there are.
    """

    def __init__(self, source: str, tensors: int, hint: str) -> None:
        self.tensors = tensors
        super().__init__(f"{source}: none of {tensors:,} tensors is selected for FP8; {hint}")


class NonFiniteError(SourceError, ValueError):
    """A tensor to be quantized holds NaN or Inf.

    Attributes:
        tensor: its name.
        count: how many of its elements.
        position: index of the first, one number a dimension.
    """

    def __init__(self, tensor: str, count: int, position: tuple[int, ...], value: str) -> None:
        self.tensor, self.count, self.position, self.value = tensor, count, position, value
        where = ", ".join(map(str, position))
        super().__init__(
            f"tensor {printable(tensor)}: {count:,} values are NaN or Inf, the first ({value}) at [{where}];"
            " nonfinite='keep' (--nonfinite keep) leaves such tensors as they are"
        )


class UnrepresentableError(SourceError, ValueError):
    """The original numerics cannot quantize this fp16 tensor: its multiplier overflows.

    Attributes:
        tensor: its name.
        amax: its largest absolute value.
    """

    def __init__(self, tensor: str, amax: float) -> None:
        self.tensor, self.amax = tensor, amax
        super().__init__(
            f"tensor {printable(tensor)}: in fp16 448 / {amax:.6g} overflows, and the original script"
            " writes garbage; use numerics 'float32'"
        )


class UnsteadyReadError(SourceError):
    """Shards that share a scale group do not find the same in it, however often they are made.

    Attributes:
        shard: one of them.
        group: the scale group.
        attempts: how often they were made.
    """

    def __init__(self, shard: str, group: str, attempts: int) -> None:
        self.shard, self.group, self.attempts = shard, group, attempts
        super().__init__(
            f"{printable(shard)}: the scale of {printable(group)} came out otherwise than in another shard,"
            f" {attempts} times; look for a disk, memory or a proxy that alters data, then run again"
        )


class UnfinishedError(SourceError):
    """The folder is half-way through a conversion in place: some shards are FP8, others are not.

    Attributes:
        source: the folder.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        super().__init__(
            f"{source}: half-way through a conversion in place; finish it first (nemotron-fp8 quantize"
            f" {source} --in-place, with the same options)"
        )
