"""Makes checkpoints for tests, and says what must become of them.

The writer here shares no code with the package: it is what the package's reader is tested against.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import safe_open

from nemotron_fp8_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nemotron_fp8_kernels.formats import Granularity

Tensors = dict[str, torch.Tensor]
Shards = dict[str, Tensors]

INDEX = "model.safetensors.index.json"
MANIFEST, CARD = "nemotron_fp8.json", "README.md"
"""Files that a source need not have: they describe a result's files and their origin, for programs and people."""
ONE = "model.safetensors"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""torch's dtype of a safetensors name."""
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronForCausalLM"],
    "model_type": "nemotron",
    "hidden_act": "relu2",
    "zeta": {"b": 1, "a": [1e-05, None, True]},
    "alpha": "é",
}
"""A config.json whose keys are in no order."""


def raw(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, row-major."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""


def shard_bytes(tensors: Mapping[str, torch.Tensor], metadata: Any = None, lead: int = 0) -> bytes:
    """A safetensors file of these tensors, in their order; ``lead`` spaces put the data out of alignment."""
    tree: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        start, data = len(data), data + raw(tensor)
        tree[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, len(data)],
        }
    return framed(b" " * lead + json.dumps(tree).encode(), data)


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this text for a header, right or wrong."""
    return len(header).to_bytes(8, "little") + header + data


def write_checkpoint(
    folder: Path,
    shards: Shards,
    *,
    metadata: Mapping[str, Any] | None = None,
    config: object = CONFIG,
    index: bool | None = None,
    index_metadata: Mapping[str, Any] | None = None,
    side: Mapping[str, bytes] | None = None,
    lead: int = 0,
) -> Path:
    """Write a checkpoint folder and return it.

    Args:
        folder: made with its parents.
        shards: the tensors of each file.
        metadata: ``__metadata__`` of each file, by its name.
        config: config.json; None for none.
        index: whether there is an index; None for one where there are several files.
        index_metadata: further keys of the index's metadata.
        side: other files.
        lead: see `shard_bytes`.
    """
    folder.mkdir(parents=True)
    for name, tensors in shards.items():
        (folder / name).write_bytes(shard_bytes(tensors, (metadata or {}).get(name), lead))
    if index or (index is None and len(shards) > 1):
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        total = sum(t.nbytes for tensors in shards.values() for t in tensors.values())
        tree = {"metadata": {**(index_metadata or {}), "total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(tree, indent=2), encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name, data in (side or {}).items():
        (folder / name).write_bytes(data)
    return folder


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Normal values like those of weights."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def model(dtype: torch.dtype = torch.bfloat16, layers: int = 2) -> Shards:
    """A small gated decoder in two shards; layer 0's q/k/v, and its gate and up, lie across them."""
    shards: Shards = {f"model-{i:05d}-of-00002.safetensors": {} for i in (1, 2)}
    first, second = shards.values()
    first["model.embed_tokens.weight"] = weight(24, 16, dtype=dtype, seed=1)
    for layer in range(layers):
        stem, home = f"model.layers.{layer}.", first if layer == 0 else second
        rest = second  # of what is fused
        home[f"{stem}input_layernorm.weight"] = weight(16, dtype=dtype, seed=2)
        home[f"{stem}self_attn.q_proj.weight"] = weight(16, 16, dtype=dtype, seed=10 * layer + 3)
        home[f"{stem}self_attn.k_proj.weight"] = weight(8, 16, dtype=dtype, seed=10 * layer + 4)
        rest[f"{stem}self_attn.v_proj.weight"] = weight(8, 16, dtype=dtype, seed=10 * layer + 5)
        home[f"{stem}self_attn.o_proj.weight"] = weight(16, 16, dtype=dtype, seed=10 * layer + 6)
        home[f"{stem}mlp.gate_proj.weight"] = weight(40, 16, dtype=dtype, seed=10 * layer + 7)
        rest[f"{stem}mlp.up_proj.weight"] = weight(40, 16, dtype=dtype, seed=10 * layer + 8)
        home[f"{stem}mlp.down_proj.weight"] = weight(16, 40, dtype=dtype, seed=10 * layer + 9)
    second["model.norm.weight"] = weight(16, dtype=dtype, seed=100)
    second["lm_head.weight"] = weight(24, 16, dtype=dtype, seed=101)
    return shards


def quantized(
    tensors: Mapping[str, torch.Tensor], names: frozenset[str] | set[str], granularity: Granularity = "channel"
) -> Tensors:
    """Return the expected content of a shard whose tensors in ``names`` become FP8, by the kernel reference.

    As in the default layout (``channel``) and in the published one (``tensor``).
    """
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name in names:
            result[name], result[f"{name}_scale"] = reference.quantize(tensor, granularity)
        else:
            result[name] = tensor
    return result


def projections(tensors: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """The tensors that the default rule takes where nothing that is fused stays."""
    return frozenset(
        n for n, t in tensors.items() if n.endswith("_proj.weight") and t.ndim == 2 and not n.startswith("mtp.")
    )


def saved(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None, scratch: Path) -> bytes:
    """The bytes that ``safetensors.torch.save_file`` writes."""
    path = scratch / "saved.safetensors"
    safetensors.torch.save_file(dict(tensors), path, metadata)
    return path.read_bytes()


def read_tensors(path: Path) -> Tensors:
    """The tensors of a shard."""
    return safetensors.torch.load_file(path)


def edit(path: Path, change: Mapping[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a shard; its metadata stays."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors: Tensors = read_tensors(path)
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    safetensors.torch.save_file(tensors, path, metadata)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree.update(changes)
    path.write_text(json.dumps(tree), encoding="utf-8")


def replace(path: Path, by: bytes | Path | None) -> None:
    """Put a file with these bytes, a link to another path, or (None) a folder where a file is."""
    path.unlink()
    if by is None:
        path.mkdir()
    elif isinstance(by, bytes):
        path.write_bytes(by)
    else:
        path.symlink_to(by)


def empty(folder: Path, *names: str) -> None:
    """Remove files of a folder; all, if none is named."""
    for path in [folder / name for name in names] or list(folder.iterdir()):
        path.unlink()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if two tensors are equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def snapshot(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Digest, inode and modification time of every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.lstat().st_ino,
            path.lstat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
    }


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    """The files of a result but for its manifest and its card, which also tell of the recipe."""
    found = contents(folder)
    del found[MANIFEST], found["README.md"]
    return found
