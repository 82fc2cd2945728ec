"""Checkpoints as engines serve them: every layer quantizes activations, keys and values, and what clips is counted."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.inference.activations import Products, Scheme, cast
from nemotron_fp8.inference.fp8_cache import KEYS, LATENTS, is_latent
from nemotron_fp8.inference.state import Saved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from nemotron_fp8.inference.fp8_cache import Cache
    from nemotron_fp8.inference.session import Session, Stream


class Clipping(NamedTuple):
    """Values that were cast with a stored scale.

    Attributes:
        clipped: values beyond the range of the scale.
        values: all values.
    """

    clipped: int
    values: int


class _Counts:
    """Counts of a layer, by name of what was cast. The sums stay on the device until the layer is done."""

    def __init__(self) -> None:
        self._values: dict[str, int] = {}
        self._clipped: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: int, clipped: torch.Tensor) -> None:
        self._values[name] = self._values.get(name, 0) + values
        self._clipped[name] = self._clipped[name] + clipped if name in self._clipped else clipped

    def found(self) -> dict[str, Clipping]:
        return {name: Clipping(int(self._clipped[name]), values) for name, values in self._values.items()}


class Serving:
    """Treats activations, keys and values as engines do, and compares hidden states with the source's. An `Observer`.

    Args:
        session: the checkpoints, the source first.

    Attributes:
        errors: relative errors of the hidden states after each layer, by result.
        unseen: by checkpoint, names of quantized weights that no product with activations was seen of.
        clipping: by checkpoint, the values that were cast with a stored scale, by name of the module.
    """

    def __init__(self, session: Session) -> None:
        self._api, self._layers, self._streams = session.api, session.skeleton.layers, session.streams
        self.errors: list[list[float]] = [[] for _ in self._streams[1:]]
        self.unseen: list[set[str]] = [set() for _ in self._streams]
        self.clipping: list[dict[str, Clipping]] = [{} for _ in self._streams]

    def resume(self, saved: Saved) -> None:
        self.errors = [list(row) for row in saved.errors]
        self.clipping = [{name: Clipping(*pair) for name, pair in table.items()} for table in saved.clipped]

    @contextmanager
    def watching(self, which: int, number: int, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        stream, counts = self._streams[which], _Counts()
        handlers, owners = _handlers(stream.weights.layers[number].schemes, tensors, counts)
        with ExitStack() as stack:
            if stream.weights.has_fp8_cache:
                caches = _Caches(stream, self._layers[number], number, counts)
                caches.take_latents(handlers, tensors)
                stack.enter_context(self._api.attention(caches.apply))
            products = stack.enter_context(Products(handlers))
            yield
        self.unseen[which] |= {
            name for address, (name, expert) in owners.items() if expert is None and address not in products.seen
        }
        self.clipping[which].update(counts.found())

    def finished(self, which: int, hidden: torch.Tensor) -> None:
        if which:
            self.errors[which - 1].append(_relative_error(hidden[which], hidden[0]))

    def has_cached(self, which: int) -> bool:
        """Return True if keys of a checkpoint went through an FP8 cache."""
        return any(name.endswith(KEYS) for name in self.clipping[which])

    def findings(self, layers: int) -> Saved:
        return Saved(layers, self.errors, clipped=self.clipping)


class _Caches:
    """FP8 caches of the attention modules of a layer.

    Args:
        stream: the checkpoint.
        layer: the layer.
        number: its number.
        counts: counts what is clipped.
    """

    def __init__(self, stream: Stream, layer: torch.nn.Module, number: int, counts: _Counts) -> None:
        self._stream, self._number, self._counts = stream, number, counts
        self._modules = dict(layer.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._caches: dict[str, Cache] = {}

    def _of(self, name: str) -> Cache:
        if name not in self._caches:
            self._caches[name] = self._stream.weights.cache_of(self._number, name, self._stream.reader)
        return self._caches[name]

    def apply(
        self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as attention reads them."""
        return self._of(self._names[module]).apply(module, key, value, self._counts.add)

    def take_latents(
        self, handlers: dict[int, Callable[[torch.Tensor], torch.Tensor]], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Let the inputs of the projections of latents go through the cache, before they are treated otherwise."""
        for name, module in self._modules.items():
            if is_latent(module):
                address = tensors[f"{name}.{LATENTS}.weight"].data_ptr()
                handlers[address] = self._through(name, handlers.get(address))

    def _through(
        self, name: str, then: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def handle(latents: torch.Tensor) -> torch.Tensor:
            found = self._of(name).apply_to_latents(latents, self._counts.add)
            return found if then is None else then(found)

        return handle


def _relative_error(hidden: torch.Tensor, source: torch.Tensor) -> float:
    """Return the relative L2 error of hidden states, without a float64 copy of all of them."""
    noise = signal = 0.0
    for own, right in zip(hidden, source, strict=True):
        exact = right.double()  # squares of bfloat16 overflow float32
        noise += float((own.double() - exact).square_().sum())
        signal += float(exact.square_().sum())
    return (noise / signal) ** 0.5 if signal else 0.0


def _handlers(
    schemes: Mapping[tuple[str, int | None], Scheme], tensors: Mapping[str, torch.Tensor], counts: _Counts
) -> tuple[dict[int, Callable[[torch.Tensor], torch.Tensor]], dict[int, tuple[str, int | None]]]:
    """Return what to do with the activations of quantized weights, and the names of these weights, by address."""
    handlers: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
    names: dict[int, tuple[str, int | None]] = {}
    memo: dict[Scheme, tuple[torch.Tensor, torch.Tensor]] = {}
    for (name, expert), scheme in schemes.items():
        tensor = tensors[name]
        stack = tensor if tensor.dim() == 3 else tensor[None]
        for number in range(len(stack)) if expert is None else [expert]:
            address = stack[number].data_ptr()
            names[address] = (name, None if tensor.dim() != 3 else number)

            def handle(x: torch.Tensor, scheme: Scheme = scheme) -> torch.Tensor:
                known = memo.get(scheme)
                if known is None or known[0] is not x:  # weights that are multiplied by the same activations
                    known = memo[scheme] = x, _treated(x, scheme, counts)
                return known[1]

            handlers[address] = handle
    return handlers, names


def _treated(x: torch.Tensor, scheme: Scheme, counts: _Counts) -> torch.Tensor:
    """Return activations as a scheme treats them, and count those beyond a stored scale."""
    if scheme.static is None:
        return scheme.apply(x)
    found = cast(x, scheme.static)
    counts.add(scheme.module, x.numel(), found.clipped)
    return found.values
