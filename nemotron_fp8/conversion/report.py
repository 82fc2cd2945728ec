"""What came of a conversion, counted from its plan and its receipts, and what a person should be told of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8._utils import listed, peak_resident_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import NonFinite, ShardReceipt


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a conversion; no bytes are written where the result was there already."""

    path: Path | str
    inventory: Inventory
    receipts: Mapping[str, ShardReceipt]
    quantized: int
    unquantized: int
    notices: tuple[str, ...]
    bytes_written: int
    resumed: int
    decoded: int = 0

    def report(self, started: float) -> Report:
        """What a caller is told of a conversion that began at ``started`` of the monotonic clock."""
        return Report(
            destination=str(self.path),
            tensors_quantized=self.quantized,
            tensors_kept=self.unquantized,
            bytes_read=sum(shard.size for shard in self.inventory.shards),
            bytes_written=self.bytes_written,
            seconds=time.monotonic() - started,
            peak_resident_bytes=peak_resident_bytes(),
            unchanged=self.bytes_written == 0,
            resumed=self.resumed,
            nonfinite=tuple({f.tensor: f for r in self.receipts.values() for f in r.nonfinite}.values()),
            notices=self.notices,
            left_out=self.inventory.left_out,
            tensors_dequantized=self.decoded,
        )


def report_of(
    plan: Plan, path: Path | str, receipts: Mapping[str, ShardReceipt], written: int, resumed: int = 0
) -> Outcome:
    """Count what a plan and its receipts say."""
    unquantized = frozenset().union(*(receipt.unquantized for receipt in receipts.values()))
    tensor_tasks = [
        tensor_task for shard_task in plan.shard_tasks for tensor_task in shard_task.tensor_tasks_without(unquantized)
    ]
    quantized = sum(tensor_task.group is not None for tensor_task in tensor_tasks)
    decoded = sum(tensor_task.decode is not None for tensor_task in tensor_tasks)
    rest = len(tensor_tasks) - quantized - decoded
    notices = (*plan.notices, *_followers(plan, receipts), *_small_scales(receipts))
    return Outcome(path, plan.inventory, receipts, quantized, rest, notices, written, resumed, decoded)


def _followers(plan: Plan, receipts: Mapping[str, ShardReceipt]) -> tuple[str, ...]:
    """A notice for every fused module that stays whole because a part of it is not finite."""
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
                f"{fused_module}: engines load {listed([*members[fused_module]])} as one; {listed(cause)} holds NaN or"
                " Inf and"
                f" stays, so {listed(followers)} stays with it"
            )
    return tuple(notices)


def _small_scales(receipts: Mapping[str, ShardReceipt]) -> tuple[str, ...]:
    """A warning where shared scales are so small that an engine's merging loses codes all the same."""
    groups = sorted({group for receipt in receipts.values() for group in receipt.small_scales})
    if not groups:
        return ()
    more = f" and {len(groups) - 4} more" if len(groups) > 4 else ""
    return (
        f"the shared scales of {', '.join(groups[:4])}{more} are under 2^-15: vLLM merges fused tensors through fp16,"
        " where these underflow and lose codes",
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did.

    Attributes:
        destination: where the result is.
        tensors_quantized: tensors that became FP8.
        tensors_kept: tensors that stayed as they were.
        bytes_read: bytes of the source's shards.
        bytes_written: bytes of all files of the result; 0 where it was there already.
        seconds: wall time.
        peak_resident_bytes: the most memory that this process has had resident; None where the system does
            not tell.
        unchanged: whether the destination was this very result already.
        resumed: shards that an earlier run had finished, checked and taken over.
        nonfinite: tensors kept because they, or what is fused with them, hold NaN or Inf.
        notices: what a person should know.
        left_out: files of the source that were not copied, each with the reason.
        tensors_dequantized: tensors that were FP8 and are plain now.
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
