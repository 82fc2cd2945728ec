"""Everything that models take from transformers beyond its documented functions, behind one check of the version.

These functions have no stability promise. They are the same in transformers 5.19 to 5.24. `Transformers` imports them
once, and a version without one of them ends in an error that names it.
"""

from __future__ import annotations

import os
import re
import warnings
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from nemotron_fp8.errors import MissingExtraError, TransformersVersionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch


OLDEST = (5, 19)
"""Oldest version of transformers with these functions."""
LONGEST_PROBLEM = 200
"""Most characters of a message of transformers or torch inside a message of this library."""
MAX_BUFFER_BYTES = 1 << 30
"""Bytes of all buffers of a model that no checkpoint holds: rotary frequencies, masks. Models have megabytes."""


AttentionHandler: TypeAlias = (
    "Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]"
)
"""Function of a module of attention, its keys and its values that returns keys and values."""


class Target(NamedTuple):
    """Place of a tensor of a checkpoint in a model.

    Attributes:
        name: name of a parameter or buffer of the model; of several that one tensor becomes, the first.
        pattern: pattern of the conversion that the tensor needs; None for a tensor that is loaded as it is.
    """

    name: str
    pattern: str | None


class Stacking(NamedTuple):
    """A conversion that stacks matrices: those of one pattern along the first dimension, several patterns side by side.

    Attributes:
        patterns: the patterns, in the order of their rows in the stack.
    """

    patterns: tuple[str, ...]


class TooLargeError(Exception):
    """A config describes a model that is much larger than its checkpoint."""


def problem_of(error: BaseException, hidden: str = "") -> str:
    """Return the message of an error of transformers or torch: one short line, without frames of C++.

    Args:
        error: the error.
        hidden: a path that means nothing to the user; it is left out.
    """
    text = " ".join(str(error).split()).partition(" Exception raised from ")[0]
    if hidden:
        text = text.replace(hidden, "its folder")
    return text if len(text) <= LONGEST_PROBLEM else f"{text[:LONGEST_PROBLEM]}..."


