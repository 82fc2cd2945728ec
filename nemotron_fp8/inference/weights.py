"""Weights of a checkpoint in the form of a model: which tensors make which parameter, and their values, decoded.

A parameter is filled piece by piece: a piece is a tensor of the checkpoint and the elements that it becomes. Stacks of
experts are filled from single experts this way, without a copy. Any other conversion is left to transformers, one
parameter at a time.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nemotron_fp8._utils import listed, parallel_for
from nemotron_fp8.checkpoint.dtypes import QUANTIZABLE
from nemotron_fp8.engines.base import as_bytes
from nemotron_fp8.errors import (
    NonFiniteOutputError,
    OtherModelError,
    UnsupportedArchitectureError,
    printable,
)
from nemotron_fp8.inference.activations import Requantized, Scheme, fused_scales, schemes_of
from nemotron_fp8.inference.fp8_cache import Cache, cache_of, has_cache
from nemotron_fp8.inference.transformers_api import problem_of
from nemotron_fp8.planning.encoded_source import encoded_source
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.layouts import execution_scales
from nemotron_fp8.planning.recipe import recipe_of
from nemotron_fp8.sources.reader import TORCH_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.inference.skeleton import Skeleton
    from nemotron_fp8.inference.transformers_api import Target, Transformers
    from nemotron_fp8.sources.base import Source
    from nemotron_fp8.sources.reader import Reader


SLICE_ELEMENTS = 1 << 19
"""Elements that a thread reads or decodes at a time."""
OTHER_DTYPES = {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool, "F64": torch.float64}
"""torch dtypes of buffers that are no weights."""


class Slot(NamedTuple):
    """Place of a parameter in a buffer.

    Attributes:
        offset: first byte.
        dtype: dtype of the parameter.
        shape: shape of the parameter.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter."""
        return prod(self.shape) * self.dtype.itemsize

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the parameter in a buffer of bytes."""
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


class Piece(NamedTuple):
    """A tensor of a checkpoint, and the elements of a parameter that it becomes.

    Attributes:
        view: the tensor.
        target: name of the parameter in its module.
        first: first element of the parameter; first column of the matrix, if a turned matrix is part of one.
        expert: number of the matrix in a stack; None for a parameter that is no stack.
        turned: True if the matrices of the tensor are the transposes of those of the parameter.
    """

    view: TensorView
    target: str
    first: int
    expert: int | None = None
    turned: bool = False


class Split(NamedTuple):
    """Place of a single expert's matrix in a stack that a conversion has split.

    Attributes:
        target: name of the stack in the model.
        expert: number of the expert.
        part: number of the matrix among those of an expert.
        parts: matrices of an expert in the stack.
        turned: True if the stack holds transposes.
    """

    target: str
    expert: int
    part: int
    parts: int
    turned: bool


@dataclass(slots=True)
class Part:
    """The tensors of a decoder layer, or those outside of all layers.

    Attributes:
        pieces: tensors that become a part of a parameter.
        converted: tensors that transformers converts, by the first parameter that they become.
        stored_bytes: bytes of the tensors in the checkpoint.
        schemes: treatment of activations, by name of the parameter and number of the matrix in a stack.
        requantized: weights that engines quantize again, by name.
    """

    pieces: list[Piece] = field(default_factory=list)
    converted: dict[str, list[TensorView]] = field(default_factory=dict)
    stored_bytes: int = 0
    schemes: dict[tuple[str, int | None], Scheme] = field(default_factory=dict)
    requantized: dict[str, Requantized] = field(default_factory=dict)

    @property
    def views(self) -> list[TensorView]:
        """All tensors."""
        return [piece.view for piece in self.pieces] + [v for views in self.converted.values() for v in views]

    def name_of(self, module: str) -> str | None:
        """Return the name of a module in the checkpoint: the common start of the names of its tensors.

        Args:
            module: its name in the layer.

        Returns:
            None if neither the module nor one that holds it has tensors.
        """
        while module:
            inside = [piece for piece in self.pieces if piece.target.startswith(f"{module}.")]
            if inside:
                return _common([(piece.view.name, piece.target.removeprefix(f"{module}.")) for piece in inside])
            module = module.rpartition(".")[0]
        return None


