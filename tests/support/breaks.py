"""Ways to break a good checkpoint, and the error that each must be refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemotron_fp8 import NemotronFp8Error
from nemotron_fp8.errors import (
    AlreadyQuantizedError,
    IncompleteShardsError,
    IndexMismatchError,
    LayoutError,
    LfsPointerError,
    MalformedConfigError,
    MalformedHeaderError,
    MalformedIndexError,
    MissingShardError,
    NonFiniteError,
    NothingSelectedError,
    PackedWeightsError,
    PickledWeightsError,
    SourceNotFoundError,
    UnknownDtypeError,
)
from tests.support.checkpoints import INDEX, ONE, edit_json, empty, framed, model, replace, shard_bytes, weight

if TYPE_CHECKING:
    from collections.abc import Callable


FIRST, SECOND = (f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def weight_map(source: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
    return found


def place(source: Path, **tensors: str | None) -> None:
    """Change the index: where tensors are said to be; None for nowhere."""
    places = {**weight_map(source), **tensors}
    edit_json(source / INDEX, weight_map={name: shard for name, shard in places.items() if shard is not None})


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def header_of(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the first shard's header."""
    data = (source / FIRST).read_bytes()
    length = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + length])
    change(tree)
    (source / FIRST).write_bytes(framed(json.dumps(tree).encode(), data[8 + length :]))


def put(source: Path, shard: str, **tensors: torch.Tensor) -> None:
    """Replace or add tensors of a shard, the index following."""
    held = {**model()[shard], **tensors}
    (source / shard).write_bytes(shard_bytes(held))
    place(source, **dict.fromkeys(tensors, shard))


