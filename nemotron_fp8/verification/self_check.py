"""Check a result without its source: the manifest against the files, index and config against the shards."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.checkpoint.inventory import CARD, CONFIG, MANIFEST
from nemotron_fp8.checkpoint.stated_quantization import stated
from nemotron_fp8.documents.evaluation_section import split_evaluation
from nemotron_fp8.errors import MalformedManifestError, SourceError, excerpt
from nemotron_fp8.planning.engine_support import unread_choices
from nemotron_fp8.planning.families import DEFAULT_FAMILY, family_of, without_aliases
from nemotron_fp8.planning.layouts import quantized_dtypes, scale_suffixes
from nemotron_fp8.planning.module_lists import is_written_form
from nemotron_fp8.planning.recipe import Recipe, recipe_of
from nemotron_fp8.planning.selection import linear_modules
from nemotron_fp8.sources.files import OpenFiles
from nemotron_fp8.verification.beside import check_beside
from nemotron_fp8.verification.problems import Problem
from nemotron_fp8.verification.second_reader import check_shards
from nemotron_fp8.verification.small_files import unexpected
from nemotron_fp8.verification.stored_scales import check_stored_scales

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.local_files import FileDigest
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.number_format import ScaleType
    from nemotron_fp8.progress import StageProgress
    from nemotron_fp8.verification.result_files import ResultFiles


READ_BYTES = 1 << 22
"""Bytes of scales that are read at a time."""
ONLY_THE_SOURCE = "compare the result with its source (nemotron-fp8 verify SRC DST)"


def asked_of(files: ResultFiles) -> Mapping[str, Any] | None:
    """Return `Plan.asked` as the manifest of a result records it; None without a manifest."""
    try:
        manifest = files.manifest()
    except MalformedManifestError:  # reported by `check_manifest`
        return None
    return manifest.recipe if manifest else None


def must_be_unquantized(asked: Mapping[str, Any] | None) -> bool:
    """Return True if the result may contain no FP8 tensor: it was converted or dequantized."""
    return (asked or {}).get("task") in ("convert", "dequantize")


def may_be_unquantized(asked: Mapping[str, Any] | None) -> bool:
    """Return True if the result needs no FP8 tensor: it was converted, or non-finite tensors were kept."""
    return must_be_unquantized(asked) or (asked or {}).get("nonfinite") == "keep"


def check_manifest(files: ResultFiles, threads: int, *, required: bool, gauge: StageProgress) -> list[Problem]:
    """Compare every file of a result with its manifest.

    Args:
        files: files of the result.
        threads: files to hash at a time.
        required: report a missing manifest as a problem.
        gauge: tracks the progress.
    """
    try:
        manifest = files.manifest()
    except MalformedManifestError as error:
        return [Problem(MANIFEST, str(error))]
    if manifest is None:
        return [Problem(MANIFEST, f"missing; {ONLY_THE_SOURCE}")] if required else []
    advance = gauge.stage("digests", sum(file.size for file in manifest.files.values()))
    different = files.differing(manifest.files, threads, advance)
    if CARD in different and _is_half_carded(files, manifest.files[CARD]):
        different[CARD] += "; without its section Evaluation it matches: run the command card again"
    problems = [Problem(*item) for item in different.items()]
    added = unexpected(files, {MANIFEST, *manifest.files})
    problems += [Problem(name, f"not in {MANIFEST}: added after the conversion") for name in added]
    if required and not manifest.has_digests:
        problems.append(Problem(MANIFEST, f"holds no digests; {ONLY_THE_SOURCE}"))
    return problems


def _is_half_carded(files: ResultFiles, recorded: FileDigest) -> bool:
    """Return True if a card was interrupted between its section and the manifest."""
    try:
        card, lines = split_evaluation(files.read(CARD))
    except SourceError:
        return False
    return lines is not None and hashlib.sha256(card).hexdigest() == recorded.sha256


class Alone(NamedTuple):
    """Outcome of checking a result without its source.

    Attributes:
        problems: problems found.
        quantized: number of FP8 tensors.
        unquantized: number of other tensors without scales.
        engines: engines for which the lists of unquantized modules were proved.
    """

    problems: list[Problem]
    quantized: int = 0
    unquantized: int = 0
    engines: tuple[str, ...] = ()


def check_alone(files: ResultFiles, threads: int = 1) -> Alone:
    """Check a result without its source; the manifest records whether it must have FP8 tensors.

    Args:
        files: files of the result.
        threads: shards and scales to read at a time.
    """
    try:
        inventory = files.inventory()
    except SourceError as error:
        return Alone([Problem(str(getattr(error, "shard", files.name)), str(error))])
    problems = check_shards(inventory.shards, files.opener, threads, "the result")
    problems += _check_statements(inventory)
    views = {view.name: view for view in inventory.views}
    asked = asked_of(files)
    quantization = inventory.quantization_config
    dtypes = quantized_dtypes(quantization)
    quantized = [name for name, view in views.items() if view.dtype in dtypes]
    if must_be_unquantized(asked):
        problems += [Problem(name, f"is FP8, but {MANIFEST} records an unquantized result") for name in quantized]
        scales = [name for name in views if name.endswith(_scale_names())]
        problems += [Problem(name, f"is a scale, but {MANIFEST} records an unquantized result") for name in scales]
        if quantization is not None:
            problems.append(Problem(CONFIG, f"has a quantization_config, but {MANIFEST} records an unquantized result"))
        return Alone(problems, len(quantized), len(views) - len(quantized))
    # A missing manifest is reported by `check_manifest`; without it, an unquantized folder is no contradiction.
    if not quantized and quantization is None and (asked is None or may_be_unquantized(asked)):
        return Alone(problems, 0, len(views))
    recipe = recipe_of(quantization)
    engines: tuple[str, ...] = ()
    wrong, scaled = _check_scales(files, views, quantized, recipe or Recipe(), threads)
    problems += wrong
    stored = check_stored_scales(files, views, quantized, recipe or Recipe(), asked, inventory, threads)
    problems += stored.problems
    if not quantized:
        problems.append(Problem(files.name, "holds no FP8 tensor"))
    if inventory.config is not None:
        if recipe is None:
            what = "its quantization_config describes no layout that this version writes"
            problems.append(Problem(CONFIG, what))
        else:
            plain = (view for name, view in views.items() if name not in scaled and name not in stored.names)
            fp8, family = frozenset(scaled.values()), family_of(inventory.config)
            described = quantization if isinstance(quantization, dict) else {}
            wrong, engines = check_listed_modules(plain, fp8, recipe, family, described, asked, stored.names)
            problems += wrong
            problems += check_beside(files, recipe.layout, described)
    others = views.keys() - scaled.keys() - stored.names
    return Alone(problems, len(scaled), len(others) - len(scaled), engines)


def _check_statements(inventory: Inventory) -> list[Problem]:
    """Check that config.json states no quantization but in its ``quantization_config``: engines read others, too."""
    places = [place for place, _ in stated(inventory.config) if place != "quantization_config"]
    return [Problem(CONFIG, f"states a second quantization in {place}, which engines may read") for place in places]


def _check_scales(
    files: ResultFiles, views: Mapping[str, TensorView], quantized: Iterable[str], recipe: Recipe, threads: int
) -> tuple[list[Problem], dict[str, str]]:
    """Check names, dtypes and shapes of scales; return problems, and the FP8 tensor by the name of its scale."""
    scales: dict[str, str] = {}
    problems: list[Problem] = []
    sound: list[TensorView] = []
    weight_format, suffixes = recipe.weight_format, _scale_names()
    for name in quantized:
        wanted = weight_format.scale_of(views[name])
        scale = views.get(wanted.name)
        scales[wanted.name] = name
        if len(views[name].shape) < 2:
            problems.append(Problem(name, f"is FP8 of shape {list(views[name].shape)}; engines load matrices only"))
        if scale is None:
            problems.append(Problem(name, f"is FP8, but its scale {wanted.name} is missing"))
        elif scale.shape != wanted.shape:
            problems.append(Problem(scale.name, f"shape {list(scale.shape)}, must be {list(wanted.shape)}"))
        elif scale.dtype != wanted.dtype:
            problems.append(Problem(scale.name, f"{scale.dtype}, must be {wanted.dtype}"))
        else:
            sound.append(scale)
    problems += _wrong_scales(files, sound, weight_format.numbers.scale, threads)
    problems += [
        Problem(n, "is a scale without an FP8 tensor") for n in views if n.endswith(suffixes) and n not in scales
    ]
    return problems, scales


def _scale_names() -> tuple[str, ...]:
    """Return the endings of the names of scale tensors."""
    return tuple(f".weight{suffix}" for suffix in scale_suffixes())


def _wrong_scales(
    files: ResultFiles, scales: Sequence[TensorView], scale_type: ScaleType, threads: int
) -> list[Problem]:
    """Check the values of scales: an engine accepts any value silently."""
    opened = OpenFiles(files.opener)
    wrong: dict[str, str] = {}

    def one(scale: TensorView) -> None:
        for begin in range(0, scale.nbytes, READ_BYTES):
            (extent,) = scale.extents  # a tensor with elements of a safetensors shard is one extent
            buffer = bytearray(min(READ_BYTES, scale.nbytes - begin))
            with opened.use(extent.file) as file:
                file.read_into(extent.offset + begin, memoryview(buffer))
            # A byte is a scale by itself: 256 of them at most differ.
            for value in scale_type.unpack(bytes(sorted(set(buffer))) if scale.itemsize == 1 else buffer):
                if not (math.isfinite(value) and value > 0):
                    wrong[scale.name] = f"holds {value}, must be positive and finite"
                    return

    try:
        parallel_for(max(1, min(threads, len(scales))), scales, one)
    finally:
        opened.close()
    return [Problem(scale.name, wrong[scale.name]) for scale in scales if scale.name in wrong]


MAX_ENTRY, MAX_OTHERS = 1000, 500
"""Longest entry, in characters, and most entries of a list that this version would not write; others are not matched:
the time grows with modules times entries, and the list may be a stranger's."""


