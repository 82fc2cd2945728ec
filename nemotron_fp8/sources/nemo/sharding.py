"""Divide tensors among shards of a given size, as huggingface_hub does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.dtypes import RANK
from nemotron_fp8.checkpoint.inventory import SINGLE, Shard

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nemotron_fp8.checkpoint.tensor_view import TensorView


def split(views: Iterable[TensorView], shard_size: int) -> tuple[Shard, ...]:
    """Divide tensors, in their order, among shards of at most ``shard_size`` bytes of tensors.

    A larger tensor has a shard of its own. The rule is that of ``split_state_dict_into_shards_factory`` in
    huggingface_hub, so that the same model saved by transformers has the same shards.
    """
    groups: list[list[TensorView]] = []
    current: list[TensorView] = []
    room = shard_size
    for view in views:
        if view.nbytes > shard_size:
            groups.append([view])
            continue
        if view.nbytes > room:
            groups.append(current)
            current, room = [], shard_size
        current.append(view)
        room -= view.nbytes
    if current:
        groups.append(current)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [SINGLE]
    metadata = (("format", "pt"),)
    return tuple(
        Shard(name, sum(view.nbytes for view in group), metadata, tuple(sorted(group, key=_file_order)))
        for name, group in zip(names, groups, strict=True)
    )


def _file_order(view: TensorView) -> tuple[int, str]:
    """Return the sort key of a tensor in a file that the safetensors library writes."""
    return RANK[view.dtype], view.name
