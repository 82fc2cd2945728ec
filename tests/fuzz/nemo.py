"""Inputs of a NeMo checkpoint: config, zarr arrays, torch_dist metadata and data, tokenizer, archive."""

from __future__ import annotations

import bz2
import gzip
import io
import pickle
import struct
import zlib
from typing import TYPE_CHECKING, Any

from tests.fuzz.archive_mutations import entries_of, mutate_message, mutate_tar, mutate_zip, saved_tensor
from tests.fuzz.commands import reading_nemo
from tests.fuzz.json_mutations import Members, encoded, hostile, mutate_json, mutate_tree, parsed, written
from tests.fuzz.pickle_mutations import mutate_pickle
from tests.fuzz.seeds import tar_of
from tests.fuzz.values import integer, is_big, many, mutate_bytes, pick, text
from tests.fuzz.yaml_mutations import mutate_yaml

if TYPE_CHECKING:
    from random import Random

    from tests.fuzz.seeds import Seeds
    from tests.fuzz.tree import Input, Tree

CONFIG, METADATA, DATA, TOKENIZER = (
    "model_config.yaml",
    "model_weights/.metadata",
    "model_weights/__0_0.distcp",
    "0123_tokenizer.model",
)
CONFIG_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "activation", "normalization", "layernorm_epsilon", "bias", "position_embedding_type", "rotary_percentage",
    "rotary_base", "precision", "share_embeddings_and_output_weights", "max_position_embeddings", "encoder_seq_length",
    "init_method_std", "tokenizer", "num_moe_experts", "mcore_gpt", "transformer_block_type",
    "seq_len_interpolation_factor", "model", "target", "nemo_version", "megatron_amp_O2", "multi_query_attention",
    "qk_layernorm", "<<", "1", "? a", "a.b", "null", "'a b'",
)  # fmt: skip
ZARRAY_KEYS = (
    "chunks",
    "compressor",
    "dtype",
    "fill_value",
    "filters",
    "order",
    "shape",
    "zarr_format",
    "dimension_separator",
)
COMPRESSORS = ("zlib", "gzip", "bz2", "zstd", "blosc")


def config(chance: Random, seeds: Seeds) -> Input:
    """Change the model config."""
    source = dict(seeds.zarr if chance.random() < 0.7 else seeds.dist)
    old = _file(source, CONFIG).decode()
    source[CONFIG] = mutate_yaml(chance, old, CONFIG_KEYS).encode(
        "utf-8", pick(chance, ("surrogateescape", "surrogatepass"))
    )
    return reading_nemo(chance, source, seeds)


def _file(tree: Tree, name: str) -> bytes:
    data = tree[name]
    assert isinstance(data, bytes)
    return data


def zarray(chance: Random, seeds: Seeds) -> Input:
    """Change the metadata of a zarr array, or what lies beside it."""
    source = dict(pick(chance, (seeds.zarr, seeds.zarr, seeds.zarr_zlib, seeds.zarr_blosc)))
    name = pick(chance, [name for name in source if name.endswith(".zarray")])
    kind = chance.random()
    folder = name.rpartition("/")[0]
    if kind < 0.8:
        source[name] = mutate_json(chance, _file(source, name), ZARRAY_KEYS, lambda tree: _shape(chance, tree))
    elif kind < 0.9:
        chunk = pick(chance, [other for other in source if other.startswith(f"{folder}/") and other != name])
        other = pick(
            chance, ("9.9", "0", "0.0.0.0", "00.0", "-1.0", "0.0 ", "x", ".zattrs", "0/0", "1" * 200, "0." + "9" * 100)
        )
        source[f"{folder}/{other}"] = source.pop(chunk) if chance.random() < 0.5 else _file(source, chunk)
    elif kind < 0.95:
        del source[name]
    else:
        moved = {other: node for other, node in source.items() if other.startswith(f"{folder}/")}
        new = pick(
            chance,
            (f"{folder}.x", folder.replace("layers", "layers.7"), "model_weights/x", "model_weights/é", folder.upper()),
        )
        source |= {new + other.removeprefix(folder): node for other, node in moved.items()}
    return reading_nemo(chance, source, seeds)


def _shape(chance: Random, tree: Any) -> None:
    """Change shape, chunks or dtype to numbers."""
    for _ in range(pick(chance, (1, 2))):
        key = pick(chance, ("shape", "chunks", "dtype", "compressor", "dimension_separator"))
        old = dict(tree).get(key)
        new: Any = hostile(chance)
        if key in ("shape", "chunks") and isinstance(old, list) and old:
            new = list(old)
            new[chance.randrange(len(new))] = pick(chance, (1, 2, 3, 5, 1 << 20, 1 << 48, 0, -1, integer(chance)))
            new = pick(chance, (new, [*new, 1], new[1:], [1, *new], []))
        elif key == "dtype":
            new = pick(
                chance,
                ("<f4", "<f2", "<f8", "|u1", "|b1", "<i8", ">f4", "<V2", "bfloat16", "<c8", "|O", [["a", "<f4"]]),
            )
        elif key == "compressor":
            new = Members(
                [
                    ("id", pick(chance, (*COMPRESSORS, "lz4", 1))),
                    ("level", integer(chance)),
                    ("blocksize", integer(chance)),
                ]
            )
        elif key == "dimension_separator":
            new = pick(chance, (".", "/", "", "..", 0, None))
        tree[:] = [(known, value) for known, value in tree if known != key] + [(key, new)]


