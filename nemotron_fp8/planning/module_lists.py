"""Lists of unquantized modules in a ``quantization_config``, as engines match them with the names of their modules.

An engine looks up its own name of a module. That name differs from the checkpoint's by a prefix (``visual`` is
``model.visual`` in transformers, ``language_model.lm_head`` is ``lm_head``), or by an inner part that the family's
record states (`nemotron_fp8.planning.families.Rename`). An entry must match every name of an unquantized module, and
no quantized module: an engine would take the codes of such a module for weights.

Six ways of matching are in use:

==============  ============================================================================================
exact           vLLM, ``ignored_layers``
prefix          vLLM's experts in ``ignored_layers``; transformers before 5.20
parts           SGLang: whole parts of a name, one after the other, anywhere in it
anywhere        vLLM's ``modelopt``: any part of the text of a name
fnmatch         TensorRT-LLM, modelopt
``re.match``    compressed-tensors after ``re:``; transformers, where an entry also matches as a suffix
==============  ============================================================================================

Sources: ``is_layer_skipped``, ``should_ignore_layer`` and ``ModelOptQuantConfigBase.is_layer_excluded`` of vLLM,
``_module_path_match`` of SGLang, ``should_convert_module`` of transformers, ``is_match`` of compressed-tensors.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


EXPERTS = "experts"
"""Text in the names of modules of routed experts, by which vLLM recognizes them."""
REGEX = "re:"
"""Mark of a regular expression in a list of compressed-tensors."""
ANY_PREFIX = f"{REGEX}.*"
WRAPPERS = frozenset(
    ("model", "language_model", "text_model", "transformer", "backbone", "decoder", "thinker", "llm", "base_model")
)
"""First parts of names that some engine drops or adds."""
LONE = frozenset(("lm_head", "proj_out", "output_projection", "embed_out", "output_layer"))
"""Names of output layers, which no other module has."""
MODEL = "model."
"""Prefix that SGLang drops from an entry and adds to it."""
MOST_SHORT, MOST_PARTS = 1000, 16
"""Most entries of one or two parts that are looked for in the text of all names, and most parts of a name that are
looked for in each order: a list and names may be a stranger's."""
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a name that is a number: of a layer, or of an expert."""


class Modules(NamedTuple):
    """Linear modules of a result.

    Attributes:
        unquantized: names under which engines look up unquantized modules, in the order of the source.
        quantized: names under which engines look up quantized modules.
        trees: parts of names of modules that are unquantized with all that they hold: encoders, which engines rename
            inside.
        merged: names of modules that engines merge from unquantized modules, and may look up as a whole.
        merged_quantized: names of modules that engines merge from quantized modules.
    """

    unquantized: tuple[str, ...] = ()
    quantized: frozenset[str] = frozenset()
    trees: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    merged_quantized: frozenset[str] = frozenset()


def core(name: str) -> str:
    """Return the name of a module without the first parts that some engine drops.

    A single last part stays only if it is the name of an output layer: an entry for any ``proj`` would match
    projections under other names of an engine.
    """
    while (found := name.partition("."))[0] in WRAPPERS and found[2]:
        if "." not in found[2] and found[2] not in LONE:
            break
        name = found[2]
    return name


def _numberless(name: str) -> str:
    """Replace every number in a name."""
    return NUMBER.sub("#", name)


def _first_number(name: str) -> str:
    """Replace every number in a name but the first, which is that of the layer."""
    first = NUMBER.search(name)
    return name if first is None else name[: first.end()] + _numberless(name[first.end() :])


def _all_numbers(name: str) -> str:
    return name


SHAPES: tuple[Callable[[str], str], ...] = (_numberless, _first_number, _all_numbers)
"""Forms of an entry, from the most general to the most specific."""


class _Quantized:
    """Names of quantized modules, to prove that an entry matches none."""

    def __init__(self, names: frozenset[str]) -> None:
        # By their ends without numbers: an entry is compared with names of one kind only.
        self._by_end = sorted((_numberless(name)[::-1], name) for name in names)
        self._plain_ends = sorted(name[::-1] for name in names)
        self._sorted = sorted(names)
        self._known: dict[str, bool] = {}

    def any_ends_in(self, ending: str) -> bool:
        """Return True if a name ends in an ending, in which ``#`` stands for any number."""
        found = self._known.get(ending)
        if found is None:
            found = self._known[ending] = self._search(ending)
        return found

    def _search(self, ending: str) -> bool:
        if "#" not in ending:
            return _any_starts_with(self._plain_ends, ending[::-1])
        end = _regex(ending)
        wanted = _numberless(ending)[::-1]
        place = bisect_left(self._by_end, (wanted, ""))
        while place < len(self._by_end) and self._by_end[place][0].startswith(wanted):
            if end.search(self._by_end[place][1]):
                return True
            place += 1
        return False

    def any_starts_with(self, text: str) -> bool:
        """Return True if a name starts with a text."""
        return _any_starts_with(self._sorted, text)


