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


MICROSCALING = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})
"""Dtypes of packed weights and of their scales; no unquantized checkpoint has them (OCP Microscaling Formats)."""
CODES = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
"""Dtypes of codes, or of several codes in one element, if there is a scale beside the tensor."""
EXPERT_DTYPE = "expert_dtype"
"""Key of the config of DeepSeek V4 that states the format of its experts."""
_FEW_BITS = re.compile(r"(mx|nv)?(fp|int|uint)[1-8]", re.IGNORECASE)


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


def packed_weight(views: Iterable[TensorView], config: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """Return the name of a tensor of codes that are no FP8 numbers, and what shows that; None without one.

    Args:
        views: all tensors of a source.
        config: config.json; None without one.
    """
    dtypes = {view.name: view.dtype for view in views}
    experts = _few_bits(config)
    for name, dtype in dtypes.items():
        if dtype in MICROSCALING:
            return name, f"is {dtype}, which only quantized checkpoints have"
        if dtype not in CODES:
            continue
        scale = next((scale for scale in _scales_of(name) if scale in dtypes), None)
        if scale is not None:
            return name, f"is {dtype}, with a scale {scale}"
        if experts is not None and ".experts." in name and name.endswith(".weight"):
            return name, f"is {dtype}, and {EXPERT_DTYPE} is {experts!r}"
    return None


def _scales_of(name: str) -> Iterator[str]:
    """Yield the names that the scale of a tensor of codes may have."""
    stem, weight, _ = name.rpartition(".weight")
    if weight and name.endswith(weight):
        yield from (f"{stem}.{last}" for last in ("scale", "scales"))
    if name.endswith("_blocks"):
        yield name.removesuffix("_blocks") + "_scales"
    yield from (f"{name}_{last}" for last in ("scale", "scales", "scale_inv", "scale_2"))


def _few_bits(config: object) -> str | None:
    """Return the dtype of experts that a config states if it has at most 8 bits; None for any other."""
    if not isinstance(config, dict):
        return None
    stated_dtype = config.get(EXPERT_DTYPE)
    if isinstance(stated_dtype, str) and is_few_bits(stated_dtype):
        return stated_dtype
    return next((found for value in config.values() if (found := _few_bits(value))), None)


def is_few_bits(dtype: object) -> bool:
    """Return True for the name of a dtype of at most 8 bits, such as ``fp4``."""
    return isinstance(dtype, str) and _FEW_BITS.fullmatch(dtype) is not None


def last_name(name: str) -> str:
    """Return the part of a tensor's name after its last dot; empty for a name without a dot."""
    _, dot, last = name.rpartition(".")
    return last if dot else ""
