"""The pipeline's folders against a writer that shares no code with it, before any engine sees them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from tests.inference import whole_tensor_writer
from tests.inference.layouts import (
    E8M0,
    KV_CACHE,
    LAYOUTS,
    MODELOPT,
    MODELOPT_BLOCK,
    MODELOPT_KV_CACHE,
    MX,
    MX_WEIGHTS,
    MXFP8,
    UNROUNDED,
    Layout,
    config_of,
    read_folder,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engines

KEPT_BY_BLOCK = "modules_to_not_convert"
MORE = (UNROUNDED, E8M0, MXFP8, MX, MX_WEIGHTS, MODELOPT, MODELOPT_BLOCK, KV_CACHE, MODELOPT_KV_CACHE)


@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE], ids=lambda layout: layout.name)
@pytest.mark.parametrize("model", ["nemotron", "ragged_nemotron"])
def test_same_tensors_and_config(
    model: str,
    layout: Layout,
    quantized: Callable[[Path, Layout], Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Same names, dtypes, shapes and bytes, and the same words to the engine."""
    source: Path = request.getfixturevalue(model)
    whole_tensor_writer.write(source, tmp_path / "whole", layout)
    expected, got = read_folder(tmp_path / "whole"), read_folder(quantized(source, layout))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    assert _said(quantized(source, layout)) == _said(tmp_path / "whole")
    assert _beside(quantized(source, layout)) == _beside(tmp_path / "whole")


def _beside(folder: Path) -> object:
    """The older form of the same words, without the order of the modules; None where the layout has none."""
    path = folder / whole_tensor_writer.BESIDE
    if not path.exists():
        return None
    words = json.loads(path.read_text())
    words["quantization"]["exclude_modules"].sort()
    return words


def _said(folder: Path) -> dict[str, object]:
    """The quantization_config, with the order of the modules that it leaves alone taken out."""
    words = config_of(folder)["quantization_config"]
    assert isinstance(words, dict)
    lists = {key: sorted(words[key]) for key in words.keys() & {"ignore", "ignored_layers", KEPT_BY_BLOCK}}
    return words | lists
