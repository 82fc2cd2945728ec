"""Compiled kernels of the CPU path, called by ctypes; the bytes are those of the reference.

The build of the package compiles ``kernels.c``. Without a library for this machine, `load` returns None, and the CPU
path uses torch. ctypes releases the interpreter lock during a call.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..error_sums import ErrorSums
from ..errors import NoDataError
from . import libraries

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ..formats import ScaleRounding

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Numbers of the dtypes in ``kernels.c``."""

RULES: dict[ScaleRounding, int] = {"none": 0, "power-of-two": 1, "mx": 2}
"""Numbers of the roundings of scales in ``kernels.c``."""

SWITCH = "NEMOTRON_FP8_NATIVE"
"""Environment variable: ``0`` to use torch only, ``any`` for the library without AVX2."""


class RowSums:
    """Error sums of rows as ``kernels.c`` stores them.

    Args:
        rows: number of rows.

    Attributes:
        sums: float64 ``[rows, 3]``: sums of squares of values and of errors, largest square of an error.
        counts: int64 ``[rows, 2]``: values that the clamp changed, nonzero values that became 0.
    """

    def __init__(self, rows: int) -> None:
        self.sums = torch.empty(rows, 3, dtype=torch.float64)
        self.counts = torch.empty(rows, 2, dtype=torch.int64)

    def pointers(self) -> tuple[int, int]:
        """Return the addresses of both arrays."""
        return self.sums.data_ptr(), self.counts.data_ptr()

    def error_sums(self) -> ErrorSums:
        """Return the sums in their own type."""
        sums, counts = self.sums, self.counts
        return ErrorSums(sums[:, 0], sums[:, 1], sums[:, 2].sqrt(), counts[:, 0], counts[:, 1])


class Native:
    """Functions of a library. Matrices have dense rows; every argument is checked by the caller.

    A grid is ``(height, width, across)``: rows and columns under one scale, and scales in a row.

    Args:
        path: the library.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        matrix = [ctypes.c_int, pointer, size, size, size, size, size, size]

        def function(name: str, *types: object) -> Callable[..., None]:
            found = getattr(library, name)
            found.argtypes, found.restype = types, None
            return found  # type: ignore[no-any-return]  # ctypes does not describe its functions

        self.path = path
        self._amax = function("fp8_amax", *matrix, pointer)
        self._best_amax = function("fp8_best_amax", ctypes.c_int, pointer, size, size, size, pointer)
        self._cast = function("fp8_cast", *matrix, ctypes.c_int, pointer, pointer, size)
        self._measure = function("fp8_measure", *matrix, ctypes.c_int, pointer, pointer, size, pointer, pointer)
        self._quantize = function("fp8_quantize", *matrix, ctypes.c_int, pointer, pointer, size, pointer, pointer)
        self._decode = function("fp8_decode", *matrix, pointer, pointer, size)
        self._scales = function("fp8_scales", ctypes.c_int, pointer, size, pointer)
        self._look_up = function("fp8_look_up", pointer, size, pointer, pointer)

    def amax(self, w: torch.Tensor, grid: tuple[int, int, int], bits: torch.Tensor) -> None:
        """Raise ``bits`` (int32, contiguous) to the amaxes of a matrix."""
        self._amax(*_matrix(w, grid), _address(bits))

    def best_amax(self, w: torch.Tensor, bits: torch.Tensor) -> None:
        """Store the candidates of the rows of a matrix with the least error in ``bits`` (int32, contiguous)."""
        self._best_amax(DTYPES[w.dtype], _address(w), *w.shape, w.stride(0), _address(bits))

    def cast(
        self,
        w: torch.Tensor,
        grid: tuple[int, int, int],
        rounding: ScaleRounding,
        bits: torch.Tensor,
        q: torch.Tensor,
    ) -> None:
        """Cast a matrix to codes ``q`` with known amaxes ``bits`` (int32, contiguous)."""
        self._cast(*_matrix(w, grid), RULES[rounding], *_of(bits, q))

    def measure(
        self,
        w: torch.Tensor,
        grid: tuple[int, int, int],
        rounding: ScaleRounding,
        bits: torch.Tensor,
        q: torch.Tensor,
        sums: RowSums,
    ) -> None:
        """Cast a matrix as `cast` does, and store the error sums of its rows."""
        self._measure(*_matrix(w, grid), RULES[rounding], *_of(bits, q), *sums.pointers())

    def quantize(
        self,
        w: torch.Tensor,
        grid: tuple[int, int, int],
        rounding: ScaleRounding,
        bits: torch.Tensor,
        q: torch.Tensor,
        sums: RowSums | None = None,
    ) -> None:
        """Cast a matrix with its own amaxes; ``bits`` (int32, contiguous, zeros) receives them, ``sums`` the errors."""
        pointers = (None, None) if sums is None else sums.pointers()
        self._quantize(*_matrix(w, grid), RULES[rounding], *_of(bits, q), *pointers)

    def decode(self, q: torch.Tensor, grid: tuple[int, int, int], scale: torch.Tensor, w: torch.Tensor) -> None:
        """Dequantize a matrix of codes to ``w``; ``scale`` is float32 and contiguous."""
        factors = _address(scale)
        self._decode(DTYPES[w.dtype], _address(q), *q.shape, q.stride(0), *grid, factors, _address(w), w.stride(0))

    def scales(self, bits: torch.Tensor, scale: torch.Tensor, rounding: ScaleRounding) -> None:
        """Store the scales of amaxes ``bits`` (int32, contiguous) in ``scale`` (float32, of the same shape)."""
        self._scales(RULES[rounding], _address(bits), bits.numel(), _address(scale))

    def look_up(self, w: torch.Tensor, table: torch.Tensor, q: torch.Tensor) -> None:
        """Replace each element of a contiguous 16-bit ``w`` by its code in a table of 65,536."""
        self._look_up(_address(w), w.numel(), table.data_ptr(), q.data_ptr())


def _address(tensor: torch.Tensor) -> int:
    """Return the address of the elements of a tensor.

    Raises:
        NoDataError: the tensor has elements, but no memory.
    """
    found = tensor.data_ptr()
    if not found and tensor.numel():
        raise NoDataError
    return found


def _matrix(w: torch.Tensor, grid: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the arguments that describe a matrix and its grid."""
    return (DTYPES[w.dtype], _address(w), *w.shape, w.stride(0), *grid)


def _of(bits: torch.Tensor, q: torch.Tensor) -> tuple[int, int, int]:
    """Return addresses of amaxes and codes, and the stride of the codes."""
    return _address(bits), _address(q), q.stride(0)


@cache
def load() -> Native | None:
    """Return the compiled kernels for this processor; None if there are none."""
    switch = os.environ.get(SWITCH, "")
    if switch == "0":
        return None
    for level in libraries.levels():
        if level == "avx2" and (switch == "any" or not torch.backends.cpu.get_cpu_capability().startswith("AVX")):
            continue
        path = libraries.library(level)
        if path.is_file():
            try:
                return Native(path)
            except (OSError, AttributeError) as error:  # damaged, or on a file system that allows no programs
                warnings.warn(f"the CPU kernels cannot be loaded, torch computes instead: {error}", stacklevel=2)
    return None
