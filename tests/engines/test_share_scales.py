"""Shared scales go through vLLM's merging unchanged; scales of their own do not.

vLLM merges q/k/v and gate/up into one matrix with one scale, in two exact steps (vllm 0.32,
``vllm/model_executor/layers/quantization/utils/w8a8_utils.py``): ``requantize_with_max_scale`` takes the largest of
the scales, then for each part ``per_tensor_dequantize`` (the codes cast to float16, times a float32 scale of no
dimension, so that the product is float16) and ``ops.scaled_fp8_quant`` with the largest scale
(``static_scaled_fp8_quant``: in float32, times the reciprocal of the scale, clamped to 448 and rounded to E4M3).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import quantize_repo
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.sources.files import FolderOpener, identify
from nemotron_fp8.sources.folder import read_folder
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import ONE, Tensors, read_tensors, same_bits, weight, write_checkpoint
from tests.support.fakes import MemoryDestination
from tests.support.fp8_sources import every_tensor
from tests.support.recipes import PUBLISHED, SHARED
from tests.support.run import engine, make_shard

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.sources.files import SourceFile

FUSED = {
    "qkv": tuple(f"model.layers.{{}}.self_attn.{p}_proj.weight" for p in "qkv"),
    "gate_up": tuple(f"model.layers.{{}}.mlp.{p}_proj.weight" for p in ("gate", "up")),
}
ALL_BYTES = torch.arange(256, dtype=torch.uint8)
EVERY_CODE = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
"""The 254 finite codes."""
GROUPS = [tuple(n.format(layer) for n in names) for names in FUSED.values() for layer in (0, 1)]


def per_tensor_dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.float16) * scale


def scaled_fp8_quant(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    inverse = torch.ones((), dtype=torch.float32) / scale
    return (values.float() * inverse).clamp(-448, 448).to(torch.float8_e4m3fn)


def merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``requantize_with_max_scale``: the scale of the whole, and the codes of each part as the engine has them."""
    largest = torch.stack([scale.reshape(()) for _, scale in parts]).max()
    return largest, [
        scaled_fp8_quant(per_tensor_dequantize(codes, scale.reshape(())), largest) for codes, scale in parts
    ]