class _Parts:
    """Names of modules by what is inside them, to prove that an entry matches none.

    Args:
        names: names of modules.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(names)
        self._text = "\n".join(self._names)
        self._by_length: dict[int, defaultdict[str, list[str]]] = {}
        self._short = 0

    def with_run(self, run: str) -> list[str]:
        """Return the names that have these parts, one after the other."""
        length = run.count(".") + 1
        found = self._by_length.get(length)
        if found is None:
            found = self._by_length[length] = defaultdict(list)
            for name in self._names:
                for part in _runs(name.split("."), length):
                    found[part].append(name)
        return found.get(run, [])

    def any_contains(self, text: str) -> bool:
        """Return True if a name contains a text, or if so many texts were looked for that the answer is unknown."""
        inner = text.partition(".")[2].rpartition(".")[0]
        if inner:  # whole parts, between the first dot and the last
            return any(text in name for name in self.with_run(inner))
        self._short += 1
        return self._short > MOST_SHORT or text in self._text


def _runs(parts: list[str], length: int) -> Iterator[str]:
    return (".".join(parts[first : first + length]) for first in range(len(parts) - length + 1))


def _any_starts_with(ordered: list[str], text: str) -> bool:
    place = bisect_left(ordered, text)
    return place < len(ordered) and ordered[place].startswith(text)


def _regex(ending: str) -> re.Pattern[str]:
    """Return the pattern of the names that end in an ending, in which ``#`` stands for any number."""
    return re.compile(_escaped(ending) + r"\Z")


def _escaped(ending: str) -> str:
    return r"\d+".join(map(re.escape, ending.split("#")))


def patterns(modules: Modules) -> list[str]:
    """Return entries that match unquantized modules under any prefix: ``re:.*NAME$``.

    Numbers in an entry become ``\\d+`` where that matches no quantized module, so that one entry stands for a module
    of all layers. A name that cannot be told from a quantized one under every prefix is matched from its start.
    """
    quantized = _Quantized(modules.quantized)
    trees = _provable(modules)
    rest = [name for name in modules.unquantized if trees.keys().isdisjoint(name.split("."))]
    entries = [_pattern(name, quantized) for name in rest]
    return list(dict.fromkeys([*entries, *(f"{REGEX}{_tree(tree)}(\\..*)?$" for tree in trees)]))


def _tree(name: str) -> str:
    return rf"(.*\.)?{re.escape(name)}"


def _provable(modules: Modules) -> dict[str, None]:
    """Return the trees of which no part is quantized, in their order."""
    parts = {part for name in modules.quantized for part in name.split(".")}
    return {tree: None for tree in modules.trees if tree not in parts}


def _pattern(name: str, quantized: _Quantized) -> str:
    short = core(name)
    for text, shape in (*((short, shape) for shape in SHAPES), (name, _all_numbers)):
        ending = shape(text)
        if "#" not in text and not ending.startswith("#") and not quantized.any_ends_in(ending):
            return f"{ANY_PREFIX}{_escaped(ending)}$"
    return f"{REGEX}{re.escape(name)}$"


def exact_names(modules: Modules) -> list[str]:
    """Return entries for engines that compare whole names.

    They include merged modules, and connectors of one layer under their usual names.
    """
    trees = (prefix + tree for prefix in ("", "model.") for tree in _provable(modules))
    return list(dict.fromkeys([*modules.unquantized, *modules.merged, *trees]))


def suffixes(modules: Modules) -> list[str]:
    """Return entries for transformers, which matches an entry as a suffix, or as a pattern from the start of a name."""
    quantized = _Quantized(modules.quantized)
    entries = []
    for name in modules.unquantized:
        short = core(name)
        taken = quantized.any_ends_in(short) or quantized.any_starts_with(short)
        entries.append(name if taken else short)
    return list(dict.fromkeys([*entries, *map(_tree, _provable(modules))]))


