"""Read and write YAML whose scalars are texts: no types, no aliases, and limits on bytes, depth and nodes.

YAML turns plain text into dates, numbers in base 60, booleans and more. A reader that needs a number converts the text
of that one field. A plain text (``Plain``) is written as plain text again, so that a number of the original stays a
number, in the same digits. Source of the grammar: YAML 1.1, as PyYAML and libyaml parse it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

from nemotron_fp8.errors import printable
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any


MAX_BYTES = 1 << 18
"""Size cap of a text, in bytes. Published configs and front matters have some ten KB; PyYAML without its C library
parses about 100 KB in a second."""
MAX_DEPTH = 32
"""Most levels of nested collections; published front matters (evaluation results) have eight."""
MAX_NODES = 20_000
"""Most scalars and collections of a text."""
TEXT_TAG = "tag:yaml.org,2002:str"
TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "null", "bool", "int", "float", "timestamp", "seq", "map")
)
"""Tags that YAML itself gives to values. A scalar with a tag is a text, like a scalar in quotes."""
NULLS = frozenset(("", "~", "null", "Null", "NULL"))
TRUE, FALSE = frozenset(("true", "yes", "on")), frozenset(("false", "no", "off"))
_NUMBER_1_2 = re.compile(
    r"[-+]?(?:\.?[0-9][0-9.]*(?:[eE][-+]?[0-9]+)?|0o[0-7]+|0x[0-9a-fA-F]+|\.(?:inf|Inf|INF|nan|NaN|NAN))"
)
"""Texts that YAML 1.2 reads as numbers, or that look like one."""
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,29})")


class Plain(str):
    """A scalar without quotes, which YAML may read as a number, a date or a truth value."""

    __slots__ = ()


Tree: TypeAlias = "str | list[Tree] | dict[str, Tree] | None"
"""A text, nothing (a plain ``null``, ``~`` or empty scalar), a list, or a mapping with texts as keys."""


class _RejectedError(ValueError):
    """Violation of a rule of this module; its text is the problem for the caller's error."""


def load_mapping(data: bytes | str, refuse: Callable[[str], Exception]) -> dict[str, Tree]:
    """Parse one YAML document that is a mapping.

    Args:
        data: the whole text.
        refuse: returns the exception to raise for a problem.

    Returns:
        The mapping, in the order of the text; empty for an empty document.

    Raises:
        Exception: the exception of ``refuse``, if the text is too long, not YAML, not one mapping, too deep, or has too
            many nodes, an alias, a tag other than YAML's own, a key that is no text, or a key twice in one mapping.
    """
    with guarded(refuse):
        try:
            tree = _parse(data)
            if tree is None or isinstance(tree, dict):
                return tree or {}
            problem = "not a mapping of keys to values"
        except _RejectedError as rejected:
            problem = str(rejected)
    raise refuse(problem) from None


def _parse(data: bytes | str) -> Tree:
    import yaml

    size = len(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise _RejectedError(f"{size:,} bytes of YAML; the limit is {MAX_BYTES:,}")
    # The C parser takes a tenth of the time; PyYAML is also distributed without it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Builder(yaml).build(yaml.parse(data, loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1:,}, column {mark.column + 1:,}" if mark else ""
        what = printable(" ".join(str(error.problem or error.context or "a syntax error")[:400].split()))[1:-1]
        raise _RejectedError(f"not YAML: {what}{where}") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, _RejectedError):
            raise
        raise _RejectedError(f"not YAML: {printable(' '.join(str(error)[:400].split()))[1:-1]}") from None


