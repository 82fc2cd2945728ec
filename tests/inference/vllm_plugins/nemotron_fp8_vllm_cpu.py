"""Fill the gaps of vLLM's CPU build, so that every layout can be loaded and run by vLLM's own loader.

vLLM reads the checkpoint, builds the layers and places codes and scales as it does on a GPU; these plugins
add arithmetic alone. They are found through the entry points in the dist-info folder beside this file, when
that folder stands on PYTHONPATH.
"""

from __future__ import annotations

from typing import Any

import nearest_in_cache  # beside this file, as PYTHONPATH has it
import scaled_mm_by_float
import torch
import vllm._custom_ops as ops
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.pytorch import ChannelWiseTorchFP8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_mxfp8 import (  # noqa: E501 - a module's name
    CompressedTensorsW8A8Mxfp8MoEMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum

E4M3_MAX = 448.0
BLOCK = 128


def _cast(values: torch.Tensor, scale: torch.Tensor | None = None, *rest: Any, **named: Any) -> Any:
    """One static scale for the whole of ``values`` [M, N], which is all that loading a checkpoint asks for."""
    if scale is None or scale.numel() != 1 or any(v is not None for v in (*rest, *named.values())):
        message = f"only one static scale is covered here, got {scale}, {rest}, {named}"
        raise NotImplementedError(message)
    codes = (values.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale


def install_fp8_cast() -> None:
    """Replace the FP8 cast that vLLM requantizes fused per-tensor weights with.

    The CPU build declares the op without arguments, so that any call of it fails.
    """
    if current_platform.is_cpu():
        ops.scaled_fp8_quant = _cast


def install_scaled_mm() -> None:
    """Multiply FP8 in float32 where torch's own product would take a minute a token."""
    if current_platform.is_cpu() and scaled_mm_by_float.needs_it():
        torch._scaled_mm = scaled_mm_by_float.scaled_mm


def install_unfused_activations() -> None:
    """Leave the cast of a layer's inputs to its kernel: the CPU build lacks the op that does it in the activation."""
    if current_platform.is_cpu():
        fused_act_quant._FUSED_ACT_QUANT.clear()


def install_rows_under_one_scale() -> None:
    """Give each token the scale of all, where weights have one for each row: the kernel for CPUs slices the scale.

    On GPUs, Cutlass takes both.
    """
    multiply = ChannelWiseTorchFP8ScaledMMLinearKernel.apply_scaled_mm

    def apply_scaled_mm(self: Any, *, A: torch.Tensor, As: torch.Tensor, **named: Any) -> torch.Tensor:  # noqa: N803
        scales = As.reshape(1, 1).expand(len(A), 1) if As.dim() == 0 else As
        return multiply(self, A=A, As=scales, **named)

    if current_platform.is_cpu():
        ChannelWiseTorchFP8ScaledMMLinearKernel.apply_scaled_mm = apply_scaled_mm


def _nearest_in_cache(
    key: torch.Tensor, value: torch.Tensor, *places: Any, k_scale: float, v_scale: float, kv_cache_dtype: str
) -> None:
    if kv_cache_dtype in ("fp8", "fp8_e4m3"):
        key, value = nearest_in_cache.nudged(key, k_scale), nearest_in_cache.nudged(value, v_scale)
    _into_cache(key, value, *places, k_scale=k_scale, v_scale=v_scale, kv_cache_dtype=kv_cache_dtype)


_into_cache = ops.cpu_attn_reshape_and_cache


def install_nearest_in_cache() -> None:
    """Round keys and values to nearest on their way to an FP8 cache, as GPUs do: kernels for CPUs truncate them."""
    if current_platform.is_cpu():
        ops.cpu_attn_reshape_and_cache = _nearest_in_cache


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes [N, K] times a scale of one value, [N, 1], one value per 128x128 block, or one byte per 32 columns."""
    rows, columns = codes.shape
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(columns // scale.shape[1], 1)
    elif scale.dim() == 2 and scale.shape != (rows, 1):
        scale = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    elif scale.numel() > 1:
        scale = scale.reshape(rows, 1)
    return (codes.float() * scale).to(dtype)


class _OnCpu:
    """Offered behind vLLM's own kernels: taken only where none of those runs on this processor."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return (True, None) if current_platform.is_cpu() else (False, "requires CPU.")

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None


class DequantizingBlockKernel(_OnCpu, Fp8BlockScaledMMLinearKernel):
    """128x128 blocks, bf16 activations: vLLM's own kernels for it want AMX."""

    apply_input_quant = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave codes and scales as they were loaded: the base class prepares them for a GPU."""

    def apply_block_scaled_mm(
        self,
        A: torch.Tensor,  # noqa: N803 - vLLM passes these by name
        B: torch.Tensor,  # noqa: N803
        As: torch.Tensor,  # noqa: N803
        Bs: torch.Tensor,  # noqa: N803
    ) -> torch.Tensor:
        """``A`` [M, K] times the transposed ``B`` [N, K] under the block scales ``Bs``."""
        return torch.nn.functional.linear(A, _dequantize(B, Bs, A.dtype))


class DequantizingWeightOnlyKernel(_OnCpu, FP8ScaledMMLinearKernel):
    """FP8 weights and bf16 activations at any granularity: vLLM has no such kernel for the CPU."""

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., K] times the layer's weight, which vLLM hands over as [K, N] except by block."""
        if hasattr(layer, "weight_scale_inv"):
            weight = _dequantize(layer.weight, layer.weight_scale_inv, x.dtype)
        else:
            weight = _dequantize(layer.weight.t(), layer.weight_scale, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)

    def apply_scaled_mm(self, **_: Any) -> torch.Tensor:
        """Never reached: ``apply_weights`` does the work."""
        raise NotImplementedError


def _finish_experts(self: Fp8MoEMethod, layer: Any) -> None:
    """Let vLLM merge the scales of gate and up as on a GPU, then hand the experts in bf16 to its own CPU kernel."""
    w13, w2 = layer.w13_weight, layer.w2_weight
    s13, s2 = (getattr(layer, f"{name}_{self.weight_scale_name}") for name in ("w13", "w2"))
    if not self.block_quant:
        w13, s13 = fp8.process_fp8_weight_tensor_strategy_moe(
            w13, s13, layer.intermediate_size_per_partition, layer.local_num_experts
        )
    _hand_over(layer, ((w13, s13), (w2, s2)), layer.orig_dtype)


def _finish_mx_experts(self: CompressedTensorsW8A8Mxfp8MoEMethod, layer: Any) -> None:
    """Hand the experts in bf16 to vLLM's own CPU kernel: its kernel for blocks of 32 is written in Triton."""
    pairs = (layer.w13_weight, layer.w13_weight_scale), (layer.w2_weight, layer.w2_weight_scale)
    _hand_over(layer, pairs, layer.params_dtype)


def _hand_over(layer: Any, parts: tuple[tuple[torch.Tensor, torch.Tensor], ...], dtype: torch.dtype) -> None:
    """Dequantize the experts of a layer, and make it one of unquantized experts."""
    layer.loaded_dtype = str(parts[0][0].dtype).removeprefix("torch.")
    for name, (codes, scales) in zip(("w13_weight", "w2_weight"), parts, strict=True):
        pairs = zip(codes, scales, strict=True)
        weight = torch.stack([_dequantize(one, scale, dtype) for one, scale in pairs])
        setattr(layer, name, torch.nn.Parameter(weight, requires_grad=False))
    method = UnquantizedFusedMoEMethod(layer.moe_config)
    layer._replace_quant_method(method)
    method.process_weights_after_loading(layer)


def install_dequantizing_kernels() -> None:
    """Offer the kernels to vLLM on the CPU, last in line, and experts wherever it has none for them.

    vLLM's own kernel that dequantizes blocks of 32 runs on any device, but is offered to GPUs alone.
    """
    if current_platform.is_cpu():
        Fp8MoEMethod.process_weights_after_loading = _finish_experts
        CompressedTensorsW8A8Mxfp8MoEMethod.process_weights_after_loading = _finish_mx_experts
        if linear.EmulationMxfp8LinearKernel not in linear._POSSIBLE_MXFP8_KERNELS.get(PlatformEnum.CPU, []):
            linear.register_linear_kernel(linear.EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    for table, kernel in (
        (linear._POSSIBLE_FP8_BLOCK_KERNELS, DequantizingBlockKernel),
        (linear._POSSIBLE_WFP8A16_KERNELS, DequantizingWeightOnlyKernel),
    ):
        kernels = table.setdefault(PlatformEnum.CPU, [])
        if kernel not in kernels:
            kernels.append(kernel)
