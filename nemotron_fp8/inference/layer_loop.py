"""A model, or several of the same architecture, run layer by layer: every layer of every checkpoint, one in memory.

All sequences are pushed through a layer of one checkpoint, then through the same layer of the next one. After every
layer the state is saved, from which an interrupted run resumes. An `Observer` sees the products and the results of a
layer: an evaluation is this loop and a comparison, a calibration is this loop and an observer that measures.
"""

from __future__ import annotations

import time
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nemotron_fp8.engines.cuda.device import DEFAULT_SHARE
from nemotron_fp8.errors import EvaluationBudgetError, NonFiniteOutputError
from nemotron_fp8.inference.layer_memory import LayerMemory, file_buffer
from nemotron_fp8.inference.needs import needs_layer_files, needs_of
from nemotron_fp8.inference.state import Saved, state_errors
from nemotron_fp8.inference.weights import Slot, all_finite, read_elements, slots_of
from nemotron_fp8.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from nemotron_fp8.engines.cuda.device import Device
    from nemotron_fp8.inference.needs import EvaluationNeeds
    from nemotron_fp8.inference.session import Session, Stream
    from nemotron_fp8.inference.skeleton import LayerArguments


LOCAL_GAP, REMOTE_GAP = 1 << 16, 1 << 22
"""Bytes between two rows of an embedding that are read along, rather than by a read of their own."""
EMBEDDING_BYTES = 4 << 20
"""Bytes of rows of an embedding that are read at a time."""


class Observer(Protocol):
    """Watches the layers of a run, and may change what they compute. Its findings are a part of the saved state."""

    def resume(self, saved: Saved) -> None:
        """Take over the findings of an interrupted run."""
        ...

    def watching(self, which: int, number: int, tensors: Mapping[str, torch.Tensor]) -> AbstractContextManager[object]:
        """Return a context in which all sequences run through a layer of a checkpoint.

        Args:
            which: number of the checkpoint.
            number: number of the layer.
            tensors: parameters of the layer in memory, by name in it.
        """
        ...

    def finished(self, which: int, hidden: torch.Tensor) -> None:
        """Take the hidden states of all checkpoints after a layer of one of them.

        Args:
            which: number of that checkpoint.
            hidden: ``[checkpoints, sequences, length, hidden size]``, on the CPU.
        """
        ...

    def findings(self, layers: int) -> Saved:
        """Return the findings to save after a number of layers."""
        ...


def _check_device_memory(needs: EvaluationNeeds, device: Device) -> None:
    """Raise EvaluationBudgetError if two layers and the buffers of a sequence do not fit into the device."""
    layers, rest = 2 * needs.layer_bytes, max(needs.forward_bytes, needs.head_bytes)
    free = int(device.free_bytes() * DEFAULT_SHARE)
    if layers + rest > free:
        part = f"two of the largest decoder layer on {device.name} ({layers:,} bytes)"
        raise EvaluationBudgetError(part, layers + rest, free, "use another device (--device cpu)")


