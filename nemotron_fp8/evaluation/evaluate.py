"""Evaluate results against their source: run all checkpoints layer by layer on the same sequences, and compare them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemotron_fp8._utils import check_arguments, parse_bytes, shortened, usable_cores
from nemotron_fp8._version import __version__
from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.engines.cuda.device import CudaDevice
from nemotron_fp8.engines.devices import resolve_devices
from nemotron_fp8.errors import DeviceError, NonFiniteOutputError, OtherModelError, RecipeError, SampleError
from nemotron_fp8.evaluation import sample as samples
from nemotron_fp8.evaluation.needs import DEFAULT_LENGTH, DEFAULT_SEQUENCES
from nemotron_fp8.evaluation.run import Run, Stream
from nemotron_fp8.evaluation.skeleton import DTYPES, Skeleton
from nemotron_fp8.evaluation.state import SavedState, identity_of, private_folder
from nemotron_fp8.evaluation.transformers_api import Transformers
from nemotron_fp8.evaluation.weights import Weights
from nemotron_fp8.hub.options import as_hub_options
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.sources.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nemotron_fp8.engines.cuda.device import Device
    from nemotron_fp8.evaluation.result import Evaluation
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.progress import Progress
    from nemotron_fp8.sources.base import Source


ACTIVATIONS = ("as-served", "none")
"""Treatments of activations: as the engines that load a checkpoint do it, or in 16 bits everywhere."""
SHARE_OF_FREE = 0.5
"""Share of the free memory that is used if there is no budget."""


def evaluate_repo(
    source: str | os.PathLike[str],
    results: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    text: str | os.PathLike[str] | None = None,
    *,
    tokens: str | os.PathLike[str] | None = None,
    sequences: int | None = None,
    length: int | None = None,
    activations: str = "as-served",
    device: str = "auto",
    max_memory: str | int | None = None,
    spill: bool = False,
    state_dir: str | os.PathLike[str] | None = None,
    restart: bool = False,
    threads: int | None = None,
    hub: HubOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Evaluate results against their source, one decoder layer in memory at a time.

    Args:
        source: the checkpoint that the results were made from, in any place and format of `quantize_repo`.
        results: one result, or several, in any of these places.
        text: a text file, UTF-8; None for the language reference of Python.
        tokens: a file of token ids instead of a text: JSON, a list of equally long lists.
        sequences: sequences to evaluate; None for 16 of a text, or all lists of ``tokens``.
        length: tokens of a sequence; None for 512 of a text, or whole lists of ``tokens``.
        activations: ``as-served`` to quantize activations, and merge weights, as engines do for each checkpoint;
            ``none`` to leave them in 16 bits.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        max_memory: bytes of all buffers, as a number or like ``"8GiB"``; None for half of the free memory.
        spill: True to keep hidden states in a file, which the system writes to disk when memory is short.
        state_dir: folder for the saved state, from which the same call resumes; None for one in the user's cache.
        restart: True to discard the state of an interrupted evaluation.
        threads: threads that read and decode; None for one on each available core.
        hub: options for reading from the Hub.
        progress: called with the progress.

    Returns:
        The figures of source and results.

    Raises:
        MissingExtraError: transformers is not installed.
        TransformersVersionError: the installed version of transformers is too old, or too new.
        UnsupportedArchitectureError: the model cannot be run layer by layer.
        OtherModelError: a result is not of the source's model.
        SampleError: the text or the tokens are unusable.
        NonFiniteOutputError: a checkpoint computes NaN, infinity, or numbers that are too large.
        EvaluationBudgetError: the buffers exceed ``max_memory``.
        EvaluationStateError, EvaluationBusyError: the saved state is damaged, or in use.
        SourceError, HubError, AddressError: a checkpoint cannot be read.
        RecipeError, DeviceError: an argument has an unsupported value.
    """
    named = [results] if isinstance(results, (str, os.PathLike)) else list(results)
    check_arguments(source=source, threads=threads, progress=progress)
    for result in named:
        check_arguments(source=result)
    _check(named, tokens, text, sequences, length, activations)
    api = Transformers()
    of_results = replace(as_hub_options(hub), revision=None)  # the revision is that of the source
    opened = [open_source(source, hub=hub), *(open_source(each, hub=of_results) for each in named)]
    labels = [os.fspath(each) for each in (source, *named)]
    budget = _free_memory() if max_memory is None else parse_bytes(max_memory, "max_memory")
    cores = threads or usable_cores()
    with ExitStack() as stack, torch.no_grad(), api.quiet():
        root = _state_root(state_dir)
        folder = stack.enter_context(private_folder(root))
        skeleton = _skeleton(api, opened[0], labels[0], folder)
        if tokens is None:
            counts = sequences or DEFAULT_SEQUENCES, length or DEFAULT_LENGTH
            drawn = samples.draw_text(opened[0], api, folder, text, *counts)
        else:
            drawn = samples.read_tokens(tokens, sequences, length)
        samples.check_ids(drawn, skeleton.head.weight.shape[0])
        streams = []
        for number, (each, label) in enumerate(zip(opened, labels, strict=True)):
            weights = Weights(api, skeleton, each, label, activations == "as-served", labels[0] if number else None)
            reader = stack.enter_context(Reader(each.opener))
            weights.prepare(reader)
            streams.append(Stream(label, weights, reader))
            more = weights.further_layers - streams[0].weights.further_layers
            if more:
                raise OtherModelError(
                    label, labels[0], f"it has tensors of layer {min(more)}, of which the source has none"
                )
        identity = identity_of(
            [__version__, api.version, torch.__version__, activations, drawn.ids.tolist()]
            + [[each.label, dict(each.stamps), each.inventory.config] for each in opened]
        )
        state = stack.enter_context(SavedState(root if state_dir else root / identity[:32], identity))
        if restart:
            state.discard()
        accelerator = _device(device)
        run = Run(api, skeleton, streams, drawn, budget, spill, state, cores, accelerator, progress)
        try:
            evaluation = run.evaluate()
        except NonFiniteOutputError:
            state.discard()  # the same command would fail again
            raise
        state.discard()
        return evaluation