def wildcards(modules: Modules) -> list[str]:
    """Return entries for vLLM's ``modelopt``, which looks for an entry anywhere in a name, or takes it for a wildcard.

    An entry is a name. Where a quantized module contains it (``mlp.gate`` and ``mlp.gate_proj``), its last character is
    in brackets: a wildcard that matches the name as a whole only.
    """
    quantized = _Parts(modules.quantized | modules.merged_quantized)
    return [_in_brackets(name) if quantized.any_contains(name) else name for name in exact_names(modules)]


def _in_brackets(name: str) -> str:
    """Return a wildcard that matches a name as a whole, and that no name contains."""
    return f"{name[:-1]}[{name[-1]}]"


def _out_of_brackets(entry: str) -> str:
    """Return the name that such a wildcard matches; any other entry as it is."""
    return f"{entry[:-3]}{entry[-2]}" if _BRACKETS.fullmatch(entry) else entry


def matches_exactly(entry: str, name: str) -> bool:
    """Return True if an entry is a name."""
    return entry == name


def matches_in_vllm(entry: str, name: str) -> bool:
    """Return True if an entry is a name, or that of a part of the module of routed experts (``is_layer_skipped``)."""
    return entry == name or _holds_experts(entry, name)


def matches_part(entry: str, name: str) -> bool:
    """Return True if the parts of an entry follow one another in a name (``_module_path_match`` of SGLang)."""
    return f".{entry.removeprefix(MODEL).rstrip('.')}." in f".{name}." or _holds_experts(entry, name)


def matches_anywhere(entry: str, name: str) -> bool:
    """Return True if a name contains an entry, or equals it as a wildcard (``is_layer_excluded`` of vLLM).

    A wildcard of a form that this library does not write matches nothing: it may be a stranger's, from a result.
    """
    return entry in name or _out_of_brackets(entry) == name or _holds_experts(entry, name)


def _holds_experts(entry: str, name: str) -> bool:
    """Return True if a name is that of a module of experts, and an entry that of a part of it."""
    return EXPERTS in name and f".{name}." in f".{entry}."


def matches_pattern(entry: str, name: str) -> bool:
    """Return True if an entry matches a name in compressed-tensors, and in vLLM's reader of it."""
    if entry.startswith(REGEX):
        return _compiled_match(entry.removeprefix(REGEX), name)
    return entry == name


def matches_suffix(entry: str, name: str) -> bool:
    """Return True if an entry matches a name in transformers' ``modules_to_not_convert``."""
    if name.endswith(entry) or f"{name}.".startswith(f"{entry}."):
        return True
    if not _WRITTEN.fullmatch(entry):
        return False
    return re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) is not None


def _compiled_match(pattern: str, name: str) -> bool:
    """Match a pattern of a form that this library writes; any other pattern matches nothing.

    The pattern may be a stranger's, from a result. These forms take at most the square of the length of a name.
    """
    if not _WRITTEN.fullmatch(pattern):
        return False
    return re.match(pattern, name) is not None


_WORDS = r"(?:[\w-]|\\[^A-Za-z0-9\s.])+"
"""Text of a pattern that matches itself."""
_PART = rf"(?:{_WORDS}|\\d\+)"
_WRITTEN = re.compile(
    rf"\^?\$|(?:\.\*|\(\.\*\\\.\)\?)?(?:\\\.)?{_PART}(?:\\\.{_PART})*"
    r"(?:\\\.(?:\.\*)?|\(\\\.\.\*\)\?)?\$?"
)
"""Patterns that this library writes: parts of a name between escaped dots, each a text or a number, with anything
before them and with anything after a dot."""


