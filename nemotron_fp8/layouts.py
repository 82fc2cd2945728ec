"""What engines want on disk for a quantised weight: names, dtypes and shapes of it and of its scales.

Source: vLLM's ``Fp8Config`` and the published Nemotron-4-340B-Instruct-FP8 checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.dtypes import FP8

if TYPE_CHECKING:
    from nemotron_fp8.recipe import Recipe
    from nemotron_fp8.view import TensorView


class Output(NamedTuple):
    """One tensor of an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def scale_of(view: TensorView, recipe: Recipe) -> Output:
    """Return name, dtype and shape of the scale of a quantised weight ``[N, K]``.

    Per tensor it is ``<name>_scale``, float32 ``[]``: what a code is multiplied by.
    """
    del recipe  # one layout so far
    return Output(f"{view.name}_scale", "F32", ())


def outputs(view: TensorView, quantised: bool, recipe: Recipe) -> tuple[Output, ...]:
    """Return what stands in the output for one tensor of the input."""
    if not quantised:
        return (Output(view.name, view.dtype, view.shape),)
    return (Output(view.name, FP8, view.shape), scale_of(view, recipe))
