"""Hypothesis strategies for the pipeline: values, views in pieces, checkpoints."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.checkpoint.tensor_view import Extent, TensorView
from tests.support.checkpoints import DTYPES, ONE

if TYPE_CHECKING:
    from tests.support.checkpoints import Shards, Tensors

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
PATTERNS = ("normal", "zero", "negative zero", "subnormal", "huge", "any bits", "one large")
OTHERS = tuple(sorted(set(DTYPES) - {"F8_E4M3", "F8_E8M0"}))
"""dtypes that a tensor which stays may have."""

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "mixer.in_proj",
    "mixer.experts.0.up_proj",
    "mixer.experts.1.up_proj",
)
OTHER_NAMES = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.mixer.A_log",
    "model.layers.0.mixer.conv1d.weight",
    "mtp.layers.0.eh_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "buffer é\u2028\U0001f600",
    "..",
    "a/b",
)


def values(shape: tuple[int, ...], dtype: torch.dtype, pattern: str, seed: int) -> torch.Tensor:
    """A finite tensor of one of `FLOATS`, of values of some kind."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    tiny, top = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    if pattern == "normal":
        return (normal * 0.02).to(dtype)
    if pattern == "zero":
        return torch.zeros(shape, dtype=dtype)
    if pattern == "negative zero":
        return torch.zeros(shape, dtype=dtype).neg()
    if pattern == "subnormal":
        return (normal.clamp(-1, 1).double() * tiny).to(dtype)
    if pattern == "huge":
        exponents = torch.rand(shape, generator=generator) * 2 - 1
        span = torch.tensor(top).log2()
        return (torch.sign(normal) * torch.exp2(exponents * span)).clamp(-top, top).to(dtype)
    if pattern == "one large":
        tensor = (normal * tiny).to(dtype)
        if tensor.numel():
            tensor.view(-1)[seed % tensor.numel()] = -top
        return tensor
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
    found = torch.randint(low, high, shape, generator=generator, dtype=bits).view(dtype)
    return torch.where(found.isfinite(), found, torch.zeros((), dtype=dtype))


def any_bytes(shape: tuple[int, ...], name: str, seed: int) -> torch.Tensor:
    """A tensor of any dtype with any bytes in it (Booleans stay 0 or 1)."""
    dtype = DTYPES[name]
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    data = torch.randint(0, top, (prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@st.composite
def weights(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> torch.Tensor:
    """A finite matrix: often small, at times empty, of one element, or of several slices."""
    shape = draw(
        st.one_of(
            st.tuples(st.integers(0, 12), st.integers(0, 40)),
            st.just((1, 1)),
            st.tuples(st.integers(1, 3), st.sampled_from([257, 4099])),
        )
    )
    dtype, pattern = draw(st.sampled_from(dtypes)), draw(st.sampled_from(PATTERNS))
    return values(shape, dtype, pattern, draw(st.integers(0, 1 << 16)))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to be written.

    Attributes:
        shards: its tensors by file.
        metadata: ``__metadata__`` of each file, at most one key.
        lead: spaces before the header, which decide how far the data is out of alignment.
    """

    shards: Shards
    metadata: dict[str, dict[str, str] | None]
    lead: int


@st.composite
def checkpoints(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Checkpoint:
    """Projections and others in one to three shards; at least one tensor becomes FP8."""
    tensors: Tensors = {"model.layers.9.self_attn.o_proj.weight": draw(weights(dtypes))}
    for module in draw(st.lists(st.sampled_from(MODULES), max_size=5, unique=True)):
        tensors[f"model.layers.{draw(st.integers(0, 1))}.{module}.weight"] = draw(weights(dtypes))
    for name in draw(st.lists(st.sampled_from(OTHER_NAMES), max_size=4, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        tensors[name] = any_bytes(shape, draw(st.sampled_from(OTHERS)), draw(st.integers(0, 99)))
        if name.endswith(".weight") and tensors[name].dtype == torch.float8_e5m2:
            tensors[name] = tensors[name].view(torch.uint8)  # a weight in FP8 is a quantized source
    order = draw(st.permutations(sorted(tensors)))
    count = draw(st.integers(1, 3))
    names = [ONE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    shards: Shards = {name: {} for name in names}
    for i, tensor in enumerate(order):
        home = names[i] if i < count else draw(st.sampled_from(names))
        shards[home][tensor] = tensors[tensor]
    shards = {name: held for name, held in shards.items() if held}
    if len(shards) == 1:
        shards = dict(zip([ONE], shards.values(), strict=True))
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    metadata = st.one_of(st.none(), st.just({"format": "pt"}), st.dictionaries(texts, texts, max_size=1))
    return Checkpoint(shards, {name: draw(metadata) for name in shards}, draw(st.integers(0, 9)))


@dataclass(frozen=True)
class Pieces:
    """A tensor cut into extents of several files.

    Attributes:
        view: the tensor.
        files: the files that hold it, among other bytes.
        data: its bytes in one piece.
    """

    view: TensorView
    files: dict[str, bytes]
    data: bytes


VIEW_DTYPES = ("U8", "BF16", "F32", "I64")


@st.composite
def pieces(
    draw: st.DrawFn,
    dtypes: tuple[str, ...] = VIEW_DTYPES,
    shape: tuple[int, ...] | None = None,
    data: bytes | None = None,
    name: str = "t",
) -> Pieces:
    """A view of bands of rows, each cut into columns, each such rectangle with a stride and file of its own.

    Rectangles of one band may be interleaved in a file, as the slices of a stacked array are.
    """
    dtype = draw(st.sampled_from(dtypes))
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    view = TensorView(name, dtype, shape, ())
    if data is None:
        data = draw(st.randoms(use_true_random=False)).randbytes(view.nbytes)
    assert len(data) == view.nbytes == prod(shape) * BITS[dtype] // 8
    files = {f"{name}.{letter}": bytearray() for letter in "abc"}
    if not data:
        return Pieces(view, {key: bytes(file) for key, file in files.items()}, data)
    extents: list[Extent] = []
    width = view.row_bytes
    for top, bottom in _cuts(draw, view.rows):
        for left, right in _cuts(draw, width):
            file = draw(st.sampled_from(sorted(files)))
            offset = len(files[file]) + draw(st.integers(0, 9))
            length, count = right - left, bottom - top
            stride = length + draw(st.sampled_from([0, 0, 1, 5]))
            held = files[file]
            held.extend(b"\xee" * (offset - len(held)))
            for row in range(top, bottom):
                held.extend(data[row * width + left : row * width + right])
                if row + 1 < bottom:  # the last run ends the file: nothing stands after it
                    held.extend(b"\xee" * (stride - length))
            extents.append(Extent(file, offset, stride, count, length, top, left))
    whole = TensorView(view.name, view.dtype, view.shape, tuple(extents))
    return Pieces(whole, {key: bytes(file) for key, file in files.items()}, data)


def _cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Spans that cover ``[0, size)``."""
    inner = draw(st.lists(st.integers(1, size - 1), max_size=2, unique=True)) if size > 1 else []
    edges = [0, *sorted(inner), size]
    return list(itertools.pairwise(edges))
