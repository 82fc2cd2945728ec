"""The loop of an evaluation: every layer of every checkpoint, then the comparison of what they predict."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from nemotron_fp8._utils import peak_resident_bytes
from nemotron_fp8._version import __version__
from nemotron_fp8.documents.manifest import shards_digest
from nemotron_fp8.engines.cuda.device import DEFAULT_SHARE
from nemotron_fp8.errors import EvaluationBudgetError, NonFiniteOutputError
from nemotron_fp8.evaluation.activations import Products
from nemotron_fp8.evaluation.comparison import Comparison, by_position, change_of, mean_of
from nemotron_fp8.evaluation.layer_memory import LayerMemory, file_buffer
from nemotron_fp8.evaluation.needs import head_words, needs_layer_files, needs_of
from nemotron_fp8.evaluation.result import LARGEST, CheckpointFigures, Evaluation
from nemotron_fp8.evaluation.state import Saved, SavedState, state_errors
from nemotron_fp8.evaluation.weights import Slot, Weights, all_finite, read_elements, slots_of
from nemotron_fp8.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nemotron_fp8.engines.cuda.device import Device
    from nemotron_fp8.evaluation.comparison import TokenFigures
    from nemotron_fp8.evaluation.needs import EvaluationNeeds
    from nemotron_fp8.evaluation.sample import Drawn
    from nemotron_fp8.evaluation.skeleton import LayerArguments, Skeleton
    from nemotron_fp8.evaluation.transformers_api import Transformers
    from nemotron_fp8.sources.reader import Reader


LOCAL_GAP, REMOTE_GAP = 1 << 16, 1 << 22
"""Bytes between two rows of an embedding that are read along, rather than by a read of their own."""
EMBEDDING_BYTES = 4 << 20
"""Bytes of rows of an embedding that are read at a time."""


def _check_device_memory(needs: EvaluationNeeds, device: Device) -> None:
    """Raise EvaluationBudgetError if two layers and the buffers of a sequence do not fit into the device."""
    layers, rest = 2 * needs.layer_bytes, max(needs.forward_bytes, needs.head_bytes)
    free = int(device.free_bytes() * DEFAULT_SHARE)
    if layers + rest > free:
        part = f"two of the largest decoder layer on {device.name} ({layers:,} bytes)"
        raise EvaluationBudgetError(part, layers + rest, free, "use another device (--device cpu)")


@dataclass(slots=True)
class Stream:
    """A checkpoint in the loop.

    Attributes:
        label: its name in messages.
        weights: its weights.
        reader: reads them.
        outside: parameters outside of the layers, by name in the model.
        unseen: names of quantized weights that no product with activations was seen of.
    """

    label: str
    weights: Weights
    reader: Reader
    outside: dict[str, torch.Tensor] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)


class Run:
    """One evaluation.

    Args:
        api: functions of transformers.
        skeleton: the model without weights.
        streams: the checkpoints, the source first.
        drawn: the sample.
        budget: bytes of all buffers.
        spill: True to keep hidden states in a file.
        state: saved state.
        threads: threads that read and decode.
        device: the accelerator; None for the CPU.
        progress: called with the progress.
    """

    def __init__(
        self,
        api: Transformers,
        skeleton: Skeleton,
        streams: Sequence[Stream],
        drawn: Drawn,
        budget: int,
        spill: bool,
        state: SavedState,
        threads: int,
        device: Device | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._api, self._skeleton, self._streams, self._drawn = api, skeleton, list(streams), drawn
        self._state, self._threads, self._device, self._progress = state, threads, device, progress
        self._target = torch.device("cpu") if device is None else device.memory(1).device
        self._started = time.monotonic()
        self._ids = drawn.ids
        count, length = drawn.ids.shape
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
        self._spill = spill
        self._ahead = (device is not None or not all(stream.weights.source.is_local for stream in streams)) and not any(
            part.converted for stream in streams for part in stream.weights.layers
        )
        needs = self._needs(spill)
        self._in_file = needs_layer_files(needs, budget)
        if device is not None:
            _check_device_memory(needs, device)
        self._total = sum(stream.weights.stored_bytes for stream in self._streams)
        self._done = self._skipped = 0

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

    def _needs(self, spill: bool) -> EvaluationNeeds:
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
        return replace(needs, hidden_bytes=0) if spill else needs

    def evaluate(self) -> Evaluation:
        """Run all checkpoints, and return their figures."""
        hidden = self._hidden()
        for stream in self._streams:
            self._load_outside(stream)
        saved = self._state.load(hidden)
        if saved is None:
            saved = Saved(0, [[] for _ in self._streams[1:]])
            arguments = self._begin(hidden)
        else:
            arguments = self._arguments()
        self._check_end()
        self._skipped = self._done = sum(
            stream.weights.layers[number].stored_bytes for stream in self._streams for number in range(saved.layers)
        )
        self._run_layers(hidden, arguments, saved)
        comparison = self._compare(hidden)
        return self._figures(comparison, saved.errors)

    def _hidden(self) -> torch.Tensor:
        """Return the buffer of the hidden states: ``[checkpoints, sequences, length, hidden size]``."""
        shape, dtype = self._shape, self._skeleton.dtype
        if not self._spill:
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

    def _run_layers(self, hidden: torch.Tensor, arguments: Sequence[LayerArguments], saved: Saved) -> None:
        """Push the hidden states of every checkpoint through every layer."""
        skeleton, device = self._skeleton, self._device
        places = [
            (number, which)
            for number in range(saved.layers, len(skeleton.layers))
            for which in range(len(self._streams))
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
        moved = _Mover(self._target)
        with state_errors(self._state.work):
            layer_memory = LayerMemory(max(self._sizes), self._ahead, device, folder)
        with layer_memory as memory, memory.layers(jobs) as buffers:
            for (number, which), buffer in zip(places, buffers, strict=True):
                self._run_layer(hidden[which], number, which, buffer, moved(arguments[number]))
                if which:
                    saved.errors[which - 1].append(_relative_error(hidden[which], hidden[0]))
                if which == len(self._streams) - 1:
                    self._state.save(hidden, Saved(number + 1, saved.errors))

    def _run_layer(
        self, hidden: torch.Tensor, number: int, which: int, buffer: torch.Tensor, arguments: LayerArguments
    ) -> None:
        """Push the hidden states of one checkpoint through one layer, in place."""
        skeleton, stream = self._skeleton, self._streams[which]
        layer, slots = skeleton.layers[number], self._slots[number]
        before = skeleton.parameters_of(layer)
        tensors = {name: slot.of(buffer) for name, slot in slots.items()}
        skeleton.place(layer, tensors)
        if buffer.device.type != "cpu":
            layer.to(buffer.device)  # buffers that no checkpoint holds
        handlers, names = _handlers(stream.weights.layers[number].schemes, tensors)
        size, count = stream.weights.layers[number].stored_bytes, len(hidden)
        try:
            for at, sequence in enumerate(hidden):
                with skeleton.running(f"its layer {number} cannot be run alone"), Products(handlers) as products:
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
                for address in products.seen:
                    names.pop(address, None)
                self._advance(size * (at + 1) // count - size * at // count, number)
        finally:
            skeleton.place(layer, before)
        used = {name for name, expert in names.values() if expert is None}
        stream.unseen |= used

    def _advance(self, count: int, number: int | None) -> None:
        """Count bytes of weights whose work is done."""
        self._done += count
        if self._progress is not None:
            layers = len(self._skeleton.layers)
            stage = "output layer" if number is None else f"layer {number + 1} of {layers}"
            seconds = time.monotonic() - self._started
            self._progress(
                Progress(
                    self._done,
                    self._total,
                    "",
                    source_bytes=self._total,
                    skipped=self._skipped,
                    seconds=seconds,
                    stage=stage,
                )
            )

    def _compare(self, hidden: torch.Tensor) -> Comparison:
        """Compare the predictions of all checkpoints, word by word of the vocabulary; hidden states are overwritten."""
        skeleton, streams = self._skeleton, self._streams
        for target, stream in zip(hidden, streams, strict=True):
            skeleton.place(skeleton.model, stream.outside)
            for number, ids in enumerate(self._ids):
                target[number] = skeleton.end(ids[None], target[number][None])[0]
        comparison = Comparison(self._ids, len(streams) - 1)
        total, width = streams[0].weights.head.shape
        words = min(head_words(self._ids.shape[1]), total)
        buffers = [torch.empty((words, width), dtype=skeleton.dtype) for _ in streams]
        for first in range(0, total, words):
            last = min(first + words, total)
            parts = []
            for buffer, stream in zip(buffers, streams, strict=True):
                part = buffer[: last - first]
                read_elements(stream.label, stream.reader, stream.weights.head, first * width, part.view(-1))
                bias = stream.outside.get(f"{skeleton.head_name.removesuffix('weight')}bias")
                moved = None if bias is None else bias[first:last].to(self._target)
                parts.append((part.to(self._target), moved))
            for number, ids in enumerate(self._ids):
                logits = [
                    skeleton.logits(ids[None], states[number][None].to(self._target), _head(*part))[0, :-1].float()
                    for states, part in zip(hidden, parts, strict=True)
                ]
                for stream, values in zip(streams, logits, strict=True):
                    if not all_finite(values):
                        raise NonFiniteOutputError(stream.label, f"its logits of words {first:,} to {last - 1:,}")
                comparison.add(number, first, logits)
            for stream in streams:
                size = stream.weights.head_bytes
                self._advance(size * last // total - size * first // total, None)
        return comparison

    def _figures(self, comparison: Comparison, errors: Sequence[Sequence[float]]) -> Evaluation:
        source, layers = comparison.source(), len(self._skeleton.layers)
        figures = [
            self._checkpoint_figures(stream, source, own, rows)
            for stream, own, rows in zip(
                self._streams, (source, *comparison.results()), ([0.0] * layers, *errors), strict=True
            )
        ]
        return Evaluation(
            source=figures[0],
            results=tuple(figures[1:]),
            sample=self._drawn.sample,
            version=__version__,
            libraries={"torch": torch.__version__, "transformers": self._api.version},
            device="cpu" if self._device is None else self._device.name,
            seconds=time.monotonic() - self._started,
            peak_resident_bytes=peak_resident_bytes(),
        )

    def _checkpoint_figures(
        self, stream: Stream, source: TokenFigures, own: TokenFigures, errors: Sequence[float]
    ) -> CheckpointFigures:
        for name, values in (("perplexities", own.nll), ("KL divergences", own.kl)):
            most = math.log(LARGEST) if values is own.nll else LARGEST
            if not float(values.mean().abs()) < most:  # NaN is not, either
                raise NonFiniteOutputError(stream.label, f"its {name}")
        change, kl, same = change_of(source, own), mean_of(own.kl), mean_of(own.same)
        return CheckpointFigures(
            name=stream.label,
            weights=stream.weights.title,
            activations=stream.weights.activations_title,
            perplexity=float(own.nll.mean().exp()),
            perplexity_change=change.value,
            perplexity_error=change.error,
            kl=kl.value,
            kl_error=kl.error,
            top1=same.value,
            top1_error=same.error,
            layers=tuple(errors),
            sequence_kl=tuple(own.kl.mean(1).tolist()),
            sequence_nll=tuple(own.nll.mean(1).tolist()),
            position_kl=by_position(own.kl),
            notices=self._notices(stream),
            digest=shards_digest(root) if (root := stream.weights.source.root) and root.is_dir() else "",
        )

    def _notices(self, stream: Stream) -> tuple[str, ...]:
        notices = []
        length, most = self._ids.shape[1], self._skeleton.positions
        if stream is self._streams[0] and most is not None and length > most:
            notices.append(
                f"sequences of {length:,} tokens are longer than the {most:,} positions that config.json states, and"
                " are predicted badly; pass a smaller length (--length)"
            )
        if unused := stream.weights.unused:
            shown = ", ".join(unused[:3])
            notices.append(
                f"{len(unused):,} {'tensors are' if len(unused) > 1 else 'tensor is'} not part of the model that"
                f" transformers {self._api.version} builds, and {'were' if len(unused) > 1 else 'was'} not evaluated"
                f" ({shown})"
            )
        if stream.unseen:
            shown = ", ".join(sorted(stream.unseen)[:3])
            notices.append(f"the activations of {shown} were left in 16 bits: no product with these weights was seen")
        return tuple(notices)


def _head(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: torch.nn.functional.linear(states.to(weight.dtype), weight, bias)


def _relative_error(hidden: torch.Tensor, source: torch.Tensor) -> float:
    """Return the relative L2 error of hidden states, without a float64 copy of all of them."""
    noise = signal = 0.0
    for own, right in zip(hidden, source, strict=True):
        exact = right.double()  # squares of bfloat16 overflow float32
        noise += float((own.double() - exact).square_().sum())
        signal += float(exact.square_().sum())
    return (noise / signal) ** 0.5 if signal else 0.0


def _handlers(
    schemes: Mapping[tuple[str, int | None], Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[int, Callable[[torch.Tensor], torch.Tensor]], dict[int, tuple[str, int | None]]]:
    """Return what to do with the activations of quantized weights, and the names of these weights, by address."""
    handlers: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
    names: dict[int, tuple[str, int | None]] = {}
    memo: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    for (name, expert), scheme in schemes.items():
        tensor = tensors[name]
        stack = tensor if tensor.dim() == 3 else tensor[None]
        for number in range(len(stack)) if expert is None else [expert]:
            address = stack[number].data_ptr()
            names[address] = (name, None if tensor.dim() != 3 else number)

            def handle(x: torch.Tensor, scheme: Any = scheme) -> torch.Tensor:
                known = memo.get(scheme)
                if known is None or known[0] is not x:  # weights that are multiplied by the same activations
                    known = memo[scheme] = x, scheme.apply(x)
                return known[1]

            handlers[address] = handle
    return handlers, names


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
