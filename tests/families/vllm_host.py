"""Runs inside vLLM's environment: loads checkpoints by vLLM's own loader, without a forward, and compares them.

A job is ``{"source", "result"}``: both folders are loaded into models of vLLM whose every parameter was filled with
NaN before, and each parameter of the result is held against the source's. The answer is a verdict (see ``judge``).
A job of ``{"names"}`` answers how vLLM calls what a checkpoint holds (see ``names``).

What vLLM does after loading, and its kernels, are left out: they need a device, and say nothing about names.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import traceback
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.inference.vllm_host import preload, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

LIMIT_SECONDS = 60.0
"""The time that one job may take."""

TOLERANCE = 0.05
"""The relative L2 error that FP8 may have; rounding to three bits alone gives 0.026."""

GAIN_TOLERANCE = 0.01
"""The relative error that the size of a group of rows may have; a wrong scale is a wrong size."""

ROWS = 128
"""Rows are compared in groups of this many, so that one wrong group does not vanish in a large matrix."""

ABSENT = ("timm", "torchvision", "numba")
"""Packages that model files import without asking whether they are there."""

CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale", "q_zero_point", "k_zero_point", "v_zero_point")
"""Parameters of the attention cache, which a checkpoint need not have."""


def _dense_layers(config: Any) -> int:
    """Count the layers without experts that a model begins with."""
    return int(config.mlp_layer_types.index("sparse"))


NO_AUXILIARY_LOSS = {"topk_method": "noaux_tc"}
HEAD_DIM = {"head_dim": lambda config: config.hidden_size // config.num_attention_heads}
STATED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3": NO_AUXILIARY_LOSS,
    "deepseek_v32": NO_AUXILIARY_LOSS,
    "glm4_moe": HEAD_DIM,
    "glm4_moe_lite": {"first_k_dense_replace": _dense_layers},
    "glm4v_moe_text": {**HEAD_DIM, "use_qk_norm": False},
    "glm_moe_dsa": NO_AUXILIARY_LOSS,
    "hy_v3": {
        "first_k_dense_replace": _dense_layers,
        "expert_hidden_dim": lambda config: config.moe_intermediate_size,
        "route_norm": True,
        "qk_norm": True,
    },
    "lfm2": {"block_dim": lambda config: config.hidden_size, "conv_dim": lambda config: config.hidden_size},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": lambda config: [int("sliding" in kind) for kind in config.layer_types],
        "moe_layer_freq": lambda config: [int(kind == "sparse") for kind in config.mlp_layer_types],
        "swa_num_attention_heads": lambda config: config.num_attention_heads,
        "swa_num_key_value_heads": lambda config: config.num_key_value_heads,
        "swa_head_dim": lambda config: config.head_dim,
        "swa_v_head_dim": lambda config: config.v_head_dim,
        "sliding_window_size": lambda config: config.sliding_window,
        "layernorm_epsilon": lambda config: config.rms_norm_eps,
        "add_swa_attention_sink_bias": True,
    },
    "kimi_linear": {"mla_use_nope": True, "first_k_dense_replace": _dense_layers},
    "minimax_m2": {
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "rotary_dim": lambda config: config.head_dim // 2,
    },
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "voxtral_encoder": {"downsample_factor": lambda config: config.intermediate_size // config.hidden_size},
}
"""Fields that published checkpoints state in config.json and vLLM wants, but transformers no longer writes."""


def completed(config: Any, *, folder: Path, quantization: dict[str, Any] | None) -> Any:
    """Return a config with what ``STATED`` says of it and of the configs inside it, where config.json is silent."""
    _complete(config, json.loads((folder / "config.json").read_text()))
    if quantization:
        config.quantization_config = quantization
    return config


def _complete(config: Any, said: dict[str, Any]) -> None:
    for name, value in STATED.get(config.model_type, {}).items():
        if name not in said:
            setattr(config, name, value(config) if callable(value) else value)
    for name, part in said.items():
        if isinstance(part, dict) and hasattr(inner := vars(config).get(name), "model_type"):
            _complete(inner, part)


class _Named(type):
    """The type of stand-ins: each attribute of one is another."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (_StandIn,), {})