def _check_list_keys(
    wanted: Mapping[str, Any], found: Mapping[str, Any], *, exact: bool, older: bool
) -> tuple[list[Problem], dict[str, list[str]]]:
    """Check that the config has the lists that its layout has, each a list of texts, and empty only where it may be.

    Engines, and versions of one engine, differ in the key that they read first and in what an empty list means.

    Args:
        wanted: lists that this version writes, by key.
        found: lists of the config, by key.
        exact: report every entry that this version would not write.
        older: the result is of a version with other lists.

    Returns:
        Problems, and the lists of texts to match with the names of modules, within the limits.
    """
    problems, lists = [], {}
    for key in dict.fromkeys((*wanted, *found)):
        entries, what = found.get(key), ""
        if (key in wanted) != (key in found):
            what = "missing" if key in wanted else "not a list of this layout, and engines may read it"
        elif type(entries) is not list or not all(type(name) is str for name in entries):
            what = f"{excerpt(entries)}, not a list of names"
        elif bool(wanted[key]) != bool(entries):
            what = "empty" if wanted[key] else "not empty, although every linear module is FP8"
        if what and not older:
            problems.append(Problem(CONFIG, f"quantization_config: {key} is {what}"))
        if type(entries) is not list:
            continue
        names = list(dict.fromkeys(name for name in entries if type(name) is str))
        written = set(wanted.get(key, ()))
        others = [name for name in names if name not in written]
        if len(others) > MAX_OTHERS or any(len(name) > MAX_ENTRY for name in others):
            problems.append(
                Problem(CONFIG, f"quantization_config: {key} has {len(others):,} entries that no conversion writes")
            )
            others = [name for name in others[:MAX_OTHERS] if len(name) <= MAX_ENTRY]
        elif exact and not what:
            problems += [Problem(name, f"is in {key} of {CONFIG}, where no conversion puts it") for name in others]
        kept = written.union(others)
        lists[key] = [name for name in names if name in kept]
    return problems, lists


