"""A NeMo checkpoint to an inventory: its arrays as tensors of Hugging Face, its config, its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.errors import PickledWeightsError, SourceNotFoundError, printable
from nemotron_fp8.nemo import config as nemo_config
from nemotron_fp8.nemo import zarr
from nemotron_fp8.nemo.files import files_of_folder
from nemotron_fp8.nemo.mapping import EMBEDDING, Table, tensors, why_left_out
from nemotron_fp8.nemo.shards import split
from nemotron_fp8.source import Inventory, SideFile, sort_side_files
from nemotron_fp8.sources import Source

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from nemotron_fp8.nemo.arrays import Stored
    from nemotron_fp8.nemo.files import Files
    from nemotron_fp8.view import TensorView

MODEL_CONFIG = "model_config.yaml"
WEIGHTS = "model_weights"
ARCHIVE = ".nemo"
README = "README.md"


def is_nemo(path: Path) -> bool:
    """Whether a path is a NeMo checkpoint: a folder with its config, or an archive."""
    return (path / MODEL_CONFIG).is_file() or (path.suffix == ARCHIVE and path.is_file())


def open_nemo(path: Path, shard_size: int) -> Source:
    """Take the inventory of a NeMo checkpoint and say how to open its files.

    Args:
        path: a folder with ``model_config.yaml`` and ``model_weights/``, or a ``.nemo`` archive.
        shard_size: bytes of tensors in a shard of the result.

    Raises:
        NemoError: the checkpoint is not what NeMo writes; the class says why.
        SourceError: it cannot be read.
    """
    files = files_of_folder(path)
    return Source(read_nemo(files, shard_size), files.opener, path)


def read_nemo(files: Files, shard_size: int) -> Inventory:
    """Take the inventory of the files of a NeMo checkpoint."""
    if MODEL_CONFIG not in files.places:
        raise SourceNotFoundError(files.source, f"no {MODEL_CONFIG} in it; is this a NeMo checkpoint?")
    loaded = nemo_config.load_yaml(files.read(MODEL_CONFIG, length=nemo_config.MAX_YAML_BYTES + 1), MODEL_CONFIG)
    model = nemo_config.read_model(loaded, MODEL_CONFIG)
    arrays, left_out = _arrays(files)
    table = Table.of(files.source, model, arrays)
    views = list(tensors(table))
    extra = [array.whole(array.name) for array in sorted(table.rest, key=lambda array: array.name)]
    notices = tuple(_outside(array) for array in extra)
    shards = split([*views, *extra], shard_size)
    embedding = table.arrays[EMBEDDING]
    config = nemo_config.hf_config(model, embedding.shape[0], embedding.dtype)
    side, others = _side_files(files)
    return Inventory(
        source=files.source,
        shards=shards,
        index_metadata=_index_metadata([*views, *extra]) if len(shards) > 1 else None,
        config=config,
        side_files=side,
        left_out=(*others, *left_out),
        notices=notices,
    )


def _arrays(files: Files) -> tuple[list[Stored], list[tuple[str, str]]]:
    """Read the descriptions of all arrays; return those of the model, and what is left out and why."""
    found = zarr.find_arrays(files, WEIGHTS)
    if not found:
        raise _no_weights(files)
    left_out: list[tuple[str, str]] = []
    arrays = []
    for name, folder in found.items():
        reason = why_left_out(name)
        if reason:
            left_out.append((name, reason))
        else:
            arrays.append(zarr.read_array(files, folder, name)[0])
    return arrays, left_out


def _no_weights(files: Files) -> Exception:
    pickles = tuple(name for name in files.places if name.endswith((".ckpt", ".pt", ".pth")))
    if pickles:
        return PickledWeightsError(files.source, pickles)
    return SourceNotFoundError(files.source, f"no arrays in {WEIGHTS}/; is the checkpoint complete?")


def _outside(view: TensorView) -> str:
    return (
        f"array {printable(view.name)} is outside the table of NemotronForCausalLM and is kept under its own"
        " name: engines need support for it"
    )


def _index_metadata(views: Iterable[TensorView]) -> dict[str, int]:
    """What transformers writes beside ``total_size``."""
    return {"total_parameters": sum(view.numel for view in views)}


def _side_files(files: Files) -> tuple[tuple[SideFile, ...], list[tuple[str, str]]]:
    """What is copied from beside the weights, and what is not."""
    sizes = {name: place.size for name, place in files.places.items() if "/" not in name and name != MODEL_CONFIG}
    side, left_out = sort_side_files(sizes, ())
    return side, [*left_out, (MODEL_CONFIG, "config.json is made from it")]