def chunk(chance: Random, seeds: Seeds) -> Input:
    """Change a chunk, compressed or not."""
    kind = pick(chance, ("zarr", "zarr_zlib", "zarr_gzip", "zarr_zstd", "zarr_blosc", "zarr_blosc"))
    source = dict(getattr(seeds, kind))
    names = [
        name for name in source if "/" in name.removeprefix("model_weights/") and not name.endswith((".zarray", ".pt"))
    ]
    for _ in range(pick(chance, (1, 1, 3))):
        name = pick(chance, names)
        old = source.get(name, b"")
        assert isinstance(old, bytes)
        source[name] = _chunk(chance, old)
        if chance.random() < 0.08:
            del source[name]
    if chance.random() < 0.3:  # all arrays say that they are compressed otherwise
        other = pick(chance, COMPRESSORS)
        for name in source:
            if name.endswith(".zarray"):
                tree = parsed(_file(source, name))
                compressor = Members([("id", other), ("level", 1)])
                source[name] = encoded(written(Members((k, compressor if k == "compressor" else v) for k, v in tree)))
    return reading_nemo(chance, source, seeds)


def _chunk(chance: Random, old: bytes) -> bytes:
    """Return a mutation of a chunk, or a stream that expands to much."""
    if chance.random() < 0.6:
        return mutate_bytes(chance, old)
    size = 1 << (28 if is_big(chance) else 20)
    return pick(
        chance,
        (
            lambda: b"",
            lambda: bytes(len(old)),
            lambda: old[:-1],
            lambda: old * 2,
            lambda: zlib.compress(bytes(size), 1),
            lambda: gzip.compress(bytes(1 << 20), 1) * (size >> 20),
            lambda: bz2.compress(bytes(size), 1),
            lambda: zlib.compress(bytes(size), 1)[:-5],
            lambda: _blosc(chance, old),
            lambda: _zstd(chance),
        ),
    )()


def _blosc(chance: Random, old: bytes) -> bytes:
    """Return a blosc header with other sizes."""
    made = bytearray(old.ljust(16, b"\0"))
    at = pick(chance, (0, 1, 2, 3, 4, 8, 12))
    if at < 4:
        made[at] = chance.randrange(256)
    else:
        made[at : at + 4] = struct.pack("<I", integer(chance) & 0xFFFFFFFF)
    return bytes(made)


def _zstd(chance: Random) -> bytes:
    """Return a frame of zstd with a size that is not true, perhaps of one repeated byte."""
    size = pick(chance, (0, 1, 1 << 20, 1 << 40, (1 << 64) - 1, (1 << 64) - 2))
    blocks = (struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"a") * pick(chance, (1, 100, 5000))
    last = struct.pack("<I", 1 << 3 | 1 << 1 | 1)[:3] + b"a"
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", size) + blocks + last


def metadata(chance: Random, seeds: Seeds) -> Input:
    """Change the metadata of a torch_dist checkpoint: by opcode, or the values of its objects."""
    source = dict(seeds.dist)
    old = _file(source, METADATA)
    if chance.random() < 0.6:
        source[METADATA] = mutate_pickle(chance, old)
        return reading_nemo(chance, source, seeds)
    described = pickle.loads(old)
    for _ in range(pick(chance, (1, 1, 1, 2, 3))):
        _describe(chance, described)
    source[METADATA] = pickled(described)
    return reading_nemo(chance, source, seeds)


def _describe(chance: Random, described: Any) -> None:
    """Change one value of the metadata of a torch_dist checkpoint."""
    tensors, places = described.state_dict_metadata, described.storage_data
    name = pick(chance, sorted(tensors))
    index = pick(chance, list(places))
    chunks = getattr(tensors[name], "chunks", None) or []
    kind = chance.randrange(12)
    number = pick(chance, (0, 1, 2, 3, 16, 17, 1 << 20, integer(chance)))
    if kind == 0:
        places[index].offset = number
    elif kind == 1:
        places[index].length = number
    elif kind == 2:
        paths = ("__0_0.distcp", "__1_0.distcp", "../x.distcp", "a/b.distcp", ".metadata", "", text(chance), 7, None)
        places[index].relative_path = pick(chance, paths)
    elif kind == 3:
        del places[index]
    elif kind == 4:
        other = pick(chance, list(places))
        places[index], places[other] = places[other], places[index]
    elif kind == 5:
        tensors[pick(chance, (text(chance), f"{name}.x", name.replace("layers", "layers.0"), "optimizer.x"))] = (
            tensors.pop(name)
        )
    elif kind == 6:
        tensors[name] = pick(chance, (tensors[pick(chance, sorted(tensors))], None, [], 1, "x"))
    elif kind == 7 and chunks:
        chunks[:] = pick(chance, (chunks[1:], chunks * 2, chunks[::-1], [], chunks * many(chance)))
    elif kind == 8 and chunks:
        part = pick(chance, chunks)
        for key in pick(chance, (("offsets",), ("sizes",), ("offsets", "sizes"))):
            setattr(part, key, _sides(chance, getattr(part, key)))
    elif kind == 9 and chunks:
        tensors[name].size = _sides(chance, tensors[name].size)
    elif kind == 10 and chunks:
        import torch

        dtypes = (torch.float32, torch.int64, torch.complex64, torch.bool, None, "bfloat16", 1)
        tensors[name].properties.dtype = pick(chance, dtypes)
    elif chunks:
        _grid(chance, tensors[name], chunks)


