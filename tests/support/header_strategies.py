"""Hypothesis strategies for headers: tensors to lay out, metadata, and broken files."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.checkpoint.header import METADATA_KEY
from tests.support.fuzz_header import mutant

if TYPE_CHECKING:
    from collections.abc import Iterable

Tensors = list[tuple[str, str, tuple[int, ...]]]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
"""Any text that UTF-8 can hold."""

names = st.one_of(
    st.from_regex(
        r"model\.layers\.[0-9]{1,3}\.(self_attn\.[qkvo]|mlp\.(up|down))_proj\.(weight|weight_scale)",
        fullmatch=True,
    ),
    texts.filter(lambda text: text not in ("", METADATA_KEY) and "\0" not in text),
)
"""Names a tensor can have: as models have them, and anything else that is allowed."""

metadatas = st.one_of(st.none(), st.dictionaries(texts, texts, max_size=1))
"""None, an empty map or one pair: what the safetensors library writes in a fixed order."""

mutants = st.randoms(use_true_random=False).map(mutant)
"""A safetensors file, mostly broken in one or two places."""


@st.composite
def tensors(draw: st.DrawFn, dtypes: Iterable[str] = BITS, max_elements: int = 4096) -> Tensors:
    """Up to 8 tensors of different names, empty ones and scalars among them, sub-byte ones in whole bytes."""
    drawn: Tensors = []
    for name in draw(st.lists(names, max_size=8, unique=True)):
        dtype = draw(st.sampled_from(sorted(dtypes)))
        shape = draw(st.lists(st.integers(0, 9), max_size=4).filter(lambda shape: prod(shape) <= max_elements))
        drawn.append((name, dtype, (*shape, 4) if BITS[dtype] < 8 else tuple(shape)))
    return drawn
