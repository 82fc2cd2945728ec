"""Recognize sources that are no checkpoint of safetensors shards: adapters, GGUF, pipelines, pointers of Git LFS."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    OTHER_WEIGHTS,
    PICKLES,
    SINGLE,
    is_adapter,
    mistral_weights,
    model_weights,
)
from nemotron_fp8.errors import (
    AdapterError,
    LfsPointerError,
    NestedCheckpointsError,
    OtherFormatError,
    PickledWeightsError,
    SourceNotFoundError,
)
from nemotron_fp8.untrusted import strict_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from nemotron_fp8.errors import SourceError


PIPELINE = "model_index.json"
"""File of a diffusers pipeline, whose models are in folders."""
GGUF = ".gguf"
GGUF_ADVICE = (
    "its weights are quantized already, or packed for llama.cpp; pass the checkpoint of safetensors shards that it was"
    " made from"
)
SAFETENSORS_ADVICE = "pass a checkpoint of safetensors shards, as transformers' save_pretrained writes it"
POINTER_BYTES = 1024
"""Maximum bytes of a Git LFS pointer."""
_POINTER = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/v\d+\n")
_POINTER_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)


def refuse_pointer(file: str, folder: str, data: bytes) -> None:
    """Raise LfsPointerError if the first bytes of a file are those of a Git LFS pointer."""
    if _POINTER.match(data):
        size = _POINTER_SIZE.search(data)
        raise LfsPointerError(file, folder, int(size.group(1)) if size else None)


def other_file(path: str, name: str) -> SourceError:
    """Return the error of a single file that is no shard, by its name."""
    lower = name.lower()
    if lower.endswith(GGUF):
        return OtherFormatError(path, GGUF_ADVICE, "a GGUF file of llama.cpp", (name,))
    if lower.endswith(OTHER_WEIGHTS):
        return OtherFormatError(path, SAFETENSORS_ADVICE, "weights of another framework", (name,))
    if lower.endswith(PICKLES):
        return PickledWeightsError(path, (name,))
    if name in (CONFIG, INDEX, PIPELINE):
        return SourceNotFoundError(path, "a file of a checkpoint, without weights; pass the folder that contains it")
    return SourceNotFoundError(path, "neither a folder nor a .safetensors or .nemo file")


def without_weights(
    source: str, names: Sequence[str], nested: Iterable[str], read: Callable[[str], bytes], above: str, step: str = ""
) -> SourceError:
    """Return the error of a folder or a repository that holds no shard of a model.

    Args:
        source: its name in messages.
        names: names of its files.
        nested: paths of the files in its folders, with ``/``.
        read: returns the content of one of its files.
        above: path in front of the name of a folder in it, to pass that folder as the source.
        step: step before that, appended to the problem.
    """
    adapter = tuple(name for name in names if is_adapter(name))
    if any(name != ADAPTER_CONFIG for name in adapter):
        return AdapterError(source, adapter, base_of(read(ADAPTER_CONFIG)) if ADAPTER_CONFIG in names else None)
    if consolidated := mistral_weights(names):
        return OtherFormatError(
            source,
            "its names of tensors are not those of transformers; pass a checkpoint with config.json and"
            f" {SINGLE}, or convert it with transformers' convert_mistral_weights_to_hf.py",
            "weights in the format of Mistral",
            consolidated,
        )
    checkpoints = tuple(f"{above}{folder}" for folder in checkpoints_in(nested))
    if PIPELINE in names:
        return NestedCheckpointsError(source, f"a diffusers pipeline ({PIPELINE}), not one model{step}", checkpoints)
    if pickles := tuple(name for name in names if name.lower().endswith(PICKLES)):
        return PickledWeightsError(source, pickles)
    if files := tuple(name for name in names if name.lower().endswith(GGUF)):
        return OtherFormatError(source, GGUF_ADVICE, "only GGUF files of llama.cpp", files)
    if files := tuple(name for name in names if name.lower().endswith(OTHER_WEIGHTS)):
        return OtherFormatError(source, SAFETENSORS_ADVICE, "only weights of another framework", files)
    if checkpoints:
        problem = f"no .safetensors file at the top, but in folders{step}"
        return NestedCheckpointsError(source, problem, checkpoints)
    return SourceNotFoundError(source, "no .safetensors file in this folder; name a checkpoint folder")


def checkpoints_in(nested: Iterable[str]) -> list[str]:
    """Return the folders that hold a config and the weights of a model, from the paths of all files in folders."""
    folders: dict[str, list[str]] = {}
    for path in nested:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    return sorted(
        folder
        for folder, names in folders.items()
        if CONFIG in names and (INDEX in names or any(re.match(r"model[.-]", name) for name in model_weights(names)))
    )


def base_of(data: bytes) -> str | None:
    """Return the name of the model that an adapter changes; None if its config does not state it."""
    try:
        base = strict_json.load_object(data, ADAPTER_CONFIG, lambda *_: ValueError()).get("base_model_name_or_path")
    except ValueError:
        return None
    return base if isinstance(base, str) and base else None
