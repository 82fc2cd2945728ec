"""The checkpoint that is killed and broken over and over: small, yet with every kind of file and tensor."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path

from nemotron_fp8.checkpoint import header

MTIME_NS = 1_700_000_000_000_000_000
"""Modification time of every file of a fresh source, so that copies of it are the same to a journal."""
SHARDS = 3


def write_source(folder: Path, rows: int, columns: int, shards: int = SHARDS) -> None:
    """Write a checkpoint: bf16 projections (q, k and v in different shards), norms, index, config, side files."""
    folder.mkdir(parents=True)
    generator = random.Random(7)
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    for i, group in enumerate(groups):
        stem = f"model.layers.{i}."
        group[f"{stem}self_attn.q_proj.weight"] = (rows, columns)
        groups[(i + 1) % shards][f"{stem}self_attn.k_proj.weight"] = (rows, columns)
        group[f"{stem}mlp.down_proj.weight"] = (columns, rows)
        group[f"{stem}input_layernorm.weight"] = (columns,)
    groups[0]["model.embed_tokens.weight"] = (32, columns)
    weight_map, total = {}, 0
    for i, tensors in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{shards:05d}.safetensors"
        layout = header.build_header([(t, "BF16", shape) for t, shape in tensors.items()], {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header.serialize(layout))
            for entry in layout.entries:
                file.write(_values(entry.nbytes // 2, generator))
                weight_map[entry.name] = name
        total += layout.data_size
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron"})
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    settle_times(folder)


def _values(count: int, generator: random.Random) -> bytes:
    """bf16 values like weights; beyond some thousand they repeat."""
    pool = b"".join(struct.pack("<f", generator.gauss(0, 0.02))[2:] for _ in range(min(count, 4096)))
    return (pool * (count // 4096 + 1))[: 2 * count]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def settle_times(folder: Path) -> None:
    """Give every file of a folder the same modification time."""
    for path in folder.iterdir():
        os.utime(path, ns=(MTIME_NS, MTIME_NS))


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder with its times; links stay links."""
    shutil.copytree(source, target, symlinks=True)


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder by relative path; folders end in a slash, links show their target."""
    found: dict[str, str] = {}
    for root, folders, files in os.walk(folder):
        base = Path(root)
        for name in folders:
            found[f"{(base / name).relative_to(folder)}/"] = "folder"
        for name in files:
            path = base / name
            key = str(path.relative_to(folder))
            found[key] = f"-> {path.readlink()}" if path.is_symlink() else digest(path)
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree_at(folder: Path) -> dict[str, str] | None:
    """SHA-256 of the files of a folder, read through one descriptor of it; None if another folder stands there by then.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = {}
        for name in os.listdir(fd):  # noqa: PTH208  (of a descriptor)
            file = os.open(name, os.O_RDONLY, dir_fd=fd)
            with os.fdopen(file, "rb") as opened:
                found[name] = hashlib.sha256(opened.read()).hexdigest()
        there = folder.stat()
        return found if os.path.samestat(os.fstat(fd), there) else None
    except FileNotFoundError:
        # Someone removed what was published; that is no partial result.
        return None
    finally:
        os.close(fd)
