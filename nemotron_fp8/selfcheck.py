"""What a result tells about itself: its manifest against its files, its index and config against its shards."""

from __future__ import annotations

import math
import os
import struct
from typing import TYPE_CHECKING

from nemotron_fp8.config import kept_modules
from nemotron_fp8.dtypes import FP8
from nemotron_fp8.errors import MalformedManifestError, SourceError
from nemotron_fp8.manifest import check_files, read_manifest
from nemotron_fp8.partial import names_in
from nemotron_fp8.source import CONFIG, MANIFEST, read_folder

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.source import Inventory
    from nemotron_fp8.view import TensorView

Problems = list[tuple[str, str]]
"""What a problem is about (a tensor or a file), and the problem."""


def check_manifest(root: Path, threads: int, *, required: bool) -> Problems:
    """Compare every file of a result with its manifest.

    Args:
        root: the result.
        threads: how many files to hash at a time.
        required: whether a result without a manifest is a problem.
    """
    try:
        manifest = read_manifest(root)
    except MalformedManifestError as error:
        return [(MANIFEST, str(error))]
    if manifest is None:
        return [(MANIFEST, "missing: only a comparison with the source can tell")] if required else []
    problems: Problems = list(check_files(root, manifest.files, threads).items())
    known = {MANIFEST, *manifest.files}
    for name in names_in(root):
        if name not in known and (name.endswith(".safetensors") or name == CONFIG):
            problems.append((name, f"not in {MANIFEST}"))
    if required and not manifest.has_digests:
        problems.append((MANIFEST, "holds no digests: only a comparison with the source can tell"))
    return problems


def check_alone(root: Path) -> tuple[Problems, int, int]:
    """Check what a result must be whatever it was made from.

    Returns:
        What is wrong, how many tensors are FP8 and how many are not, scales apart.
    """
    try:
        inventory = read_folder(root)
    except SourceError as error:
        return [(str(getattr(error, "shard", root.name)), str(error))], 0, 0
    views = {view.name: view for view in inventory.views}
    scales = {f"{name}_scale" for name, view in views.items() if view.dtype == FP8}
    problems: Problems = []
    for name, view in views.items():
        if view.dtype == FP8:
            scale = views.get(f"{name}_scale")
            if scale is None:
                problems.append((name, f"FP8, but its scale {name}_scale is missing"))
            elif problem := _wrong_scale(root, scale):
                problems.append((scale.name, problem))
        elif name.endswith(".weight_scale") and name not in scales:
            problems.append((name, "the scale of no FP8 tensor"))
    if not scales:
        problems.append((root.name, "holds no FP8 tensor"))
    problems += _check_config(inventory, views, scales)
    return problems, len(scales), len(views.keys() - scales) - len(scales)


def _wrong_scale(root: Path, scale: TensorView) -> str | None:
    """Say what is wrong with a scale: an engine takes anything in silence."""
    if scale.dtype != "F32":
        return f"{scale.dtype}, must be F32"
    for extent in scale.extents:
        fd = os.open(root / extent.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(fd, scale.nbytes, extent.offset)
        finally:
            os.close(fd)
        for (value,) in struct.iter_unpack("<f", data):
            if not (math.isfinite(value) and value > 0):
                return f"holds {value}, must be positive and finite"
    return None


def _check_config(inventory: Inventory, views: dict[str, TensorView], scales: set[str]) -> Problems:
    if inventory.config is None:
        return []
    quantization = inventory.config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return [(CONFIG, "its quantization_config does not say quant_method fp8")]
    listed = quantization.get("ignored_layers")
    if not isinstance(listed, list) or not all(isinstance(module, str) for module in listed):
        return [(CONFIG, "ignored_layers is not a list of names")]
    quantised = frozenset(name.removesuffix("_scale") for name in scales)
    expected = kept_modules((view for name, view in views.items() if name not in scales), quantised)
    problems: Problems = [
        (m, "stays, but is not in ignored_layers") for m in expected if m not in set(listed)
    ]
    problems += [(m, "in ignored_layers, but no layer that stays") for m in listed if m not in set(expected)]
    return problems
