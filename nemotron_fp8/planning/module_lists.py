"""Lists of unquantized modules in a ``quantization_config``, as engines match them with the names of their modules.

An engine looks up its own name of a module. That name differs from the checkpoint's by a prefix (``visual`` is
``model.visual`` in transformers, ``language_model.lm_head`` is ``lm_head``), or by an inner part that the family's
record states (`nemotron_fp8.planning.families.Rename`). An entry must match every name of an unquantized module, and
no quantized module: an engine would take the codes of such a module for weights.

Four ways of matching are in use:

==============  ============================================================================================
exact           vLLM and SGLang, ``ignored_layers``
prefix          vLLM's experts in ``ignored_layers``; transformers before 5.20
fnmatch         TensorRT-LLM, modelopt
``re.match``    compressed-tensors after ``re:``; transformers, where an entry also matches as a suffix
==============  ============================================================================================

Sources: ``is_layer_skipped`` and ``should_ignore_layer`` of vLLM, ``should_convert_module`` of transformers,
``is_match`` of compressed-tensors.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


REGEX = "re:"
"""Mark of a regular expression in a list of compressed-tensors."""
ANY_PREFIX = f"{REGEX}.*"
WRAPPERS = frozenset(
    ("model", "language_model", "text_model", "transformer", "backbone", "decoder", "thinker", "llm", "base_model")
)
"""First parts of names that some engine drops or adds."""
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Modules(NamedTuple):
    """Linear modules of a result.

    Attributes:
        unquantized: names under which engines look up unquantized modules, in the order of the source.
        quantized: names under which engines look up quantized modules.
    """

    unquantized: tuple[str, ...] = ()
    quantized: frozenset[str] = frozenset()


def core(name: str) -> str:
    """Return the name of a module without the first parts that some engine drops."""
    while (found := name.partition("."))[0] in WRAPPERS and found[2]:
        name = found[2]
    return name


def _numberless(name: str) -> str:
    """Replace every number in a name."""
    return _NUMBER.sub("#", name)


def _first_number(name: str) -> str:
    """Replace every number in a name but the first, which is that of the layer."""
    first = _NUMBER.search(name)
    return name if first is None else name[: first.end()] + _numberless(name[first.end() :])


def _all_numbers(name: str) -> str:
    return name


SHAPES: tuple[Callable[[str], str], ...] = (_numberless, _first_number, _all_numbers)
"""Forms of an entry, from the most general to the most specific."""


class _Ends:
    """Names by their ends, to find one that ends in a text."""

    def __init__(self, names: Iterable[str]) -> None:
        self._reversed = sorted({name[::-1] for name in names})

    def any_ends_in(self, text: str) -> bool:
        """Return True if a name ends in a text."""
        wanted = text[::-1]
        place = bisect_left(self._reversed, wanted)
        return place < len(self._reversed) and self._reversed[place].startswith(wanted)


class _Quantized:
    """Names of quantized modules, to prove that an entry matches none."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self._ends = {shape: _Ends(map(shape, names)) for shape in SHAPES}
        self._sorted = sorted(names)

    def any_ends_in(self, text: str, shape: Callable[[str], str] = _all_numbers) -> bool:
        """Return True if a name of a shape ends in a text."""
        return self._ends[shape].any_ends_in(text)

    def any_starts_with(self, text: str) -> bool:
        """Return True if a name starts with a text."""
        place = bisect_left(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)


def patterns(modules: Modules) -> list[str]:
    """Return entries that match unquantized modules under any prefix: ``re:.*NAME$``.

    Numbers in an entry become ``\\d+`` where that matches no quantized module, so that one entry stands for a module
    of all layers. A name that cannot be told from a quantized one under every prefix is matched from its start.
    """
    quantized = _Quantized(modules.quantized)
    return list(dict.fromkeys(_pattern(name, quantized) for name in modules.unquantized))


def _pattern(name: str, quantized: _Quantized) -> str:
    short = core(name)
    for text, shape in (*((short, shape) for shape in SHAPES), (name, _all_numbers)):
        ending = shape(text)
        if "#" not in text and not quantized.any_ends_in(ending, shape):
            return ANY_PREFIX + r"\d+".join(map(re.escape, ending.split("#"))) + "$"
    return f"{REGEX}{re.escape(name)}$"


def exact_names(modules: Modules) -> list[str]:
    """Return entries for engines that compare whole names."""
    return list(dict.fromkeys(modules.unquantized))


