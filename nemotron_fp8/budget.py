"""Bytes as people write them, and the cores that this process may use."""

from __future__ import annotations

import os
import re

from nemotron_fp8.errors import RecipeError

UNITS = {"": 1, "b": 1}
UNITS |= {f"{prefix}ib": 1 << (10 * power) for power, prefix in enumerate("kmgt", 1)}
UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}


def parse_bytes(text: str | int) -> int:
    """Return a number of bytes from ``"256MiB"``, ``"1.5GB"``, ``"4096"`` or a number.

    Raises:
        RecipeError: it is not understood, or not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text), re.ASCII)
        if not found or found.group(2).lower() not in UNITS:
            raise RecipeError(f"{text!r} is no amount of memory; write it like 256MiB, 1.5GB or 1000000")
        count = int(float(found.group(1)) * UNITS[found.group(2).lower()])
    if count <= 0:
        raise RecipeError(f"{text!r} is no amount of memory: it must be positive")
    return count


def format_bytes(count: float) -> str:
    """Return a number of bytes for people: three or four digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
