"""Names and compiler options of the compiled kernels; without imports of the package, for its build."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "kernels.c"

X86 = ("x86_64", "amd64")

FLAGS = (
    "-std=c11",
    "-O3",
    # The bytes are those of IEEE arithmetic without fused operations. Nothing reads errno or the exception flags.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fno-stack-protector",
    "-fno-builtin",  # no calls of memcpy and memset
    "-fPIC",
    "-shared",
)
"""Compiler options of all libraries."""

LEVELS: dict[str, tuple[str, ...]] = {"avx2": ("-mavx2", "-mf16c", "-mfma"), "any": ()}
"""Instruction sets of x86-64 that are compiled for, the best first, and their options."""


def levels() -> dict[str, tuple[str, ...]]:
    """Return the instruction sets for this kind of processor, the best first, and their compiler options."""
    return LEVELS if platform.machine().lower() in X86 else {"any": ()}


def library(level: str, folder: Path = HERE) -> Path:
    """Return the path of a library.

    Its name has a digest of source, options and kind of machine: neither an old library is loaded, nor that of another
    machine on a shared file system.
    """
    made_of = " ".join((*FLAGS, *levels()[level], platform.system(), platform.machine()))
    digest = hashlib.sha256(SOURCE.read_bytes() + made_of.encode()).hexdigest()[:12]
    return folder / f"kernels-{level}-{digest}.so"
