"""What was measured of a shard, as a line of the journal: a conversion in place needs it when the shard is gone."""

from __future__ import annotations

import base64
import struct
from typing import TYPE_CHECKING, Any

import torch

from nemotron_fp8.execute import Measured
from nemotron_fp8.planning.receipt import Receipt, entry_receipt, receipt_entry

if TYPE_CHECKING:
    from collections.abc import Mapping


def measured_entry(name: str, measured: Measured) -> dict[str, Any]:
    """What was measured of a shard, as a line of the journal; amaxes as int32, little-endian, in base64."""
    amaxes = {}
    for group, bits in measured.amaxes.items():
        values = bits.to("cpu", torch.int32).flatten().tolist()
        data = struct.pack(f"<{len(values)}i", *values)
        amaxes[group] = [list(bits.shape), base64.b64encode(data).decode("ascii")]
    nonfinite = receipt_entry(Receipt(name, 0, None, nonfinite=measured.nonfinite))["nonfinite"]
    return {"kind": "amax", "name": name, "amaxes": amaxes, "nonfinite": nonfinite}


def entry_measured(entry: Mapping[str, Any]) -> Measured:
    """A line of the journal as what was measured.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is none.
    """
    amaxes = {}
    for group, (shape, text) in entry["amaxes"].items():
        values = [value for (value,) in struct.iter_unpack("<i", base64.b64decode(text, validate=True))]
        amaxes[str(group)] = torch.tensor(values, dtype=torch.int32).reshape(shape)
    receipt = entry_receipt({**entry, "size": 0, "sha256": None, "kept": [], "small_scales": [], "stats": []})
    return Measured(amaxes, receipt.nonfinite)
