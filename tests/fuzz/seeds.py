"""Good specimens of every outside format, made once by the command itself and by the writers of the other tests."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from functools import cached_property
from typing import TYPE_CHECKING

from tests.fuzz.harness import KILLED, run
from tests.fuzz.tree import Input, Tree, read_tree, under
from tests.support.stops import die_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuzz.hub_answers import HubSeeds

CARD = """\
---
license: apache-2.0
license_name: some-license
license_link: LICENSE
language:
- en
- de
tags:
- nvidia
- llama-3
base_model: owner/name
library_name: transformers
pipeline_tag: text-generation
datasets: [owner/data]
model-index:
- name: Model
  results:
  - task: {type: text-generation}
    dataset: {name: MMLU, type: mmlu}
    metrics:
    - {type: acc, value: 0.5, verified: false}
---
# A model

Some text, with a [link](https://example.com).

<!-- nemotron_fp8: begin -->
old
<!-- nemotron_fp8: end -->
The rest.
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"},
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "vocab_size": 24,
    "eos_token_id": [1, 2],
}
LAST_CHANGE = 200


class Seeds:
    """The specimens, as trees in memory.

    Args:
        base: a folder to make them in; it is left empty.
    """

    def __init__(self, base: Path) -> None:
        self._base = base / "seeds"
        for left in (self._base, self._base.with_name("hub")):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._base.mkdir(parents=True)
        try:
            self._make()
        finally:
            shutil.rmtree(self._base, ignore_errors=True)

    def _make(self) -> None:
        self.source = self._apart(source)
        self.moe = self._apart(moe)
        both = under("src", self.source)
        quiet = ("--threads", "1")
        self.result = self._command(both, "quantize", "src", "dst", "--stats", *quiet)
        fp8 = ("--format", "fp8", "--granularity", "tensor")
        self.tensor_result = self._command(both, "quantize", "src", "dst", *fp8, *quiet)
        self.wide = self._apart(wide)
        self.block_result = self._command(under("src", self.wide), "quantize", "src", "dst", "--format", "fp8", *quiet)
        self.partial = self._interrupted(both, ["quantize", "src", "dst", *quiet], "dst.partial/journal.jsonl", 2)
        self.published = self._interrupted(both, ["quantize", "src", "dst", *quiet], "dst.partial/journal.jsonl", 4)
        in_place = ["quantize", "src", "--in-place", *quiet]
        self.in_place = self._interrupted(both, in_place, "src/", 2)
        for name, compress in (
            ("zarr", None),
            ("zarr_zlib", {"id": "zlib", "level": 1}),
            ("zarr_gzip", {"id": "gzip", "level": 1}),
            ("zarr_zstd", {"id": "zstd", "level": 1}),
            ("zarr_blosc", {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 1, "blocksize": 0}),
        ):
            setattr(self, name, self._apart(lambda folder, compress=compress: zarr(folder, compress)))
        self.dist = self._apart(dist)
        self.archive = {"it.nemo": tar_of(self.zarr)}

    @cached_property
    def hub(self) -> HubSeeds:
        """A served Hub that holds some of the specimens."""
        from tests.fuzz.hub_answers import HubSeeds

        return HubSeeds(self, self._base.with_name("hub"))

    zarr: Tree
    zarr_zlib: Tree
    zarr_gzip: Tree
    zarr_zstd: Tree
    zarr_blosc: Tree

    def _apart(self, make: Callable[[Path], None]) -> Tree:
        """Make a folder in another process: torch's threads must not start in this one."""
        folder = self._base / "made"
        pid = os.fork()
        if not pid:
            code = 1
            try:
                make(folder)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"{make} failed")
        tree = read_tree(folder)
        shutil.rmtree(folder)
        return tree

    def _command(self, tree: Tree, *command: str) -> Tree:
        folder = self._base / "run"
        ended = run(Input(tree, list(command)), folder, 120)
        if ended.code:
            raise RuntimeError(f"{command}: {ended.err}")
        made = read_tree(folder / "dst")
        shutil.rmtree(folder)
        return made

    def _interrupted(self, tree: Tree, command: list[str], journal: str, lines: int) -> Tree:
        """Return the whole folder of a command that was killed when its journal had so many lines."""
        from nemotron_fp8.cli.main import main

        folder = self._base / "run"
        for number in range(10, LAST_CHANGE):
            ended = run(Input(tree, command), folder, 120, lambda number=number: (die_at(number), main()))
            left = {name: node for name, node in read_tree(folder).items() if not name.startswith(("home", "tmp"))}
            shutil.rmtree(folder)
            found = [node for name, node in left.items() if name.startswith(journal) and name.endswith("journal.jsonl")]
            if ended.code == -KILLED and found and isinstance(found[0], bytes) and found[0].count(b"\n") >= lines:
                lock = {name: b'{"pid": 1, "host": "host"}' for name in left if name.endswith("/lock")}
                return {**{name: node for name, node in left.items() if "/work-" not in name}, **lock}
        raise RuntimeError(f"{command} left no journal")