def _check(
    results: Sequence[object], tokens: object, text: object, sequences: object, length: object, activations: object
) -> None:
    """Raise RecipeError for arguments with unsupported values."""
    if not results:
        raise RecipeError("no result to evaluate; name at least one", ("results",))
    if tokens is not None and text is not None:
        raise RecipeError("text (--text) and tokens (--tokens) are both given; pass one of them", ("text", "tokens"))
    if activations not in ACTIVATIONS:
        raise RecipeError(
            f"activations is {shortened(activations)}, not one of {', '.join(ACTIVATIONS)}", ("activations",)
        )
    for name, value, least in (("sequences", sequences, 1), ("length", length, 2)):
        if value is not None and (type(value) is not int or value < least):
            raise RecipeError(f"{name} (--{name}) is {shortened(value)}, not a number from {least} on", (name,))


def _skeleton(api: Transformers, source: Source, label: str, folder: Path) -> Skeleton:
    config = source.inventory.config
    if not isinstance(config, dict):
        raise SampleError(label, f"has no {CONFIG}, so its model is unknown; pass a whole checkpoint")
    return Skeleton(api, label, config, folder, dtype_of(source), len(source.inventory.views))


def dtype_of(source: Source) -> torch.dtype:
    """Return the dtype in which a model computes: as its config states, else that of most of its bytes."""
    config = source.inventory.config or {}
    text = config.get("text_config")
    for each in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(name := each.get(key), str) and name in DTYPES:
                return DTYPES[name]
    sizes = {"BF16": 0, "F16": 0, "F32": 0}
    for view in source.inventory.views:
        if view.dtype in sizes:
            sizes[view.dtype] += view.nbytes
    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[max(sizes, key=lambda key: sizes[key])]


def _state_root(folder: str | os.PathLike[str] | None) -> Path:
    """Return the folder of the user's choice, or the one with the states of all evaluations."""
    if folder is not None:
        return Path(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nemotron_fp8" / "evaluations"


def _free_memory() -> int:
    """Return the bytes that an evaluation may use without a budget."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(int(line.split()[1]) * 1024 * SHARE_OF_FREE)
    except (OSError, ValueError):
        pass
    return 4 << 30


def _device(name: str) -> Device | None:
    """Return the accelerator; None for the CPU."""
    found = resolve_devices(name)
    if len(found) > 1 and name != "auto":
        raise DeviceError(name, f"an evaluation runs on one device; choose one of {', '.join(found)}")
    if found[0] == "cpu":
        return None
    return CudaDevice(found[0])