def changed(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Codes that the merging changes: value for value, since zeros may lose their sign."""
    return sum(
        int((codes.float() != after.float()).sum()) for (codes, _), after in zip(parts, merged(parts)[1], strict=True)
    )


def parts_of(found: Tensors, names: tuple[str, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(found[name], found[f"{name}_scale"]) for name in names]


@pytest.mark.parametrize("format_", ["fp8", "compressed-tensors"])
def test_the_engine_changes_no_code_under_a_shared_scale(tmp_path: Path, checkpoint: Path, format_: str) -> None:
    """Layer 0's groups lie across the shards, layer 1's do not. Each scale is the reference's of the largest amax."""
    quantize_repo(checkpoint, tmp_path / "fp8", SHARED.model_copy(update={"format": format_}), device="cpu")
    found, original = every_tensor(tmp_path / "fp8"), every_tensor(checkpoint)
    homes = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert [len({homes[name] for name in names}) for names in GROUPS] == [2, 1, 2, 1]
    for names in GROUPS:
        amax = torch.stack([reference.amax(original[name]) for name in names]).max()
        for name in names:
            codes, scale = reference.quantize_with_amax(original[name], amax)
            assert same_bits(found[name], codes)
            assert same_bits(found[f"{name}_scale"].reshape(()), scale)
        assert changed(parts_of(found, names)) == 0
        assert float(merged(parts_of(found, names))[0]) == float(scale)


def test_the_engine_changes_codes_under_scales_of_their_own(tmp_path: Path, checkpoint: Path) -> None:
    """Codes of every group move in which a scale is under 0.9 of the largest; nearer ones may round to themselves."""
    quantize_repo(checkpoint, tmp_path / "fp8", PUBLISHED, device="cpu")
    found = every_tensor(tmp_path / "fp8")
    counts = []
    for names in GROUPS:
        parts = parts_of(found, names)
        scales = [float(scale) for _, scale in parts]
        assert len(set(scales)) > 1
        if min(scales) < 0.9 * max(scales):
            counts.append(changed(parts))
    assert counts
    assert all(count > 0 for count in counts)


def test_every_code_survives_at_every_scale_down_to_the_limit() -> None:
    """All finite codes, at 2^-15, just above and at random scales over it: none changes. At 2^-16 some do."""
    every = EVERY_CODE
    limit = 2.0**-15
    drawn = torch.rand(300, generator=torch.Generator().manual_seed(9)) * 8
    for scale in [torch.tensor(limit), torch.tensor(limit * (1 + 2**-23)), *(limit * torch.exp2(drawn))]:
        assert changed([(every, scale), (every, scale)]) == 0
    assert changed([(every, torch.tensor(limit / 2 * 0.9))]) > 0


@dataclass
class Recorded:
    """A file that notes the bytes that are asked of it; there are no windows, so that no byte comes unseen."""

    file: SourceFile
    ranges: list[tuple[int, int]]

    def window(self, offset: int, length: int) -> memoryview | None:
        """No bytes: all are read."""
        del offset, length
        return None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Note the range and read."""
        self.ranges.append((offset, offset + len(buffer)))
        self.file.read_into(offset, buffer)

    def release(self, offset: int, length: int) -> None:
        """Nothing is resident."""

    def close(self) -> None:
        """Close the file."""
        self.file.close()


@dataclass
class RecordingOpener:
    """Opens a folder's files and notes what is read of each."""

    opener: FolderOpener
    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def open(self, file: str) -> Recorded:
        """See `nemotron_fp8.sources.files.Opener.open`."""
        return Recorded(self.opener.open(file), self.ranges.setdefault(file, []))


def test_of_another_shard_only_the_partners_are_read(checkpoint: Path) -> None:
    """Making the first shard reads its own tensors, and of the second v and up of layer 0: not a byte beside them."""
    inventory = read_folder(checkpoint)
    plan = make_plan(inventory, SHARED, 1 << 26, 2)
    first, second = (shard.name for shard in inventory.shards)
    opener = RecordingOpener(FolderOpener(checkpoint, identify(checkpoint)))
    make_shard(plan.shard_tasks[0], opener, destination := MemoryDestination(), engine())
    assert set(destination.staged) == {first}
    extents = {view.name: view.extents[0] for shard in inventory.shards for view in shard.views}
    partners = [names[-1] for names in GROUPS if ".0." in names[-1]]
    wanted: set[int] = set()
    for name in partners:
        view = next(v for v in inventory.views if v.name == name)
        assert extents[name].file == second
        wanted |= set(range(extents[name].offset, extents[name].offset + view.nbytes))
    read = {byte for begin, end in opener.ranges[second] for byte in range(begin, end)}
    assert read == wanted
    assert set(opener.ranges) == {first, second}


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_groups_whose_scale_underflows_in_the_engine_are_named(tmp_path: Path, factor: float) -> None:
    """A warning where a shared scale is under 2^-15, and not above, nor for a tensor alone."""
    names = [name.format(0) for name in FUSED["qkv"]]
    alone = "model.layers.1.self_attn.o_proj.weight"
    # Every code there is, and so an amax of 448 times the scale that is wanted.
    values = EVERY_CODE.float().reshape(2, 127) * (2.0**-15 * factor)
    tensors = {name: values / (i + 1) for i, name in enumerate(names)}
    tensors[alone] = weight(8, 16) * 1e-6
    write_checkpoint(tmp_path / "source", {ONE: tensors})
    report = quantize_repo(tmp_path / "source", tmp_path / "fp8", SHARED, device="cpu")
    found = [notice for notice in report.notices if "2^-15" in notice]
    parts = parts_of(read_tensors(tmp_path / "fp8" / ONE), tuple(names))
    if factor < 1:
        (notice,) = found
        assert "model.layers.0.self_attn.qkv_proj" in notice
        assert alone not in notice
        assert "layers.1" not in notice
        assert changed(parts) > 0, "or there would be nothing to warn of"
    else:
        assert found == []
        assert changed(parts) == 0