class Transformers:
    """The functions of transformers that this library calls.

    Raises:
        MissingExtraError: transformers is not installed.
        TransformersVersionError: the installed version lacks a function.
    """

    def __init__(self) -> None:
        try:
            self.package: Any = import_module("transformers")
        except ImportError as error:
            raise MissingExtraError("evaluate", "transformers") from error
        self.version: str = str(self.package.__version__)
        numbers = tuple(int(part) for part in self.version.split(".")[:2] if part.isdecimal())
        if numbers < OLDEST:
            raise TransformersVersionError(self.version, f"versions from {'.'.join(map(str, OLDEST))} on are supported")
        mapping, loading = self._module("conversion_mapping"), self._module("core_model_loading")
        self._mapping_of = self._name(mapping, "get_model_conversion_mapping")
        self._rename: Callable[..., tuple[str, str | None]] = self._name(loading, "rename_source_key")
        self._load = self._name(loading, "convert_and_load_state_dict_in_model")
        self._sort_key = self._name(loading, "dot_natural_key")
        self._renaming, self._converter, merge, concatenate = (
            self._name(loading, name)
            for name in ("WeightRenaming", "WeightConverter", "MergeModulelist", "Concatenate")
        )
        self._merge: list[tuple[Any, Any]] = [(merge, 0)]
        self._merge_and_join = [*self._merge, (concatenate, 1)]
        modeling = self._module("modeling_utils")
        self._load_config = self._name(modeling, "LoadStateDictConfig")
        self._interface = self._name(modeling, "AttentionInterface")
        self._name(self._interface, "get_interface")
        self._without_init = self._name(self._module("initialization"), "no_init_weights")
        self.logging: Any = self._module("utils.logging")

    def _module(self, name: str) -> Any:
        try:
            return import_module(f"transformers.{name}")
        except ImportError as error:
            raise TransformersVersionError(self.version, f"it has no module {name}") from error

    def _name(self, module: Any, name: str) -> Any:
        try:
            return getattr(module, name)
        except AttributeError as error:
            where = getattr(module, "__name__", type(module).__name__)
            raise TransformersVersionError(self.version, f"{where} has no {name}") from error

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Suppress progress bars and warnings of transformers and torch."""
        before, bars = self.logging.get_verbosity(), self.logging.is_progress_bar_enabled()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            self.logging.set_verbosity(before)
            if bars:
                self.logging.enable_progress_bar()

    @contextmanager
    def attention(self, handler: AttentionHandler) -> Iterator[None]:
        """Give the keys and values of every attention to a function first; attention gets those that it returns.

        They are those that an engine caches: after rotary embedding, and before heads are repeated. Models whose
        attention does not call a function of transformers' table are not seen.

        Args:
            handler: called with the module of the attention, keys and values, ``[sequences, heads, length, head size]``
                in the dtype of the model; returns the keys and values to use, of the same shapes and dtype.
        """
        before = self._interface.get_interface

        def get_interface(table: Any, *given: Any, **named: Any) -> Callable[..., Any]:
            function = before(table, *given, **named)

            def attend(
                module: torch.nn.Module,
                query: torch.Tensor,
                key: torch.Tensor,
                value: torch.Tensor,
                *further: Any,
                **options: Any,
            ) -> Any:
                key, value = handler(module, key, value)
                return function(module, query, key, value, *further, **options)

            return attend

        self._interface.get_interface = get_interface
        try:
            yield
        finally:
            self._interface.get_interface = before

    @contextmanager
    def building(self, most: int) -> Iterator[None]:
        """Build modules on the meta device, as ``from_pretrained`` does, and without initialization.

        A model of any size is built without memory, and `initialize_buffers` makes its buffers.

        Args:
            most: most parameters; a config can describe more of them than memory holds.

        Raises:
            TooLargeError: the model has more parameters.
        """
        import torch

        register = torch.nn.Module.register_parameter
        count = 0

        def register_on_meta(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
            nonlocal count
            register(module, name, param)
            if param is not None:
                module._parameters[name] = type(param)(param.to("meta"), requires_grad=False)
                count += 1
                if count > most:
                    raise TooLargeError(
                        f"its config describes more than {most:,} parameters, and its weights have not as many"
                    )

        with self.quiet(), self._without_init(), torch.device("meta"):
            torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]  # see finally
            try:
                yield
            finally:
                torch.nn.Module.register_parameter = register  # type: ignore[method-assign]  # the original

    def initialize_buffers(self, model: Any) -> None:
        """Compute the buffers that no checkpoint holds as ``from_pretrained`` does: with float32 as the default dtype.

        A model that is built computes them in its own dtype, and some lose digits by it.

        Raises:
            TooLargeError: they have more than `MAX_BUFFER_BYTES`.
        """
        import torch

        places = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name in module._non_persistent_buffers_set
        ]
        size = sum(buffer.nbytes for _, _, buffer in places)
        if size > MAX_BUFFER_BYTES:
            raise TooLargeError(f"its config describes tables of {size:,} bytes beside its weights")
        for module, name, buffer in places:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        for tensor in model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        with self.quiet():
            self._name(model, "initialize_weights")()

    def targets(self, model: Any, names: Sequence[str]) -> dict[str, Target]:
        """Return the place of tensors of a checkpoint in a model, by name; tensors without a place are left out."""
        rules = self._mapping_of(model)
        renamings = [rule for rule in rules if isinstance(rule, self._renaming)]
        converters = [rule for rule in rules if isinstance(rule, self._converter)]
        there = model.state_dict()
        found = {}
        for name in sorted(names, key=self._sort_key):
            target, pattern = self._rename(name, renamings, converters, model.base_model_prefix, there)
            if target not in there and name in there:
                target, pattern = self._rename(name, [], [], model.base_model_prefix, there)
            if target in there:
                found[name] = Target(target, pattern)
        return found

    def stacking(self, model: Any, pattern: str) -> Stacking | None:
        """Return the stacking that a conversion does; None for a conversion of another kind."""
        for rule in self._mapping_of(model):
            if isinstance(rule, self._converter) and pattern in rule.source_patterns:
                steps = [(type(step), getattr(step, "dim", None)) for step in rule.operations]
                one = len(rule.source_patterns) == 1
                if len(rule.target_patterns) == 1 and steps == (self._merge if one else self._merge_and_join):
                    return Stacking(tuple(rule.source_patterns))
                return None
        return None

    def float32_names(self, model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
        """Return a function that returns True for parameters that a model keeps in float32."""
        plan: Mapping[str, Any] = model._get_dtype_plan(dtype)
        patterns = [re.compile(name.replace("*", ".*")) for name in plan]
        return lambda name: any(pattern.search(name) for pattern in patterns)

    def convert(self, model: Any, tensors: Mapping[str, Callable[[], torch.Tensor]], dtype: torch.dtype) -> None:
        """Load tensors into a model, converted as ``from_pretrained`` converts them.

        Args:
            model: the model; its parameters are replaced.
            tensors: functions that return the tensors, by name in the checkpoint.
            dtype: dtype of the parameters.

        Raises:
            ValueError: a tensor cannot be converted, or has another shape than the model's.
        """
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # else all tensors would be read at once
        config = self._load_config(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=self._mapping_of(model),
            device_map={"": "cpu"},
        )
        with self.quiet():
            info, _ = self._load(model, {name: _Lazy(read) for name, read in tensors.items()}, config)
        if info.mismatched_keys or info.conversion_errors:
            raise ValueError(str(sorted(map(str, info.mismatched_keys)) or dict(info.conversion_errors))[:500])


class _Lazy:
    """A tensor that is read when the loader takes it, in the form of safetensors' slices."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: object) -> torch.Tensor:
        return self._read()

    def get_dtype(self) -> str:
        return "BF16"
