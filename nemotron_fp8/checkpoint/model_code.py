"""Python code that the configs of a checkpoint name for transformers (``auto_map``). It is copied, and never run.

A reference is ``module.Class``, of ``module.py`` beside the config, or ``owner/name--module.Class``, of another
repository. Modules import each other relatively. Source: ``dynamic_module_utils`` of transformers.
"""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8._utils import listed
from nemotron_fp8.errors import printable
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


CONFIGS = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files beside config.json that may have an ``auto_map``."""
KEY = "auto_map"
CODE = ".py"
MAX_CODE_BYTES = 1 << 20
"""Size cap of a module whose imports are followed, in bytes; published modules have some hundred KB at most."""
MAX_HEAD, MAX_NAMES = 300, 500
"""Length caps of one import, in characters: up to its ``import``, and of the names that follow."""
_BEGIN = re.compile(r"^[ \t]{0,200}from[ \t]{0,20}\.", re.MULTILINE)
"""Begin of a relative import. Its parts have caps, so that the search takes no longer than the text is long."""
_HEAD = re.compile(r"from[ \t]*\.[ \t]*([\w.]*)[ \t]+import\b[ \t]*(\(?)")
"""Head of a relative import: its module, and a parenthesis if the names have one."""


@dataclass(frozen=True, slots=True)
class ModelCode:
    """Code that a checkpoint needs.

    Attributes:
        files: names of the modules that exist, in order.
        missing: names of the modules that do not.
        repositories: other repositories that hold code.
    """

    files: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()

    @property
    def notices(self) -> tuple[str, ...]:
        """Notices for the user."""
        found = []
        if self.files:
            found.append(
                f"code that {KEY} names is copied as text, and was not run: {', '.join(self.files)}; the result needs"
                " trust_remote_code, which runs it"
            )
        if self.missing:
            found.append(
                f"code that {KEY} names is not beside config.json: {listed([printable(n) for n in self.missing])}; the"
                " result does not load with trust_remote_code unless you add it"
            )
        if self.repositories:
            found.append(
                f"{KEY} names code of other repositories, which is not copied:"
                f" {listed([printable(n) for n in self.repositories])}; the result needs trust_remote_code, which"
                " downloads and runs it"
            )
        return tuple(found)


def find_code(config: Mapping[str, Any] | None, sizes: Mapping[str, int], read: Callable[[str], bytes]) -> ModelCode:
    """Find the modules that the configs of a checkpoint name, and those that they import relatively.

    Args:
        config: config.json; None without one.
        sizes: bytes of the files of the checkpoint that may be copied, by name.
        read: returns the content of one of these files.
    """
    trees: list[Mapping[str, Any]] = [config or {}]
    small = [name for name in CONFIGS if sizes.get(name, strict_json.MAX_BYTES + 1) <= strict_json.MAX_BYTES]
    trees += [_load(read(name), name) for name in small]
    repositories: set[str] = set()
    known: set[str] = set()
    wanted: list[str] = []

    def want(module: str) -> None:
        parts = module.split(".")
        name = ("/".join(parts) if all(map(str.isidentifier, parts)) else module) + CODE
        if name not in known:
            known.add(name)
            wanted.append(name)

    for reference in (reference for tree in trees for reference in _references(tree)):
        repository, _, local = reference.rpartition("--")
        module, _, _ = local.rpartition(".")
        if repository:
            repositories.add(repository)
        elif module:
            want(module)
    while wanted:
        name = wanted.pop()
        if sizes.get(name, MAX_CODE_BYTES + 1) <= MAX_CODE_BYTES:
            for module in relative_imports(read(name)):
                want(module)
    found = known & sizes.keys()
    return ModelCode(tuple(sorted(found)), tuple(sorted(known - found)), tuple(sorted(repositories)))


def names_code(config: Mapping[str, Any] | None) -> bool:
    """Return True if a config, or a config in it, names code."""
    return any(True for _ in _references(config or {}))


def _load(data: bytes, name: str) -> Mapping[str, Any]:
    """Return a parsed config; an empty one if the file is malformed, because it is copied in any case."""
    try:
        return strict_json.load_object(data, name, lambda *_: ValueError())
    except ValueError:
        return {}


def _references(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield the references of a config and of the configs in it."""
    pending: list[tuple[Any, bool]] = [(tree, False)]
    while pending:
        value, named = pending.pop()
        if isinstance(value, dict):
            pending += [(item, named or key == KEY) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(item, named) for item in value]
        elif named and isinstance(value, str):
            yield value


def relative_imports(code: bytes) -> list[str]:
    """Return the modules of the same folder that a module imports. Its import statements are parsed, and never run.

    Only these statements are parsed, one by one: the tree of a whole module takes hundreds of times its size, and a
    module may have a syntax that this version of Python does not know.
    """
    text = code.decode("utf-8", "replace")
    found: dict[str, None] = {}
    for begin in _BEGIN.finditer(text):
        start = text.index("from", begin.start())
        match = _HEAD.match(text[start : start + MAX_HEAD])
        if match is None:
            continue
        module, bracket = match.groups()
        end = start + match.end()
        names = "_" if module else _names(text[end : end + MAX_NAMES], ")" if bracket else "\n")
        with suppress(_UnreadableError), guarded(_UnreadableError):  # prose in a docstring, or a broken module
            for statement in ast.parse(f"from .{module} import {names}").body:
                if isinstance(statement, ast.ImportFrom) and statement.level == 1:
                    imported = [alias.name for alias in statement.names]
                    found |= dict.fromkeys([statement.module] if statement.module else imported)
    return list(found)


class _UnreadableError(Exception):
    """A statement that cannot be parsed."""


def _names(text: str, end: str) -> str:
    """Return the names of an import up to ``end``, in parentheses and without comments."""
    return f"({re.sub(r'#.*', '', text).partition(end)[0]})"