def source(folder: Path) -> None:
    """Write a small decoder in two shards with every kind of small file."""
    from tests.support.checkpoints import model, write_checkpoint

    write_checkpoint(
        folder,
        model(layers=1),
        metadata={f"model-{i:05d}-of-00002.safetensors": {"format": "pt"} for i in (1, 2)},
        config=CONFIG,
        side={
            "README.md": CARD.encode(),
            "tokenizer.json": b'{"version": "1.0"}',
            "tokenizer_config.json": json.dumps(
                {"add_bos_token": True, "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}, "a": [1.5]}
            ).encode(),
            "generation_config.json": b'{"eos_token_id": [1, 2]}',
            "configuration_x.py": b"from .other_x import y\n",
            "modeling_x.py": b"from .configuration_x import XConfig\nimport torch\n",
            "tokenization_x.py": b"import re\n",
            "other_x.py": b"y = 1\n",
            "LICENSE": b"free",
        },
    )


def wide(folder: Path) -> None:
    """Write a model of one weight that divides into blocks."""
    from tests.support.checkpoints import weight, write_checkpoint

    tensors = {"model.layers.0.mlp.down_proj.weight": weight(128, 128), "model.norm.weight": weight(16)}
    write_checkpoint(folder, {"model.safetensors": tensors}, config={"model_type": "llama"})


def moe(folder: Path) -> None:
    """Write a decoder with experts, a router and stacked experts in one shard."""
    from tests.support.checkpoints import weight, write_checkpoint

    tensors = {"model.embed_tokens.weight": weight(24, 16), "lm_head.weight": weight(24, 16)}
    stem = "model.layers.0."
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8), ("o_proj", 16)):
        tensors[f"{stem}self_attn.{name}.weight"] = weight(rows, 16)
    tensors[f"{stem}mlp.experts.gate_up_proj"] = weight(4, 16, 32)
    tensors[f"{stem}mlp.experts.down_proj"] = weight(4, 16, 16)
    tensors[f"{stem}mlp.gate.weight"] = weight(4, 16)
    tensors[f"{stem}input_layernorm.weight"] = weight(16)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "hidden_size": 16,
        "text_config": {"model_type": "qwen3_moe_text", "num_experts": 4},
    }
    write_checkpoint(folder, {"model.safetensors": tensors}, config=config)


def zarr(folder: Path, compress: dict[str, object] | None) -> None:
    """Write a NeMo checkpoint in the zarr layout."""
    from tests.sources.nemo.test_conversions import sentencepiece
    from tests.support.nemo_writer import hf_tensors, write_nemo

    write_nemo(folder, hf_tensors(sizes()), sizes(), "output", compress=compress)
    (folder / "0123_tokenizer.model").write_bytes(sentencepiece())
    (folder / "README.md").write_text(CARD)


def sizes() -> object:
    """Return the sizes of the NeMo models."""
    from tests.support.nemo_writer import Sizes

    return Sizes(layers=1, heads=2, groups=1, head_dim=8, hidden=16, inner=32, vocabulary=24)


def dist(folder: Path) -> None:
    """Write a NeMo checkpoint in the torch_dist layout."""
    import torch

    from tests.sources.nemo.test_torch_dist import write_dist
    from tests.support.nemo_writer import hf_tensors

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    write_dist(folder, sizes(), hf_tensors(sizes()), blocks=True)


def tar_of(tree: Tree, top: str = "./") -> bytes:
    """Pack a tree as a .nemo archive."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:") as archive:
        for name, node in tree.items():
            if isinstance(node, bytes):
                info = tarfile.TarInfo(top + name)
                info.size = len(node)
                archive.addfile(info, io.BytesIO(node))
    return made.getvalue()
