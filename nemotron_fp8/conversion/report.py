"""Report of a conversion: counts and notices from its plan and its receipts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8._display import Part, counted, display, one_line
from nemotron_fp8._utils import format_bytes, listed, peak_resident_bytes
from nemotron_fp8.planning.engine_support import support_text
from nemotron_fp8.planning.linear_share import describe, percent
from nemotron_fp8.planning.receipt import NOT_RECODED, Recoded, recoded_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.planning.engine_support import EngineSupport
    from nemotron_fp8.planning.linear_share import LinearShare
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import NonFinite, ShardReceipt


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """Report of a conversion.

    Attributes:
        destination: path or address of the result.
        tensors_quantized: tensors that were quantized to FP8.
        tensors_kept: tensors that were copied unquantized.
        bytes_read: bytes of the source's shards.
        bytes_written: bytes of all files of the result; 0 if the destination already held the result.
        seconds: wall time.
        peak_resident_bytes: peak resident memory of this process; None if the operating system does not report it.
        unchanged: True if the destination already held the result.
        resumed: shards of an earlier run that were verified and reused.
        nonfinite: tensors with NaN or Inf, which are left unquantized together with the tensors fused with them.
        notices: warnings and remarks for the user.
        left_out: files of the source that were not copied, each with the reason.
        tensors_dequantized: FP8 tensors that were dequantized.
        share: share of the linear weights that became FP8, and what was left; None for another task.
        engines: engines, and whether they read the result; empty for another task.
        recoded: FP8 tensors of a quantized source that keep their codes or are rounded once more, and the values that
            changed; zeros for an unquantized source, and for shards of an earlier run whose records are gone.
    """

    destination: str
    tensors_quantized: int
    tensors_kept: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_resident_bytes: int | None
    unchanged: bool
    resumed: int
    nonfinite: tuple[NonFinite, ...]
    notices: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    tensors_dequantized: int = 0
    share: LinearShare | None = None
    engines: tuple[EngineSupport, ...] = ()
    recoded: Recoded = NOT_RECODED

    def __repr__(self) -> str:
        if self.unchanged:
            return one_line("Report", self.destination, ["already up to date"])
        return one_line("Report", self.destination, [self._counts, self._sizes])

    def _repr_html_(self) -> str:
        share = self.share
        facts = [
            ("tensors", self._counts),
            ("files", "already up to date; nothing was changed" if self.unchanged else self._sizes),
            ("memory at peak", "" if self.peak_resident_bytes is None else format_bytes(self.peak_resident_bytes)),
            ("resumed", f"{counted(self.resumed, 'shard')} of an earlier run" if self.resumed else ""),
            ("linear weights", "" if share is None or share.share is None else f"{percent(share.share)} FP8 by bytes"),
            ("source", self.recoded.sentence and f"quantized itself: {self.recoded.sentence}"),
            ("engines", support_text(self.engines) if self.engines else ""),
        ]
        found = [(f.tensor, f"{f.count:,}", f"{f.value} at {list(f.position)}") for f in self.nonfinite]
        left = () if share is None else share.left
        parts = [
            Part("Linear weights left unquantized", [(describe(each),) for each in left]),
            Part("NaN and Inf", found, ("tensor", "values", "first"), (1,)),
            Part("Notices", [(notice,) for notice in self.notices]),
            Part("Files that were not copied", self.left_out, ("file", "why")),
        ]
        return display("Report", self.destination, facts, parts)

    @property
    def _counts(self) -> str:
        counts = (
            (self.tensors_quantized, "quantized"),
            (self.tensors_dequantized, "dequantized"),
            (self.tensors_kept, "copied"),
        )
        return ", ".join(f"{count:,} {what}" for count, what in counts if count)

    @property
    def _sizes(self) -> str:
        sizes = f"{format_bytes(self.bytes_read)} read, {format_bytes(self.bytes_written)} written"
        return f"{sizes} in {self.seconds:.1f} s"


def report_of(
    plan: Plan, destination: str, receipts: Mapping[str, ShardReceipt], written: int, resumed: int, started: float
) -> Report:
    """Build the report of a conversion.

    Args:
        plan: plan of the conversion.
        destination: name of the result.
        receipts: receipts of the shards, by name; empty if they are unknown, because another run made the result.
        written: bytes of all files that were written; 0 if the destination already held the result.
        resumed: shards that an earlier run had finished.
        started: time of the call on the monotonic clock, in seconds.
    """
    unquantized = frozenset().union(*(receipt.unquantized for receipt in receipts.values()))
    tensor_tasks = [
        tensor_task for shard_task in plan.shard_tasks for tensor_task in shard_task.tensor_tasks_without(unquantized)
    ]
    quantized = sum(tensor_task.group is not None for tensor_task in tensor_tasks)
    recoded = recoded_of(receipts.values())
    dequantized = sum(tensor_task.decode is not None for tensor_task in tensor_tasks)
    return Report(
        destination=destination,
        tensors_quantized=quantized,
        tensors_kept=len(tensor_tasks) - quantized - dequantized,
        bytes_read=sum(shard.size for shard in plan.inventory.shards),
        bytes_written=written,
        seconds=time.monotonic() - started,
        peak_resident_bytes=peak_resident_bytes(),
        unchanged=written == 0,
        resumed=resumed,
        nonfinite=tuple({f.tensor: f for r in receipts.values() for f in r.nonfinite}.values()),
        notices=(*plan.notices, *_followers(plan, receipts), *_small_scales(receipts), *_recoding(recoded)),
        left_out=plan.inventory.left_out,
        tensors_dequantized=dequantized,
        share=None if plan.task else plan.share_without(unquantized),
        engines=plan.engines,
        recoded=recoded,
    )


def _followers(plan: Plan, receipts: Mapping[str, ShardReceipt]) -> tuple[str, ...]:
    """Return a notice for every fused module that is left unquantized because a part of it is not finite."""
    spoiled = {finding.tensor for receipt in receipts.values() for finding in receipt.nonfinite}
    members: dict[str, dict[str, None]] = {}
    for group in (group for shard_task in plan.shard_tasks for group in shard_task.groups):
        members.setdefault(group.fused_module, {}).update((view.name, None) for view in group.members)
    notices = []
    for fused_module in sorted(frozenset[str]().union(*(receipt.unquantized for receipt in receipts.values()))):
        cause = [name for name in members[fused_module] if name in spoiled]
        followers = [name for name in members[fused_module] if name not in spoiled]
        if followers:
            notices.append(
                f"{fused_module}: engines fuse {listed([*members[fused_module]])}; unquantized: {listed(cause)} (NaN or"
                f" Inf); therefore also unquantized: {listed(followers)}"
            )
    return tuple(notices)


def _recoding(recoded: Recoded) -> tuple[str, ...]:
    """Return the counts of a quantized source in words."""
    return (f"the source is quantized itself: {recoded.sentence}",) if recoded.sentence else ()


def _small_scales(receipts: Mapping[str, ShardReceipt]) -> tuple[str, ...]:
    """Return a warning if shared scales are so small that vLLM's merging of fused tensors loses codes."""
    groups = sorted({group for receipt in receipts.values() for group in receipt.small_scales})
    if not groups:
        return ()
    more = f" and {len(groups) - 4} more" if len(groups) > 4 else ""
    return (
        f"shared scales under 2^-15: {', '.join(groups[:4])}{more}; vLLM merges fused tensors through fp16, where such"
        " scales underflow and codes are lost",
    )