class _StandIn(metaclass=_Named):
    """Stands in for whatever a package that is not installed has: a class, a function, a decorator."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take anything: model files call these when they are imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn()

    def __call__(self, *given: Any, **__: Any) -> Any:
        """Return a function that is to be decorated as it is."""
        return given[0] if given and isinstance(given[0], types.FunctionType) else _StandIn()


class _Absent(types.ModuleType):
    """Stands in for a module of a package that is not installed."""

    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (_StandIn,), {})


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a stand-in for any module of ``ABSENT``. Last in line, so what is installed is taken from there."""

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def prepare() -> None:
    """Import what every job needs and cure what stands between a checkpoint and its parameters."""
    preload()
    # Kernels of a GPU, compiled by a package that is not there.
    os.environ["VLLM_KIMI_K3_GEMM_AR"] = "0"
    from transformers.utils import import_utils

    # transformers is to know that these are absent: it then does without. Its answers are cached.
    import_utils.is_torchvision_available()
    import_utils.is_timm_available()
    sys.meta_path.append(_AbsentFinder())

    from vllm.model_executor.models import registry

    def inspect(model: Any) -> Any:
        return registry._ModelInfo.from_model_cls(model.load_model_cls())

    # vLLM looks at each model class in a process of its own, which takes 30 seconds, and hides why one cannot be had.
    registry._LazyRegisteredModel.inspect_model_cls = inspect
    registry._try_inspect_model_cls = lambda _, model: model.inspect_model_cls()
    registry._try_load_model_cls = lambda _, model: model.load_model_cls()

    import vllm.model_executor.model_loader.default_loader
    import vllm.model_executor.models.transformers  # noqa: F401
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    _take_for_granted()


