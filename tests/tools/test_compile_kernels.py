"""The CPU kernels compile with any C compiler into libraries that need no other; without one, the message says so."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import compile_kernels
from nemotron_fp8_kernels import native
from nemotron_fp8_kernels.native import Native, libraries

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(compile_kernels.__file__).resolve().parent
needs_compiler = pytest.mark.skipif(compile_kernels.compiler() is None, reason="needs a C compiler")


@pytest.fixture
def hook() -> ModuleType:
    pytest.importorskip("hatchling")
    return compile_kernels.load(ROOT / "build_hook.py")


@needs_compiler
def test_libraries_are_compiled_and_old_ones_removed(tmp_path: Path) -> None:
    old = tmp_path / "kernels-any-000000000000.so"
    old.touch()
    made = compile_kernels.compile_kernels(tmp_path)
    assert made == [libraries.library(level, tmp_path) for level in libraries.levels()]
    assert sorted(tmp_path.iterdir()) == sorted(made)
    bits = torch.zeros(1, dtype=torch.int32)
    Native(made[-1]).amax(torch.tensor([[1.0, -3.0]]), (1, 2, 1), bits)
    assert float(bits.view(torch.float32)) == 3.0


@needs_compiler
def test_libraries_need_no_other_library(tmp_path: Path) -> None:
    """One file for every distribution: its version of libc does not matter."""
    for path in compile_kernels.compile_kernels(tmp_path):
        content = path.read_bytes()
        assert not [name for name in (b"GLIBC_", b"memcpy", b"memset", b"memmove") if name in content]


def test_a_library_of_another_source_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a library depends on the source and on the compiler options."""
    names = {libraries.library("any", tmp_path)}
    changed = tmp_path / "kernels.c"
    changed.write_bytes(libraries.SOURCE.read_bytes() + b"\n")
    with monkeypatch.context() as patch:
        patch.setattr(libraries, "SOURCE", changed)
        names.add(libraries.library("any", tmp_path))
    monkeypatch.setattr(libraries, "FLAGS", (*libraries.FLAGS, "-g"))
    names.add(libraries.library("any", tmp_path))
    assert len(names) == 3


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: ModuleType) -> None:
    """A build asks the package index for a compiler; a direct call says what to install."""
    builder = hook.CompiledKernels(str(ROOT), {}, SimpleNamespace(), SimpleNamespace(), str(tmp_path), "wheel")
    without_compiler(monkeypatch)
    assert builder.dependencies() == ["ziglang"]
    with pytest.raises(OSError, match="install gcc or clang, or the Python package ziglang"):
        compile_kernels.compile_kernels(tmp_path)
    monkeypatch.setenv("NEMOTRON_FP8_NATIVE", "0")
    assert builder.dependencies() == []
    data: dict[str, Any] = {"artifacts": []}
    builder.initialize("standard", data)
    assert data == {"artifacts": []}


def test_zig_compiles_for_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a target it compiles for the processor of the build."""
    for chosen in ("python3 -m ziglang cc", "zig cc", "'/a folder/zigcc'"):
        monkeypatch.setenv("CC", chosen)
        command = compile_kernels.compiler()
        assert command is not None
        assert command[-2] == "-target"
    monkeypatch.setenv("CC", "zig cc -target x86_64-linux-gnu")
    assert compile_kernels.compiler() == ["zig", "cc", "-target", "x86_64-linux-gnu"]


def test_a_compiler_that_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "true")
    with pytest.raises(OSError, match="made no library: true"):
        compile_kernels.compile_kernels(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_damaged_library_is_not_fatal(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes instead, and a warning says why."""
    for level in libraries.levels():
        libraries.library(level, tmp_path).write_bytes(content)
    names = {level: libraries.library(level, tmp_path) for level in libraries.levels()}
    monkeypatch.setattr(libraries, "library", names.__getitem__)
    monkeypatch.delenv(native.SWITCH, raising=False)
    with pytest.warns(UserWarning, match="torch computes instead"):
        assert native.load.__wrapped__() is None


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: ModuleType) -> None:
    """With the way to install without compiled kernels, and without a half-made library."""
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho the compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    builder = hook.CompiledKernels(str(ROOT), {}, SimpleNamespace(), SimpleNamespace(), str(tmp_path), "wheel")
    with pytest.raises(RuntimeError, match=r"the compiler is broken[\s\S]*NEMOTRON_FP8_NATIVE=0"):
        builder.initialize("standard", {"artifacts": []})
    with pytest.raises(subprocess.CalledProcessError):
        compile_kernels.compile_kernels(tmp_path)
    assert list(tmp_path.glob("*.so")) == []