def _common(named: Sequence[tuple[str, str]]) -> str:
    """Return the common start of names of tensors, each without as many parts as its name in the module has."""
    parts = [name.split(".")[: -len(inside.split("."))] or [""] for name, inside in named]
    return ".".join(_common_start(parts))


def _common_start(lists: Iterable[Sequence[str]]) -> list[str]:
    found: list[str] = []
    for items in zip(*lists, strict=False):
        if len(set(items)) > 1:
            break
        found.append(items[0])
    return found


def slots_of(parameters: Mapping[str, torch.Tensor]) -> tuple[dict[str, Slot], int]:
    """Return the places of parameters in a buffer, aligned, and the bytes of the buffer."""
    slots, end = {}, 0
    for name, parameter in parameters.items():
        slots[name] = Slot(end, parameter.dtype, tuple(parameter.shape))
        end += -(-slots[name].nbytes // 64) * 64
    return slots, end


class Weights:
    """Weights of one checkpoint.

    Args:
        api: functions of transformers.
        skeleton: the model.
        source: the checkpoint.
        label: name of the checkpoint in messages.
        as_served: treat activations, and fused weights of one scale, as engines do.
        of: name of the source, for a result; None for the source itself.

    Attributes:
        layers: the tensors of each decoder layer.
        outside: the tensors outside of the layers, without the input embedding and the output layer.
        embedding: input embedding.
        head: output layer; the input embedding if they are tied.
        unused: names of tensors that the model does not have.
        further_layers: numbers of layers among them.
        stored_bytes: bytes of all tensors that are read.
        has_fp8_cache: True if keys and values are treated as in an FP8 cache; known after `prepare`.

    Raises:
        OtherModelError: the tensors of a result do not fit the model of the source.
        UnsupportedArchitectureError: those of the source do not.
    """

    def __init__(
        self,
        api: Transformers,
        skeleton: Skeleton,
        source: Source,
        label: str,
        as_served: bool,
        of: str | None = None,
    ) -> None:
        self._api, self._skeleton, self._label, self._of = api, skeleton, label, of
        self.source = source
        encoded = encoded_source(source.inventory)
        self._all = {view.name: view for view in encoded.inventory.views}
        execution = execution_scales()
        names = [name for name in self._all if name not in encoded.scales and name.rpartition(".")[2] not in execution]
        targets = api.targets(skeleton.model, names)
        self._shapes = {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in skeleton.parameters_of(skeleton.model).items()
        }
        splits = self._splits([name for name in names if name not in targets])
        self.unused = [name for name in names if name not in targets and name not in splits]
        by_target: defaultdict[str, list[str]] = defaultdict(list)
        for name, target in targets.items():
            by_target[target.name].append(name)
        self.embedding = self._matrix(by_target.get(skeleton.embedding_name), skeleton.embedding_name)
        tied = self.embedding if skeleton.is_tied and skeleton.head_name not in by_target else None
        self.head = tied or self._matrix(by_target.get(skeleton.head_name), skeleton.head_name)
        self.layers = [Part() for _ in skeleton.layers]
        self.outside = Part()
        layer = re.compile(re.escape(skeleton.layers_name) + r"\.(\d+)\.(.*)")
        needed = set(skeleton.outside_names())
        for place, members in by_target.items():
            if place in (skeleton.embedding_name, skeleton.head_name):
                continue
            if found := layer.fullmatch(place):
                self._add(self.layers[int(found[1])], place, found[2], members, targets)
            elif place in needed:
                self._add(self.outside, place, place, members, targets)
        for name, split in splits.items():
            if found := layer.fullmatch(split.target):
                self._add_split(self.layers[int(found[1])], self._all[name], found[2], split)
        self._check_splits(splits)
        self.further_layers = self._further_layers(targets, layer)
        self._check_complete(needed)
        for part in (*self.layers, self.outside):
            part.stored_bytes = sum(stored.nbytes for view in part.views for stored in view.stored)
        self._check_dtypes()
        self.head_bytes = sum(stored.nbytes for stored in self.head.stored)
        self.stored_bytes = sum(part.stored_bytes for part in (*self.layers, self.outside)) + self.head_bytes
        self._as_served, self.has_fp8_cache = as_served, False

    def _further_layers(self, targets: Mapping[str, Target], layer: re.Pattern[str]) -> set[int]:
        """Return the numbers of layers of the checkpoint that the model does not have."""
        starts = {
            name[: name.index(f".{found[1]}.")]
            for name, target in targets.items()
            if (found := layer.fullmatch(target.name)) and f".{found[1]}." in name
        }
        return {
            int(found[1])
            for name in self.unused
            for start in starts
            if name.startswith(f"{start}.") and (found := re.match(r"(\d+)\.", name[len(start) + 1 :]))
        } - set(range(len(self.layers)))

    def _problem(self, problem: str) -> OtherModelError | UnsupportedArchitectureError:
        if self._of is None:
            return self._skeleton.unsupported(problem)
        return OtherModelError(self._label, self._of, problem)

    def _matrix(self, members: Sequence[str] | None, target: str) -> TensorView:
        """Return the only tensor of an embedding or an output layer."""
        if members is None or len(members) != 1:
            raise self._problem(f"it has {len(members or ())} tensors of {target}, not one")
        view = self._all[members[0]]
        if view.shape != self._shapes[target][0]:
            raise self._wrong_shape(view, self._shapes[target][0])
        return view

    def _wrong_shape(self, view: TensorView, shape: tuple[int, ...]) -> OtherModelError | UnsupportedArchitectureError:
        return self._problem(f"{view.name} has the shape {list(view.shape)}, and the model needs {list(shape)}")

    def _add(self, part: Part, target: str, name: str, members: Sequence[str], targets: Mapping[str, Target]) -> None:
        """Add the tensors of one parameter to a part; ``name`` is the name of the parameter in its module."""
        shape, _ = self._shapes[target]
        views = [self._all[member] for member in members]
        pattern = targets[members[0]].pattern
        if pattern is None:
            if len(views) > 1:
                raise self._problem(f"{listed(list(members))} are tensors of one parameter, {target}")
            view = views[0]
            turned = len(shape) == 3 and view.encoding is not None and view.encoding.packed
            if view.shape != ((shape[0], shape[2], shape[1]) if turned else shape):
                raise self._wrong_shape(view, shape)
            part.pieces.append(Piece(view, name, 0, turned=turned))
            return
        stacking = self._api.stacking(self._skeleton.model, pattern)
        if stacking is None or len(shape) != 3:
            part.converted[target] = views
            return
        by_pattern: defaultdict[str, list[TensorView]] = defaultdict(list)
        for member, view in zip(members, views, strict=True):
            by_pattern[str(targets[member].pattern)].append(view)
        row = 0
        for each in stacking.patterns:
            experts = by_pattern[each]
            rows = experts[0].shape[0] if experts else 0
            for number, view in enumerate(experts):
                if view.shape != (rows, shape[2]) or len(experts) != shape[0]:
                    raise self._problem(
                        f"{view.name} of {len(experts)} experts has the shape {list(view.shape)}, which does not stack"
                        f" to the {list(shape)} of {target}"
                    )
                part.pieces.append(Piece(view, name, (number * shape[1] + row) * shape[2], number))
            row += rows
        if row != shape[1]:
            raise self._problem(f"the tensors of {target} have {row} rows of {shape[1]}")

    def _splits(self, names: Sequence[str]) -> dict[str, Split]:
        """Return the places of single experts in the stacks of the model, of which they are parts."""
        inventory = self.source.inventory
        family = family_of(inventory.config)
        stacked = family.stacked
        if stacked is None:
            return {}
        recorded = {family.canonical_stack(stack.name): stack for stack in inventory.stacks}
        found: dict[str, tuple[str, int, int, int]] = {}
        for name in names:
            place = family.routed.search(name)
            if place is None:
                continue
            number = place.group().strip(".").rpartition(".")[2]
            for last, projections in stacked.parts:
                projection = name[place.end() :].removesuffix(".weight")
                if projection in projections:
                    stack = f"{name[: place.end() - len(number) - 1]}{last}"
                    found[name] = stack, int(number), projections.index(projection), len(projections)
        known = {
            stack: (recorded[stack].name,) if stack in recorded else (stacked.published(stack), stack)
            for stack, *_ in found.values()
        }
        targets = self._api.targets(self._skeleton.model, [name for names in known.values() for name in names])
        splits = {}
        for name, (stack, expert, part, parts) in found.items():
            target = next((targets[each] for each in known[stack] if each in targets), None)
            if target is None:
                continue
            kept = recorded[stack].transposed if stack in recorded else stacked.transposed is not False
            turned = self._is_turned(target.name, self._all[name], parts, kept)
            splits[name] = Split(target.name, expert, part, parts, turned)
        return splits

    def _is_turned(self, target: str, view: TensorView, parts: int, otherwise: bool) -> bool:
        """Return True if a stack of the model holds transposes; ``otherwise`` if its sides do not tell."""
        shape, (rows, columns) = self._shapes[target][0], view.shape
        sides = (parts * rows, columns)
        if sides != sides[::-1] and shape[1:] in (sides, sides[::-1]):
            return shape[1:] != sides
        return otherwise

    def _add_split(self, part: Part, view: TensorView, name: str, split: Split) -> None:
        """Add a single expert's matrix to the stack of which it is a part."""
        shape = self._shapes[split.target][0]
        rows, columns = view.shape
        sides = (split.parts * rows, columns)
        if split.expert >= shape[0] or shape[1:] != (sides[::-1] if split.turned else sides):
            raise self._problem(
                f"{view.name} has the shape {list(view.shape)}, which is no part of the {list(shape)} of {split.target}"
            )
        first = split.part * rows
        if not split.turned:
            first = (split.expert * shape[1] + first) * shape[2]
        part.pieces.append(Piece(view, name, first, split.expert, split.turned))

    def _check_splits(self, splits: Mapping[str, Split]) -> None:
        """Raise an error if a part of a stack is missing."""
        counts = Counter(split.target for split in splits.values())
        for split in splits.values():
            wanted = self._shapes[split.target][0][0] * split.parts
            if counts[split.target] != wanted:
                raise self._problem(f"it has {counts[split.target]} of {wanted} matrices of {split.target}")

    def _check_complete(self, needed: Iterable[str]) -> None:
        """Raise an error if a parameter has no tensor."""
        wanted = [*map(self._skeleton.parameters_of, self._skeleton.layers), needed]
        missing: set[str] = set()
        for (prefix, part), names in zip(self._prefixed(), wanted, strict=True):
            if part.converted:  # one tensor may become several parameters, which only loading shows
                continue
            there = {piece.target for piece in part.pieces}
            missing |= {prefix + name for name in names if name not in there}
        if missing:
            raise self._problem(f"it has no tensor for {listed(sorted(missing))}")

    def _check_dtypes(self) -> None:
        """Raise an error for a tensor whose dtype is not one of weights, before hours are spent on other layers."""
        wanted = [(view, self._skeleton.dtype) for view in (self.embedding, self.head)]
        for prefix, part in self._prefixed():
            wanted += [(piece.view, self._shapes[f"{prefix}{piece.target}"][1]) for piece in part.pieces]
            wanted += [(view, self._shapes[target][1]) for target, views in part.converted.items() for view in views]
        for view, dtype in wanted:
            known = view.dtype in QUANTIZABLE or OTHER_DTYPES.get(view.dtype) == dtype
            if view.encoding is None and not known:
                raise self._problem(f"{view.name} has the dtype {view.dtype}, and the model needs {str(dtype)[6:]}")

    def _prefixed(self) -> list[tuple[str, Part]]:
        """Return all parts, with the start of the names of their parameters in the model."""
        layers = [(f"{self._skeleton.layers_name}.{number}.", part) for number, part in enumerate(self.layers)]
        return [*layers, ("", self.outside)]

    @property
    def title(self) -> str:
        """Number format of the weights, for people."""
        formats = {_title(view) for part in self.layers for view in part.views if view.encoding is not None}
        return ", ".join(sorted(formats)) or str(self._skeleton.dtype).removeprefix("torch.")

    @property
    def activations_title(self) -> str:
        """Treatment of activations, for people."""
        titles = {scheme.title for part in self.layers for scheme in part.schemes.values()}
        found = ", ".join(sorted(titles)) or f"{8 * self._skeleton.dtype.itemsize} bits"
        return f"{found}; FP8 cache of keys and values" if self.has_fp8_cache else found

    def prepare(self, reader: Reader) -> None:
        """Read the scales that decide how activations and fused weights are treated; needed before `fill`.

        Raises:
            ScaleError: a scale of activations is missing, or is not a positive finite number.
        """
        if not self._as_served:
            return
        config, recipe = self.source.inventory.config, recipe_of(self.source.inventory.quantization_config)
        activations = None if recipe is None else recipe.activations
        self.has_fp8_cache = has_cache(self._all, config)
        for part in self.layers:
            part.requantized = fused_scales(part.views, config, reader)
            pieces = [piece for piece in part.pieces if piece.view.encoding is not None]
            found = schemes_of([piece.view for piece in pieces], self._all, activations, config, reader)
            part.schemes = {(p.target, p.expert): found[p.view.name] for p in pieces if p.view.name in found}

    def cache_of(self, number: int, module: str, reader: Reader) -> Cache:
        """Return the FP8 cache of an attention module.

        Args:
            number: number of its layer.
            module: its name in the layer.
            reader: reads the checkpoint.

        Raises:
            ScaleError: a scale of the cache is not a positive finite number.
        """
        name = self.layers[number].name_of(module)
        name = f"{self._skeleton.layers_name}.{number}.{module}" if name is None else name
        return cache_of(name, self._all, self.source.inventory.config, reader)

    def fill(
        self, part: Part, module: Any, slots: Mapping[str, Slot], buffer: torch.Tensor, reader: Reader, threads: int
    ) -> None:
        """Write the parameters of a layer into a buffer.

        Args:
            part: the tensors.
            module: the layer, or the model for tensors outside of layers.
            slots: places of the parameters in the buffer.
            buffer: uint8, on the CPU.
            reader: reads the checkpoint.
            threads: threads that read and decode.
        """
        jobs: list[tuple[Piece, int, torch.Tensor]] = []
        for piece in part.pieces:
            whole = slots[piece.target].of(buffer)
            if piece.turned:
                jobs.append((piece, 0, whole))
                continue
            flat = whole.view(-1)[piece.first : piece.first + piece.view.numel]
            step = _step(piece.view)
            jobs += [(piece, start, flat[start : start + step]) for start in range(0, flat.numel(), step)]

        def run(job: tuple[Piece, int, torch.Tensor]) -> None:
            piece, start, target = job
            second = part.requantized.get(piece.view.name)
            if not piece.turned:
                read_elements(self._label, reader, piece.view, start, target, second)
            elif piece.expert is None:
                _turn(self._label, piece.view, target, reader)
            else:
                rows, columns = piece.view.shape
                values = torch.empty(rows * columns, dtype=target.dtype)
                read_elements(self._label, reader, piece.view, 0, values, second)
                target[piece.expert, :, piece.first : piece.first + rows].copy_(values.view(rows, columns).T)

        parallel_for(min(threads, len(jobs)), jobs, run)
        for target, views in part.converted.items():
            self._convert(target, views, module, slots, buffer, reader)

    def _convert(
        self,
        target: str,
        views: Sequence[TensorView],
        module: Any,
        slots: Mapping[str, Slot],
        buffer: torch.Tensor,
        reader: Reader,
    ) -> None:
        """Let transformers convert the tensors of a parameter, and copy it to its place."""
        skeleton = self._skeleton
        dtype = self._shapes[target][1]

        def read(view: TensorView) -> Callable[[], torch.Tensor]:
            def values() -> torch.Tensor:
                found = torch.empty(view.shape, dtype=dtype)
                read_elements(self._label, reader, view, 0, found.view(-1))
                return found

            return values

        before = skeleton.parameters_of(module)
        try:
            self._api.convert(skeleton.model, {view.name: read(view) for view in views}, skeleton.dtype)
        except (ValueError, RuntimeError, KeyError) as error:
            raise self._problem(f"transformers cannot convert the tensors of {target}: {problem_of(error)}") from error
        made = skeleton.parameters_of(module)
        for name, tensor in made.items():
            if tensor is not before.get(name) and name in slots:
                slots[name].of(buffer).copy_(tensor)
        skeleton.place(module, before)


def _turn(label: str, view: TensorView, whole: torch.Tensor, reader: Reader) -> None:
    """Write a stack whose matrices are transposed."""
    rows, columns = view.shape[1:]
    for expert in range(view.shape[0]):
        values = reader.decoded(view, expert * rows * columns, (expert + 1) * rows * columns, whole.dtype)
        _check_finite(label, view, values)
        whole[expert].copy_(values.view(rows, columns).T)


def _title(view: TensorView) -> str:
    """Return the number format of a quantized weight, for people."""
    assert view.encoding is not None
    rows, columns = view.encoding.cell
    cell = "tensor" if rows is None else "row" if columns is None else f"block of {rows}x{columns}"
    return f"{'FP4' if view.encoding.packed else 'FP8'}, a scale for each {cell}"


def _step(view: TensorView) -> int:
    """Return the elements of a slice: whole rows of scales, if they are few enough."""
    if view.encoding is None or view.encoding.cell[0] is None:
        return SLICE_ELEMENTS
    band = view.row_elements * view.encoding.cell[0]
    return max(1, SLICE_ELEMENTS // band) * band if band <= SLICE_ELEMENTS else SLICE_ELEMENTS


def read_elements(
    label: str,
    reader: Reader,
    view: TensorView,
    start: int,
    target: torch.Tensor,
    requantized: Requantized | None = None,
) -> None:
    """Write elements of a tensor, from ``start`` on, into ``target``, in its dtype.

    Args:
        label: name of the checkpoint in messages.
        reader: reads the checkpoint.
        view: the tensor.
        start: first element.
        target: flat; decides the number of elements and their dtype.
        requantized: the scale with which an engine quantizes the tensor again; None if it does not.

    Raises:
        NonFiniteOutputError: an element is NaN or infinite; fused attention can hide it.
    """
    _read_elements(reader, view, start, target, requantized)
    _check_finite(label, view, target)


def all_finite(values: torch.Tensor) -> bool:
    """Return True if no value is NaN or infinite; ``isfinite`` takes ten times as long."""
    return not values.numel() or all(map(math.isfinite, values.aminmax()))


def _check_finite(label: str, view: TensorView, values: torch.Tensor) -> None:
    if values.is_floating_point() and not all_finite(values):
        raise NonFiniteOutputError(label, f"values of {printable(view.name)}")


def _read_elements(
    reader: Reader, view: TensorView, start: int, target: torch.Tensor, requantized: Requantized | None
) -> None:
    stop = start + target.numel()
    if view.encoding is not None:
        if requantized is None:
            target.copy_(reader.decoded(view, start, stop, target.dtype))
        else:
            target.copy_(requantized.values(reader.decoded(view, start, stop, torch.float32)))
        return
    stored = TORCH_DTYPES.get(view.dtype, OTHER_DTYPES.get(view.dtype))
    if stored == target.dtype:
        reader.gather(view, start * view.itemsize, stop * view.itemsize, as_bytes(target))
        return
    if view.dtype not in TORCH_DTYPES:
        raise UnsupportedArchitectureError(view.name, view.dtype, "no weight has this dtype")
    with reader.elements(view, start, stop) as values:
        target.copy_(values)
        del values
