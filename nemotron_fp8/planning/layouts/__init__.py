"""Layouts of quantized checkpoints: one record each. `register_layout` adds another."""

from nemotron_fp8.planning.layouts.base import (
    ENGINES,
    Activations,
    Choice,
    Layout,
    ListReader,
    Output,
    Readers,
    Scheme,
    StaticScales,
    WeightFormat,
    execution_scales,
    input_scale_of,
    layout_named,
    layout_names,
    layouts,
    one_scale_shapes,
    quantized_dtypes,
    register_layout,
    scale_suffixes,
    stored_formats,
    unregister_layout,
)
from nemotron_fp8.planning.layouts.compressed_tensors import COMPRESSED_TENSORS
from nemotron_fp8.planning.layouts.fp8 import FP8
from nemotron_fp8.planning.layouts.modelopt import MODELOPT
from nemotron_fp8.planning.layouts.mxfp8 import MXFP8

__all__ = [
    "COMPRESSED_TENSORS",
    "ENGINES",
    "FP8",
    "MODELOPT",
    "MXFP8",
    "Activations",
    "Choice",
    "Layout",
    "ListReader",
    "Output",
    "Readers",
    "Scheme",
    "StaticScales",
    "WeightFormat",
    "execution_scales",
    "input_scale_of",
    "layout_named",
    "layout_names",
    "layouts",
    "one_scale_shapes",
    "quantized_dtypes",
    "register_layout",
    "scale_suffixes",
    "stored_formats",
    "unregister_layout",
]

for _layout in (FP8, COMPRESSED_TENSORS, MXFP8, MODELOPT):
    register_layout(_layout)
