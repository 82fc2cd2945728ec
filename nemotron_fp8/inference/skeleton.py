"""The model of a checkpoint without its weights: transformers' own modules, with parameters on the meta device.

The model runs in three steps, and each is its own forward with some modules replaced by functions that return at once:

========  ============================================  ===========================================
step      replaced                                      yields
========  ============================================  ===========================================
`begin`   every decoder layer                           hidden states before the first layer, and
                                                        the other arguments of every layer
`end`     every decoder layer                           hidden states after the final norm
`logits`  the decoder, and the output layer by a part   logits of these words, as the model changes
                                                        them after its output layer
========  ============================================  ===========================================

No step knows an architecture. What a model does otherwise is detected, and the model is rejected by name.
"""

from __future__ import annotations

import copy
import json
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from nemotron_fp8.checkpoint.stated_quantization import without_statements
from nemotron_fp8.errors import NemotronFp8Error, UnsupportedArchitectureError, printable
from nemotron_fp8.inference.transformers_api import TooLargeError, problem_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from nemotron_fp8.inference.transformers_api import Transformers


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Dtypes in which a model computes, by the name in config.json."""

DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
"""Errors of the device, not of a model; older versions of torch lack the second."""

COUNTS = re.compile("(layers?|blocks?|experts?|labels|depth|stages?)$")
"""Keys of config.json that state how many times transformers repeats something while it reads a config."""
MOST_REPEATS = 1 << 16
"""Largest of such numbers: 256 times that of any published model."""
PARAMETERS_OF_TENSOR, FURTHER_PARAMETERS = 32, 1 << 13
"""Most parameters of a model for each tensor of its checkpoint, and beside them."""

OF_ENCODER = re.compile("cross|encoder")
"""Names of attention to the output of an encoder."""
IGNORED = ("auto_map", "return_dict")
"""Keys of config.json that name code of the checkpoint, or change the form of what a model returns."""


class LayerArguments(NamedTuple):
    """Arguments of a decoder layer beside the hidden states.

    Attributes:
        positional: further positional arguments.
        named: keyword arguments: masks, rotary embeddings, positions.
    """

    positional: tuple[Any, ...]
    named: Mapping[str, Any]


class Begun(NamedTuple):
    """Result of the first step.

    Attributes:
        hidden: hidden states before the first layer: ``[1, length, hidden size]``.
        arguments: arguments of each layer.
    """

    hidden: torch.Tensor
    arguments: list[LayerArguments]


NOT_WITHOUT = "it cannot be run without its layers"
"""Reason for a model whose own code fails, before that of the failure."""


class _Second:
    """Second item of what a layer returns: a model that passes it to another layer is rejected."""


OUTPUT_FORMS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, _Second()),
)
"""Forms in which layers return hidden states: alone, as the first item, or with attention weights that are unused."""

Lookup: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
"""Function that returns the rows of an embedding for ids: ``[..., hidden size]``."""


class Skeleton:
    """A model whose parameters are on the meta device.

    Args:
        api: functions of transformers.
        name: name of the checkpoint in messages.
        config: content of its config.json.
        folder: an empty folder, for the config in a form that transformers reads.
        dtype: dtype in which the model computes.
        tensors: tensors of the checkpoint; they limit the parameters of the model.

    Attributes:
        model: the model.
        layers: its decoder layers.
        layers_name: name of the list of the layers in the model.
        embedding: input embedding.
        head: output layer.
        positions: tokens of the longest sequence, as the config states them; None if it does not.
        is_tied: True if the output layer is the input embedding unless a checkpoint has both.

    Raises:
        UnsupportedArchitectureError: transformers does not know the model, or it cannot be run layer by layer.
    """

    def __init__(
        self, api: Transformers, name: str, config: Mapping[str, Any], folder: Path, dtype: torch.dtype, tensors: int
    ) -> None:
        self._api, self._name, self._config = api, name, config
        model_type, architectures = config.get("model_type"), config.get("architectures")
        stated = architectures[0] if isinstance(architectures, list) and architectures else model_type
        self.architecture = str(stated)
        self.dtype = dtype
        self._most = PARAMETERS_OF_TENSOR * tensors + FURTHER_PARAMETERS
        self.model: Any = self._build(folder)
        self.model.eval()
        text = self.model.config.get_text_config()
        count = getattr(text, "num_hidden_layers", None)
        positions = getattr(text, "max_position_embeddings", None)
        self.positions = positions if type(positions) is int and positions > 0 else None
        decoder = self.model.get_decoder()
        found = [
            module
            for module in decoder.modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == count and len(module)
        ]
        self.embedding = self.model.get_input_embeddings()
        self.head = self.model.get_output_embeddings()
        if not found:
            raise self.unsupported(
                f"no list of {count} decoder layers was found in its module {type(decoder).__name__}"
            )
        if self.head is None or not hasattr(self.head, "weight"):
            raise self.unsupported("it has no output layer over words, so that it predicts no tokens")
        if self.head.weight.dim() != 2:
            raise self.unsupported("its output layer is no matrix")
        self.layers: torch.nn.ModuleList = found[0]
        names = {id(module): name for name, module in self.model.named_modules()}
        self.layers_name = names[id(self.layers)]
        self.embedding_name = f"{names[id(self.embedding)]}.weight"
        self.head_name = f"{names[id(self.head)]}.weight"
        self.decoder_name = names[id(decoder)]
        configs = (self.model.config, text)
        self.is_tied = any(getattr(each, "tie_word_embeddings", False) is True for each in configs)
        if any(
            getattr(module, "is_causal", None) is False and not OF_ENCODER.search(name)
            for name, module in self.layers.named_modules()
        ):
            raise self.unsupported("its layers see the tokens that are to be predicted")
        # A model without a body of its own is its own base model; the body is then the owner of the layers.
        base = self.model.base_model
        self._body: Any = (
            base if base is not self.model else self.model.get_submodule(self.layers_name.rpartition(".")[0])
        )
        # Some models run their decoder without its owner.
        self._bodies = [module for module in (self._body, decoder) if module not in (self.model, self.head)]
        self._output: Any = None
        self._form: Callable[[torch.Tensor], Any] | None = None

    def unsupported(self, reason: str) -> UnsupportedArchitectureError:
        """Return the error for a model that cannot be run layer by layer."""
        return UnsupportedArchitectureError(self._name, self.architecture, reason)

    def too_long(self, length: int) -> str:
        """Return a notice about sequences that are longer than the model's; empty for shorter ones."""
        if self.positions is None or length <= self.positions:
            return ""
        return (
            f"sequences of {length:,} tokens are longer than the {self.positions:,} positions that config.json states,"
            " and are predicted badly; pass a smaller length (--length)"
        )

    def _build(self, folder: Path) -> Any:
        """Build the model from its config, without code of the checkpoint."""
        if found := _repeats(self._config):
            raise self.unsupported(
                f"its config states a number of {printable(found)} that no model has; fetch config.json again"
            )
        plain = {key: value for key, value in without_statements(self._config).items() if key not in IGNORED}
        (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        package = self._api.package
        try:
            with self._api.quiet():
                config = package.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            config.use_cache = False
            config.get_text_config().use_cache = False
            kind = self._kind(config)
            try:
                return self._from_config(kind, config, "sdpa")
            except ValueError as error:
                if "scaled_dot_product_attention" not in str(error):
                    raise
                return self._from_config(kind, config, "eager")
        except (UnsupportedArchitectureError, MemoryError):
            raise
        except TooLargeError as error:
            raise self.unsupported(str(error)) from None
        except Exception as error:  # of any class: the config is a stranger's
            known = "auto_map" not in self._config
            more = "" if known else "; its own code (auto_map) is not run"
            problem = problem_of(error, str(folder))
            raise self.unsupported(
                f"transformers {self._api.version} cannot build it: {type(error).__name__}: {problem}{more}"
            ) from error

    def _kind(self, config: Any) -> Any:
        """Return the class of transformers that predicts tokens with this config."""
        package = self._api.package
        if getattr(config, "is_encoder_decoder", False):
            raise self.unsupported("its decoder needs the output of an encoder")
        for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
            kind = getattr(package, name)
            if type(config) in kind._model_mapping:
                return kind
        raise self.unsupported(f"transformers {self._api.version} has no causal language model of this kind")

    def _from_config(self, kind: Any, config: Any, attention: str) -> Any:
        with self._api.building(self._most):
            model = kind.from_config(
                config, dtype=self.dtype, attn_implementation=attention, experts_implementation="eager"
            )
        self._api.initialize_buffers(model)
        return model

    def outside_names(self) -> list[str]:
        """Return the names of parameters and stored buffers outside of the layers, but for embedding and output layer.

        Those of encoders beside the decoder are left out: text does not reach them.
        """
        prefix = f"{self.decoder_name}." if self.decoder_name else ""
        layers, head = f"{self.layers_name}.", f"{self.head_name.removesuffix('weight')}"
        large = (self.embedding_name, self.head_name)
        return [
            name
            for name in self.model.state_dict()
            if name.startswith((prefix, head)) and not name.startswith(layers) and name not in large
        ]

    @staticmethod
    def parameters_of(module: Any) -> dict[str, torch.Tensor]:
        """Return the parameters and stored buffers of a module, by name."""
        found: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
        return found

    @staticmethod
    def place(module: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make tensors the parameters and buffers of a module, by name; they are not copied."""
        for name, tensor in tensors.items():
            stem, _, last = name.rpartition(".")
            owner = module.get_submodule(stem)
            if last in owner._parameters:
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                owner._parameters[last] = tensor if is_parameter else torch.nn.Parameter(tensor, requires_grad=False)
            else:
                owner._buffers[last] = tensor

    @contextmanager
    def _layers_replaced(self, make: Callable[[int], Callable[..., torch.Tensor]]) -> Iterator[None]:
        """Replace the forward of every layer by the function that ``make`` returns for its number."""

        def replacement(number: int) -> Callable[..., Any]:
            function = make(number)
            form = self._form or OUTPUT_FORMS[0]
            return lambda *args, **kwargs: form(function(*args, **kwargs))

        try:
            for number, layer in enumerate(self.layers):
                layer.forward = replacement(number)
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def begin(self, ids: torch.Tensor, lookup: Lookup) -> Begun:
        """Return the hidden states before the first layer, and the arguments of every layer.

        Args:
            ids: int64 ``[1, length]``.
            lookup: returns the rows of the input embedding for ids.

        Raises:
            UnsupportedArchitectureError: the model changes hidden states between layers, or layers share state.
        """
        errors: list[UnsupportedArchitectureError] = []
        for form in OUTPUT_FORMS if self._form is None else (self._form,):
            self._form = form
            try:
                return self._begin(ids, lookup)
            except UnsupportedArchitectureError as error:
                errors.append(error)
        self._form = None
        # An error of the model's own code says less than a reason of this module.
        raise next((error for error in errors if not error.reason.startswith(NOT_WITHOUT)), errors[0])

    def _begin(self, ids: torch.Tensor, lookup: Lookup) -> Begun:
        seen: dict[int, LayerArguments] = {}
        expected: list[torch.Tensor] = []

        def make(number: int) -> Callable[..., torch.Tensor]:
            def layer(hidden: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor:
                given = LayerArguments(positional, named)
                self._check_state(given)
                if expected and hidden is not expected[0]:
                    raise self.unsupported("it changes hidden states between its layers")
                if number != len(seen):
                    raise self.unsupported("it runs its layers in another order, or some of them several times")
                expected[:] = [hidden]
                seen[number] = given
                return hidden

            return layer

        self._run(make, ids, lookup)
        if len(seen) != len(self.layers):
            raise self.unsupported(f"its forward runs {len(seen)} of its {len(self.layers)} layers")
        self._check_shape(expected[0], ids)
        return Begun(expected[0], [seen[number] for number in range(len(seen))])

    def _run(self, make: Callable[[int], Callable[..., torch.Tensor]], ids: torch.Tensor, lookup: Lookup) -> Any:
        """Run the model up to its output layer, with other layers, and return what it returns."""
        length = ids.shape[1]
        longer = self.positions is not None and length > self.positions
        problem = (
            f"it has {self.positions:,} positions, and a sequence {length:,} tokens; pass a smaller length (--length)"
            if longer
            else NOT_WITHOUT
        )
        running = self.running(problem)
        with running, self._layers_replaced(make), _Embedding(self.embedding.weight, lookup):
            return self._body(input_ids=ids, use_cache=False)

    @contextmanager
    def running(self, problem: str) -> Iterator[None]:
        """Turn errors of the model's code into UnsupportedArchitectureError: its parts do not run one by one.

        Args:
            problem: the part that does not run.
        """
        try:
            yield
        except (NemotronFp8Error, MemoryError, *DEVICE_ERRORS):
            raise
        except Exception as error:  # of any class: it is any model's code
            if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
                raise  # the machine's limit, not the model's
            raise self.unsupported(f"{problem}: {type(error).__name__}: {problem_of(error)}") from error

    def _check_shape(self, hidden: torch.Tensor, ids: torch.Tensor) -> None:
        """Raise UnsupportedArchitectureError if hidden states are not as wide as the embedding."""
        wanted = (*ids.shape, self.embedding.weight.shape[1])
        if hidden.shape != wanted:
            raise self.unsupported(f"its hidden states have the shape {list(hidden.shape)}, not {list(wanted)}")

    def _check_state(self, given: LayerArguments) -> None:
        """Raise UnsupportedArchitectureError if a layer is given an object through which it can share state."""
        for name, value in (*enumerate(given.positional, 1), *given.named.items()):
            if isinstance(value, _Second):
                raise self.unsupported(f"its layers hand each other more than hidden states (argument {name!r})")
            if _is_shared_state(value):
                raise self.unsupported(f"its layers share state ({type(value).__name__} in the argument {name!r})")

    def end(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after the final norm.

        Args:
            ids: int64 ``[1, length]``.
            hidden: hidden states after the last layer: ``[1, length, hidden size]``.
        """
        last = len(self.layers) - 1

        def make(number: int) -> Callable[..., torch.Tensor]:
            return lambda given, *_, **__: hidden if number == last else given

        nothing = hidden.new_zeros(1).expand(hidden.shape[-1])
        self._output = self._run(make, ids, lambda given: nothing.expand(*given.shape, -1))
        found = getattr(self._output, "last_hidden_state", None)
        if not isinstance(found, torch.Tensor):
            raise self.unsupported("it returns no hidden states after its last layer")
        self._check_shape(found, ids)
        return found

    def logits(
        self, ids: torch.Tensor, hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return logits of some words: those of ``head``, changed as the model changes them afterwards.

        Args:
            ids: int64 ``[1, length]``.
            hidden: hidden states after the final norm, from `end`.
            head: returns the logits of some words for hidden states.
        """
        output = copy.copy(self._output)
        output.last_hidden_state = hidden
        for module in self._bodies:
            module.forward = lambda *_, **__: output
        self.head.forward = head
        try:
            with self.running("its output layer cannot be run alone"):
                found: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            for module in (*self._bodies, self.head):
                module.__dict__.pop("forward", None)
        return found

    def check_logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        """Check that the model changes the logits of each word alone, so that they can be computed in parts.

        Args:
            ids: int64 ``[1, length]``.
            hidden: hidden states after the final norm, from `end`.

        Raises:
            UnsupportedArchitectureError: it does not.
        """
        ids, hidden = ids[:, :2], hidden[:, :2]
        words = self.head.weight.shape[0]
        values = torch.linspace(-40, 40, 2 * words, dtype=torch.float32).view(1, 2, words).to(hidden.dtype)
        whole = self.logits(ids, hidden, lambda _: values)
        middle = words // 2
        left = self.logits(ids, hidden, lambda _: values[..., :middle])
        right = self.logits(ids, hidden, lambda _: values[..., middle:])
        if whole.shape != values.shape or not torch.equal(torch.cat((left, right), -1), whole):
            raise self.unsupported("it changes logits after the output layer, and not those of each word alone")


def _repeats(value: object, depth: int = 0) -> str:
    """Return the key of a config whose number would make transformers repeat something endlessly; empty without one."""
    if depth > 8:
        return ""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if type(item) is int and item > MOST_REPEATS and isinstance(key, str) and COUNTS.search(key):
            return key
        if isinstance(item, (dict, list)) and (found := _repeats(item, depth + 1)):
            return found
    return ""


def _is_shared_state(value: object) -> bool:
    """Return True for an object that a layer could change for later layers: a cache, a dict or a list."""
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype, torch.device)):
        return False
    if isinstance(value, tuple):
        return any(map(_is_shared_state, value))
    return True


class _Embedding(TorchFunctionMode):
    """Answers lookups in the input embedding, whose weight is on the meta device.

    Args:
        weight: the weight.
        lookup: returns the rows for ids.
    """

    def __init__(self, weight: torch.Tensor, lookup: Lookup) -> None:
        super().__init__()
        self._weight, self._lookup = weight, lookup

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.nn.functional.embedding and len(args) > 1 and args[1] is self._weight:
            return self._lookup(args[0])
        if func is torch.Tensor.to and _is_meta((*args[1:], given.get("device"))):
            return args[0]  # some models move ids to the device of the weight
        return func(*args, **given)


def _is_meta(values: tuple[Any, ...]) -> bool:
    """Return True if a device among arguments is the meta device."""
    return any(isinstance(value, (str, torch.device)) and torch.device(value).type == "meta" for value in values)
