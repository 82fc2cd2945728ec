"""Activations as engines serve them: quantized before every product with an FP8 weight; and weights that they merge.

===========================  =====================================================================
weights                      activations
===========================  =====================================================================
a scale for each tensor      one scale for each token
a scale for each row         one scale for each token
blocks of 128 x 128          one scale for each 128 values of a token
groups of 32 (MX)            one power of two for each 32 values of a token
a static scale is stored     that scale (``input_scale``)
===========================  =====================================================================

A scale is amax / 448 in float32. Products are those of the model's dtype: values are quantized and dequantized before
them. vLLM multiplies the codes and rounds once, which changes a perplexity by about a thousandth.

Weights with one input have one stored scale in an engine, the largest: those that it merges (q/k/v, gate/up), and, by
role, all experts of a layer. An expert without a scale counts as 1.0 there. Values beyond the range of a stored scale
are clipped, and counted.

Sources: ``Fp8LinearMethod``, ``Fp8MoEMethod``, ``QuantFP8`` and ``per_token_group_quant_fp8`` of vLLM; OCP Microscaling
Formats, section 6.3.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch.overrides import TorchFunctionMode

from nemotron_fp8.errors import ScaleError
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.layouts import input_scale_of
from nemotron_fp8.planning.number_format import E4M3, MX_BLOCK
from nemotron_fp8.planning.stored_scales import one_input
from nemotron_fp8.sources.scale_values import STORED
from nemotron_fp8_kernels import dequantize, quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from weakref import ReferenceType

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.sources.reader import Reader


BEYOND = E4M3.max * (1 + 2**-20)
"""Least quotient of a value and a scale that counts as clipped: float32 scales are rounded, which is not clipping."""
SLICE = 1 << 20
"""Values that are cast at a time: float32 copies of all would exceed the memory of the layer."""
WITHOUT_SCALE = 1.0
"""Scale that engines take for the inputs of an expert that has none, and for a cache that has none."""


class Cast(NamedTuple):
    """Values after a cast to FP8 with a stored scale.

    Attributes:
        values: quantized and dequantized, in the dtype of the values before.
        clipped: number of values beyond the range of the scale, int64 ``[]``.
    """

    values: torch.Tensor
    clipped: torch.Tensor


def cast(values: torch.Tensor, scale: float) -> Cast:
    """Quantize values to E4M3 with a stored scale, to nearest even and clipped, and dequantize them.

    Args:
        values: any floating dtype.
        scale: float32, multiplies the codes.
    """
    made = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    clipped = torch.zeros((), dtype=torch.int64, device=values.device)
    flat, target = values.reshape(-1), made.view(-1)
    for start in range(0, flat.numel(), SLICE):
        quotients = flat[start : start + SLICE].float() / scale
        clipped += torch.count_nonzero(quotients.abs() > BEYOND)
        codes = quotients.clamp_(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn)
        target[start : start + SLICE] = codes.float().mul_(scale)
    return Cast(made, clipped)


@dataclass(frozen=True, slots=True)
class Scheme:
    """Treatment of the activations of a weight.

    Attributes:
        group: values of a token under one scale; None for all of them.
        powers: True if scales are powers of two.
        static: the stored scale; None for scales that are computed.
        module: the module with that scale, or the one that engines merge it into, by its name in the checkpoint.
    """

    group: int | None = None
    powers: bool = False
    static: float | None = None
    module: str = field(default="", compare=False)

    @property
    def title(self) -> str:
        """Display name."""
        if self.static is not None:
            return "FP8, a stored scale"
        unit = "token" if self.group is None else f"{self.group} values of a token"
        return f"FP8, {'a power of two' if self.powers else 'a scale'} for each {unit}"

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations, quantized and dequantized: any floating dtype, scales along the last dimension."""
        if self.static is not None:
            return cast(x, self.static).values
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self.group is None:
            codes, scale = quantize(rows, "channel")
            return dequantize(codes, scale, "channel", dtype=x.dtype).view(x.shape)
        block, rounding = (1, self.group), "mx" if self.powers else "none"
        codes, scale = quantize(rows, "block", block, rounding=rounding)  # type: ignore[arg-type]  # both are choices
        return dequantize(codes, scale, "block", block, x.dtype).view(x.shape)


