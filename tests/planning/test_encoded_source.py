"""Quantized weights of a source, found by the names, dtypes and shapes of codes and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, plan_repo
from nemotron_fp8.checkpoint.inventory import Inventory, Shard
from nemotron_fp8.checkpoint.tensor_view import contiguous
from nemotron_fp8.errors import BudgetError, LayoutError
from nemotron_fp8.planning.encoded_source import encoded_source
from tests.support.checkpoints import ONE, read_tensors, weight, write_checkpoint
from tests.support.fp8_sources import EMBEDDING, mixed, source_of
from tests.support.quantized import KINDS, checkpoint_of

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

W = "model.layers.0.mlp.down_proj.weight"
Stored = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by tensor name."""
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}


def inventory_of(tensors: Stored, config: dict[str, Any] | None = None) -> Inventory:
    views, end = [], 0
    for name, (dtype, shape) in tensors.items():
        views.append(contiguous(ONE, name, dtype, shape, end))
        end += views[-1].nbytes
    return Inventory("source", (Shard(ONE, end, None, tuple(views)),), None, config or {}, (), ())


STORED: dict[str, tuple[Stored, dict[str, Any] | None, tuple[int | None, int | None]]] = {
    "tensor": ({W: ("F8_E4M3", (200, 300)), f"{W}_scale": ("F32", ())}, None, (None, None)),
    "tensor [1]": ({W: ("F8_E4M3", (200, 300)), f"{W}_scale": ("BF16", (1,))}, None, (None, None)),
    "rows": ({W: ("F8_E4M3", (200, 300)), f"{W}_scale": ("F32", (200, 1))}, None, (1, None)),
    "rows [N]": ({W: ("F8_E4M3", (200, 300)), f"{W}_scale": ("F32", (200,))}, None, (1, None)),
    "ragged blocks": ({W: ("F8_E4M3", (200, 300)), f"{W}_scale_inv": ("F32", (2, 3))}, None, (128, 128)),
    "blocks in four dimensions": ({W: ("F8_E4M3", (256, 384)), f"{W}_scale": ("F32", (2, 1, 3, 1))}, None, (128, 128)),
    "blocks of another size": ({W: ("F8_E4M3", (64, 96)), f"{W}_scale_inv": ("F32", (2, 3))}, BLOCKS, (32, 32)),
    ".scale": ({W: ("F8_E4M3", (256, 384)), W[:-6] + "scale": ("F8_E8M0", (2, 3))}, None, (128, 128)),
    "MXFP8": ({W: ("F8_E4M3", (200, 320)), f"{W}_scale": ("U8", (200, 10))}, None, (1, 32)),
    "MXFP4": ({W: ("I8", (200, 160)), W[:-6] + "scale": ("F8_E8M0", (200, 10))}, None, (1, 32)),
    "MXFP4 of ModelOpt": ({W: ("U8", (200, 160)), f"{W}_scale": ("U8", (200, 10))}, None, (1, 32)),
    "stack of blocks": (
        {W[:-7]: ("F8_E4M3", (3, 256, 200)), f"{W[:-7]}_scale_inv": ("F32", (3, 2, 2))},
        None,
        (128, 128),
    ),
    "stack of rows": ({W[:-7]: ("F8_E4M3", (3, 256, 200)), f"{W[:-7]}_scale": ("F32", (3, 256, 1))}, None, (1, None)),
}


@pytest.mark.parametrize("case", STORED)
def test_shapes_tell_what_a_scale_covers(case: str) -> None:
    tensors, config, cell = STORED[case]
    inventory = inventory_of({**tensors, EMBEDDING: ("BF16", (8, 16))}, config)
    found = encoded_source(inventory)
    ((name, view),) = found.weights.items()
    assert view.encoding is not None
    assert view.encoding.cell == cell
    assert view.dtype == "F32"
    assert found.scales == {other for other in tensors if other != name}
    stored = tensors[name][1]
    assert view.shape == ((stored[0], stored[1] * 2) if view.encoding.packed else stored)
    assert [view.name for view in found.inventory.views] == [view.name for view in inventory.views]


