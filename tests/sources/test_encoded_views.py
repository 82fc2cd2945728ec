"""Encoded views: any range of elements equals the same elements of the whole tensor, code times scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.checkpoint.tensor_view import E2M1, Encoding, contiguous, encoded
from nemotron_fp8.sources.decoding import PAIRS_AT_ONCE, codes_from_pairs
from nemotron_fp8.sources.reader import FolderOpener, Reader
from nemotron_fp8.sources.scale_values import STORED, unpack_scales

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from nemotron_fp8.checkpoint.tensor_view import TensorView

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _stored(folder: Path, codes: torch.Tensor, scales: torch.Tensor, dtype: str, **kind: object) -> TensorView:
    """Write codes and scales to a file, after a few other bytes, and return the view of their values."""
    before = b"abc"
    (folder / "values").write_bytes(before + _bytes(codes) + _bytes(scales))
    packed = kind["elements"] == E2M1
    shape = (codes.shape[0], codes.shape[1] * 2) if packed else tuple(codes.shape)
    first = contiguous("values", "w", "U8" if packed else "F8_E4M3", tuple(codes.shape), len(before))
    second = contiguous("values", "w_scale", dtype, tuple(scales.shape), len(before) + codes.nbytes)
    return encoded("w", shape, Encoding(str(kind["elements"]), first, second, kind["cell"]))  # type: ignore[arg-type]


@given(data=st.data())
def test_a_range_of_elements_is_that_of_the_whole_matrix(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows, columns = data.draw(st.integers(1, 9)), 2 * data.draw(st.integers(1, 12))
    tall = data.draw(st.sampled_from([None, 1, 2, 3, 4]))
    wide = data.draw(st.sampled_from([None, 2, 4, 6, 32])) if tall else None
    packed = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(sorted(STORED)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    down = 1 if tall is None else -(-rows // tall)
    across = 1 if wide is None else -(-columns // wide)
    exponents = torch.randint(120, 134, (down, across), generator=generator, dtype=torch.uint8)
    scale = unpack_scales(exponents, "U8")
    raw = exponents if STORED[dtype] is torch.uint8 else scale.to(STORED[dtype])
    if packed:
        pairs = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
        table = torch.tensor([*E2M1_VALUES, *(-x for x in E2M1_VALUES)])
        halves = torch.stack((pairs & 15, pairs >> 4), dim=2).view(rows, columns)
        elements, stored = table[halves.long()], pairs
    else:
        finite = torch.randint(0, 127, (rows, columns), generator=generator, dtype=torch.uint8)
        sign = torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.uint8) << 7
        stored = (finite | sign).view(torch.float8_e4m3fn)
        elements = stored.float()
    full = scale.repeat_interleave(tall or rows, 0)[:rows].repeat_interleave(wide or columns, 1)[:, :columns]
    expected = (elements * full).flatten()
    root = tmp_path_factory.mktemp("encoded")
    view = _stored(root, stored, raw, dtype, elements=E2M1 if packed else "F8_E4M3", cell=(tall, wide))
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    with Reader(FolderOpener(root)) as reader:
        with reader.elements(view, start, stop) as values:
            assert values.dtype == torch.float32
            assert torch.equal(values, expected[start:stop])
        begin, end = data.draw(st.integers(0, view.nbytes)), view.nbytes
        with reader.raw(view, begin, end) as part:
            assert bytes(part) == _bytes(expected)[begin:end]
        assert torch.equal(reader.decoded(view, start, stop, torch.bfloat16), expected[start:stop].to(torch.bfloat16))


def test_every_pair_of_e2m1_codes_has_its_values() -> None:
    pairs = torch.arange(256, dtype=torch.uint8)
    table = [*E2M1_VALUES, *(-x for x in E2M1_VALUES)]
    expected = [table[half] for byte in range(256) for half in (byte & 15, byte >> 4)]
    assert codes_from_pairs(pairs).float().tolist() == expected
    many = pairs.repeat(PAIRS_AT_ONCE // 256 + 1)
    assert torch.equal(codes_from_pairs(many).float(), torch.tensor(expected).repeat(PAIRS_AT_ONCE // 256 + 1))


def test_a_view_knows_the_views_that_are_stored() -> None:
    codes = contiguous("f", "w", "F8_E4M3", (4, 8), 0)
    scales = contiguous("f", "w_scale", "F32", (4, 1), 32)
    view = encoded("w", (4, 8), Encoding("F8_E4M3", codes, scales, (1, None)))
    assert view.stored == (codes, scales)
    assert codes.stored == (codes,)
    assert view.nbytes == 4 * 4 * 8
    assert not view.extents
