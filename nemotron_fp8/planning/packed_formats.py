"""Packed weights that are not read: their format by name, and the tool that undoes it.

Sources: the packers of compressed-tensors, ModelOpt, AutoAWQ, GPTQModel and bitsandbytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.checkpoint.dtypes import FLOAT8
from nemotron_fp8.checkpoint.stated_quantization import (
    is_quantized_name,
    last_name,
    method_of,
    packed_tensor,
    packed_weight,
    stated,
)
from nemotron_fp8.errors import PackedWeightsError
from nemotron_fp8.planning.plan import evidence_of_quantization

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView


TRANSFORMERS = "transformers (model.dequantize(), then save_pretrained)"
COMPRESSED = "transformers (load with CompressedTensorsConfig(run_compressed=False), then save_pretrained)"
GPTQMODEL = "GPTQModel"


class _Format(NamedTuple):
    """A packed format: its name, and the tool that undoes it; empty if none is known."""

    name: str
    tool: str = ""


BY_METHOD = {
    "awq": _Format("AWQ (INT4)", GPTQMODEL),
    "awq_marlin": _Format("AWQ (INT4)", GPTQMODEL),
    "gptq": _Format("GPTQ", GPTQMODEL),
    "gptq_marlin": _Format("GPTQ", GPTQMODEL),
    "bitsandbytes": _Format("bitsandbytes", TRANSFORMERS),
    "hqq": _Format("HQQ", TRANSFORMERS),
    "torchao": _Format("torchao", TRANSFORMERS),
}
"""Formats by the method that a config states."""


def refuse_packed(inventory: Inventory, left: Sequence[TensorView]) -> None:
    """Raise PackedWeightsError for weights in a format that is not read.

    Args:
        inventory: contents of the source.
        left: its tensors, except weights that are read and their scales.
    """
    found = _packed(inventory, left)
    if found is None:
        return
    name, what = found
    views = {view.name: view for view in inventory.views}
    methods = [method for _, statement in stated(inventory.config) if (method := method_of(statement))]
    form = _format(name, views, methods[0] if methods else None)
    evidence = (evidence_of_quantization(inventory) if methods else None) or f"tensor {name} {what}"
    raise PackedWeightsError(inventory.source, evidence, False, form.name, form.tool)


def _packed(inventory: Inventory, left: Sequence[TensorView]) -> tuple[str, str] | None:
    """Return the name of a packed tensor, and what shows that; None without one."""
    if (name := packed_tensor(left)) is not None:
        return name, "belongs to packed weights"
    for view in left:
        if view.dtype in FLOAT8 and view.name.endswith(".weight") and not is_quantized_name(view.name):
            return view.name, f"is {view.dtype}"
    return packed_weight(left, inventory.config)


def _format(name: str, views: Mapping[str, TensorView], method: str | None) -> _Format:
    """Return the format of a packed tensor, by its name and the tensors beside it."""
    last, dtype = last_name(name), views[name].dtype
    stem = name.removesuffix(last)
    if f"{stem}weight_global_scale" in views or f"{stem}weight_scale_2" in views:
        return _Format("NVFP4", COMPRESSED if last == "weight_packed" else "")
    if last == "weight_packed":
        return _Format("INT4 or INT8, packed by compressed-tensors (pack-quantized)", COMPRESSED)
    if method in BY_METHOD:
        return BY_METHOD[method]
    if last in ("absmax", "SCB"):
        return BY_METHOD["bitsandbytes"]
    if last == "qweight":
        return _Format("GPTQ or AWQ", GPTQMODEL)
    if dtype == "I8" and f"{stem}weight_scale" in views:
        return _Format("INT8", COMPRESSED if method == "compressed-tensors" else "")
    if dtype in FLOAT8:
        return _Format(f"FP8 of another kind ({dtype})")
    return _Format("packed" if method is None else f"{method}, packed")
