"""Take the inventory of a NeMo checkpoint: its arrays as tensors of Hugging Face, its config, its tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.header import check_name
from nemotron_fp8.checkpoint.inventory import Inventory
from nemotron_fp8.errors import PickledWeightsError, SourceError, SourceNotFoundError, SourceReadError, printable
from nemotron_fp8.errors.nemo import MalformedArrayError
from nemotron_fp8.sources.base import Source, stamp
from nemotron_fp8.sources.nemo import model_config as nemo_config
from nemotron_fp8.sources.nemo import torch_dist, zarr
from nemotron_fp8.sources.nemo.compressed_chunks import ChunkOpener, Packed, held_bytes
from nemotron_fp8.sources.nemo.files import files_of_folder
from nemotron_fp8.sources.nemo.name_mapping import EMBEDDING, Table, tensors, why_left_out
from nemotron_fp8.sources.nemo.payload_checks import CheckedOpener, Payload
from nemotron_fp8.sources.nemo.sharding import split
from nemotron_fp8.sources.nemo.side_files import MODEL_CONFIG, explain, small_files
from nemotron_fp8.sources.nemo.tar_index import files_of_archive
from nemotron_fp8.untrusted import yaml_text
from nemotron_fp8.untrusted.regular_files import why_unreadable

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.sources.nemo.arrays import Stored
    from nemotron_fp8.sources.nemo.files import Files


WEIGHTS = "model_weights"
ARCHIVE = ".nemo"


def is_nemo(path: Path) -> bool:
    """Return True for a NeMo checkpoint: a folder with its config, or an archive.

    Raises:
        SourceReadError: the config is no regular file.
    """
    config = path / MODEL_CONFIG
    if os.path.lexists(config) and (why := why_unreadable(config)):
        raise SourceReadError(str(config), why)
    return (path / MODEL_CONFIG).is_file() or (path.suffix == ARCHIVE and path.is_file())


def open_nemo(path: Path, shard_size: int) -> Source:
    """Take the inventory of a NeMo checkpoint and create the opener of its files.

    Args:
        path: a folder with ``model_config.yaml`` and ``model_weights/``, or a ``.nemo`` archive.
        shard_size: bytes of tensors in a shard of the result.

    Raises:
        NemoError: the checkpoint is not as NeMo writes it; the class names the reason.
        SourceError: a file cannot be read.
    """
    files, opener = files_of_archive(path) if path.is_file() else files_of_folder(path)
    source = read_nemo(files, shard_size, path)
    return replace(source, stamps={name: stamp(identity) for name, identity in opener.identities.items()})


def read_nemo(files: Files, shard_size: int, root: Path | None) -> Source:
    """Take the inventory of a NeMo checkpoint from its files, local or remote.

    Args:
        files: the files.
        shard_size: bytes of tensors in a shard of the result.
        root: the local folder or file that contains them; None if they are not local.

    Raises:
        As `open_nemo`.
    """
    if MODEL_CONFIG not in files.places:
        raise SourceNotFoundError(files.source, f"{MODEL_CONFIG} is missing; pass a complete NeMo checkpoint")
    loaded = nemo_config.load_yaml(files.read(MODEL_CONFIG, length=yaml_text.MAX_BYTES + 1), MODEL_CONFIG)
    model = nemo_config.read_model(loaded, MODEL_CONFIG)
    found = _find(files)
    table = Table.of(files.source, model, found.arrays)
    views = list(tensors(table))
    extra = [array.whole(array.name) for array in sorted(table.outside(), key=lambda array: array.name)]
    _check_names({view.name for view in views}, [view.name for view in extra], files.source)
    shards = split([*views, *extra], shard_size)
    embedding = table.arrays[EMBEDDING]
    beside = small_files(files, loaded, model, embedding.shape[0])
    explain(extra, beside)
    parameters = sum(view.numel for view in (*views, *extra))
    inventory = Inventory(
        source=files.source,
        shards=shards,
        index_metadata={"total_parameters": parameters} if len(shards) > 1 else None,  # as transformers writes it
        config=nemo_config.hf_config(model, embedding.shape[0], embedding.dtype, beside.bos, beside.eos),
        side_files=beside.side,
        left_out=(*beside.left_out, *found.left_out),
        made=tuple(beside.made.items()),
        notices=tuple(beside.notices),
        card=beside.card,
        opener_bytes=held_bytes(found.packed),
    )
    opener = ChunkOpener(files.opener, found.packed) if found.packed else files.opener
    if found.payloads and root is not None:  # a repository on the Hub is read by range, each byte once
        opener = CheckedOpener(opener, tuple(dict.fromkeys(found.payloads)))
    return Source(inventory, opener, root)


@dataclass(slots=True)
class _Found:
    """Arrays of a checkpoint."""

    arrays: list[Stored] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    packed: dict[str, Packed] = field(default_factory=dict)
    payloads: list[Payload] = field(default_factory=list)


def _find(files: Files) -> _Found:
    """Read the descriptions of all arrays."""
    found = _Found()
    folders = zarr.find_arrays(files, WEIGHTS)
    if torch_dist.is_dist(files, WEIGHTS):
        if folders:
            raise SourceReadError(
                files.source, f"{WEIGHTS}/ holds both zarr arrays and a torch_dist checkpoint; remove one of them"
            )
        return _find_dist(files, found)
    if not folders:
        raise _no_weights(files)
    for name, folder in folders.items():
        if reason := why_left_out(name):
            found.left_out.append((name, reason))
            continue
        array, packed = zarr.read_array(files, folder, name)
        found.arrays.append(array)
        found.packed |= packed
    return found


def _find_dist(files: Files, found: _Found) -> _Found:
    def wanted(name: str) -> bool:
        reason = why_left_out(name)
        if reason:
            found.left_out.append((name, reason))
        return reason is None

    found.arrays, found.payloads = torch_dist.read_dist(files, WEIGHTS, wanted)
    if not found.arrays:
        raise _no_weights(files)
    return found


def _check_names(known: set[str], extra: list[str], source: str) -> None:
    """Check that the names of arrays outside the model are valid in safetensors and unused by the model."""
    for name in extra:
        check_name(name, source)
        if name in known:
            raise MalformedArrayError(
                name, "its name is that of a tensor of NemotronForCausalLM, which it would replace"
            )


def _no_weights(files: Files) -> SourceError:
    pickles = tuple(name for name in files.places if name.endswith((".ckpt", ".pt", ".pth")))
    if pickles:
        return PickledWeightsError(files.source, pickles)
    return SourceNotFoundError(
        files.source, f"no arrays in {printable(WEIGHTS)}; fetch the checkpoint again if it is incomplete"
    )