def _check_patterns(recipe: Recipe, quantization: Mapping[str, Any]) -> list[Problem]:
    """Report patterns of a form that this library never writes: they may be a stranger's, and are not run."""
    problems = []
    for reader in recipe.layout.readers_of_lists(recipe.scheme):
        for entry in reader.read(quantization).entries:
            if not is_written_form(entry, reader.matches):
                what = f"is in the unquantized modules of {CONFIG}, and no name or pattern that this library writes"
                problems.append(Problem(entry, f"{what}; {' and '.join(reader.engines)} may match it with anything"))
    return problems


def check_listed_modules(
    views: Iterable[TensorView],
    quantized: frozenset[str],
    recipe: Recipe,
    family: Family,
    quantization: Mapping[str, Any],
    asked: Mapping[str, Any] | None,
    stored: frozenset[str] = frozenset(),
    *,
    exact: bool = False,
) -> tuple[list[Problem], tuple[str, ...]]:
    """Prove that each engine finds every unquantized linear module in its list, and no FP8 module.

    An engine expects FP8 of every module that its list does not match, and reads the codes of an FP8 module that its
    list matches as weights.

    Args:
        views: tensors of the source, or of the result without its scales.
        quantized: names of the FP8 tensors.
        recipe: recipe with the layout of the result.
        family: model family.
        quantization: ``quantization_config`` of the result.
        asked: recipe in the manifest; None without a manifest. Versions without ``also_select`` listed modules under
            their names in the checkpoint only.
        stored: names of the scales from a calibration.
        exact: report every entry that a conversion by this version would not write.

    Returns:
        Problems, and the engines for which the proof holds; none for an unknown family.
    """
    older = asked is not None and "also_select" not in asked
    views, known = list(views), family is not DEFAULT_FAMILY
    if older:
        family = without_aliases(family)
        views = [view for view in views if len(view.shape) != 3 or family.stack.search(view.name)]
    present = {view.name for view in views}
    tied = {name for name in family.tied_heads if f"{name}.weight" not in present}
    modules = linear_modules(views, quantized, family, aliases=not older)
    problems: list[Problem] = []
    proved: list[str] = []
    fp8 = sorted(modules.quantized)
    unread = unread_choices(recipe, (*present, *stored))
    layout = recipe.layout
    wanted = layout.unquantized_entries(layout.config(recipe.scheme, modules))
    wrong_lists, lists = _check_list_keys(wanted, layout.unquantized_entries(quantization), exact=exact, older=older)
    quantization = {**quantization, **lists}
    problems += wrong_lists
    problems += _check_patterns(recipe, quantization)
    for reader in recipe.layout.readers_of_lists(recipe.scheme):
        listed, engines = reader.read(quantization), " and ".join(reader.engines)
        needed = modules.unquantized
        if "transformers" not in reader.engines:  # the others do not look up an output layer without a tensor
            needed = tuple(name for name in needed if name not in tied)
        missing = [name for name in needed if not listed.covers(name)]
        wrong = listed.matching(modules.quantized)
        problems += [
            Problem(name, f"is unquantized, but {CONFIG} does not list it: {engines} would expect FP8")
            for name in missing
        ]
        problems += [
            Problem(
                entry,
                f"is in the unquantized modules of {CONFIG}, but matches {listed.match_of(entry, fp8)}, which is FP8:"
                f" {engines} would not scale it",
            )
            for entry in wrong
        ]
        if not missing and not wrong:
            proved += [engine for engine in reader.engines if engine not in unread]
    return problems, tuple(proved) if known and not older else ()