def spoiled(value: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    tensor = weight(16, 16, dtype=dtype)
    tensor[2, 7] = tensor[3, 1] = value
    return tensor


def only(source: Path, name: str, data: bytes) -> None:
    """Leave one file of weights."""
    empty(source, FIRST, SECOND, INDEX)
    (source / name).write_bytes(data)


def pointer(size: int) -> bytes:
    """Return the text that Git LFS writes in place of a file that was not fetched."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n".encode()


Break = tuple[type[NemotronFp8Error], "Callable[[Path], object]", dict[str, object], str]

BREAKS: dict[str, Break] = {
    "missing shard": (
        MissingShardError,
        lambda s: (s / SECOND).unlink(),
        {"shard": SECOND, "tensors": len(model()[SECOND])},
        "missing, but model.safetensors.index.json places 12 tensors in it",
    ),
    "dangling link for a shard": (
        MissingShardError,
        lambda s: replace(s / SECOND, Path("nowhere")),
        {"shard": SECOND},
        "missing",
    ),
    "tensor in the index but not in its shard": (
        IndexMismatchError,
        lambda s: place(s, **{"ghost.weight": FIRST}),
        {"tensor": "ghost.weight", "shard": FIRST},
        "in model.safetensors.index.json, but not in the shard",
    ),
    "tensor in a shard but not in the index": (
        IndexMismatchError,
        lambda s: place(s, **{O_PROJ: None}),
        {"tensor": O_PROJ, "shard": FIRST},
        "not in model.safetensors.index.json",
    ),
    "tensor in another shard than the index says": (
        IndexMismatchError,
        lambda s: place(s, **{O_PROJ: SECOND}),
        {"tensor": O_PROJ, "shard": FIRST},
        "places it in",
    ),
    "tensor in two shards": (
        IndexMismatchError,
        lambda s: put(s, SECOND, **{O_PROJ: weight(16, 16)}),
        {"tensor": O_PROJ},
        r"model\.safetensors\.index\.json places it in",
    ),
    "header: trailing bytes": (
        MalformedHeaderError,
        lambda s: append(s / FIRST, b"x"),
        {"file": FIRST},
        "belong to no tensor",
    ),
    "header: cut off": (
        MalformedHeaderError,
        lambda s: (s / FIRST).write_bytes((s / FIRST).read_bytes()[:-1]),
        {"file": FIRST},
        "bytes are missing",
    ),
    "header: empty file": (MalformedHeaderError, lambda s: (s / FIRST).write_bytes(b""), {"file": FIRST}, "0 bytes"),
    "header: shape and offsets": (
        MalformedHeaderError,
        lambda s: header_of(s, lambda tree: tree[O_PROJ].update(shape=[16, 17])),
        {"file": FIRST, "tensor": O_PROJ},
        "takes 544 bytes",
    ),
    "header: an LFS pointer": (
        LfsPointerError,
        lambda s: (s / FIRST).write_bytes(pointer(12345)),
        {"file": FIRST, "size": 12345},
        "not the file of 12,345 bytes",
    ),
    "unknown dtype": (
        UnknownDtypeError,
        lambda s: header_of(s, lambda tree: tree[O_PROJ].update(dtype="F7_E4M2")),
        {"file": FIRST, "tensor": O_PROJ, "dtype": "F7_E4M2"},
        "unknown dtype",
    ),
    "quantized: config": (
        AlreadyQuantizedError,
        lambda s: edit_json(s / "config.json", quantization_config={"quant_method": "bitnet"}),
        {"fp8": False},
        "quant_method 'bitnet'",
    ),
    "quantized: packed weights": (
        PackedWeightsError,
        lambda s: put(s, FIRST, **{"model.layers.0.self_attn.x.qweight": torch.zeros(2, 2, dtype=torch.int32)}),
        {"fp8": False, "tool": "GPTQModel"},
        "x.qweight belongs to packed weights.*undo it with GPTQModel",
    ),
    "quantized: FP8 weight without a scale": (
        LayoutError,
        lambda s: put(s, FIRST, **{O_PROJ: weight(16, 16, dtype=torch.float8_e4m3fn)}),
        {"tensor": O_PROJ},
        "an FP8 tensor without a scale",
    ),
    "quantized: a scale": (
        AlreadyQuantizedError,
        lambda s: put(s, FIRST, **{f"{O_PROJ}_scale": torch.tensor(1.0)}),
        {},
        "is a scale",
    ),
    "NaN": (
        NonFiniteError,
        lambda s: put(s, FIRST, **{O_PROJ: spoiled(float("nan"))}),
        {"tensor": O_PROJ, "count": 2, "position": (2, 7), "value": "nan"},
        r"2 values are NaN or Inf, the first \(nan\) at \[2, 7\].*--nonfinite keep",
    ),
    "Inf": (
        NonFiniteError,
        lambda s: put(s, SECOND, **{"model.layers.1.self_attn.q_proj.weight": spoiled(float("-inf"))}),
        {"tensor": "model.layers.1.self_attn.q_proj.weight", "count": 2, "position": (2, 7), "value": "-inf"},
        r"the first \(-inf\) at \[2, 7\]",
    ),
    "nothing selected": (
        NothingSelectedError,
        lambda s: only(s, ONE, shard_bytes({"a.weight": weight(4, 4)})),
        {"tensors": 1},
        r"weights with unknown names: --also-select '\(\^\|\\\.\)a\\\.weight\$' \(not known as a linear weight\)",
    ),
    "no tensors": (
        NothingSelectedError,
        lambda s: only(s, ONE, framed(b"{}")),
        {"tensors": 0},
        "none of 0 tensors",
    ),
    "only pickled weights": (
        PickledWeightsError,
        lambda s: only(s, "pytorch_model.bin", b"x"),
        {"files": ("pytorch_model.bin",)},
        "run code when",
    ),
    "no weights": (
        SourceNotFoundError,
        lambda s: empty(s, FIRST, SECOND, INDEX),
        {},
        "no .safetensors file",
    ),
    "shards without an index and without numbers": (
        SourceNotFoundError,
        lambda s: ((s / INDEX).unlink(), (s / FIRST).rename(s / "other.safetensors")),
        {},
        "2 files of weights, but no",
    ),
    "one shard of several without an index": (
        IncompleteShardsError,
        lambda s: empty(s, SECOND, INDEX),
        {"missing": (SECOND,), "expected": 2, "index": INDEX},
        "1 of 2 shards are missing",
    ),
    "a tensor in two shards without an index": (
        IndexMismatchError,
        lambda s: (put(s, SECOND, **{O_PROJ: weight(16, 16)}), (s / INDEX).unlink()),
        {"tensor": O_PROJ},
        "duplicate, also in",
    ),
    "config: a list": (
        MalformedConfigError,
        lambda s: (s / "config.json").write_text("[]"),
        {"file": "config.json"},
        "config.json: .*not an object",
    ),
    "config: not JSON": (MalformedConfigError, lambda s: (s / "config.json").write_text("{"), {}, "config.json"),
    "config: NaN": (MalformedConfigError, lambda s: (s / "config.json").write_text('{"a": NaN}'), {}, "NaN"),
    "config: a key twice": (MalformedConfigError, lambda s: (s / "config.json").write_text('{"a":1,"a":2}'), {}, "a"),
    "index: a list": (MalformedIndexError, lambda s: (s / INDEX).write_text("[]"), {"file": INDEX}, "object"),
    "index: no weight_map": (MalformedIndexError, lambda s: (s / INDEX).write_text("{}"), {}, "weight_map"),
    "index: empty weight_map": (
        MalformedIndexError,
        lambda s: (s / INDEX).write_text('{"weight_map": {}}'),
        {},
        "weight_map is empty",
    ),
    "index: metadata": (MalformedIndexError, lambda s: edit_json(s / INDEX, metadata=[1]), {}, "metadata"),
    "index: no file name": (MalformedIndexError, lambda s: place(s, **{O_PROJ: 7}), {}, "not a plain file name"),  # type: ignore[arg-type]
    "index: another kind of file": (
        MalformedIndexError,
        lambda s: place(s, **{O_PROJ: "pytorch_model.bin"}),
        {},
        "not a .safetensors file",
    ),
    "index: two names but for case": (
        MalformedIndexError,
        lambda s: place(s, **{O_PROJ: FIRST.upper().replace(".SAFETENSORS", ".safetensors")}),
        {},
        "upper and lower case",
    ),
}