def _sides(chance: Random, old: Any) -> Any:
    """Return other dimensions."""
    new = list(old)
    if new:
        new[chance.randrange(len(new))] = pick(chance, (0, 1, 2, 1 << 20, 1 << 47, 1 << 48, 1 << 62))
    return pick(chance, (new, new, [*old, 1], list(old)[1:], list(old) * 5, [], None, "ab", tuple(new)))


def _grid(chance: Random, tensor: Any, chunks: list[Any]) -> None:
    """Cut an array into strips of rows and of columns, whose edges make a large grid."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    side = pick(chance, (3, 30, 300, 1000))
    tensor.size = [side, side]
    columns = [([0, i], [1, 1]) for i in range(side)]
    rows = [([i, 0], [1, side]) for i in range(1, side)]
    chunks[:] = [ChunkStorageMetadata(offsets, sizes) for offsets, sizes in columns + rows]  # type: ignore[arg-type]  # lists


def pickled(value: Any) -> bytes:
    """Return a pickle of the protocol that torch writes."""
    out = io.BytesIO()
    pickle.dump(value, out)
    return out.getvalue()


def distcp(chance: Random, seeds: Seeds) -> Input:
    """Change a file of tensors, or let the metadata name an archive that was made for this input."""
    source = dict(seeds.dist)
    data = _file(source, DATA)
    kind = chance.random()
    if kind < 0.5:
        source[DATA] = mutate_zip(chance, data)
        return reading_nemo(chance, source, seeds)
    if kind < 0.55:
        source[DATA] = mutate_bytes(chance, data)
        return reading_nemo(chance, source, seeds)
    described = pickle.loads(_file(source, METADATA))
    index, info = pick(chance, [(k, v) for k, v in described.storage_data.items() if k.offset is not None])
    entries = entries_of(data[info.offset : info.offset + info.length])
    for _ in range(pick(chance, (1, 1, 2))):
        name = pick(chance, (*entries, "data.pkl", "data.pkl"))
        if name not in entries:
            continue
        by_opcode = name == "data.pkl" and chance.random() < 0.9
        entries[name] = mutate_pickle(chance, entries[name]) if by_opcode else mutate_bytes(chance, entries[name])
        if chance.random() < 0.1:
            entries[pick(chance, ("data.pkl", "data/0", "byteorder", text(chance)[:60_000]))] = entries.pop(name)
    new = saved_tensor(chance, entries)
    info.offset, info.length = len(data), len(new)
    described.storage_data[index] = info
    source[DATA] = data + new
    source[METADATA] = pickled(described)
    return reading_nemo(chance, source, seeds)


def tokenizer(chance: Random, seeds: Seeds) -> Input:
    """Change fields of the SentencePiece model."""
    source = dict(seeds.zarr)
    source[TOKENIZER] = mutate_message(chance, _file(source, TOKENIZER))
    if chance.random() < 0.1:
        source[pick(chance, ("x.model", "é.model", "tokenizer.model", "a\n.model"))] = source.pop(TOKENIZER)
    return reading_nemo(chance, source, seeds)


def archive(chance: Random, seeds: Seeds) -> Input:
    """Change the headers of a .nemo archive; some archives are of torch_dist."""
    data = (
        _file(seeds.archive, "it.nemo") if chance.random() < 0.8 else tar_of(seeds.dist, pick(chance, ("./", "", "a/")))
    )
    return reading_nemo(chance, {"it.nemo": mutate_tar(chance, data)}, seeds, "it.nemo")


def weights_metadata(chance: Random, seeds: Seeds) -> Input:
    """Change the small files beside the arrays, or the names of files."""
    source = dict(pick(chance, (seeds.zarr, seeds.dist)))
    name = "model_weights/metadata.json"
    if chance.random() < 0.6:
        tree = parsed(_file(source, name))
        mutate_tree(chance, tree, ("sharded_backend", "common_backend"))
        source[name] = encoded(written(tree))
    else:
        old = pick(chance, sorted(source))
        source[f"{old.rpartition('/')[0]}/{pick(chance, ('x', 'README.md', 'é', '.hidden', 'a.py'))}".lstrip("/")] = (
            source.pop(old)
        )
    return reading_nemo(chance, source, seeds)
