"""config.json and the index of a result, and further files that state its quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.json_text import pretty_json
from nemotron_fp8.checkpoint.stated_quantization import without_statements

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.planning.layouts import Layout


def render_config(config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> bytes:
    """Return config.json as transformers writes it: the source's keys in order, then any ``quantization_config``.

    The source's own statements of a quantization are dropped, also those of nested configs: engines read them.
    """
    plain = without_statements(config)
    return pretty_json(plain if quantization is None else {**plain, "quantization_config": quantization})


def render_beside(layout: Layout, quantization: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files that state a quantization beside config.json, by name; none for an empty statement."""
    return {name: pretty_json(value) for name, value in layout.beside(quantization).items()} if quantization else {}


def render_index(headers: Mapping[str, Header], metadata: Mapping[str, Any]) -> bytes:
    """Return the index of shards.

    Args:
        headers: headers by file name of the shard.
        metadata: metadata of the source's index. Its ``total_size`` is replaced by the sum of the tensors' bytes.
    """
    weight_map = {entry.name: shard for shard, header in headers.items() for entry in header.entries}
    total = sum(header.data_size for header in headers.values())
    return pretty_json({"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