def suffixes(modules: Modules) -> list[str]:
    """Return entries for transformers, which matches an entry as a suffix, or as a pattern from the start of a name."""
    quantized = _Quantized(modules.quantized)
    entries = []
    for name in modules.unquantized:
        short = core(name)
        taken = quantized.any_ends_in(short) or quantized.any_starts_with(short)
        entries.append(name if taken else short)
    return list(dict.fromkeys(entries))


def matches_exactly(entry: str, name: str) -> bool:
    """Return True if an entry is a name."""
    return entry == name


def matches_pattern(entry: str, name: str) -> bool:
    """Return True if an entry matches a name in compressed-tensors, and in vLLM's reader of it."""
    if entry.startswith(REGEX):
        return _compiled_match(entry.removeprefix(REGEX), name)
    return entry == name


def matches_suffix(entry: str, name: str) -> bool:
    """Return True if an entry matches a name in transformers' ``modules_to_not_convert``."""
    return name.endswith(entry) or _compiled_match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name)


def _compiled_match(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except (re.error, RecursionError):
        return False


class ModuleList:
    """A list of unquantized modules in a config, asked for many names.

    Args:
        entries: entries of the list.
        matches: the engine's way of matching an entry with a name.
    """

    def __init__(self, entries: Iterable[str], matches: Callable[[str, str], bool]) -> None:
        self.entries = tuple(entries)
        self._matches = matches
        self._exact = frozenset(self.entries)
        # Entries that this library writes are looked up by their ends; only others are matched one by one.
        self._ends: dict[Callable[[str], str], set[str]] = {shape: set() for shape in SHAPES}
        self._others: list[str] = []
        for entry in self.entries:
            ending = _ending_of(entry) if matches is matches_pattern else None
            shape = None if ending is None else _shape_of(ending)
            if ending is not None and shape is not None:
                self._ends[shape].add(ending)
            elif matches is matches_suffix:
                self._ends[_all_numbers].add(entry)
                if not _PLAIN.fullmatch(entry):
                    self._others.append(entry)
            elif entry.startswith(REGEX):
                self._others.append(entry)

    def covers(self, name: str) -> bool:
        """Return True if an entry matches a name, at the start of one of its parts."""
        if name in self._exact:
            return True
        for shape, endings in self._ends.items():
            if endings:
                text = shape(name)
                if any(text[start:] in endings for start in _starts(text)):
                    return True
        return any(self._matches(entry, name) for entry in self._others)

    def matching(self, names: frozenset[str]) -> list[str]:
        """Return the entries that match one of the names, anywhere that the engine would match them."""
        index = _Quantized(names)
        found = []
        for entry in self.entries:
            ending = _ending_of(entry) if self._matches is matches_pattern else None
            shape = None if ending is None else _shape_of(ending)
            if ending is not None and shape is not None:
                hit = index.any_ends_in(ending, shape)
            elif self._matches is matches_suffix and _PLAIN.fullmatch(entry):
                hit = index.any_ends_in(entry) or entry in names or index.any_starts_with(f"{entry}.")
            elif entry.startswith(REGEX) or self._matches is matches_suffix:
                hit = any(self._matches(entry, name) for name in names)
            else:
                hit = entry in names
            if hit:
                found.append(entry)
        return found


_PLAIN = re.compile(r"[\w.-]+")
_OURS = re.compile(r"re:\.\*((?:\\d\+|\\.|[^\\()\[\]{}|*+?^$])+)\$")


def _ending_of(entry: str) -> str | None:
    """Return the text in which a matching name ends, with ``#`` for a number; None for any other entry."""
    found = _OURS.fullmatch(entry)
    if found is None or "#" in found.group(1):
        return None
    body = found.group(1).replace(r"\d+", "#")
    if re.search(r"\\[A-Za-z0-9]|(?<!\\)\.", body) is not None:  # a class of characters, or any character
        return None
    ending = re.sub(r"\\(.)", r"\1", body)
    return ending if _shape_of(ending) is not None else None


def _shape_of(ending: str) -> Callable[[str], str] | None:
    """Return the shape that an ending has; None if this library writes none like it."""
    if "#" not in ending:
        return _all_numbers
    return next((shape for shape in SHAPES if shape(ending.replace("#", "0")) == ending), None)


def _starts(text: str) -> list[int]:
    """Return the places at which a part of a name starts."""
    return [0, *(place + 1 for place, char in enumerate(text) if char == ".")]
