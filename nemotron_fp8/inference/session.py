"""Session: everything that a run layer by layer needs, from the checkpoints to the device."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemotron_fp8._utils import parse_bytes, shortened, usable_cores
from nemotron_fp8._version import __version__
from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.engines.cuda.device import CudaDevice
from nemotron_fp8.engines.devices import resolve_devices
from nemotron_fp8.errors import DeviceError, NonFiniteOutputError, OtherModelError, RecipeError, SampleError
from nemotron_fp8.inference import sample as samples
from nemotron_fp8.inference.needs import DEFAULT_LENGTH, DEFAULT_SEQUENCES
from nemotron_fp8.inference.skeleton import DTYPES, Skeleton
from nemotron_fp8.inference.state import SavedState, identity_of, private_folder
from nemotron_fp8.inference.transformers_api import Transformers
from nemotron_fp8.inference.weights import Weights
from nemotron_fp8.sources.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nemotron_fp8.engines.cuda.device import Device
    from nemotron_fp8.inference.sample import Drawn
    from nemotron_fp8.progress import Progress
    from nemotron_fp8.sources.base import Source


SHARE_OF_FREE = 0.5
"""Share of the free memory that is used if there is no budget."""


@dataclass(slots=True)
class Stream:
    """A checkpoint that is run.

    Attributes:
        label: its name in messages.
        weights: its weights.
        reader: reads them.
        outside: parameters outside of the layers, by name in the model.
    """

    label: str
    weights: Weights
    reader: Reader
    outside: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Session:
    """Checkpoints and a sample, ready to be run layer by layer.

    Attributes:
        api: functions of transformers.
        skeleton: the model without weights.
        streams: the checkpoints, the source first.
        drawn: the sample.
        state: saved state.
        budget: bytes of all buffers.
        spill: True to keep hidden states in a file.
        threads: threads that read and decode.
        device: the accelerator; None for the CPU.
        progress: called with the progress.
    """

    api: Transformers
    skeleton: Skeleton
    streams: tuple[Stream, ...]
    drawn: Drawn
    state: SavedState
    budget: int
    spill: bool
    threads: int
    device: Device | None
    progress: Callable[[Progress], None] | None


@contextmanager
def session_of(
    sources: Callable[[], Sequence[tuple[str, Source]]],
    kind: str,
    identity: Sequence[object],
    text: str | os.PathLike[str] | None,
    *,
    tokens: str | os.PathLike[str] | None,
    sequences: int | None,
    length: int | None,
    as_served: bool,
    device: str,
    max_memory: str | int | None,
    spill: bool,
    state_dir: str | os.PathLike[str] | None,
    restart: bool,
    threads: int | None,
    progress: Callable[[Progress], None] | None,
) -> Iterator[Session]:
    """Prepare a session. The saved state is discarded when the context ends without an error.

    Args:
        sources: opens the checkpoints, the source first: the name of each in messages, and the checkpoint. Called once
            transformers is known to be usable.
        kind: kind of the run, in the plural: name of the folder with the states of such runs.
        identity: JSON values that the figures depend on, beside checkpoints and sample.
        text: a text file, UTF-8; None for the language reference of Python.
        tokens: a file of token ids instead of a text.
        sequences, length: size of the sample; None for the default.
        as_served: treat activations, and fused weights of one scale, as engines do.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        max_memory: bytes of all buffers; None for half of the free memory.
        spill: True to keep hidden states in a file.
        state_dir: folder for the saved state; None for one in the user's cache.
        restart: True to discard the state of an interrupted run.
        threads: threads that read and decode; None for one on each available core.
        progress: called with the progress.

    Raises:
        MissingExtraError, TransformersVersionError: no usable version of transformers is installed.
        UnsupportedArchitectureError: the model cannot be run layer by layer.
        OtherModelError: another checkpoint is not of the source's model.
        SampleError: the text or the tokens are unusable.
        EvaluationStateError, EvaluationBusyError: the saved state is damaged, or in use.
        SourceError: a checkpoint cannot be read.
        RecipeError, DeviceError: an argument has an unsupported value.
    """
    api = Transformers()
    labels, opened = zip(*sources(), strict=True)
    budget = _free_memory() if max_memory is None else parse_bytes(max_memory, "max_memory")
    with ExitStack() as stack, torch.no_grad(), api.quiet():
        root = state_root(state_dir, kind)
        folder = stack.enter_context(private_folder(root))
        skeleton = _skeleton(api, opened[0], labels[0], folder)
        if tokens is None:
            counts = sequences or DEFAULT_SEQUENCES, length or DEFAULT_LENGTH
            drawn = samples.draw_text(opened[0], api, folder, text, *counts)
        else:
            drawn = samples.read_tokens(tokens, sequences, length)
        samples.check_ids(drawn, skeleton.head.weight.shape[0])
        streams: list[Stream] = []
        for number, (each, label) in enumerate(zip(opened, labels, strict=True)):
            weights = Weights(api, skeleton, each, label, as_served, labels[0] if number else None)
            reader = stack.enter_context(Reader(each.opener))
            weights.prepare(reader)
            streams.append(Stream(label, weights, reader))
            more = weights.further_layers - streams[0].weights.further_layers
            if more:
                raise OtherModelError(
                    label, labels[0], f"it has tensors of layer {min(more)}, of which the source has none"
                )
        digest = identity_of(
            [__version__, api.version, torch.__version__, *identity, drawn.ids.tolist()]
            + [[each.label, dict(each.stamps), each.inventory.config] for each in opened]
        )
        state = stack.enter_context(SavedState(root if state_dir else root / digest[:32], digest))
        if restart:
            state.discard()
        try:
            yield Session(
                api=api,
                skeleton=skeleton,
                streams=tuple(streams),
                drawn=drawn,
                state=state,
                budget=budget,
                spill=spill,
                threads=threads or usable_cores(),
                device=_device(device),
                progress=progress,
            )
        except NonFiniteOutputError:
            state.discard()  # the same command would fail again
            raise
        state.discard()


def check_sample(tokens: object, text: object, sequences: object, length: object) -> None:
    """Raise RecipeError for arguments of a sample with unsupported values."""
    if tokens is not None and text is not None:
        raise RecipeError("text (--text) and tokens (--tokens) are both given; pass one of them", ("text", "tokens"))
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


def state_root(folder: str | os.PathLike[str] | None, kind: str) -> Path:
    """Return the folder of the user's choice, or the one with the states of all such runs."""
    if folder is not None:
        return Path(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nemotron_fp8" / kind


def _free_memory() -> int:
    """Return the bytes that a run may use without a budget."""
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
        raise DeviceError(name, f"a run layer by layer takes one device; choose one of {', '.join(found)}")
    if found[0] == "cpu":
        return None
    return CudaDevice(found[0])