class LayerLoop:
    """The loop over the layers of all checkpoints of a session.

    Args:
        session: checkpoints, sample, state and options.
        predicts: True if the caller runs the output layer afterwards, so that its memory and bytes count.

    Raises:
        EvaluationBudgetError: the buffers exceed the memory budget, or the memory of the device.
    """

    def __init__(self, session: Session, predicts: bool) -> None:
        api, skeleton = session.api, session.skeleton
        self._session, self._skeleton, self._streams = session, skeleton, session.streams
        self._state, self._threads, self._device = session.state, session.threads, session.device
        self.target = torch.device("cpu") if session.device is None else session.device.memory(1).device
        self._started = time.monotonic()
        self._ids = session.drawn.ids
        count, length = self._ids.shape
        width = self._streams[0].weights.embedding.shape[1]
        self._shape = (len(self._streams), count, length, width)
        is_float32 = api.float32_names(skeleton.model, skeleton.dtype)
        self._slots: list[dict[str, Slot]] = []
        sizes = []
        for number, layer in enumerate(skeleton.layers):
            slots, size = self._slots_of(skeleton.parameters_of(layer), f"{skeleton.layers_name}.{number}.", is_float32)
            self._slots.append(slots)
            sizes.append(size)
        self._sizes = sizes
        model = skeleton.parameters_of(skeleton.model)
        names = skeleton.outside_names()
        self._outside_slots, self._outside_bytes = self._slots_of({name: model[name] for name in names}, "", is_float32)
        is_local = all(stream.weights.source.is_local for stream in self._streams)
        self._ahead = (self._device is not None or not is_local) and not any(
            part.converted for stream in self._streams for part in stream.weights.layers
        )
        self._total = sum(
            stream.weights.stored_bytes - (0 if predicts else stream.weights.head_bytes) for stream in self._streams
        )
        needs = self._needs(predicts)
        self._in_file = needs_layer_files(needs, session.budget)
        if self._device is not None:
            _check_device_memory(needs, self._device)
        self._done = self._skipped = 0

    @property
    def seconds(self) -> float:
        """Wall time since the beginning."""
        return time.monotonic() - self._started

    @staticmethod
    def _slots_of(
        parameters: Mapping[str, torch.Tensor], prefix: str, is_float32: Callable[[str], bool]
    ) -> tuple[dict[str, Slot], int]:
        """Return the places of parameters in a buffer; those that stay in float32 have that dtype."""
        wanted = {
            name: tensor.to("meta", torch.float32 if is_float32(prefix + name) else tensor.dtype)
            for name, tensor in parameters.items()
        }
        return slots_of(wanted)

    def _needs(self, predicts: bool) -> EvaluationNeeds:
        """Return the needs of this run, from the sizes of the model that was built."""
        itemsize = self._skeleton.dtype.itemsize
        streams, count, length, width = self._shape
        sides = [max(slot.shape[-2:]) for slots in self._slots for slot in slots.values() if len(slot.shape) > 1]
        words = self._streams[0].weights.head.shape[0]
        needs = needs_of(
            streams - 1,
            count,
            length,
            layers=len(self._sizes),
            itemsize=itemsize,
            layer_bytes=max(self._sizes),
            outside_bytes=self._outside_bytes,
            hidden=width,
            widest=max(sides, default=0),
            words=words,
            output_bytes=words * width * itemsize,
            reads=[stream.weights.stored_bytes for stream in self._streams],
            ahead=self._ahead,
        )
        if self._session.spill:
            needs = replace(needs, hidden_bytes=0)
        return needs if predicts else replace(needs, head_bytes=0)

    def run(self, observer: Observer) -> torch.Tensor:
        """Run all layers of all checkpoints, and return the hidden states after the last one.

        Returns:
            ``[checkpoints, sequences, length, hidden size]``, in the dtype of the model, on the CPU.

        Raises:
            UnsupportedArchitectureError: the model cannot be run layer by layer.
            NonFiniteOutputError: a weight or a hidden state is NaN or infinite.
            EvaluationStateError: the saved state is damaged.
            WriteError: the state cannot be saved.
        """
        hidden = self._hidden()
        for stream in self._streams:
            self._load_outside(stream)
        saved = self._state.load(hidden)
        if saved is None:
            arguments = self._begin(hidden)
        else:
            observer.resume(saved)
            arguments = self._arguments()
        self._check_end()
        layers = 0 if saved is None else saved.layers
        self._skipped = self._done = sum(
            stream.weights.layers[number].stored_bytes for stream in self._streams for number in range(layers)
        )
        self._run_layers(hidden, arguments, layers, observer)
        return hidden

    def finish(self, hidden: torch.Tensor) -> None:
        """Replace hidden states after the last layer by those after the final norm."""
        skeleton = self._skeleton
        for target, stream in zip(hidden, self._streams, strict=True):
            skeleton.place(skeleton.model, stream.outside)
            for number, ids in enumerate(self._ids):
                target[number] = skeleton.end(ids[None], target[number][None])[0]

    def _hidden(self) -> torch.Tensor:
        """Return the buffer of the hidden states: ``[checkpoints, sequences, length, hidden size]``."""
        shape, dtype = self._shape, self._skeleton.dtype
        if not self._session.spill:
            return torch.empty(shape, dtype=dtype)
        with state_errors(self._state.work):
            return file_buffer(self._state.work, prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def _load_outside(self, stream: Stream) -> None:
        """Read the parameters outside of the layers."""
        buffer = torch.empty(self._outside_bytes, dtype=torch.uint8)
        slots = self._outside_slots
        weights = stream.weights
        weights.fill(weights.outside, self._skeleton.model, slots, buffer, stream.reader, self._threads)
        stream.outside = {name: slot.of(buffer) for name, slot in slots.items()}

    def _rows(self, stream: Stream) -> Callable[[torch.Tensor], torch.Tensor]:
        """Read the rows of the input embedding that the sequences need, and return their lookup."""
        view = stream.weights.embedding
        needed = torch.unique(self._ids)
        rows = torch.empty((len(needed), view.shape[1]), dtype=self._skeleton.dtype)
        row_bytes = view.shape[1] * rows.dtype.itemsize
        gap = max(1, (LOCAL_GAP if stream.weights.source.is_local else REMOTE_GAP) // row_bytes)
        most = max(1, EMBEDDING_BYTES // row_bytes)
        numbers = needed.tolist()
        begin = 0
        while begin < len(numbers):
            end = begin + 1
            while (
                end < len(numbers) and numbers[end] - numbers[end - 1] <= gap and numbers[end] - numbers[begin] < most
            ):
                end += 1
            first, last = numbers[begin], numbers[end - 1] + 1
            part = torch.empty((last - first, view.shape[1]), dtype=rows.dtype)
            read_elements(stream.label, stream.reader, view, first * view.shape[1], part.view(-1))
            rows[begin:end] = part[needed[begin:end] - first]
            begin = end

        def lookup(ids: torch.Tensor) -> torch.Tensor:
            at = torch.searchsorted(needed, ids).clamp_(max=len(needed) - 1)
            if not torch.equal(needed[at], ids):
                raise self._skeleton.unsupported("it adds tokens of its own to a text")
            return rows[at]

        return lookup

    def _begin(self, hidden: torch.Tensor) -> list[LayerArguments]:
        """Compute the hidden states before the first layer, and return the arguments of every layer."""
        found: list[LayerArguments] | None = None
        for target, stream in zip(hidden, self._streams, strict=True):
            self._skeleton.place(self._skeleton.model, stream.outside)
            lookup = self._rows(stream)
            for number, ids in enumerate(self._ids):
                begun = self._skeleton.begin(ids[None], lookup)
                target[number] = begun.hidden[0]
                if found is None:
                    found = begun.arguments
                elif not all(map(_same, found, begun.arguments)):
                    raise self._skeleton.unsupported("it passes to its layers what depends on the tokens")
        assert found is not None  # there is a source, and at least one sequence
        return found

    def _arguments(self) -> list[LayerArguments]:
        """Return the arguments of every layer, for a run whose hidden states are known."""
        stream = self._streams[0]
        self._skeleton.place(self._skeleton.model, stream.outside)
        zero = torch.zeros(self._shape[-1], dtype=self._skeleton.dtype)
        return self._skeleton.begin(self._ids[:1], lambda ids: zero.expand(*ids.shape, -1).clone()).arguments

    def _check_end(self) -> None:
        """Check that final norm and output layer can be run alone, before hours are spent on the layers."""
        _, _, length, width = self._shape
        nothing = torch.zeros((1, length, width), dtype=self._skeleton.dtype)
        ids = self._ids[:1]
        self._skeleton.check_logits(ids, self._skeleton.end(ids, nothing))

    def _run_layers(
        self, hidden: torch.Tensor, arguments: Sequence[LayerArguments], done: int, observer: Observer
    ) -> None:
        """Push the hidden states of every checkpoint through the layers that are left."""
        skeleton, device = self._skeleton, self._device
        places = [
            (number, which) for number in range(done, len(skeleton.layers)) for which in range(len(self._streams))
        ]
        if not places:
            return

        def filler(number: int, which: int) -> Callable[[torch.Tensor], None]:
            stream = self._streams[which]

            def fill(buffer: torch.Tensor) -> None:
                part, layer = stream.weights.layers[number], skeleton.layers[number]
                stream.weights.fill(part, layer, self._slots[number], buffer, stream.reader, self._threads)

            return fill

        jobs = [(self._sizes[number], filler(number, which)) for number, which in places]
        folder = self._state.work if self._in_file else None
        moved = _Mover(self.target)
        with state_errors(self._state.work):
            layer_memory = LayerMemory(max(self._sizes), self._ahead, device, folder)
        with layer_memory as memory, memory.layers(jobs) as buffers:
            for (number, which), buffer in zip(places, buffers, strict=True):
                self._run_layer(hidden[which], number, which, buffer, moved(arguments[number]), observer)
                observer.finished(which, hidden)
                if which == len(self._streams) - 1:
                    self._state.save(hidden, observer.findings(number + 1), len(skeleton.layers))

    def _run_layer(
        self,
        hidden: torch.Tensor,
        number: int,
        which: int,
        buffer: torch.Tensor,
        arguments: LayerArguments,
        observer: Observer,
    ) -> None:
        """Push the hidden states of one checkpoint through one layer, in place."""
        skeleton, stream = self._skeleton, self._streams[which]
        layer = skeleton.layers[number]
        before = skeleton.parameters_of(layer)
        tensors = {name: slot.of(buffer) for name, slot in self._slots[number].items()}
        skeleton.place(layer, tensors)
        if buffer.device.type != "cpu":
            layer.to(buffer.device)  # buffers that no checkpoint holds
        size, count = stream.weights.layers[number].stored_bytes, len(hidden)
        stage = f"layer {number + 1} of {len(skeleton.layers)}"
        try:
            with observer.watching(which, number, tensors):
                for at, sequence in enumerate(hidden):
                    with skeleton.running(f"its layer {number} cannot be run alone"):
                        out = layer(sequence[None].to(buffer.device), *arguments.positional, **arguments.named)
                    made = out[0] if isinstance(out, (tuple, list)) else out
                    if made.dtype != hidden.dtype or made.shape != (1, *sequence.shape):
                        raise skeleton.unsupported(
                            f"its layer {number} makes hidden states of {made.dtype} {list(made.shape)}, not of"
                            f" {hidden.dtype} {[1, *sequence.shape]}"
                        )
                    sequence.copy_(made[0])
                    if not all_finite(sequence):
                        raise NonFiniteOutputError(stream.label, f"the hidden states after layer {number}")
                    self.advance(size * (at + 1) // count - size * at // count, stage)
        finally:
            skeleton.place(layer, before)

    def advance(self, count: int, stage: str) -> None:
        """Count bytes of weights whose work is done, and report the progress.

        Args:
            count: the bytes.
            stage: name of the step for people.
        """
        self._done += count
        if self._session.progress is not None:
            self._session.progress(
                Progress(
                    self._done,
                    self._total,
                    "",
                    source_bytes=self._total,
                    skipped=self._skipped,
                    seconds=self.seconds,
                    stage=stage,
                )
            )


def _same(first: object, second: object) -> bool:
    """Return True if two arguments of a layer have equal values."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return bool(first == second)


class _Mover:
    """Moves arguments of layers to a device, each object once: all layers share most of them."""

    def __init__(self, target: torch.device) -> None:
        self._target = target
        self._moved: dict[int, tuple[object, object]] = {}

    def __call__(self, arguments: LayerArguments) -> LayerArguments:
        if self._target.type == "cpu":
            return arguments
        positional = tuple(map(self._move, arguments.positional))
        return type(arguments)(positional, {name: self._move(value) for name, value in arguments.named.items()})

    def _move(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._move, value))
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._moved:
            self._moved[id(value)] = value, value.to(self._target)
        return self._moved[id(value)][1]
