"""Quantized weights of a source as views of their float32 values: FP8 with scales, and MXFP4.

=======================================  ==========================================================================
weights                                  codes and scales
=======================================  ==========================================================================
FP8 of every registered layout           ``X.weight`` F8_E4M3, ``X.weight_scale`` or ``X.weight_scale_inv``
FP8 of DeepSeek V4                       ``X.weight`` F8_E4M3, ``X.scale`` F8_E8M0 or F32
FP8 of ModelOpt                          scales of rows ``[N]``, of blocks ``[N / 128, 1, K / 128, 1]``
MXFP4 of DeepSeek V4, of ModelOpt        ``X.weight`` I8 or U8 ``[N, K / 2]``, a scale E8M0 ``[N, K / 32]``
MXFP4 of compressed-tensors              ``X.weight_packed`` U8 ``[N, K / 2]``, ``X.weight_scale`` U8 ``[N, K / 32]``
MXFP4 of gpt-oss, stacks of experts      ``X_blocks`` U8 ``[E, N, K / 32, 16]``, ``X_scales`` U8 ``[E, N, K / 32]``
=======================================  ==========================================================================

Scales of 8 bits are E8M0. A scale covers a tensor, a row, or a block whose size the config states, else one of the
registered layouts; the last block of a row or column may be ragged, as in DeepSeek's checkpoints.

Sources: the loaders of vLLM and transformers for each format, and the published checkpoints of DeepSeek-V3 and V4, and
of gpt-oss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.dtypes import nbytes
from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.checkpoint.stated_quantization import is_quantized_name
from nemotron_fp8.checkpoint.tensor_view import E2M1, Encoding, TensorView, encoded
from nemotron_fp8.errors import LayoutError
from nemotron_fp8.planning.layouts import one_scale_shapes, scale_suffixes, stored_formats
from nemotron_fp8.planning.number_format import MX_BLOCK, Coverage, coverage_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.planning.layouts import WeightFormat


EXPONENTS = frozenset({"F8_E8M0", "U8"})
"""Dtypes of scales that are powers of two, in one byte."""
SCALE_DTYPES = frozenset({"F32", "BF16", "F16"}) | EXPONENTS
"""Dtypes of scales that are read."""
GROUP = MX_BLOCK[1]
"""Elements under one scale of the Microscaling formats."""
PACKED_DTYPES = frozenset({"I8", "U8"})
"""Dtypes of bytes that hold two codes of MXFP4 each."""
BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the names of codes and scales of stacked experts in gpt-oss."""


@dataclass(frozen=True, slots=True)
class EncodedSource:
    """A source whose quantized weights are views of their values.

    Attributes:
        inventory: contents of the source, with views of values in place of codes; its scales are tensors as before.
        weights: the views of values, by name.
        scales: names of the scales that these views read.
    """

    inventory: Inventory
    weights: Mapping[str, TensorView]
    scales: frozenset[str]


def encoded_source(inventory: Inventory) -> EncodedSource:
    """Return a source with its FP8 and MXFP4 weights as views of their values; without any, the source as it is.

    Raises:
        LayoutError: an FP8 tensor has no scale, several, or one whose shape fits no known layout.
    """
    views = {view.name: view for view in inventory.views}
    formats = stored_formats(inventory.quantization_config)
    elements = {weight_format.numbers.element.dtype for weight_format in formats}
    finder = _Scales(views, formats)
    found: dict[str, TensorView] = {}
    for view in views.values():
        if view.dtype in elements and not is_quantized_name(view.name):
            found[view.name] = finder.fp8(view)
        elif (packed := _mxfp4(view, views)) is not None:
            found[view.name] = packed
    if not found:
        return EncodedSource(inventory, {}, frozenset())
    shards = tuple(
        replace(shard, views=tuple(found.get(view.name, view) for view in shard.views)) for shard in inventory.shards
    )
    return EncodedSource(
        replace(inventory, shards=shards), {v.name: v for v in found.values()}, scales_of(found.values())
    )


def scales_of(views: Iterable[TensorView]) -> frozenset[str]:
    """Return the names of the scales that views of values read."""
    return frozenset(view.encoding.scales.name for view in views if view.encoding is not None)


def check_all_read(inventory: Inventory, source: EncodedSource) -> None:
    """Raise LayoutError for a scale that no quantized weight has: a result would hold it beside scales of its own.

    Args:
        inventory: contents of the source.
        source: the same source, with its weights as views of their values.
    """
    endings = tuple(f".weight{suffix}" for suffix in scale_suffixes())
    for view in inventory.views:
        if view.name.endswith(endings) and view.name not in source.scales:
            problem = "a scale of no FP8 tensor: the weight is missing, or not quantized"
            raise LayoutError(view.name, f"{problem}; remove the scale, or start from the original checkpoint")