def schemes_of(
    weights: Iterable[TensorView],
    views: Mapping[str, TensorView],
    activations: str | None,
    config: Mapping[str, Any] | None,
    reader: Reader,
) -> dict[str, Scheme]:
    """Return the treatment of the activations of quantized weights, by name; without those that stay in 16 bits.

    Args:
        weights: weights of a layer, with encodings.
        views: all tensors of the checkpoint, by name.
        activations: treatment that the checkpoint states; None if it is unknown.
        config: config.json; None without one.
        reader: reads stored scales.

    Raises:
        ScaleError: a stored scale is missing, or is not a positive finite number.
    """
    family = family_of(config)
    found, groups = {}, defaultdict[str, dict[str, float | None]](dict)
    for view in weights:
        assert view.encoding is not None
        stored = views.get(input_scale_of(view.name))
        if activations == "static" or (stored is not None and stored.numel == 1):
            scale = None if stored is None else read_scale(stored, reader)
            groups[one_input(view.name, family)][view.name] = scale
        elif activations == "dynamic":
            rows, columns = view.encoding.cell
            is_mx = (rows, columns) == MX_BLOCK
            found[view.name] = Scheme(group=MX_BLOCK[1], powers=True) if is_mx else Scheme(group=columns)
    for group, members in groups.items():
        some = next(iter(members))
        scales = [scale for scale in members.values() if scale is not None]
        if len(scales) < len(members) and family.is_routed(some):
            scales.append(WITHOUT_SCALE)
        if not scales:
            raise ScaleError(input_scale_of(some), (), "missing")
        found.update(dict.fromkeys(members, Scheme(static=max(scales), module=group.removesuffix(".weight"))))
    return found


def read_scale(view: TensorView, reader: Reader) -> float:
    """Return the value of a scale of one element.

    Raises:
        ScaleError: the scale has more elements, or is not a positive finite number.
    """
    if view.numel != 1 or view.dtype not in STORED:
        raise ScaleError(view.name, (), f"{view.dtype} {list(view.shape)}, not one number")
    value = float(reader.scales(view, 0, 1)[0])
    if not 0 < value < math.inf:
        raise ScaleError(view.name, (), repr(value))
    return value


@dataclass(frozen=True, slots=True)
class Requantized:
    """A weight that an engine quantizes again, because it merges it with others under one scale.

    Attributes:
        scale: the largest scale of the merged weights.
    """

    scale: float

    def values(self, decoded: torch.Tensor) -> torch.Tensor:
        """Return the values of float32 weights after the second quantization: float32."""
        codes = (decoded / self.scale).clamp_(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn)
        return codes.float() * self.scale


def fused_scales(
    views: Iterable[TensorView], config: Mapping[str, Any] | None, reader: Reader
) -> dict[str, Requantized]:
    """Return the second scale of weights of one scale each that engines merge, by name; without those it is equal for.

    Source: ``requantize_with_max_scale`` of vLLM.
    """
    family = family_of(config)
    scales: dict[str, dict[str, float]] = {}
    for view in views:
        if view.encoding is not None and view.encoding.cell == (None, None) and view.encoding.scales.numel == 1:
            matrix = family.fused_matrix_of(view.name)
            scales.setdefault(matrix, {})[view.name] = float(reader.scales(view.encoding.scales, 0, 1)[0])
    found = {}
    for members in scales.values():
        largest = max(members.values())
        found.update({name: Requantized(largest) for name, scale in members.items() if scale != largest})
    return found


PRODUCTS: dict[Any, tuple[int, int]] = {
    torch.nn.functional.linear: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.bmm: (0, 1),
    torch.Tensor.bmm: (0, 1),
    torch.mm: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
}
"""Functions that multiply activations by weights: positions of both among the arguments."""


CASTS = frozenset({torch.Tensor.to, torch.Tensor.type, torch.Tensor.float})
"""Functions that return a weight in another dtype: routers are often multiplied in float32."""


class Products(TorchFunctionMode):
    """Sees every product with a registered weight in the context, and changes its activations.

    Weights are recognized by their memory: a linear layer, or a matrix of a stack of experts. A cast of a weight counts
    as that weight.

    Args:
        handlers: what to do with the activations of a weight, by the address of its first element.

    Attributes:
        seen: addresses of the weights that were multiplied.
    """

    def __init__(self, handlers: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]) -> None:
        super().__init__()
        self._handlers = handlers
        self._casts: dict[int, tuple[ReferenceType[torch.Tensor], int]] = {}
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        places = PRODUCTS.get(func)
        if places is not None and len(args) > places[0]:
            at, of = places
            weight = args[of] if len(args) > of else kwargs.get("weight", kwargs.get("mat2"))
            if isinstance(weight, torch.Tensor):
                address = self._address_of(weight)
                if address in self._handlers:
                    self.seen.add(address)
                    args = (*args[:at], self.treat(address, args[at], weight), *args[at + 1 :])
        made = func(*args, **kwargs)
        if func in CASTS and isinstance(args[0], torch.Tensor) and made is not args[0]:
            address = args[0].data_ptr()
            if address in self._handlers and isinstance(made, torch.Tensor) and made.shape == args[0].shape:
                self._casts[id(made)] = ref(made), address
        return made

    def _address_of(self, weight: torch.Tensor) -> int:
        """Return the address of a weight, or that of the weight that was cast to it."""
        cast = self._casts.get(id(weight))
        return cast[1] if cast is not None and cast[0]() is weight else weight.data_ptr()

    def treat(self, address: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the activations to multiply by a weight.

        Args:
            address: address of the weight, or of the first of a stack.
            x: activations.
            weight: the weight, the stack, or a cast of it.
        """
        return self._handlers[address](x)