def _take_for_granted() -> None:
    """Skip what vLLM asks of processors, and what its CPU build refuses for want of a kernel.

    None of it decides which parameters there are, what they are called and how they are loaded.
    """
    from vllm.config import ModelConfig
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.platforms.cpu import CpuPlatform
    from vllm.triton_utils import triton

    # It would load the processor to see what modalities there are.
    ModelConfig._supports_multimodal_inputs = lambda self: self.is_multimodal_model
    # Its last check: experts without a gate need a GPU.
    FusedMoEConfig.__post_init__ = _without(NotImplementedError, FusedMoEConfig.__post_init__, None)
    no_kernel = (UnquantizedMoeBackend.OOT, None)
    unquantized_fused_moe_method.select_unquantized_moe_backend = _without(
        NotImplementedError, unquantized_fused_moe_method.select_unquantized_moe_backend, no_kernel
    )

    backend = CpuPlatform.get_attn_backend_cls.__func__

    def attention(cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> Any:
        return backend(cls, selected_backend, attn_selector_config._replace(use_sparse=False), num_heads)

    CpuPlatform.get_attn_backend_cls = classmethod(attention)
    triton.set_allocator = lambda _: None


def _without(refusal: type[Exception], call: Callable[..., Any], instead: Any) -> Callable[..., Any]:
    """Return ``call`` so that it returns ``instead`` where it would raise ``refusal``."""

    def quiet(*given: Any, **named: Any) -> Any:
        try:
            return call(*given, **named)
        except refusal:
            return instead

    return quiet


class _Origins(TorchDispatchMode):
    """Follows tensors of a checkpoint into the parameters that they end in, through any operation between."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, set[str]] = {}
        # Whatever was looked at stays alive, so that no address stands for two tensors.
        self._alive: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, _: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outcome = func(*args, **(kwargs or {}))
        names = set().union(*(self.of(tensor) for tensor in _tensors((args, kwargs))))
        if names:
            written = [args[0]] if func._schema.is_mutable and args else []
            for tensor in _tensors((written, outcome)):
                self.put(tensor, names)
        return outcome

    def put(self, tensor: torch.Tensor, names: Iterable[str]) -> None:
        """Note that ``tensor`` holds something of the checkpoint's ``names``."""
        if address := _address(tensor):
            self._names.setdefault(address, set()).update(names)
            self._alive.append(tensor)

    def of(self, tensor: torch.Tensor) -> set[str]:
        """Return the names of what ``tensor`` holds."""
        return self._names.get(_address(tensor), set())

    def follow(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each of ``weights`` with memory of its own, known by its name."""
        for name, shared in weights:
            tensor = shared.clone()
            self.put(tensor, [name])
            yield name, tensor


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _address(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter stands in vLLM's model.

    Attributes:
        module: the module that owns it.
        origins: the names of the checkpoint that it was filled from.
    """

    module: torch.nn.Module
    origins: list[str]

    @property
    def lookup(self) -> str | None:
        """The name by which vLLM asks the quantization config about the module, None if it does not ask."""
        if getattr(self.module, "quant_config", None) is None:
            return None
        name = getattr(self.module, "prefix", None) or getattr(self.module, "layer_name", None)
        return name if isinstance(name, str) else None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in vLLM.

    Attributes:
        model: vLLM's model.
        parameters: each parameter and each buffer that belongs to the state, by its name.
        places: where each stands.
        dtypes: the dtype of each tensor of the checkpoint that vLLM looked at.
    """

    model: torch.nn.Module
    parameters: dict[str, torch.Tensor]
    places: dict[str, Place]
    dtypes: dict[str, str]


def load(folder: str, quantization: dict[str, Any] | None = None) -> Loaded:
    """Build vLLM's model for ``folder``, fill its parameters with NaN and load the weights.

    ``quantization`` takes the place of the folder's own quantization config.
    """
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=folder,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        # Where it is on, the CPU build turns it off later and stumbles over what followed from it.
        enable_prefix_caching=False,
        hf_overrides=functools.partial(completed, folder=Path(folder), quantization=quantization),
    ).create_engine_config()
    origins = _Origins()
    dtypes: dict[str, str] = {}

    class Loader(DefaultModelLoader):
        """vLLM's loader, with an eye on what passes through it."""

        def get_all_weights(self, model_config: Any, model: Any) -> Any:
            for name, tensor in origins.follow(super().get_all_weights(model_config, model)):
                dtypes[name] = str(tensor.dtype).removeprefix("torch.")
                yield name, tensor

    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        _be_alone()
        model = initialize_model(config)
        _forget(model)
        with origins:
            Loader(config.load_config).load_weights(model, config.model_config)
    parameters, places = {}, {}
    for prefix, module in model.named_modules():
        kept = set(module._buffers) - module._non_persistent_buffers_set
        own = [*module._parameters.items(), *((name, module._buffers[name]) for name in sorted(kept))]
        for name, tensor in own:
            if tensor is None or tensor.is_meta:
                continue
            full = f"{prefix}.{name}" if prefix else name
            parameters[full] = tensor.detach()
            places[full] = Place(module, sorted(origins.of(tensor)))
    return Loaded(model, parameters, places, dtypes)


def _be_alone() -> None:
    """Be a world of one process, as vLLM wants to be told."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state

    if not parallel_state.model_parallel_is_initialized():
        # The host runs in a folder of its own that goes with it.
        meeting = Path.cwd() / f"meeting-{os.getpid()}"
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel(1, 1)


def _forget(model: torch.nn.Module) -> None:
    """Fill every parameter with NaN, so that one that is never loaded shows.

    Scales of the attention cache keep the value that stands for "none".
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta or name.rpartition(".")[2] in CACHE_SCALES:
            continue
        if parameter.dtype == torch.float8_e4m3fn:
            parameter.data.view(torch.uint8).fill_(0x7F)
        elif parameter.is_floating_point():
            parameter.data.fill_(float("nan"))


def _spread(scale: torch.Tensor, codes: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
    """Bring the scale of a matrix [N, K] to a shape that multiplies it, None if it fits no layout.

    Layouts: one value; one for each matrix that was fused into this one, of ``widths`` rows; one for each row
    [N, 1]; one for each block, whose size follows from the number of blocks.
    """
    rows, columns = codes.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.shape == (rows, 1):
        return scale
    if scale.dim() == 1 and len(scale) == len(widths) and sum(widths) == rows:
        return scale.repeat_interleave(torch.tensor(widths)).reshape(rows, 1)
    if scale.dim() == 1 and rows % len(scale) == 0:
        return scale.repeat_interleave(rows // len(scale)).reshape(rows, 1)
    for block in (128, 64, 32):
        if scale.shape == (-(-rows // block), -(-columns // block)):
            return scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return None


def _dequantized(codes: torch.Tensor, scale: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
    """Multiply codes, of one matrix or of one for each expert, with their scale."""
    if codes.dim() == 3:
        if len(scale) != len(codes):
            return None
        experts = [_dequantized(one, factor, ()) for one, factor in zip(codes, scale, strict=True)]
        return None if any(one is None for one in experts) else torch.stack(experts)  # type: ignore[arg-type]
    factor = _spread(scale.float(), codes, widths)
    return None if factor is None else codes.float() * factor


def _far(found: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """Say where values are off by more than FP8 can be, None if nowhere.

    Rounding scatters the values of a group of rows, and does not enlarge the group: a scale that is off by less than
    rounding is shows there. Where the source holds NaN nothing is expected.
    """
    experts = found.dim() == 3
    for number, (one, other) in enumerate(zip(*((found, wanted) if experts else ([found], [wanted])), strict=True)):
        for start in range(0, len(one), ROWS):
            here, there = one[start : start + ROWS].double(), other[start : start + ROWS].double()
            known = ~there.isnan()
            here, there = here[known], there[known]
            size, gap = there.norm().item(), (here - there).norm().item()
            gain = (here @ there).item() / size**2 if size else 1.0
            if gap <= TOLERANCE * size and abs(gain - 1) <= GAIN_TOLERANCE:
                continue
            where = (f"expert {number}, " if experts else "") + f"rows {start} to {min(start + ROWS, len(one))}"
            return f"off by {gap / size if size else gap:.1%}, enlarged by {gain:.4f} ({where})"
    return None


def _fault(name: str, source: Loaded, result: Loaded) -> str | None:
    """Say what is wrong with a parameter of the result, None if nothing is."""
    found, wanted = result.parameters[name], source.parameters.get(name)
    if wanted is None:
        if name.rpartition(".")[2] in CACHE_SCALES or not found.is_floating_point():
            return None
        return "not in the source's model, and not loaded" if found.float().isnan().any() else None
    if found.shape != wanted.shape:
        return f"has the shape {tuple(found.shape)}, {tuple(wanted.shape)} for the source"
    if found.dtype == wanted.dtype:
        if _same_bits(found, wanted):
            return None
        lost = found.is_floating_point() and (found.isnan() & ~wanted.isnan()).any()
        return "not loaded" if lost else "other values than the source's"
    if found.dtype != torch.float8_e4m3fn:
        return f"is {found.dtype}, {wanted.dtype} for the source"
    return _fp8_fault(name, result, wanted)


def _fp8_fault(name: str, result: Loaded, wanted: torch.Tensor) -> str | None:
    codes = result.parameters[name]
    scales = [
        result.parameters[scale] for scale in (f"{name}_scale", f"{name}_scale_inv") if scale in result.parameters
    ]
    if len(scales) != 1:
        return f"FP8 with {len(scales)} scales"
    scale = scales[0].float()
    expected = ~wanted.isnan()
    if (codes.float().isnan() & expected).any():
        return "FP8, and its codes are not loaded"
    if scale.isnan().all():
        return "FP8, and its scale is not loaded"
    if (scale <= 0).any():
        return f"FP8 with a scale of {scale.min().item():.3g}"
    plain = _dequantized(codes, scale, getattr(result.places[name].module, "logical_widths", ()))
    if plain is None:
        return f"FP8 {tuple(codes.shape)} with a scale {tuple(scale.shape)}"
    if (plain.isnan() & expected).any():
        return "FP8, and part of its scale is not loaded"
    far = _far(plain, wanted)
    return f"FP8, and {far}" if far else None


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def _story(name: str, loaded: Loaded) -> str:
    """Say how vLLM came by a parameter: the name it looked up, and what of the checkpoint it holds."""
    place = loaded.places[name]
    asked = f"looked up as {place.lookup}" if place.lookup else "never looked up"
    held = [f"{origin} ({loaded.dtypes[origin]})" for origin in place.origins[:3]]
    if more := len(place.origins) - len(held):
        held.append(f"{more} more")
    return f"{asked}; filled from {', '.join(held) or 'nothing'}"


def judge(source: str, result: str) -> dict[str, Any]:
    """Load both folders and compare them.

    Returns:
        ``verdict``: "right"; "wrong", with what is wrong in ``detail``; "refused", if the source loads and the
        result does not; "source", if the source does not load. ``model``: vLLM's class. ``fp8``, ``kept``: how many
        weights of linear layers and of experts are FP8 in the result, and how many are not. ``largest_tp``: see
        ``_largest_tp``. ``unfilled``: the weights that no tensor of the source fills.
    """
    try:
        plain = load(source)
    except Exception as error:
        return {"verdict": "source", "detail": _reason(error)}
    answer: dict[str, Any] = {"model": type(plain.model).__name__}
    try:
        quantized = load(result)
    except Exception as error:
        return answer | {"verdict": "refused", "detail": _reason(error)}
    faults = {name: fault for name in quantized.parameters if (fault := _fault(name, plain, quantized))}
    # What is wrong with a scale is said of its weight.
    told = {f"{name}{ending}" for name in faults for ending in ("_scale", "_scale_inv")}
    detail = _grouped(
        (name, f"{fault}; {_story(name, quantized)}") for name, fault in faults.items() if name not in told
    )
    lost = [name for name in plain.parameters if name not in quantized.parameters and plain.places[name].origins]
    detail += _grouped((name, f"missing in the result's model; {_story(name, plain)}") for name in lost)
    weights = [name for name in quantized.parameters if _is_weight(name, quantized)]
    fp8 = sum(quantized.parameters[name].dtype == torch.float8_e4m3fn for name in weights)
    return answer | {
        "verdict": "wrong" if detail else "right",
        "detail": detail,
        "fp8": fp8,
        "kept": len(weights) - fp8,
        "largest_tp": _largest_tp(quantized),
        "unfilled": [line for line, _ in _groups((name, "") for name in _unfilled(plain))],
    }


def _largest_tp(loaded: Loaded) -> int | None:
    """Return the number of devices that every layer with scales by block can be split over; None without one.

    A power of two: shares have to be whole blocks, of rows in layers that are split by rows and of columns in those
    that are split by columns. (Some kernels for experts take a quarter of a block; that is not counted.)
    """
    blocked = [
        loaded.places[name].module
        for name, tensor in loaded.parameters.items()
        if tensor.dtype == torch.float8_e4m3fn and getattr(loaded.places[name].module, "weight_block_size", None)
    ]
    if not blocked:
        return None
    devices = 1
    while devices < 64 and all(_splits(module, 2 * devices) for module in blocked):
        devices *= 2
    return devices


def _splits(module: Any, devices: int) -> bool:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    rows, columns = module.weight_block_size
    if isinstance(module, QKVParallelLinear):
        shares = [module.head_size * module.total_num_heads / devices]
        shares.append(module.head_size * max(1, module.total_num_kv_heads / devices))
        return all(share % rows == 0 for share in shares)
    if isinstance(module, ColumnParallelLinear):
        return all(width / devices % rows == 0 for width in module.logical_widths)
    if isinstance(module, RowParallelLinear):
        return bool(module.input_size / devices % columns == 0)
    if isinstance(module, RoutedExperts):
        return bool(module.intermediate_size_per_partition / devices % max(rows, columns) == 0)
    return True


def _is_weight(name: str, loaded: Loaded) -> bool:
    """Return True for the weight of a linear layer, and for those of experts."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase

    kind = loaded.places[name].module
    return name.endswith("weight") and isinstance(kind, (LinearBase, RoutedExperts))


def _unfilled(loaded: Loaded) -> list[str]:
    """Name the weights of linear layers that hold NaN after loading."""
    return [
        name
        for name, tensor in loaded.parameters.items()
        if _is_weight(name, loaded) and tensor.is_floating_point() and tensor.float().isnan().any()
    ]


def _groups(faults: Iterable[tuple[str, str]]) -> list[tuple[str, int]]:
    """Bring lines that differ in numbers of layers alone together: the first of each, and how many there are."""
    groups: dict[str, tuple[str, int]] = {}
    for name, fault in faults:
        line = f"{name}: {fault}" if fault else name
        key = re.sub(r"\d+(\.\d+%)?", "#", line)
        first, count = groups.get(key, (line, 0))
        groups[key] = (first, count + 1)
    return list(groups.values())


def _grouped(faults: Iterable[tuple[str, str]]) -> list[str]:
    return [line if count == 1 else f"{line} [{count} like it]" for line, count in _groups(faults)]


def _reason(error: BaseException) -> list[str]:
    """Return the first line of an error, then the places in vLLM that it came through, the last one first."""
    lines = [line.strip() for line in (str(error).strip() or repr(error)).splitlines()]
    if "validation error" in lines[0]:  # of pydantic: the first line tells the class alone
        lines[0] = ": ".join(lines[1:3])
    root = Path(importlib.util.find_spec("vllm").origin or "").parent  # type: ignore[union-attr]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(root)]
    places = [f"{Path(f.filename).relative_to(root)}:{f.lineno} {f.name}: {f.line}" for f in reversed(frames[-5:])]
    return [f"{type(error).__name__}: {lines[0]}", *places]


IGNORE_ALL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["re:.*"],
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}
"""A quantization config under which every module is asked about and none is quantized."""


def names(folder: str) -> dict[str, Any]:
    """Load a plain checkpoint as a quantized one of which everything is kept.

    Returns:
        ``model``: vLLM's class. ``modules``: for each linear layer and each set of experts, by its name in vLLM, the
        ``lookup`` name (None if vLLM never asks, so that it can only be plain) and the ``origins`` of its weight.
        ``loose``: the other parameters that hold 2-D tensors, with theirs.
    """
    loaded = load(folder, IGNORE_ALL)
    modules, loose = {}, {}
    for name, tensor in loaded.parameters.items():
        place = loaded.places[name]
        if _is_weight(name, loaded):
            modules[name] = {"lookup": place.lookup, "origins": place.origins}
        elif tensor.dim() >= 2 and place.origins:
            loose[name] = {"kind": type(place.module).__name__, "origins": place.origins}
    return {"model": type(loaded.model).__name__, "modules": modules, "loose": loose}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Answer one job."""
    return names(job["names"]) if "names" in job else judge(job["source"], job["result"])


if __name__ == "__main__":
    serve(run, prepare, limit=LIMIT_SECONDS)