class _Scales:
    """The scale tensors of a checkpoint, by the layout of its config, or by all layouts without such a config."""

    def __init__(self, views: Mapping[str, TensorView], formats: Sequence[WeightFormat]) -> None:
        self._views, self._suffixes, self._whole = views, scale_suffixes(), one_scale_shapes()
        self._blocks = list(dict.fromkeys(weight_format.numbers.coverage.block for weight_format in formats))

    def fp8(self, view: TensorView) -> TensorView:
        """Return the view of the values of an FP8 tensor."""
        scale = self._scale(view)
        shape = _without_ones(scale.shape)
        blocks = list(self._blocks)
        if scale.dtype in EXPONENTS and MX_BLOCK not in blocks:
            blocks.append(MX_BLOCK)
        found = [c for block in blocks if (c := _coverage(view.shape, shape, block, self._whole))]
        sizes = list(dict.fromkeys(coverage.block for coverage in found if coverage.columns is not None))
        described = f"a scale {scale.dtype} {list(scale.shape)}"
        if not found or scale.dtype not in SCALE_DTYPES:
            raise LayoutError(scale.name, f"{described} fits no known layout of an FP8 weight {list(view.shape)}")
        if len(sizes) > 1:
            text = " and ".join("x".join(map(str, block)) for block in sizes)
            raise LayoutError(
                scale.name, f"{described} fits blocks of {text}; {CONFIG} must state which (quantization_config)"
            )
        return encoded(view.name, view.shape, Encoding(view.dtype, view, scale, (found[0].rows, found[0].columns)))

    def _scale(self, view: TensorView) -> TensorView:
        names = [view.name + suffix for suffix in self._suffixes]
        if view.name.endswith(".weight"):
            names.append(view.name.removesuffix("weight") + "scale")
        found = [self._views[name] for name in names if name in self._views]
        if not found:
            wanted = " or ".join(f"weight{suffix}" for suffix in self._suffixes)
            raise LayoutError(view.name, f"an FP8 tensor without a scale: the checkpoint has no {wanted} for it")
        if len(found) > 1:
            text = " and ".join(scale.name for scale in found)
            raise LayoutError(view.name, f"an FP8 tensor with {len(found)} scales, {text}: remove the wrong one")
        return found[0]


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of blocks ``[rows, 1, columns, 1]``, as ModelOpt stores them, as a matrix."""
    return (shape[0], shape[2]) if len(shape) == 4 and shape[1] == shape[3] == 1 else shape


def _coverage(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int], whole: frozenset[tuple[int, ...]]
) -> Coverage | None:
    """Return the coverage of a scale of a matrix, or of a stack whose matrices have whole blocks."""
    if len(weight) != 3 or len(scale) != 3 or scale[0] != weight[0]:
        return coverage_of(weight, scale, block, whole)
    found = coverage_of(weight[1:], scale[1:], block, frozenset())
    if found is None or (found.rows is not None and weight[1] % found.rows):
        return None
    return found


def _mxfp4(view: TensorView, views: Mapping[str, TensorView]) -> TensorView | None:
    """Return the view of the values of packed codes; None for any other tensor."""
    if view.name.endswith(BLOCKS):
        scale = views.get(view.name.removesuffix(BLOCKS) + SCALES)
        shape = view.shape
        if scale is None or view.dtype != "U8" or len(shape) != 4 or shape[3] != GROUP // 2 or not view.numel:
            return None
        if scale.dtype not in EXPONENTS or scale.shape != shape[:3]:
            return None
        name = view.name.removesuffix(BLOCKS)
        return _packed(name, view, scale, (*shape[:2], shape[2] * GROUP))
    if view.dtype not in PACKED_DTYPES or len(view.shape) != 2 or not view.numel:
        return None
    if view.name.endswith(".weight"):
        stem = view.name.removesuffix("weight")
        names = [f"{stem}scale", f"{stem}weight_scale"]
    elif view.name.endswith(".weight_packed"):
        stem = view.name.removesuffix("weight_packed")
        names = [f"{stem}weight_scale"]
    else:
        return None
    scale = next((views[name] for name in names if name in views), None)
    rows, half = view.shape
    if scale is None or scale.dtype not in EXPONENTS or scale.shape != (rows, 2 * half // GROUP) or 2 * half % GROUP:
        return None
    return _packed(f"{stem}weight", view, scale, (rows, 2 * half))


def _packed(name: str, view: TensorView, scale: TensorView, shape: tuple[int, ...]) -> TensorView:
    """Return the view of the values of dense packed codes, which become a matrix of bytes."""
    rows, half = prod(shape[:-1]), shape[-1] // 2
    (extent,) = view.extents
    codes = TensorView(name, view.dtype, (rows, half), (extent._replace(stride=half, runs=rows, length=half),))
    assert nbytes(view.dtype, codes.shape) == view.nbytes
    return encoded(name, shape, Encoding(E2M1, codes, scale, MX_BLOCK))
