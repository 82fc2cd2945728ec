"""Check the scales from a calibration in a result: every scale that an engine looks up, and its value.

An engine accepts a missing scale silently, and computes with a value of its own.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.checkpoint.inventory import AMAXES, CONFIG
from nemotron_fp8.checkpoint.stated_quantization import last_name
from nemotron_fp8.errors import AmaxesFileError, CalibrationError, SourceError
from nemotron_fp8.planning.amaxes import parse_amaxes
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.kv_cache import CACHE_SCALES, has_cache_scales, why_unscaled
from nemotron_fp8.planning.layouts import execution_scales
from nemotron_fp8.planning.number_format import FLOAT32
from nemotron_fp8.planning.stacked_experts import single_experts
from nemotron_fp8.planning.stored_scales import one_input, stored_scales
from nemotron_fp8.planning.tasks import StoredScale
from nemotron_fp8.sources.files import OpenFiles
from nemotron_fp8.verification.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.verification.result_files import ResultFiles


class _Calibration(NamedTuple):
    """Amaxes in a result.

    Attributes:
        amaxes: the amaxes; None without a readable file.
        problems: problems of the file.
    """

    amaxes: Amaxes | None
    problems: tuple[Problem, ...] = ()


def _read_calibration(files: ResultFiles) -> _Calibration:
    """Read the amaxes in a result."""
    if AMAXES not in files.names():
        return _Calibration(None)
    try:
        data = files.read(AMAXES)
        amaxes = parse_amaxes(data, AMAXES)
    except AmaxesFileError as error:
        return _Calibration(None, (Problem(AMAXES, f"no usable amaxes: {error.problem}"),))
    except SourceError as error:
        return _Calibration(None, (Problem(AMAXES, str(error)),))
    if data != amaxes.render():
        return _Calibration(amaxes, (Problem(AMAXES, "not in the form in which a conversion writes it"),))
    return _Calibration(amaxes)


class StoredCheck(NamedTuple):
    """Outcome of the check of stored scales.

    Attributes:
        names: names of the scales that belong to the result.
        amaxes: amaxes of the calibration; None without one.
        problems: problems found.
    """

    names: frozenset[str]
    amaxes: Amaxes | None
    problems: tuple[Problem, ...] = ()


def _with_recorded_cache(recipe: Recipe, asked: Mapping[str, Any] | None, views: Mapping[str, TensorView]) -> Recipe:
    """Return a recipe with the FP8 cache of the manifest, in a layout whose config does not state it.

    Without a manifest, scales of the cache in the result tell.

    Args:
        recipe: recipe that the config describes.
        asked: recipe in the manifest; None without one.
        views: tensors of the result, by name.
    """
    choice = recipe.layout.choice("kv_cache", "fp8", recipe.granularity)
    if choice is None or choice.is_stated:
        return recipe
    has_cache = has_cache_scales(views) if asked is None else asked.get("kv_cache") == "fp8"
    return recipe.model_copy(update={"kv_cache": "fp8" if has_cache else "none"})


def check_stored_scales(
    files: ResultFiles,
    views: Mapping[str, TensorView],
    quantized: Sequence[str],
    recipe: Recipe,
    asked: Mapping[str, Any] | None,
    inventory: Inventory,
    threads: int,
) -> StoredCheck:
    """Check that a result has every scale from a calibration that engines look up, with the value of its amax.

    Args:
        files: files of the result.
        views: tensors of the result, by name.
        quantized: names of the FP8 tensors.
        recipe: recipe that the config describes.
        asked: recipe in the manifest; None without one.
        inventory: contents of the result, or of its source.
        threads: scales to read at a time.
    """
    config = inventory.config
    calibration, recipe = _read_calibration(files), _with_recorded_cache(recipe, asked, views)
    amaxes, layout = calibration.amaxes, recipe.layout.static
    problems = list(calibration.problems)
    is_static = recipe.activations == "static"
    uses_amaxes = is_static or recipe.kv_cache != "none"
    expected: dict[str, StoredScale] = {}
    known = amaxes is not None and uses_amaxes
    if amaxes is not None and not uses_amaxes:
        problems.append(Problem(AMAXES, "not a file that the recipe gives: nothing uses it"))
    if amaxes is not None and known:
        weights = {recipe.weight_format.scale_of(views[name]).name for name in quantized}
        plain = [view for view in views.values() if view.name not in weights]
        try:
            stacked = single_experts(inventory)
            expected = stored_scales(recipe, amaxes, plain, quantized, config, files.name, stacked).all
        except CalibrationError as error:
            problems.append(Problem(AMAXES, str(error)))
            known = False
    elif is_static and not calibration.problems:
        problems.append(Problem(AMAXES, "missing; the scales of activations are checked against it"))
    if is_static and not expected and layout is not None:
        outputs = (layout.input_scale_of(name) for name in quantized)
        expected = {each.name: StoredScale(each.name, each.shape, 0.0, True) for each in outputs}
    problems += _missing(expected, views)
    sound = [views[name] for name, scale in expected.items() if name in views and _is_right(views[name], scale)]
    problems += _wrong_values(files, sound, expected, known, config, threads)
    gives_cache = amaxes is not None and known and bool(amaxes.k) and not why_unscaled(config)
    problems += _others(views, expected, gives_cache, is_static)
    if not gives_cache:
        problems += _wrong_cache(files, views, threads)
    return StoredCheck(frozenset(expected), amaxes, tuple(problems))


def _is_right(view: TensorView, scale: StoredScale) -> bool:
    return (view.dtype, view.shape) == (scale.output.dtype, scale.shape)


def _missing(expected: Mapping[str, StoredScale], views: Mapping[str, TensorView]) -> Iterable[Problem]:
    """Yield a problem for each scale that is missing, or has another dtype or shape."""
    for name, scale in expected.items():
        view = views.get(name)
        if view is None:
            of = "a weight is FP8" if scale.of_codes else "keys and values are cached in FP8"
            yield Problem(name, f"missing: {of}, and engines compute with a scale of their own")
        elif not _is_right(view, scale):
            what = f"{view.dtype} {list(view.shape)}"
            yield Problem(name, f"{what}, must be {scale.output.dtype} {list(scale.shape)}")


def _wrong_values(
    files: ResultFiles,
    views: Sequence[TensorView],
    expected: Mapping[str, StoredScale],
    known: bool,
    config: Mapping[str, Any] | None,
    threads: int,
) -> Iterable[Problem]:
    """Yield a problem for each scale with a wrong value.

    Without amaxes, a value must be positive and finite, and that of all weights with one input.
    """
    values = _read(files, views, threads)
    if known:
        for name, value in values.items():
            wanted = expected[name].value
            if value != wanted:
                yield Problem(name, f"holds {value!r}, and the amax in {AMAXES} gives {wanted!r}")
        return
    family = family_of(config)
    groups: defaultdict[str, dict[float, str]] = defaultdict(dict)
    yield from _unusable(values)
    for name, value in values.items():
        if not _is_usable(value):
            continue
        groups[one_input(f"{name.removesuffix('input_scale')}weight", family)].setdefault(value, name)
    for found in groups.values():
        (first, one), *others = found.items()
        for value, name in others:
            yield Problem(name, f"holds {value!r}, and {one} holds {first!r}: engines take one scale for both")


def _wrong_cache(files: ResultFiles, views: Mapping[str, TensorView], threads: int) -> list[Problem]:
    """Return a problem for each scale of the KV cache that no amaxes give and that engines cannot use.

    Those of a quantized source are kept, also where it has one for keys or values alone.
    """
    cache = [view for name, view in views.items() if last_name(name) in CACHE_SCALES]
    single = [view for view in cache if view.dtype == FLOAT32.dtype and view.numel == 1]
    return _unusable(_read(files, single, threads))


def _is_usable(value: float) -> bool:
    return 0 < value < float("inf")


def _unusable(values: Mapping[str, float]) -> list[Problem]:
    """Return a problem for each scale that is not positive and finite."""
    wrong = {name: value for name, value in values.items() if not _is_usable(value)}
    return [Problem(name, f"holds {value}, must be positive and finite") for name, value in wrong.items()]


def _read(files: ResultFiles, views: Sequence[TensorView], threads: int) -> dict[str, float]:
    """Return the values of float32 tensors of one element, by name."""
    opened, found = OpenFiles(files.opener), dict[str, float]()

    def one(view: TensorView) -> None:
        (extent,) = view.extents  # a tensor with elements of a safetensors shard is one extent
        buffer = bytearray(view.nbytes)
        with opened.use(extent.file) as file:
            file.read_into(extent.offset, memoryview(buffer))
        (found[view.name],) = FLOAT32.unpack(buffer)

    try:
        parallel_for(max(1, min(threads, len(views))), views, one)
    finally:
        opened.close()
    return {view.name: found[view.name] for view in views}


def _others(
    views: Mapping[str, TensorView], expected: Mapping[str, StoredScale], gives_cache: bool, is_static: bool
) -> Iterable[Problem]:
    """Yield a problem for each scale of activations or of the cache that engines may read and no calibration gives.

    Scales of the cache may be those of a quantized source, unless the calibration gives such scales.
    """
    for name in views:
        last = last_name(name)
        if name in expected or last not in execution_scales():
            continue
        if last in CACHE_SCALES:
            if gives_cache:
                yield Problem(name, f"is a scale of the KV cache that {AMAXES} does not give")
        elif is_static or last == "input_scale":
            yield Problem(name, f"is a scale of activations that the quantization_config of {CONFIG} does not announce")
