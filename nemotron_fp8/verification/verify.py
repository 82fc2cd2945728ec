"""Verify a result against its source: every tensor, every byte, index and config.

FP8 tensors and dequantized tensors are derived from the source again and compared byte by byte, because an engine
accepts a missing or wrong scale silently.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._display import Part, display, one_line
from nemotron_fp8._progress_bar import progress_callback
from nemotron_fp8._utils import check_arguments, parse_bytes, usable_cores
from nemotron_fp8.checkpoint.dtypes import FLOAT8, QUANTIZABLE
from nemotron_fp8.checkpoint.inventory import (
    CARD,
    CONFIG,
    INDEX,
    MANIFEST,
    Inventory,
    load_config,
    make_shard,
    parse_index,
    read_index,
)
from nemotron_fp8.checkpoint.json_text import same_json
from nemotron_fp8.documents.model_card import stated_recipe
from nemotron_fp8.documents.render import render_documents
from nemotron_fp8.engines.devices import check_number_formats, check_numbers
from nemotron_fp8.errors import RecipeError, SourceError, excerpt, printable
from nemotron_fp8.events import logged
from nemotron_fp8.planning.encoded_source import encoded_source
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.kv_cache import has_cache_scales
from nemotron_fp8.planning.quantized_source import quantized_source
from nemotron_fp8.planning.recipe import Recipe, recipe_of
from nemotron_fp8.planning.stacked_experts import split_stacks
from nemotron_fp8.progress import StageProgress
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.verification.beside import check_beside
from nemotron_fp8.verification.problems import Pair, Problem
from nemotron_fp8.verification.recorded import read_record
from nemotron_fp8.verification.result_files import open_result
from nemotron_fp8.verification.second_reader import check_shards
from nemotron_fp8.verification.self_check import (
    check_alone,
    check_listed_modules,
    check_manifest,
    may_be_unquantized,
)
from nemotron_fp8.verification.small_files import Facts, check_small_files
from nemotron_fp8.verification.stored_scales import check_stored_scales
from nemotron_fp8.verification.swapped import refuse_swapped

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from nemotron_fp8.checkpoint.inventory import Shard
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.quantized_source import QuantizedSource
    from nemotron_fp8.planning.receipt import Recoded, TensorStats
    from nemotron_fp8.progress import Progress
    from nemotron_fp8.sources.base import Source
    from nemotron_fp8.verification.recorded import Recorded
    from nemotron_fp8.verification.result_files import ResultFiles


@dataclass(frozen=True, slots=True, repr=False)
class Verification:
    """Outcome of a verification.

    Attributes:
        problems: problems found.
        tensors: statistics of every FP8 tensor whose codes could be compared, in the order of the source.
        kept: number of unquantized tensors that equal the source's, byte for byte; without a source, of all tensors
            that are not FP8.
        quantized: number of FP8 tensors.
        plain: number of tensors of a dequantized result that equal codes times scales of the source.
        engines: engines for which every linear module was shown to be FP8 with a scale, or listed as unquantized under
            the name by which they look it up; empty if no config was checked, or the family is unknown.
    """

    problems: tuple[Problem, ...]
    tensors: tuple[TensorStats, ...]
    kept: int
    quantized: int
    plain: int = 0
    engines: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if no problem was found."""
        return not self.problems

    def __repr__(self) -> str:
        return one_line("Verification", "", [self._verdict, self._counts])

    def _repr_html_(self) -> str:
        figures = sorted((t for t in self.tensors if isfinite(t.sqnr_db)), key=lambda t: t.sqnr_db)
        errors = ""
        if figures:
            median, worst = figures[len(figures) // 2], figures[0]
            errors = f"median {median.sqnr_db:.2f} dB, worst {worst.sqnr_db:.2f} dB in {worst.name}"
        complete = f"complete for {', '.join(self.engines)}" if self.engines else "not proved for any engine"
        facts = [
            ("outcome", self._verdict),
            ("tensors", self._counts),
            ("signal to noise", errors),
            ("list of unquantized modules", complete if self.quantized else ""),
        ]
        problems = [(each.tensor, each.problem) for each in self.problems]
        return display("Verification", "", facts, [Part("Problems", problems, ("tensor or file", "problem"), (), True)])

    @property
    def _verdict(self) -> str:
        if self.ok:
            return "OK"
        first = f"{self.problems[0].tensor}: {self.problems[0].problem}"
        return first if len(self.problems) == 1 else f"{len(self.problems):,} problems, the first {first}"

    @property
    def _counts(self) -> str:
        made = f"{self.quantized:,} FP8 tensors"
        if self.plain:
            made = f"{self.plain:,} tensors equal code times scale"
        elif self.tensors:
            made = f"{len(self.tensors):,} FP8 tensors compared code by code"
        return f"{made}, {self.kept:,} others"


@dataclass(slots=True)
class _Findings:
    problems: list[Problem] = field(default_factory=list)

    def add(self, what: str, problem: str) -> None:
        self.problems.append(Problem(what, problem))


@logged("verify")
def verify_repo(
    source: str | os.PathLike[str] | None,
    destination: str | os.PathLike[str],
    max_memory: str | int = "256MiB",
    threads: int | None = None,
    shard_size: str | int | None = None,
    hub: HubOptions | None = None,
    progress: Callable[[Progress], None] | bool | None = None,
) -> Verification:
    """Verify a result against its manifest, and against its source if given.

    The safetensors library opens every shard of both as a second reader, whose names, dtypes, shapes and offsets must
    equal those of this package's own reader.

    Args:
        source: the checkpoint that was quantized, converted or dequantized; None to check the result alone: the SHA-256
            of every file in its manifest, scales, index and config.
        destination: the result: a folder, or ``hf://owner/name`` (``@revision``). The Hub records the SHA-256 of every
            shard, so without a source no shard is fetched; with one, all bytes are fetched by range and none is stored.
        max_memory: bytes that the working buffers may take.
        threads: worker threads; None for one per core of this process.
        shard_size: shard size of the result, if the source is a NeMo checkpoint.
        hub: options for reading from the Hub; the revision applies to the source.
        progress: called with the bytes checked, from any thread, also concurrently; ``stage`` is "digests"
            while files are hashed, then "values" while tensors are compared with the source. True for a bar of tqdm.

    Returns:
        Problems, and statistics of every FP8 tensor that was compared with the source.

    Raises:
        SourceError: the source cannot be read, or the destination does not exist. Errors inside the destination are
            reported as problems, not raised.
        HubError, AddressError: the Hub rejects a request or cannot be reached, or an address is malformed.
        BudgetError: the buffers of a tensor exceed ``max_memory``.
        RecipeError: an argument has an unsupported value, ``hub.revision`` is set for a source that has none, or
            source and destination are swapped.
    """
    from nemotron_fp8.hub.options import as_hub_options

    if source is not None:
        check_arguments(source=source)
    check_arguments(destination=destination, max_memory=max_memory, threads=threads, shard_size=shard_size)
    check_arguments(progress=progress)
    hub = as_hub_options(hub)
    budget, workers = parse_bytes(max_memory), threads or usable_cores()
    with progress_callback(progress, "verify") as callback:
        gauge = StageProgress(callback)
        if source is None:
            return _verify_alone(destination, hub, workers, gauge)
        found = _verify_with_source(source, destination, budget, workers, shard_size, hub, gauge)
    if found.problems:
        refuse_swapped(source, destination, found.problems, hub)
    return found


def _verify_with_source(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    budget: int,
    workers: int,
    shard_size: str | int | None,
    hub: HubOptions,
    gauge: StageProgress,
) -> Verification:
    findings = _Findings()
    opened = open_source(source, shard_size, hub)
    files = open_result(destination, hub)
    findings.problems += check_manifest(files, workers, required=False, gauge=gauge)
    shards = _read_result(files, opened.inventory, findings)
    findings.problems += check_shards(opened.inventory.shards, opened.opener, workers, "the source")
    findings.problems += check_shards(shards, files.opener, workers, "the result")
    views = {view.name: view for shard in shards for view in shard.views}
    record, before = read_record(files), None
    asked = record.asked if record.manifest else None
    is_plain = (asked or {}).get("task") == "dequantize"
    if not is_plain:
        before = quantized_source(opened.inventory)
        is_plain = before is not None and not any(map(_is_fp8, views.values()))
    if is_plain:
        return _verify_plain(opened, files, views, record, budget, workers, findings, gauge)
    inventory = _inventory(opened.inventory, before, views)
    # A result without FP8 must be recorded as unquantized in its manifest: otherwise it is another folder.
    dtypes = {view.name: view.dtype for view in inventory.views}
    plain = may_be_unquantized(asked) and all(
        view.dtype == dtypes.get(name, view.dtype) for name, view in views.items()
    )
    recipe, quantization = _read_config(files, inventory, plain, record.recipe or Recipe(), findings)
    recipe = _with_recorded_scales(recipe, record, files)
    coded = [view.name for view in inventory.views if _is_fp8(views.get(view.name))]
    stored = check_stored_scales(files, views, coded, recipe, asked, opened.inventory, workers)
    findings.problems += stored.problems
    pairs = _pairs(inventory, views, recipe, findings, before, stored.names)
    family = family_of(inventory.config)
    if any(pair.scale for pair in pairs):
        check_numbers(recipe.weight_format.numbers)
    engines: tuple[str, ...] = ()
    fp8 = frozenset(pair.source.name for pair in pairs if pair.scale)
    if quantization is not None:
        wrong, engines = check_listed_modules(
            inventory.views,
            fp8,
            recipe,
            family,
            quantization,
            asked,
            stored.names,
            exact=record.manifest is None or record.current,
        )
        findings.problems += _check_scheme(record, recipe)
        findings.problems += wrong
        findings.problems += check_beside(files, recipe.layout, quantization)

    left = budget - inventory.opener_bytes
    found = _compare(opened, files, pairs, family, record.recipe, left, workers, gauge)
    findings.problems += found.problems
    facts = Facts(
        fp8,
        found.stats,
        {shard.name: shard.size for shard in shards},
        not findings.problems,
        recipe,
        recoded=found.recoded,
        beside=frozenset(recipe.layout.beside(quantization) if quantization else ()),
        amaxes=stored.amaxes,
    )
    findings.problems += check_small_files(opened, files, record, facts, budget, workers)
    return Verification(tuple(findings.problems), found.stats, found.unquantized, len(fp8), found.plain, engines)


def _verify_alone(
    destination: str | os.PathLike[str], hub: HubOptions, workers: int, gauge: StageProgress
) -> Verification:
    """Verify a result without its source."""
    if hub.revision is not None:
        raise RecipeError(
            "revision (--revision) applies to a source only; write that of a result into its address: hf://...@REV"
        )
    files = open_result(destination, hub)
    wrong = check_manifest(files, workers, required=True, gauge=gauge)
    alone = check_alone(files, workers)
    return Verification((*wrong, *alone.problems), (), alone.unquantized, alone.quantized, engines=alone.engines)


class _Compared(NamedTuple):
    """Outcome of the comparison of all pairs."""

    stats: tuple[TensorStats, ...]
    unquantized: int
    plain: int
    recoded: Recoded
    problems: list[Problem]


def _compare(
    opened: Source,
    files: ResultFiles,
    pairs: list[Pair],
    family: Family,
    recorded: Recipe | None,
    budget: int,
    workers: int,
    gauge: StageProgress,
) -> _Compared:
    """Compare the values of all pairs; arguments as for `check_quantized_values`."""
    from nemotron_fp8.verification.quantized_values import check_quantized_values
    from nemotron_fp8.verification.recoded_values import check_recoded_values, in_order, sort_pairs

    made = sort_pairs(opened.opener, files.opener, pairs, family, recorded)
    stats, unquantized, different = check_quantized_values(
        opened.opener, files.opener, made.others, family, budget, workers, gauge, recorded
    )
    again = check_recoded_values(opened.opener, files.opener, made, workers, gauge)
    stats = in_order((pair.source.name for pair in pairs), stats, again.stats)
    return _Compared(stats, unquantized, again.plain, again.recoded, [*different, *again.problems])


def _inventory(inventory: Inventory, before: QuantizedSource | None, views: Mapping[str, TensorView]) -> Inventory:
    """Return the inventory of a source as the result has it: with single experts, and without its own quantization.

    Args:
        inventory: contents of the source.
        before: a quantized source; None for any other.
        views: tensors of the result, by name.
    """
    if before is not None:
        inventory = before.inventory
    inventory = split_stacks(inventory, lambda name: name in views, lambda _: False)
    if before is None:
        return inventory
    chosen = [view.name for view in inventory.views if _is_fp8(views.get(view.name))]
    return replace(inventory, config=before.config_for(chosen))


def _is_fp8(view: TensorView | None) -> bool:
    return view is not None and view.dtype in FLOAT8


def _verify_plain(
    opened: Source,
    files: ResultFiles,
    views: dict[str, TensorView],
    record: Recorded,
    budget: int,
    threads: int,
    findings: _Findings,
    gauge: StageProgress,
) -> Verification:
    """Verify a dequantized result."""
    from nemotron_fp8.planning.dequantize import DTYPES, plan_dequantize
    from nemotron_fp8.verification.dequantized_values import check_dequantized_values, dtype_of_result

    weights = encoded_source(opened.inventory).weights
    if not weights:
        findings.add(
            MANIFEST,
            "records a dequantized result, but the source has no FP8 tensor; pass the FP8 checkpoint as the source",
        )
        return Verification(tuple(findings.problems), (), 0, 0)
    dtype = record.asked.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        dtype = dtype_of_result(weights, views)
    plan = plan_dequantize(opened.inventory, dtype, budget, threads)
    check_number_formats(plan.shard_tasks)
    _check_plain_config(files, render_documents(plan, {}).get(CONFIG), findings)
    found = check_dequantized_values(opened.opener, files.opener, plan, views, budget, threads, gauge)
    facts = Facts(frozenset(), (), {}, not (findings.problems or found.problems), Recipe(), plan)
    problems = check_small_files(opened, files, record, facts, budget, threads)
    return Verification((*findings.problems, *found.problems, *problems), (), found.unquantized, 0, found.plain)


def _check_plain_config(files: ResultFiles, expected: bytes | None, findings: _Findings) -> None:
    """Check that config.json equals the source's without its quantization_config."""
    there = CONFIG in files.names()
    if expected is None or not there:
        if expected is not None or there:
            findings.add(CONFIG, "missing" if expected is not None else "not in the source")
        return
    try:
        config = load_config(files.read(CONFIG))
    except SourceError as error:
        findings.add(CONFIG, str(error))
        return
    if not same_json(config, load_config(expected)):
        findings.add(CONFIG, "differs from the source's in more than quantization_config, which is dropped")


def _with_recorded_scales(recipe: Recipe, record: Recorded, files: ResultFiles) -> Recipe:
    """Return a recipe with choice and rounding of scales in the manifest or, without one, in the card.

    No config states them. Versions that do not record a field had only one of its values.
    """
    stated = None
    if record.manifest is None and CARD in files.names():
        with suppress(SourceError):  # reported with the other small files
            stated = stated_recipe(files.read(CARD))
    for name, before in (("scales", "amax"), ("scale_rounding", "none")):
        value: object = getattr(recipe, name)
        if record.manifest is not None:
            value = record.asked.get(name, before)
        elif stated is not None:
            value = getattr(stated.recipe, name)
        with suppress(RecipeError):  # not a value of the field, or one that this layout does not have
            recipe = Recipe(**{**recipe.model_dump(), name: value})
    return recipe


def _check_scheme(record: Recorded, recipe: Recipe) -> list[Problem]:
    """Check that the config describes the layout that the manifest records."""
    recorded = record.recipe
    if recorded is None or recorded.on_disk == recipe.on_disk:
        return []
    theirs = ", ".join(recorded.on_disk)
    return [Problem(CONFIG, f"its quantization_config is not that of the recipe in {MANIFEST} ({theirs})")]


def _read_result(files: ResultFiles, inventory: Inventory, findings: _Findings) -> list[Shard]:
    """Read headers and index of a result, add a problem for each defect, and return the readable shards."""
    shards: list[Shard] = []
    home: dict[str, str] = {}
    names = files.names()
    for shard in inventory.shards:
        if shard.name not in names:
            findings.add(shard.name, "the shard is missing")
            continue
        try:
            header, size = files.header(shard.name)
        except SourceError as error:
            findings.add(shard.name, str(error))
            continue
        if header.metadata != shard.metadata:
            theirs, ours = excerpt(header.metadata), excerpt(shard.metadata)
            findings.add(shard.name, f"its metadata {theirs} is not the source's {ours}")
        shards.append(make_shard(shard.name, header, size))
        for view in shards[-1].views:
            if view.name in home:
                findings.add(view.name, f"is in two shards, {home[view.name]} and {shard.name}")
            home[view.name] = shard.name
    known = {shard.name for shard in inventory.shards}
    for name in names:
        if name.endswith(".safetensors") and name not in known:
            findings.add(name, "the source has no such shard")
    total = sum(view.nbytes for shard in shards for view in shard.views)
    _check_index(files, inventory, home, total, findings)
    return shards


def _check_index(
    files: ResultFiles, inventory: Inventory, home: dict[str, str], total: int, findings: _Findings
) -> None:
    """Check that the index places every tensor of the shards, and no other."""
    if INDEX not in files.names():
        if inventory.index_metadata is not None:
            findings.add(INDEX, "missing")
        return
    try:
        index = parse_index(files.read(INDEX))
        metadata, weight_map = read_index(index)
    except SourceError as error:
        findings.add(INDEX, str(error))
        return
    for key in sorted(index.keys() ^ {"metadata", "weight_map"}):
        findings.add(INDEX, f"{printable(key)} is {'missing' if key not in index else 'no key of an index'}")
    for tensor, shard in weight_map.items():
        if tensor not in home:
            findings.add(tensor, f"is in {INDEX}, but in no shard")
        elif home[tensor] != shard:
            findings.add(tensor, f"{INDEX} places it in {printable(shard)}, but it is in {home[tensor]}")
    for tensor in home.keys() - weight_map.keys():
        findings.add(tensor, f"is in {home[tensor]}, but not in {INDEX}")
    if not same_json(metadata.get("total_size"), total):
        findings.add(INDEX, f"total_size is {excerpt(metadata.get('total_size'))}, the tensors have {total} bytes")
    wanted = {**(inventory.index_metadata or {}), "total_size": total}
    for key in sorted(key for key in {*metadata, *wanted} if key != "total_size"):
        if key not in metadata or key not in wanted or not same_json(metadata[key], wanted[key]):
            findings.add(INDEX, f"its metadata differs from the source's in {printable(key)}")


def _pairs(
    inventory: Inventory,
    views: dict[str, TensorView],
    recipe: Recipe,
    findings: _Findings,
    quantized_before: QuantizedSource | None = None,
    stored: frozenset[str] = frozenset(),
) -> list[Pair]:
    """Find the counterpart of every tensor of the source; add problems for missing, misshapen and extra tensors.

    ``stored`` are the names of scales from a calibration, which replace those of the KV cache in the source.
    """
    dropped = quantized_before.dropped if quantized_before is not None else frozenset[str]()
    if has_cache_scales(stored):
        dropped |= {view.name for view in inventory.views if has_cache_scales([view.name])}
    pairs, used, weight_format = [], set(stored), recipe.weight_format
    for view in inventory.views:
        if view.name in dropped:
            continue
        result = views.get(view.name)
        plain = view.dtype if view.encoding is None or quantized_before is None else quantized_before.dtype
        if result is None:
            findings.add(view.name, "missing")
            continue
        used.add(view.name)
        if result.shape != view.shape:
            findings.add(view.name, f"shape {list(result.shape)}, in the source {list(view.shape)}")
        elif result.dtype == plain:
            pairs.append(Pair(view, result, None))
        elif result.dtype != weight_format.numbers.element.dtype or view.dtype not in QUANTIZABLE:
            expected = f"in the source {plain}" if view.encoding is None else f"must be FP8 or {plain}"
            findings.add(view.name, f"dtype {result.dtype}, {expected}")
        elif len(view.shape) < 2:
            findings.add(view.name, f"is FP8 of shape {list(view.shape)}; engines load matrices only")
        else:
            wanted = weight_format.scale_of(view)
            scale = views.get(wanted.name)
            used.add(wanted.name)
            if scale is None:
                findings.add(view.name, f"is FP8, but its scale {wanted.name} is missing")
            elif (scale.dtype, scale.shape) != (wanted.dtype, wanted.shape):
                found = f"{scale.dtype} {list(scale.shape)}"
                findings.add(wanted.name, f"{found}, must be {wanted.dtype} {list(wanted.shape)}")
            else:
                pairs.append(Pair(view, result, scale, weight_format.numbers))
    for name in views.keys() - used:
        findings.add(name, "is neither in the source nor the scale of an FP8 tensor")
    return pairs


def _read_config(
    files: ResultFiles, inventory: Inventory, plain: bool, recorded: Recipe, findings: _Findings
) -> tuple[Recipe, dict[str, Any] | None]:
    """Return the layout that config.json describes, and its ``quantization_config``; None without one.

    A result without FP8 tensors (``plain``) needs no ``quantization_config``. Without a config, the layout is the
    recorded one.
    """
    if CONFIG not in files.names():
        if inventory.config is not None:
            findings.add(CONFIG, "missing")
        return recorded, None
    try:
        config = load_config(files.read(CONFIG))
    except SourceError as error:
        findings.add(CONFIG, str(error))
        return Recipe(), None
    quantization = config.pop("quantization_config", None)
    if inventory.config is None or not same_json(config, dict(inventory.config)):
        findings.add(CONFIG, "differs from the source's in more than quantization_config")
    if quantization is None and plain:
        return Recipe(), None
    if quantization is None:
        findings.add(CONFIG, f"has no quantization_config, and no {MANIFEST} records an unquantized result")
        return Recipe(), None
    recipe = recipe_of(quantization)
    if recipe is None or not isinstance(quantization, dict):
        findings.add(CONFIG, "its quantization_config describes no layout that this version writes")
        return Recipe(), None
    if not recipe.layout.describes(quantization, recipe.scheme):
        findings.add(CONFIG, "its quantization_config has keys or values that engines would misread")
    return recipe, quantization
