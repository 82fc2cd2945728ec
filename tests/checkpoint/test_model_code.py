"""Code that configs name: found from every form of ``auto_map``, followed through relative imports, never run."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from nemotron_fp8.checkpoint.model_code import MAX_CODE_BYTES, ModelCode, find_code, relative_imports


def found(config: dict[str, Any] | None, **files: str) -> ModelCode:
    """Search in files; ``__`` in a name stands for the dot."""
    content = {name.replace("__", "."): text.encode() for name, text in files.items()}
    return find_code(config, {name: len(data) for name, data in content.items()}, content.__getitem__)


AUTO_MAPS: dict[str, tuple[Any, ModelCode]] = {
    "strings": (
        {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"},
        ModelCode(("configuration_x.py", "modeling_x.py")),
    ),
    "a list with null": ({"AutoTokenizer": ["modeling_x.XTokenizer", None]}, ModelCode(("modeling_x.py",))),
    "a list alone, as old tokenizers have it": (["modeling_x.XTokenizer", None], ModelCode(("modeling_x.py",))),
    "another repository": ({"AutoModel": "o/r--modeling_x.XModel"}, ModelCode(repositories=("o/r",))),
    "a missing module": ({"AutoModel": "gone.XModel"}, ModelCode(missing=("gone.py",))),
    "a folder": ({"AutoModel": "sub.gone.XModel"}, ModelCode(missing=("sub/gone.py",))),
    "a name that climbs": ({"AutoModel": "../../x.Y"}, ModelCode(missing=("../../x.py",))),
    "no class": ({"AutoModel": "modeling_x"}, ModelCode()),
    "null": (None, ModelCode()),
    "numbers": ({"AutoModel": [1, {"x": 2.5}, True]}, ModelCode()),
}


@pytest.mark.parametrize("case", AUTO_MAPS)
def test_every_form_of_auto_map(case: str) -> None:
    auto_map, expected = AUTO_MAPS[case]
    files = {"configuration_x__py": "", "modeling_x__py": "", "other__py": ""}
    assert found({"auto_map": auto_map}, **files) == expected
    nested = {"text_config": {"auto_map": auto_map}, "parts": [{"deep": {"auto_map": auto_map}}]}
    assert found(nested, **files) == expected
    beside = {"tokenizer_config__json": json.dumps({"auto_map": auto_map})}
    assert found({}, **files, **beside) == expected


@pytest.mark.parametrize("name", ["tokenizer_config", "processor_config", "preprocessor_config"])
def test_the_configs_of_tokenizer_and_processor_count(name: str) -> None:
    named = {f"{name}__json": '{"auto_map": {"AutoProcessor": "processing_x.X"}}'}
    assert found(None, processing_x__py="", **named).files == ("processing_x.py",)
    assert found(None, processing_x__py="", **{f"{name}__json": "{"}) == ModelCode()  # copied as it is


def test_relative_imports_are_followed_to_the_end() -> None:
    """Also in a circle, and to modules that are missing; modules that nothing imports are left out."""
    code = found(
        {"auto_map": {"AutoModel": "a.A"}},
        a__py="from .b import B\nfrom . import c, d\nimport e\nfrom e import f\nfrom ..g import h",
        b__py="def f():\n    from .a import A\n    from .gone import x\n",
        c__py="",
        d__py="class X:\n  from .c import *\n",
        e__py="",
    )
    assert code == ModelCode(("a.py", "b.py", "c.py", "d.py"), ("gone.py",))


STATEMENTS: dict[str, tuple[str, list[str]]] = {
    "one line": ("from .a import x", ["a"]),
    "an alias": ("from .a import x as y  # why", ["a"]),
    "several lines": ("from .a import (  # with )\n    x,\n)", ["a"]),
    "modules": ("from . import (a as b,  # not )\n  c)", ["a", "c"]),
    "a folder": ("from .a.b import x", ["a.b"]),
    "indented": ("try:\n\tfrom .a import x\nexcept ImportError:\n    from .b import x", ["a", "b"]),
    "line ends of Windows": ("from .a import x\r\nfrom . import b\r\n", ["a", "b"]),
    "no space": ("from.a import x", ["a"]),
    "a syntax of later versions": ("type X = int\nfrom .a import x\nmatch 1:\n  case _: pass", ["a"]),
    "a broken module": ("def (:\nfrom .a import x\n", ["a"]),
    "a package above": ("from ..a import x", []),
    "absolute": ("import a\nfrom b import c\nfrom b.c import d", []),
    "a comment": ("# from .a import x", []),
    "prose": ("from . the start\nfrom .", []),
    "not text": ("\x00\ufffe from .a import x", []),
}


@pytest.mark.parametrize("case", STATEMENTS)
def test_statements(case: str) -> None:
    text, modules = STATEMENTS[case]
    assert relative_imports(text.encode()) == modules
    assert relative_imports(b"\xff\n" + text.encode()) == modules


def test_nothing_is_imported_or_run() -> None:
    before = set(sys.modules)
    code = found(
        {"auto_map": {"AutoModel": "evil.X"}}, evil__py="from .more import x\nraise SystemExit", more__py="1/0"
    )
    assert code.files == ("evil.py", "more.py")
    assert set(sys.modules) == before


def test_a_huge_module_is_named_but_not_parsed() -> None:
    large = {"a.py": MAX_CODE_BYTES + 1, "b.py": 1}

    def read(name: str) -> bytes:
        raise AssertionError(f"{name} was read")

    assert find_code({"auto_map": {"A": "a.A"}}, large, read) == ModelCode(("a.py",))


def test_notices_name_files_and_the_way_to_load() -> None:
    """None without code; names of files and repositories are escaped, since a config may hold any text."""
    assert ModelCode().notices == ()
    (copied,) = ModelCode(("a.py", "b.py", "c.py", "d.py", "e.py")).notices
    assert "a.py, b.py, c.py, d.py, e.py" in copied
    assert "was not run" in copied
    assert "trust_remote_code" in copied
    missing, foreign = ModelCode((), ("x\n.py",), ("o/r",)).notices
    assert r"'x\n.py'" in missing
    assert "trust_remote_code" in missing
    assert "'o/r'" in foreign