def is_written_form(entry: str, matches: Callable[[str, str], bool]) -> bool:
    """Return True if an entry of a list is a name, or a pattern of a form that this library writes.

    Args:
        entry: the entry.
        matches: the engine's way of matching, which decides if an entry without a mark is a pattern.
    """
    if entry.startswith(REGEX):
        return _WRITTEN.fullmatch(entry.removeprefix(REGEX)) is not None
    if _PLAIN.fullmatch(entry) is not None:
        return True
    if matches is matches_suffix:
        return _WRITTEN.fullmatch(entry) is not None
    return matches is matches_anywhere and _BRACKETS.fullmatch(entry) is not None


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
        self._runs: frozenset[str] = frozenset()
        if matches is matches_part:
            self._runs = frozenset(entry.removeprefix(MODEL) for entry in self.entries)
        elif matches is matches_anywhere:
            self._runs = frozenset(entry for entry in self.entries if not _BRACKETS.fullmatch(entry))
            self._exact = frozenset(map(_out_of_brackets, self.entries))
        # Entries that this library writes are found by their ends; only others are matched one by one.
        self._endings: dict[str, str] = {}
        self._by_end: defaultdict[str, list[re.Pattern[str]]] = defaultdict(list)
        self._others: list[str] = []
        for entry in self.entries:
            ending = self._ending_of(entry)
            if ending is not None:
                self._endings[entry] = ending
                self._by_end[_numberless(ending)].append(_regex(ending))
            elif entry.startswith(REGEX) or matches is matches_suffix:
                self._others.append(entry)

    def _ending_of(self, entry: str) -> str | None:
        """Return the text in which a matching name ends, with ``#`` for a number; None for any other entry."""
        if self._matches is matches_pattern:
            return _ending_of(entry)
        return entry if self._matches is matches_suffix and _PLAIN.fullmatch(entry) else None

    def covers(self, name: str) -> bool:
        """Return True if an entry matches a name, from the start of one of its parts on."""
        if name in self._exact:
            return True
        if self._runs:
            return name.count(".") < MOST_PARTS and any(run in self._runs for run in _parts_of(name))
        text, place = _numberless(name), 0
        while True:
            if any(end.search(name) for end in self._by_end.get(text[place:], ())):
                return True
            start = text.find(".", place)
            if start < 0:
                return any(self._matches(entry, name) for entry in self._others)
            place = start + 1

    def matching(self, names: frozenset[str]) -> list[str]:
        """Return the entries that match one of the names, anywhere that the engine would match them."""
        index, parts = _Quantized(names), _Parts(names if self._runs else ())
        return [entry for entry in self.entries if self._hits(entry, names, index, parts)]

    def _hits(self, entry: str, names: frozenset[str], index: _Quantized, parts: _Parts) -> bool:
        ending = self._endings.get(entry)
        if ending is not None:
            hit = index.any_ends_in(ending)
            if self._matches is matches_suffix:  # it matches from the start of a name too
                hit = hit or index.any_starts_with(f"{entry}.")
            return hit
        if entry in names or self._is_of_experts(entry, names):
            return True
        if self._matches is matches_part:
            return bool(parts.with_run(entry.removeprefix(MODEL)))
        if self._matches is matches_anywhere:
            name = _out_of_brackets(entry)
            return name in names if name != entry else parts.any_contains(entry)
        if entry.startswith(REGEX) or self._matches is matches_suffix:
            return any(self._matches(entry, name) for name in names)
        return False

    def _is_of_experts(self, entry: str, names: frozenset[str]) -> bool:
        """Return True if an entry is a part of a module of experts among the names, where the engine looks for one."""
        if EXPERTS not in entry or self._matches not in (matches_in_vllm, matches_part, matches_anywhere):
            return False
        return any(EXPERTS in part and part in names for part in _parts_of(entry))

    def match_of(self, entry: str, names: Iterable[str]) -> str | None:
        """Return the first of the names that an entry matches; None if it matches none."""
        return next((name for name in names if self._matches(entry, name)), None)


def _parts_of(entry: str) -> Iterator[str]:
    """Yield every sequence of parts of a name."""
    parts = entry.split(".")
    for first in range(len(parts)):
        yield from (".".join(parts[first:last]) for last in range(first + 1, len(parts) + 1))


_PLAIN = re.compile(r"[\w.-]+")
_BRACKETS = re.compile(r"[\w.-]*\[[\w-]\]")
"""A name whose last character is in brackets."""
_OURS = re.compile(r"re:\.\*((?:\\d\+|\\.|[^\\()\[\]{}|*+?^$])+)\$")


def _ending_of(entry: str) -> str | None:
    """Return the text in which a matching name ends, with ``#`` for a number; None for an entry of another form."""
    found = _OURS.fullmatch(entry)
    if found is None or "#" in found.group(1):
        return None
    body = found.group(1).replace(r"\d+", "#")
    if re.search(r"\\[A-Za-z0-9]|(?<!\\)\.", body) is not None:  # a class of characters, or any character
        return None
    return re.sub(r"\\(.)", r"\1", body)
