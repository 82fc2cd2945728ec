"""Measurements of a calibration in each layer: inputs of products with weights, and keys and values of attention."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8.calibration.magnitudes import Magnitudes, magnitudes_of
from nemotron_fp8.calibration.modules import matrices_of, module_of, stacks_of
from nemotron_fp8.errors import NonFiniteOutputError, printable
from nemotron_fp8.inference.activations import Products
from nemotron_fp8.inference.state import Saved
from nemotron_fp8.planning.amaxes import TABLES
from nemotron_fp8.planning.encoded_source import encoded_source
from nemotron_fp8.planning.families import family_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from nemotron_fp8.calibration.modules import Place
    from nemotron_fp8.inference.session import Session


class Inputs(Products):
    """Measures the inputs of every product with a weight of a layer.

    Args:
        tensors: parameters of the layer in memory, by name in it.
        matrices: names of the modules of each matrix.
        counted: True to count magnitudes, for a percentile.

    Attributes:
        found: magnitudes of the inputs of each module.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], matrices: Mapping[Place, tuple[str, ...]], counted: bool
    ) -> None:
        self._matrices, self._counted = matrices, counted
        self._places: dict[int, tuple[str, int]] = {}
        self._known: tuple[torch.Tensor, int, Magnitudes] | None = None
        self.found: dict[str, Magnitudes] = {}
        for name, tensor in tensors.items():
            if tensor.dim() in (2, 3) and tensor.is_floating_point():
                for number, matrix in enumerate(tensor if tensor.dim() == 3 else tensor[None]):
                    self._places[matrix.data_ptr()] = name, number
        super().__init__(dict.fromkeys(self._places, _unchanged))

    def treat(self, address: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Measure activations; they are not changed."""
        name, first = self._places[address]
        count = len(weight) if weight.dim() == 3 else 1
        for number in range(count):
            modules = self._matrices.get((name, first + number)) or self._matrices.get((name, None), ())
            own = x[number] if weight.dim() == 3 and x.dim() == 3 and len(x) == count else x
            self._measure(modules, own, weight.dim() == 3)
        return x

    def _measure(self, modules: Iterable[str], x: torch.Tensor, of_stack: bool) -> None:
        # Weights that are multiplied by the same activations, of which a model can change the values in place.
        if self._known is None or self._known[0] is not x or self._known[1] != x._version:
            self._known = x, x._version, magnitudes_of(x, self._counted)
        found = self._known[2]
        if found.largest is None or (of_stack and not found.largest):
            return  # an expert without tokens: models that run all experts at once give it zeros
        for module in modules:
            self.found.setdefault(module, Magnitudes(self._counted)).add(found)


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


class Unseen(NamedTuple):
    """Modules and experts that a calibration did not see.

    Attributes:
        modules: modules of weights, beside experts, that no product was seen of.
        experts: number of experts of all layers.
        unreached: number of those that no token reached.
    """

    modules: list[str]
    experts: int
    unreached: int


class Measuring:
    """Measures the activations of a source. An `Observer`.

    Args:
        session: the source and the sample.
        percentile: percentage of the values that are at most the amax; None for all of them.

    Attributes:
        tables: amaxes of ``inputs``, ``k`` and ``v``, by module.
    """

    def __init__(self, session: Session, percentile: float | None) -> None:
        self._session, self._percentile, self._counted = session, percentile, percentile is not None
        self._stream = session.streams[0]
        inventory = self._stream.weights.source.inventory
        self._family = family_of(inventory.config)
        self._stacks = stacks_of(encoded_source(inventory).inventory)
        self.tables: dict[str, dict[str, float]] = {name: {} for name in TABLES}

    def resume(self, saved: Saved) -> None:
        self.tables = {name: dict(saved.amaxes.get(name, {})) for name in TABLES}

    @contextmanager
    def watching(self, which: int, number: int, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        skeleton = self._session.skeleton
        part = self._stream.weights.layers[number]
        paths = {id(module): path for path, module in skeleton.layers[number].named_modules()}
        inputs = Inputs(tensors, self._matrices(number), self._counted)
        keys: dict[str, Magnitudes] = {}
        values: dict[str, Magnitudes] = {}

        def attention(module: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            name = part.name_of(paths.get(id(module), ""))
            if name is not None:
                for table, states in ((keys, key), (values, value)):
                    table.setdefault(name, Magnitudes(self._counted)).add(magnitudes_of(states, self._counted))
            return key, value

        with inputs, self._session.api.attention(attention):
            yield
        for kind, found in zip(TABLES, (inputs.found, keys, values), strict=True):
            self._take(kind, found, f"in layer {number}")

    def finished(self, which: int, hidden: torch.Tensor) -> None:
        pass

    def findings(self, layers: int) -> Saved:
        return Saved(layers, amaxes=self.tables)

    def head(self, hidden: torch.Tensor, target: torch.device) -> None:
        """Measure the input of the output layer, if it has a tensor of its own.

        Args:
            hidden: hidden states after the final norm, ``[sequences, length, hidden size]``.
            target: device that computes.
        """
        weights, skeleton = self._stream.weights, self._session.skeleton
        if weights.head is weights.embedding:
            return
        found = Magnitudes(self._counted)

        def observe(states: torch.Tensor) -> torch.Tensor:
            found.add(magnitudes_of(states, self._counted))
            return states.new_zeros((*states.shape[:-1], 1))

        for states, ids in zip(hidden, self._session.drawn.ids, strict=True):
            skeleton.logits(ids[None], states[None].to(target), observe)
        self._take("inputs", {module_of(weights.head.name): found}, "before the output layer")

    def _take(self, kind: str, found: Mapping[str, Magnitudes], place: str) -> None:
        """Add amaxes to a table."""
        table = self.tables[kind]
        for name, magnitudes in found.items():
            if magnitudes.largest is None:
                continue
            amax = magnitudes.amax(self._percentile)
            if not math.isfinite(amax):
                what = {"inputs": "inputs", "k": "keys", "v": "values"}[kind]
                raise NonFiniteOutputError(self._stream.label, f"the {what} of {printable(name)} {place}")
            table[name] = max(amax, table.get(name, 0.0))

    def _matrices(self, number: int) -> dict[Place, tuple[str, ...]]:
        prefix = f"{self._session.skeleton.layers_name}.{number}."
        return matrices_of(self._stream.weights.layers[number], prefix, self._stacks)

    def unseen(self) -> Unseen:
        """Return the modules without an amax."""
        modules: list[str] = []
        experts: dict[str, bool] = {}
        known = self.tables["inputs"]
        shapes = {view.name: view for view in self._stream.weights.source.inventory.views}
        for number in range(len(self._session.skeleton.layers)):
            for (_, expert), names in self._matrices(number).items():
                for name in names:
                    weight = f"{name}.weight"
                    if expert is not None or self._family.is_routed(weight):
                        module = name.rpartition(".")[0]
                        experts[module] = experts.get(module, False) or name in known
                    elif name not in known and weight in shapes and len(shapes[weight].shape) == 2:
                        modules.append(name)
        return Unseen(modules, len(experts), sum(not seen for seen in experts.values()))
