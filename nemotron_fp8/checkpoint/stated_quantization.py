"""Quantization that config.json states, at any depth, and files of quantization tools beside it.

Engines read these statements. A statement that the tensors contradict is a remnant: of a model that was quantized when
it was loaded, or dequantized since. A result must state its own quantization only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView


KEYS = ("quantization_config", "compression_config")
"""Keys of config.json, and of the configs in it, that state a quantization; ``compression_config`` is the older key of
compressed-tensors. Source: ``ModelConfig._parse_quant_hf_config`` of vLLM."""
_FILES = re.compile(
    r"^(?:hf_quant_config|quantize_config|quant_config|quantization_config|quanto_qmap"
    r"|quant_model_description[^/]*)\.json$|^recipe\.ya?ml$",
    re.IGNORECASE,
)
"""Names of files that state a quantization: of ModelOpt, AutoGPTQ, AutoAWQ, AutoRound, quanto, msmodelslim and, with
``recipe.yaml``, llm-compressor. Source: ``get_config_filenames`` of vLLM's quantization configs."""
STORED = frozenset(
    (
        *("aqlm", "auto-round", "auto_round", "awq", "awq_marlin", "bitsandbytes", "compressed-tensors", "eetq"),
        *("fbgemm_fp8", "fp8", "gptq", "gptq_marlin", "higgs", "hqq", "modelopt", "modelopt_fp4", "mxfp4", "quanto"),
        *("quark", "spqr", "torchao", "vptq"),
    )
)
"""Methods that store quantized tensors, so that floating-point tensors mean that the statement is a remnant.

Of other methods, such as ``bitnet``, a checkpoint may hold floating-point weights that only a quantized model computes
correctly with.
"""
UNQUANTIZED_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
"""Dtypes of tensors of an unquantized checkpoint. Integers of fewer bits are packed weights or codes, except for a few
masks; a checkpoint with such a mask counts as quantized if its config says so."""
QUANTIZED_NAMES = frozenset(
    (
        *("qweight", "qzeros", "g_idx", "scales", "SCB", "weight_format", "absmax", "quant_map", "nested_absmax"),
        *("nested_quant_map", "W_q", "codebooks", "codes", "weight_packed", "weight_scale", "weight_scale_inv"),
        *("weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale", "weight_scale_2", "input_scale"),
        *("input_global_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale", "scale_inv"),
    )
)
"""Last names of tensors that exist only in quantized checkpoints."""
PACKED_NAMES = frozenset({"qweight", "weight_packed", "SCB", "absmax"})
"""Last names of tensors that prove a quantization without any statement."""


def states_quantization(name: str) -> bool:
    """Return True if a file of this name states a quantization."""
    return bool(_FILES.match(name))


def stated(config: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """Yield every statement of a config with its place, like ``text_config.quantization_config``, the outermost first.

    A null states nothing.
    """
    level: list[tuple[str, Any]] = [("", config or {})]
    while level:
        below: list[tuple[str, Any]] = []
        for place, value in level:
            if isinstance(value, list):
                below += [(f"{place}[{i}]", item) for i, item in enumerate(value)]
                continue
            for key, item in value.items():
                where = f"{place}.{key}" if place else key
                if key in KEYS and item is not None:
                    yield where, item
                elif key not in KEYS:
                    below.append((where, item))
        level = [(place, value) for place, value in below if isinstance(value, dict | list)]


def without_statements(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that state a quantization, at any depth; keys keep their order."""
    return {key: _without(value) for key, value in config.items() if key not in KEYS}


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return without_statements(value)
    return [_without(item) for item in value] if isinstance(value, list) else value


def method_of(statement: object) -> str | None:
    """Return the method that a statement names, or that its keys imply; None if it does neither."""
    if not isinstance(statement, dict):
        return None
    method = statement.get("quant_method")
    if isinstance(method, str):
        return method.lower()
    for key, implied in (
        ("load_in_4bit", "bitsandbytes"),
        ("load_in_8bit", "bitsandbytes"),
        ("quant_algo", "modelopt"),
        ("config_groups", "compressed-tensors"),
    ):
        if key in statement:
            return implied
    return None


def is_remnant(statement: object) -> bool:
    """Return True if a statement is about stored tensors only, so that unquantized tensors contradict it."""
    return method_of(statement) in STORED


def is_quantized_name(name: str) -> bool:
    """Return True if a tensor of this name exists only in quantized checkpoints: a scale, or a packed weight."""
    return name.rpartition(".")[2] in QUANTIZED_NAMES or ".quant_state." in name


def are_unquantized(views: Iterable[TensorView]) -> bool:
    """Return True if neither dtype nor name of any tensor is that of a quantized checkpoint."""
    return all(view.dtype in UNQUANTIZED_DTYPES and not is_quantized_name(view.name) for view in views)


def packed_tensor(views: Iterable[TensorView]) -> str | None:
    """Return the name of a tensor that proves a quantization by its name alone; None without one."""
    return next((view.name for view in views if view.name.rpartition(".")[2] in PACKED_NAMES), None)