class _Builder:
    """Builds a tree from the events of a parser, and stops at the first event beyond a limit."""

    def __init__(self, yaml: Any) -> None:
        self._yaml, self._nodes = yaml, 0

    def build(self, events: Iterator[Any]) -> Tree:
        """Return the tree of the only document."""
        yaml = self._yaml
        tree: Tree = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _RejectedError("more than one document")
            elif isinstance(event, yaml.NodeEvent):
                tree = self._node(event, events, 1)
        return tree

    def _node(self, event: Any, events: Iterator[Any], depth: int) -> Tree:
        yaml = self._yaml
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _RejectedError(f"over the limit of {MAX_NODES:,} nodes{_line(event)}")
        if isinstance(event, yaml.AliasEvent):
            raise _RejectedError(f"an alias, which is not supported{_line(event)}")
        if event.tag not in (None, "!") and event.tag not in TAGS:
            raise _RejectedError(f"the tag {printable(event.tag, 60)}, which is not supported{_line(event)}")
        if isinstance(event, yaml.ScalarEvent):
            plain = event.style in (None, "") and event.tag is None
            if plain and event.value in NULLS:
                return None
            return Plain(event.value) if plain else str(event.value)
        if depth > MAX_DEPTH:
            raise _RejectedError(f"nested deeper than {MAX_DEPTH} levels, which is the limit{_line(event)}")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Tree] = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(self._node(event, events, depth + 1))
            return items
        return self._mapping(events, depth)

    def _mapping(self, events: Iterator[Any], depth: int) -> dict[str, Tree]:
        found: dict[str, Tree] = {}
        while not isinstance(event := next(events), self._yaml.MappingEndEvent):
            if not isinstance(event, self._yaml.ScalarEvent):
                raise _RejectedError(f"a key that is not a text{_line(event)}")
            key = self._node(event, events, depth + 1)
            name = key if isinstance(key, str) else "null"
            if name in found:
                raise _RejectedError(f"the key {printable(name, 60)} twice in one mapping{_line(event)}")
            found[name] = self._node(next(events), events, depth + 1)
        return found


def _line(event: Any) -> str:
    return f" (line {event.start_mark.line + 1:,})" if event.start_mark else ""


def dump_mapping(tree: Mapping[str, Any]) -> str:
    """Return a mapping as YAML. A ``Plain`` text stays plain; other texts are quoted where YAML needs it."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML ships no type information
        """Writes the texts of this module."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    def plain(dumper: Any, value: Plain) -> Any:
        # A scalar is written without quotes if its tag is the one that a reader would give it.
        tag = dumper.resolve(yaml.ScalarNode, str(value), (True, False))
        return dumper.represent_scalar(tag, str(value))

    def text(dumper: Any, value: str) -> Any:
        # YAML 1.2, which the Hub reads, has numbers that YAML 1.1 reads as text.
        style = "'" if _NUMBER_1_2.fullmatch(value) else None
        return dumper.represent_scalar(TEXT_TAG, value, style)

    Dumper.add_representer(Plain, plain)
    Dumper.add_representer(str, text)
    return str(yaml.dump(dict(tree), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000))


def is_text(value: str) -> bool:
    """Return True if YAML reads a text as text: it is in quotes, or no number, date or truth value."""
    import yaml

    resolver = yaml.resolver.Resolver()
    return not isinstance(value, Plain) or resolver.resolve(yaml.ScalarNode, str(value), (True, False)) == TEXT_TAG


def as_integer(value: object) -> int | None:
    """Return the decimal integer that a plain text writes; None for anything else."""
    if isinstance(value, Plain) and _INTEGER.fullmatch(value):
        return int(value.replace("_", ""))
    return None


def as_number(value: object) -> float | None:
    """Return the number that a text writes; None for anything else.

    A text in quotes counts too: YAML 1.1 reads ``1e-5``, without a point, as text.
    """
    if not isinstance(value, str) or len(value) > 60:
        return None
    try:
        return float(value)
    except ValueError:
        return None


def as_flag(value: object) -> bool | None:
    """Return the truth value that a plain text writes; None for anything else."""
    if not isinstance(value, Plain):
        return None
    return True if value.lower() in TRUE else False if value.lower() in FALSE else None