WRONG: dict[str, tuple[Stored, str]] = {
    "no scale": ({W: ("F8_E4M3", (8, 8))}, "without a scale"),
    "two scales": (
        {W: ("F8_E4M3", (8, 8)), f"{W}_scale": ("F32", ()), f"{W}_scale_inv": ("F32", (1, 1))},
        "_scale and .*_scale_inv: remove the wrong one",
    ),
    "two scales, one named by DeepSeek V4": (
        {W: ("F8_E4M3", (8, 8)), f"{W}_scale": ("F32", ()), W[:-6] + "scale": ("F8_E8M0", (1, 1))},
        "with 2 scales",
    ),
    "rows of columns": ({W: ("F8_E4M3", (8, 16)), f"{W}_scale": ("F32", (1, 16))}, "fits no known layout"),
    "integers": ({W: ("F8_E4M3", (8, 16)), f"{W}_scale": ("I32", ())}, "fits no known layout"),
    "a stack with torn blocks": (
        {W[:-7]: ("F8_E4M3", (3, 192, 200)), f"{W[:-7]}_scale_inv": ("F32", (3, 2, 2))},
        "fits no known layout",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_scales_that_fit_nothing_are_refused_by_name(case: str) -> None:
    tensors, words = WRONG[case]
    with pytest.raises(LayoutError, match=words) as caught:
        encoded_source(inventory_of(tensors))
    assert caught.value.tensor in tensors


OTHERS: dict[str, Stored] = {
    "a scale in FP8": {W: ("U8", (8, 16)), f"{W}_scale": ("F8_E4M3", (8, 2)), f"{W}_scale_2": ("F32", ())},
    "a mask": {"model.mask": ("U8", (8, 16)), W: ("BF16", (8, 16))},
    "codes with scales of another size": {W: ("I8", (8, 64)), W[:-6] + "scale": ("F8_E8M0", (8, 8))},
    "blocks of 8": {"experts.x_blocks": ("U8", (2, 8, 4, 8)), "experts.x_scales": ("U8", (2, 8, 4))},
    "blocks without scales": {"experts.x_blocks": ("U8", (2, 8, 4, 16))},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_tensors_remain_as_they_are(case: str) -> None:
    inventory = inventory_of(OTHERS[case])
    assert encoded_source(inventory).inventory is inventory


def test_plans_count_the_bytes_of_codes_and_scales(tmp_path: Path) -> None:
    made = {f"model.layers.{i}.mlp.down_proj": kind.make(128, 128, i) for i, kind in enumerate(KINDS.values())}
    everything = source_of(tmp_path / "s", made)
    for source in (everything, mixed(tmp_path / "m")[0]):
        size = sum(t.nbytes for path in source.glob("*.safetensors") for t in read_tensors(path).values())
        plan = plan_repo(source, Recipe())
        assert plan.bytes_in == size
        assert plan.bytes_out == sum(shard.layout.data_size for shard in plan.shard_tasks)


def test_a_budget_smaller_than_a_row_is_refused_by_the_weight(tmp_path: Path) -> None:
    """Values, codes, scales and the values of the comparison count, so that no run exceeds its budget."""
    tensors = checkpoint_of({"model.layers.0.mlp.down_proj": KINDS["MXFP4 of DeepSeek V4"].make(1, 1 << 20, 1)})
    source = write_checkpoint(tmp_path / "s", {ONE: {**tensors, EMBEDDING: weight(8, 16)}}, config={"model_type": "x"})
    assert plan_repo(source, Recipe(), max_memory="16MiB").buffer_bytes <= 16 << 20
    with pytest.raises(BudgetError, match="down_proj"):
        plan_repo(source, Recipe(), max_memory="8MiB")
