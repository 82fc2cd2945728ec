"""Quantized sources: every format of FP8 and MXFP4 to every layout, without an unquantized copy in between."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, dequantize_repo, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.conversion import recoding
from nemotron_fp8.errors import (
    LayoutError,
    NothingSelectedError,
)
from nemotron_fp8.planning.receipt import Recoded
from nemotron_fp8.planning.tasks import MIN_SLICE_ELEMENTS
from nemotron_fp8.sources.reader import Reader
from nemotron_fp8_kernels import reference
from nemotron_fp8_kernels.cpu import dequantize
from tests.support.checkpoints import ONE, Tensors, edit, read_tensors, same_bits, weight, write_checkpoint
from tests.support.fp8_sources import (
    EMBEDDING,
    MODULE,
    NAME,
    SECOND,
    TARGETS,
    check,
    config_of,
    every_tensor,
    mixed,
    source_of,
)
from tests.support.quantized import KINDS, Cell, Kind, Weight, checkpoint_of, decoded, spread, step_of, unpacked
from tests.support.stops import StoppedError, stop_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.checkpoint.tensor_view import TensorView


SECOND_MODULE = "model.layers.1.mlp.up_proj"


def lies_within(source: torch.Tensor, cell: Cell) -> bool:
    """Return True if each cell of a result lies in one cell of the source, element by element."""
    rows, columns = source.shape
    tall, wide = cell[0] or rows, cell[1] or columns
    if not (rows % tall or columns % wide):
        cells = source.view(rows // tall, tall, columns // wide, wide)
        return torch.equal(cells.amax((1, 3)), cells.amin((1, 3)))
    return all(
        bool((source[row : row + tall, column : column + wide] == source[row, column]).all())
        for row in range(0, rows, tall)
        for column in range(0, columns, wide)
    )


# ---- every pair of formats ----


@given(
    kind=st.sampled_from(sorted(KINDS)),
    target=st.sampled_from(sorted(TARGETS)),
    sides=st.sampled_from([(128, 128), (256, 128), (128, 384), (96, 64), (40, 160), (1, 32)]),
    powers=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=20)
def test_a_value_is_kept_or_rounded_once(
    kind: str, target: str, sides: tuple[int, int], powers: bool, seed: int
) -> None:
    recipe, cell = TARGETS[target]
    given_weight = KINDS[kind].make(*sides, seed, powers)
    old = given_weight.values
    with tempfile.TemporaryDirectory() as scratch:
        source, result = Path(scratch, "source"), Path(scratch, "fp8")
        source_of(source, {MODULE: given_weight})
        ragged = cell[0] and cell[1] and (sides[0] % cell[0] or sides[1] % cell[1])
        # One row may have a scale by itself, or in a block: the source does not tell.
        if ragged and (KINDS[kind].cell != cell or sides[0] == 1):
            with pytest.raises(NothingSelectedError, match="does not divide into blocks"):
                quantize_repo(source, result, recipe, device="cpu")
            return
        report = quantize_repo(source, result, recipe, device="cpu", threads=2)
        found = every_tensor(result)
        check(source, result)
        dequantize_repo(source, Path(scratch, "before"), dtype="float32")
        dequantize_repo(result, Path(scratch, "after"), dtype="float32")
        before, after = (read_tensors(Path(scratch, name, ONE)) for name in ("before", "after"))
    new = decoded(found, NAME, cell)
    assert torch.equal(before[NAME], old)
    assert torch.equal(after[NAME], new)
    assert same_bits(found[EMBEDDING], weight(8, 16))
    assert not [name for name in found if name.endswith("input_scale")]
    rounds = ("block" in target and "unrounded" not in target) or "mx" in target
    all_powers = powers or KINDS[kind].has_exponents
    kept = KINDS[kind].packed is None and lies_within(given_weight.cells, cell) and (all_powers or not rounds)
    changed = int((old != new).sum())
    assert report.recoded == Recoded(int(kept), int(not kept and not changed), int(bool(changed)), changed)
    assert not (kept and changed)
    if kept:
        assert same_bits(found[NAME], given_weight.tensors["weight"])
    ones = {name: tensor for name, tensor in found.items() if name != NAME}
    scale = decoded({NAME: torch.ones(sides, dtype=torch.float8_e4m3fn), **ones}, NAME, cell)
    # The multiplication before the cast rounds in float32.
    assert bool(((new.double() - old.double()).abs() <= step_of(old, scale) / 2 + old.double().abs() * 2.0**-22).all())


@pytest.mark.parametrize("target", TARGETS)
def test_the_plan_says_which_tensors_may_keep_their_codes(tmp_path: Path, target: str) -> None:
    """Where every cell of the result lies in one cell of the source, for every format of FP8."""
    recipe, cell = TARGETS[target]
    kinds = {name: kind for name, kind in KINDS.items() if kind.packed is None}
    for sides in ((256, 384), (128, 32)):
        made = {
            f"model.layers.{i}.mlp.down_proj": kind.make(*sides, i)
            for i, kind in enumerate(kinds.values())
            if cell[1] is None or not (sides[0] % (cell[0] or 1) or sides[1] % cell[1])
        }
        if not made:
            continue
        source = source_of(tmp_path / "x".join(map(str, sides)), made)
        tasks = {task.view.name: task for shard in plan_repo(source, recipe).shard_tasks for task in shard.tensor_tasks}
        for module, made_weight in made.items():
            assert tasks[f"{module}.weight"].carry == lies_within(made_weight.cells, cell), (sides, module)


def test_mxfp4_becomes_blocks_of_fp8_without_a_change(tmp_path: Path) -> None:
    """Exponents of a block may span what E4M3 holds of 0.5 to 6: beyond it, small values are rounded, and counted."""
    for span, exact in ((14, True), (16, False)):
        exponents = torch.full((128, 4), 120, dtype=torch.uint8)
        exponents[0, 0] -= span
        pairs = torch.full((128, 64), 0x77, dtype=torch.uint8)  # 6.0 everywhere
        pairs[0, :16] = 0x53  # the block of the small scale: 1.5 and 3.0
        values = unpacked(pairs) * spread(torch.exp2(exponents.float() - 127), (1, 32), (128, 128))
        tensors = {f"{MODULE}.weight": pairs.view(torch.int8), f"{MODULE}.scale": exponents.view(torch.float8_e8m0fnu)}
        source = write_checkpoint(tmp_path / f"{span}", {ONE: tensors}, config={"model_type": "llama"})
        report = quantize_repo(source, tmp_path / f"{span}-fp8", Recipe(format="fp8"), device="cpu")
        new = decoded(every_tensor(tmp_path / f"{span}-fp8"), NAME, (128, 128))
        assert torch.equal(new, values) == exact
        assert report.recoded == Recoded(0, int(exact), int(not exact), int((new != values).sum()))
        check(source, tmp_path / f"{span}-fp8")


# ---- models as they are published ----

V3_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
    },
}  # fmt: skip


def deepseek_v3(powers: bool) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """Two layers and the layer of multi-token prediction, with ragged edges as in ``kv_a_proj_with_mqa``."""
    kind = KINDS["DeepSeek V3"]
    made: dict[str, Weight] = {}
    for layer in range(3):
        for i, (module, sides) in enumerate(
            {
                "self_attn.q_a_proj": (256, 256),
                "self_attn.kv_a_proj_with_mqa": (192, 256),
                "self_attn.o_proj": (256, 128),
                "mlp.experts.0.gate_proj": (128, 256),
                "mlp.experts.0.up_proj": (128, 256),
                "mlp.experts.0.down_proj": (256, 128),
            }.items()
        ):
            made[f"model.layers.{layer}.{module}"] = kind.make(*sides, 10 * layer + i, powers)
    plain = {
        EMBEDDING: weight(64, 256),
        "lm_head.weight": weight(64, 256, seed=1),
        "model.layers.2.eh_proj.weight": weight(256, 512, seed=2),
        "model.layers.0.mlp.gate.weight": weight(4, 256, seed=3),
        "model.norm.weight": weight(256, seed=4),
    }
    return {**checkpoint_of(made), **plain}, {f"{module}.weight": each.values for module, each in made.items()}


@pytest.mark.parametrize("powers", [True, False], ids=["powers of two", "float32"])
def test_deepseek_v3_keeps_its_choice_in_blocks_and_in_rows(tmp_path: Path, powers: bool) -> None:
    tensors, values = deepseek_v3(powers)
    source = write_checkpoint(tmp_path / "source", {ONE: tensors}, config=V3_CONFIG)
    blocks = Recipe(format="fp8") if powers else Recipe(format="fp8", scale_rounding="none")
    report = quantize_repo(source, tmp_path / "block", blocks, device="cpu")
    assert report.recoded == Recoded(len(values))
    found = every_tensor(tmp_path / "block")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    quantization = config_of(tmp_path / "block").pop("quantization_config")
    assert "kv_a_proj" not in json.dumps(quantization)
    assert "model.layers.2.eh_proj" in quantization["ignored_layers"]
    check(source, tmp_path / "block")

    report = quantize_repo(source, tmp_path / "channel", Recipe(), device="cpu")
    narrow = [name for name, old in values.items() if old.shape[1] == 128]  # one block holds whole rows
    assert (report.recoded.kept, report.recoded.rounded) == (len(narrow), len(values) - len(narrow))
    found = every_tensor(tmp_path / "channel")
    for name, old in values.items():
        assert found[name].dtype == torch.float8_e4m3fn
        scale = found[f"{name}_scale"]
        if name in narrow:
            assert torch.equal(decoded(found, name, (1, None)), old)
            continue
        codes, wanted = reference.quantize(old, "channel")
        assert same_bits(found[name], codes)
        assert same_bits(scale, wanted)
    check(source, tmp_path / "channel")


def test_deepseek_v4_becomes_fp8_with_the_names_that_engines_load(tmp_path: Path) -> None:
    fp8, fp4 = KINDS["DeepSeek V4"], KINDS["MXFP4 of DeepSeek V4"]
    made = {"layers.0.attn.wq_a": fp8.make(128, 256, 1), "layers.0.attn.wkv": fp8.make(128, 256, 2)}
    for expert in range(2):
        for i, (part, sides) in enumerate({"w1": (128, 256), "w2": (256, 128), "w3": (128, 256)}.items()):
            made[f"layers.0.ffn.experts.{expert}.{part}"] = fp4.make(*sides, 3 * expert + i)
    tensors = {**checkpoint_of(made), "embed.weight": weight(64, 256), "layers.0.ffn.gate.weight": weight(4, 256)}
    config = {**V3_CONFIG, "model_type": "deepseek_v4", "architectures": ["X"], "expert_dtype": "fp4", "last": 1}
    source = write_checkpoint(tmp_path / "source", {ONE: tensors}, config=config)
    report = quantize_repo(source, tmp_path / "fp8", Recipe(format="fp8"), device="cpu")
    assert report.recoded == Recoded(2, 6)
    assert any("kept in 2 tensors, quantized again without a change in 6" in notice for notice in report.notices)
    found, written = every_tensor(tmp_path / "fp8"), config_of(tmp_path / "fp8")
    scales = {f"{module}.weight_scale_inv" for module in made}
    assert found.keys() == {f"{module}.weight" for module in made} | scales | {
        "embed.weight",
        "layers.0.ffn.gate.weight",
    }
    for module, each in made.items():
        assert torch.equal(decoded(found, f"{module}.weight", (128, 128)), each.values)
    assert [*written] == [key for key in config if key != "quantization_config"] + ["quantization_config"]
    assert written["expert_dtype"] == "fp8"
    card = (tmp_path / "fp8" / "README.md").read_text(encoding="utf-8")
    assert "The source is quantized itself: codes are kept in 2 tensors" in card
    check(source, tmp_path / "fp8")

    dequantize_repo(source, tmp_path / "plain", dtype="float32")
    plain = every_tensor(tmp_path / "plain")
    assert all(torch.equal(plain[f"{module}.weight"], each.values) for module, each in made.items())
    assert verify_repo(source, tmp_path / "plain").ok


def gpt_oss(inner: int = 64, hidden: int = 96, experts: int = 3) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """A layer of gpt-oss with its experts in MXFP4: outputs of the gate in even rows, of the other one in odd rows."""
    tensors: Tensors = {EMBEDDING: weight(64, hidden), "model.layers.0.mlp.router.weight": weight(experts, hidden)}
    values: dict[str, torch.Tensor] = {}
    for part, (rows, columns) in {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}.items():
        generator = torch.Generator().manual_seed(rows)
        pairs = torch.randint(0, 256, (experts, rows, columns // 2), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(118, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        stem = "model.layers.0.mlp.experts."
        tensors[f"{stem}{part}_blocks"] = pairs.view(experts, rows, columns // 32, 16)
        tensors[f"{stem}{part}_scales"] = exponents
        tensors[f"{stem}{part}_bias"] = weight(experts, rows)
        for expert in range(experts):
            scale = spread(torch.exp2(exponents[expert].float() - 127), (1, 32), (rows, columns))
            matrix = unpacked(pairs[expert]) * scale
            if part == "down_proj":
                values[f"{stem}{expert}.down_proj.weight"] = matrix
            else:
                values[f"{stem}{expert}.gate_proj.weight"] = matrix[0::2]
                values[f"{stem}{expert}.up_proj.weight"] = matrix[1::2]
    return tensors, values


def test_stacks_in_fp8_are_split_with_their_blocks(tmp_path: Path) -> None:
    """The blocks of the second projection begin in the middle of the stack; ignored, the stack comes back whole."""
    stem, experts, inner, hidden = "model.layers.0.mlp.experts.", 2, 128, 256
    kind = KINDS["DeepSeek V3"]
    parts = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    made = {part: [kind.make(*sides, i) for i in range(experts)] for part, sides in parts.items()}
    tensors: Tensors = {EMBEDDING: weight(8, hidden)}
    for part, weights in made.items():
        tensors[stem + part] = torch.stack([each.tensors["weight"] for each in weights])
        tensors[f"{stem}{part}_scale_inv"] = torch.stack([each.tensors["weight_scale_inv"] for each in weights])
    config = {**V3_CONFIG, "model_type": "qwen3_moe"}
    source = write_checkpoint(tmp_path / "source", {ONE: tensors}, config=config)
    report = quantize_repo(source, tmp_path / "fp8", Recipe(format="fp8", scale_rounding="none"), device="cpu")
    assert report.recoded == Recoded(3 * experts)
    found = every_tensor(tmp_path / "fp8")
    for expert in range(experts):
        both = made["gate_up_proj"][expert].values
        for name, values in (("gate", both[:inner]), ("up", both[inner:]), ("down", made["down_proj"][expert].values)):
            assert torch.equal(decoded(found, f"{stem}{expert}.{name}_proj.weight", (128, 128)), values)
    check(source, tmp_path / "fp8")
    with pytest.raises(NothingSelectedError):
        quantize_repo(source, tmp_path / "none", Recipe(ignore=("experts",)), device="cpu")
    dequantize_repo(source, tmp_path / "plain", dtype="float32")
    plain = every_tensor(tmp_path / "plain")
    assert torch.equal(plain[f"{stem}down_proj"], torch.stack([each.values for each in made["down_proj"]]))
    assert verify_repo(source, tmp_path / "plain").ok


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("block", [(1, 1), (3, 5), (128, 1 << 62), (10**30, 10**30)])
def test_blocks_of_any_size_that_a_config_states(tmp_path: Path, target: str, block: tuple[int, int]) -> None:
    recipe, cell = TARGETS[target]
    made = Kind((min(block[0], 128), min(block[1], 256)), "weight_scale_inv").make(128, 256, 1)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    source = source_of(tmp_path / "source", {MODULE: made}, config)
    report = quantize_repo(source, tmp_path / "fp8", recipe, device="cpu", max_memory="8MiB")
    new = decoded(every_tensor(tmp_path / "fp8"), NAME, cell)
    assert report.recoded.changed == int((new != made.values).sum())
    check(source, tmp_path / "fp8")


@pytest.mark.parametrize("target", ["channel", "fp8 block", "mx"])
def test_weights_without_elements(tmp_path: Path, target: str) -> None:
    source = source_of(tmp_path / "source", {MODULE: KINDS["tensor"].make(128, 128, 1)})
    name = f"{MODULE}2.weight"
    empty = {name: torch.zeros(0, 128).to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(())}
    edit(source / ONE, empty)
    quantize_repo(source, tmp_path / "fp8", TARGETS[target][0], device="cpu")
    assert every_tensor(tmp_path / "fp8")[name].shape == (0, 128)
    check(source, tmp_path / "fp8")


GPT_OSS = {"model_type": "gpt_oss", "hidden_size": 96, "quantization_config": {"quant_method": "mxfp4"}}


@pytest.mark.parametrize("target", ["channel", "mx"])
def test_experts_of_gpt_oss_are_split_by_the_order_of_their_rows(tmp_path: Path, target: str) -> None:
    recipe, cell = TARGETS[target]
    tensors, values = gpt_oss()
    source = write_checkpoint(tmp_path / "source", {ONE: tensors}, config=GPT_OSS)
    report = quantize_repo(source, tmp_path / "fp8", recipe, device="cpu", threads=2)
    found = every_tensor(tmp_path / "fp8")
    for name, old in values.items():
        new = decoded(found, name, cell)
        assert torch.equal(new, old) or target == "channel"
        assert ((new - old).abs() <= old.abs() * 2.0**-4 + old.abs().max() * 2.0**-17).all()
    assert {name for name in found if name.endswith("_bias")} == {name for name in tensors if name.endswith("_bias")}
    assert not [each.engine for each in report.engines if each.reads]
    assert all("stacks only" in each.note for each in report.engines)
    check(source, tmp_path / "fp8")


def test_packed_stacks_that_a_layout_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    """96 does not divide into blocks; and no engine loads these stacks unpacked, in their order."""
    source = write_checkpoint(tmp_path / "source", {ONE: gpt_oss()[0]}, config=GPT_OSS)
    for recipe in (Recipe(format="fp8"), Recipe(ignore=("experts",))):
        with pytest.raises(LayoutError, match=r"experts\.(gate_up|down)_proj'.*MXFP4.*(divide|--ignore)"):
            quantize_repo(source, tmp_path / "fp8", recipe, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ---- runs ----


def test_a_run_that_was_stopped_gives_the_same_result(tmp_path: Path) -> None:
    source, _ = mixed(tmp_path / "source")
    expected = quantize_repo(source, tmp_path / "whole", device="cpu")
    with pytest.raises(StoppedError):
        quantize_repo(source, tmp_path / "fp8", device="cpu", threads=1, progress=stop_at(SECOND))
    report = quantize_repo(source, tmp_path / "fp8", device="cpu")
    assert report.resumed == 1
    assert report.recoded == expected.recoded
    files = {path.name: path.read_bytes() for path in (tmp_path / "fp8").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize("target", ["channel", "fp8 block", "mx"])
@pytest.mark.parametrize("kind", ["tensor", "channel", "MXFP8", "MXFP4 of DeepSeek V4"])
def test_memory_is_bounded_and_the_bytes_do_not_depend_on_it(
    tmp_path: Path, kind: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and scales are read in parts, and the smallest budget gives the bytes of the largest one."""
    source = source_of(tmp_path / "source", {MODULE: KINDS[kind].make(2048, 1024, 1, powers=True)})
    quantize_repo(source, tmp_path / "large", TARGETS[target][0], device="cpu", threads=1)
    largest = 0

    def counted(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def read(self: Reader, view: TensorView, start: int, stop: int, *more: Any) -> torch.Tensor:
            nonlocal largest
            largest = max(largest, (stop - start) * 4)
            return original(self, view, start, stop, *more)

        return read

    for method in ("decoded", "scales"):
        monkeypatch.setattr(Reader, method, counted(getattr(Reader, method)))
    quantize_repo(source, tmp_path / "small", TARGETS[target][0], device="cpu", threads=2, max_memory="6MiB")
    assert 0 < largest <= 1 << 20
    assert (tmp_path / "small" / ONE).read_bytes() == (tmp_path / "large" / ONE).read_bytes()


@pytest.mark.parametrize("target", ["channel", "fp8 block", "mx", "fp8 tensor"])
@pytest.mark.parametrize("sides", [(256, 1024), (128, 1 << 16), (384, 640)])
def test_changed_values_of_wide_weights_are_counted_in_small_parts(
    tmp_path: Path, target: str, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A band of blocks of a wide weight has many times the values of a part."""
    recipe, cell = TARGETS[target]
    made = KINDS["MXFP4 of DeepSeek V4"].make(*sides, 3)
    source = source_of(tmp_path / "source", {MODULE: made})
    parts: list[int] = []

    def counted(codes: torch.Tensor, *more: Any) -> torch.Tensor:
        parts.append(codes.numel())
        return dequantize(codes, *more)

    monkeypatch.setattr(recoding, "dequantize", counted)
    report = quantize_repo(source, tmp_path / "fp8", recipe, device="cpu", threads=2)
    changed = int((decoded(every_tensor(tmp_path / "fp8"), NAME, cell) != made.values).sum())
    assert report.recoded == Recoded(0, int(not changed), int(bool(changed)), changed)
    assert sum(parts) == made.values.numel()
    assert max(parts) <= MIN_SLICE_ELEMENTS


@pytest.mark.parametrize("convert", [quantize_repo, dequantize_repo])
@pytest.mark.parametrize("weights", [{}, {SECOND_MODULE + ".weight": weight(8, 8)}])
def test_a_scale_without_an_fp8_weight_is_refused_by_name(
    tmp_path: Path, weights: Tensors, convert: Callable[..., object]
) -> None:
    """A result would hold the scale beside its own ones, and its verification would fail."""
    scale = SECOND_MODULE + ".weight_scale_inv"
    made = {MODULE: KINDS["tensor"].make(8, 8, 1)}
    source = source_of(tmp_path / "source", made)
    edit(source / ONE, {**weights, scale: torch.ones(1, 1)})
    with pytest.raises(LayoutError, match="a scale of no FP8 tensor") as caught:
        convert(source, tmp_path / "result")
    assert caught.value.tensor == scale
    assert not (tmp_path / "result").exists()
