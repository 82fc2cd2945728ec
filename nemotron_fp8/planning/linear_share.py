"""Share of the linear weights that becomes FP8, and what is left, with the option that takes it."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import format_bytes
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.module_lists import NUMBER, core

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.planning.tensor_plan import TensorPlan


LEAST_SHARE = 0.5
"""Share of the bytes of linear weights below which a conversion warns."""
NAMES_SHOWN = 6
"""Most kinds of names in a text about what is left."""
_LAYER = re.compile(r"\.\d+\.")


class Left(NamedTuple):
    """Weights that stay unquantized for one reason.

    Attributes:
        reason: reason for the decision.
        tensors: number of weights.
        bytes: their bytes in the source.
        names: their names without layers, ``N`` for a number, each once.
        in_decoder: True for linear weights of the decoder, which count for the share; False for output layers, encoders
            and other modules beside it.
        option: option of the command that takes them; empty if engines load them unquantized.
    """

    reason: str
    tensors: int
    bytes: int
    names: tuple[str, ...]
    in_decoder: bool
    option: str


class LinearShare(NamedTuple):
    """Share of the linear weights of the decoder that becomes FP8.

    Attributes:
        quantized_bytes: bytes of the weights that become FP8, in the source.
        linear_bytes: bytes of all linear weights of the decoder, in the source.
        left: weights that stay, by reason, those of the decoder first, then the largest first.
    """

    quantized_bytes: int
    linear_bytes: int
    left: tuple[Left, ...]

    @property
    def share(self) -> float | None:
        """Share from 0 to 1; None without linear weights."""
        return self.quantized_bytes / self.linear_bytes if self.linear_bytes else None

    @property
    def is_low(self) -> bool:
        """True if less than `LEAST_SHARE` becomes FP8."""
        return self.share is not None and self.share < LEAST_SHARE

    def lines(self) -> list[str]:
        """Return the share, then a line for each reason why weights in the decoder and beside it are left."""
        lines = ["no linear weight of a decoder is known"]
        if self.share is not None:
            lines = [f"{percent(self.share)} of the bytes of the decoder's linear weights become FP8"]
        return lines + [f"{'unquantized' if left.in_decoder else 'beside it'}: {describe(left)}" for left in self.left]

    def text(self) -> str:
        """Return the lines as one sentence."""
        return "; ".join(self.lines())


def percent(share: float) -> str:
    """Format a share in percent, never rounded up to 100."""
    return f"{min(share * 100, 99.9):.1f}%" if 0.99 <= share < 1 else f"{share:.0%}"


def describe(left: Left) -> str:
    """Return names, size, reason and option of weights that stay."""
    more = f" and {len(left.names) - NAMES_SHOWN} more" if len(left.names) > NAMES_SHOWN else ""
    names = ", ".join(left.names[:NAMES_SHOWN])
    option = f"; to take them: {left.option}" if left.option else ""
    return f"{names}{more} ({format_bytes(left.bytes)}: {left.reason}{option})"


def linear_share(tensors: Iterable[TensorPlan], options: Mapping[str, str]) -> LinearShare:
    """Return the share of linear weights that becomes FP8.

    Args:
        tensors: decision for every tensor.
        options: option of the command that takes weights which stay for a reason, by reason.
    """
    quantized = total = 0
    by_reason: defaultdict[tuple[bool, str], list[TensorPlan]] = defaultdict(list)
    for t in tensors:
        if t.role == "linear":
            total += t.bytes_in
            quantized += t.bytes_in * t.quantize
        if not t.quantize and t.role != "other":
            by_reason[t.role == "linear", t.reason].append(t)
    left = []
    for (in_decoder, reason), stay in by_reason.items():
        names = tuple(dict.fromkeys(kind_of(t.name) for t in stay))
        option = options.get(_rule_of(reason), "")
        if option:
            option += f" {option_for(t.name for t in stay)}"
        left.append(Left(reason, len(stay), sum(t.bytes_in for t in stay), names, in_decoder, option))
    return LinearShare(quantized, total, tuple(sorted(left, key=lambda each: (not each.in_decoder, -each.bytes))))


def check_share(share: LinearShare, least: float | None) -> None:
    """Refuse a plan in which too little of the decoder becomes FP8.

    Args:
        share: share of the plan.
        least: least share of the bytes of linear weights, in percent; None for any.

    Raises:
        RecipeError: a smaller share becomes FP8, or the source has no linear weight of a decoder.
    """
    found = share.share
    if least is not None and (found is None or found * 100 < least):
        raise RecipeError(f"min_share (--min-share) is {least:g}%, but {share.text()}", ("min_share",))


def kind_of(name: str) -> str:
    """Return the name of a tensor inside its layer, with ``N`` for other numbers."""
    return NUMBER.sub("N", _inside_the_layer(name))


def _inside_the_layer(name: str) -> str:
    """Return the name of a module without that of its layer, and without the first parts that engines drop."""
    text = core(name).removesuffix(".weight")
    layer = _LAYER.search(text)
    return text if layer is None else text[layer.end() :]


def option_for(names: Iterable[str]) -> str:
    """Return a pattern that matches the names of tensors of some kinds in all layers; quoted for a shell."""
    kinds = list(dict.fromkeys(map(_ending, names)))
    text = kinds[0] if len(kinds) == 1 else f"({'|'.join(kinds)})"
    return shlex.quote(rf"(^|\.){text}$")


def _ending(name: str) -> str:
    """Return a regular expression for the end of a name, with any number for each number."""
    parts = _inside_the_layer(name).split(".")
    text = r"\.".join(r"\d+" if NUMBER.fullmatch(part) else re.escape(part) for part in parts)
    return text + r"\.weight" * name.endswith(".weight")


def _rule_of(reason: str) -> str:
    """Return a reason without what differs from tensor to tensor."""
    return reason.partition(":")[0]
